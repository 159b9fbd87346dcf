//! The ICE engine's options: the text that people write.

use super::faults::{DurationText, Faults, parse_duration};
use super::{HwkmVersion, regs};
use crate::spec::Options;
use crate::verify::Sample;
use inlinecrypt_cipher::kdf::KdfVariant;
use inlinecrypt_core::caps::UnitMask;
use inlinecrypt_core::error::Error;
use std::fmt;
use std::time::Duration;

/// Which hardware, and which firmware on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IceVariant {
    /// ICE 3.1.0: no key manager. Raw keys only.
    Raw,
    /// ICE 3.2.0 with HWKM v1: raw or wrapped keys, decided once per start.
    HwkmV1,
    /// ICE 3.2.1 with HWKM v2: raw or wrapped keys, decided once per start.
    HwkmV2,
    /// ICE 4.0.0 with HWKM v2 and firmware that takes both, as announced for later chips. No public driver for it exists.
    Next,
}

impl IceVariant {
    /// Every variant.
    pub const ALL: [Self; 4] = [Self::Raw, Self::HwkmV1, Self::HwkmV2, Self::Next];

    /// The name in a spec.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::HwkmV1 => "hwkm-v1",
            Self::HwkmV2 => "hwkm-v2",
            Self::Next => "next",
        }
    }

    /// The engine's name with the variant.
    pub(crate) const fn full_name(self) -> &'static str {
        match self {
            Self::Raw => "ice:raw",
            Self::HwkmV1 => "ice:hwkm-v1",
            Self::HwkmV2 => "ice:hwkm-v2",
            Self::Next => "ice:next",
        }
    }

    pub(crate) const fn version(self) -> regs::Version {
        match self {
            Self::Raw => regs::Version::new(3, 1, 0),
            Self::HwkmV1 => regs::Version::new(3, 2, 0),
            Self::HwkmV2 => regs::Version::new(3, 2, 1),
            Self::Next => regs::Version::new(4, 0, 0),
        }
    }

    pub(crate) const fn hwkm(self) -> Option<HwkmVersion> {
        match self {
            Self::Raw => None,
            Self::HwkmV1 => Some(HwkmVersion::V1),
            Self::HwkmV2 | Self::Next => Some(HwkmVersion::V2),
        }
    }
}

/// Options of the [ICE engine](crate::ice).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IceSpec {
    /// Hardware and firmware. Stands first, without a name.
    pub variant: IceVariant,
    /// How many keyslots, 1 to 256. Option `slots`.
    pub keyslots: u32,
    /// Bytes of a DUN: 8 (UFS) or 4 (eMMC). Option `dun`.
    pub dun_bytes: u8,
    /// Data unit sizes, in 512s: `sdus_mask` of the capability. Option `units`, sizes in bytes joined by `+`.
    pub unit_mask: u8,
    /// How long a program takes. Option `program-latency`. Zero unless asked for: no public source states it.
    pub program_latency: Duration,
    /// How inline encryption keys and software secrets are derived. Option `kdf`.
    pub kdf: KdfVariant,
    /// What goes wrong on purpose. Option `faults`.
    pub faults: Faults,
    /// Seed of the faults' dice. Option `seed`.
    pub seed: u64,
    /// Which share of what passes is compared with software. Option `verify`.
    pub verify: Option<Sample>,
}

impl IceSpec {
    /// The engine's name.
    pub const NAME: &str = "ice";
    /// What shipped ICE has (OP-TEE `core/pta/qcom/ice`).
    pub const KEYSLOTS_DEFAULT: u32 = 32;
    /// What CFGC can say (UFSHCI: eight bits, minus one).
    pub const KEYSLOTS_MAX: u32 = 256;
    /// What can be written.
    pub const HELP: &str = "ice:raw|hwkm-v1|hwkm-v2|next[,OPTION,...], options slots=1..256, dun=8|4, units=512+...+65536, \
        program-latency=TIME, kdf=v1|legacykdf|rearranged, faults=FAULT+..., seed=N and verify=N|all";

    /// A healthy engine of this variant.
    #[must_use]
    pub fn new(variant: IceVariant) -> Self {
        Self {
            variant,
            keyslots: Self::KEYSLOTS_DEFAULT,
            dun_bytes: 8,
            unit_mask: 0xff,
            program_latency: Duration::ZERO,
            kdf: KdfVariant::default(),
            faults: Faults::default(),
            seed: 0,
            verify: None,
        }
    }

    /// The sizes of data units that it serves.
    pub(crate) fn units(&self) -> UnitMask {
        UnitMask::from_bits(u32::from(self.unit_mask) * 512)
    }

    pub(crate) fn parse(options: &Options<'_>) -> Result<Self, Error> {
        let known = || IceVariant::ALL.map(IceVariant::name).join(", ");
        let (name, options) = options.split_first();
        let variant =
            IceVariant::ALL.into_iter().find(|variant| variant.name() == name).ok_or_else(|| {
                options.error(format!("no ICE variant {name:?}; the variants are: {}", known()))
            })?;
        let mut spec = Self::new(variant);
        let mut seen: Vec<&str> = Vec::new();
        for option in options.iter() {
            let (name, value) = option?;
            if seen.contains(&name) {
                return Err(options.error(format!("option {name:?} is given twice")));
            }
            seen.push(name);
            let wrong = |what: &str| options.error(format!("{name}={value:?}: not {what}"));
            match name {
                "slots" => {
                    spec.keyslots = number(value)
                        .and_then(|slots| u32::try_from(slots).ok())
                        .filter(|slots| (1..=Self::KEYSLOTS_MAX).contains(slots))
                        .ok_or_else(|| wrong("a number from 1 to 256"))?;
                }
                "dun" => {
                    spec.dun_bytes = match value {
                        "8" => 8,
                        "4" => 4,
                        _ => return Err(wrong("8 (UFS) or 4 (eMMC) bytes")),
                    };
                }
                "units" => {
                    spec.unit_mask = parse_units(value).ok_or_else(|| {
                        wrong("sizes from 512 to 65536 that are powers of two, joined by \"+\"")
                    })?;
                }
                "program-latency" => {
                    spec.program_latency = parse_duration(value)
                        .ok_or_else(|| wrong("a whole number with ns, us, ms or s, at most an hour"))?;
                }
                "kdf" => {
                    if variant.hwkm().is_none() {
                        return Err(options.error(format!("{} derives no keys", variant.full_name())));
                    }
                    spec.kdf = options.kdf(value)?;
                }
                "faults" => spec.faults = Faults::parse(value).map_err(|why| options.error(why))?,
                "seed" => spec.seed = number(value).ok_or_else(|| wrong("a number below 2^64"))?,
                "verify" => {
                    spec.verify = Some(
                        value.parse().map_err(|_why| wrong("\"all\" or a number from 1 to 4294967295"))?,
                    );
                }
                _ => {
                    return Err(options.error(format!(
                        "no option {name:?}; the options are: slots, dun, units, program-latency, kdf, faults, seed, verify"
                    )));
                }
            }
        }
        Ok(spec)
    }
}

/// Digits alone: `parse` would take a plus sign, too.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn parse_units(text: &str) -> Option<u8> {
    text.split('+').try_fold(0_u8, |mask, size| {
        let size = number(size).filter(|size| size.is_power_of_two() && size.is_multiple_of(512))?;
        Some(mask | u8::try_from(size / 512).ok()?)
    })
}

/// The shortest text that parses back to the same.
impl fmt::Display for IceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { variant, keyslots, dun_bytes, unit_mask, program_latency, kdf, faults, seed, verify } =
            *self;
        let default = Self::new(variant);
        f.write_str(variant.full_name())?;
        if keyslots != default.keyslots {
            write!(f, ",slots={keyslots}")?;
        }
        if dun_bytes != default.dun_bytes {
            write!(f, ",dun={dun_bytes}")?;
        }
        if unit_mask != default.unit_mask {
            let sizes = (0..8).filter(|bit| unit_mask & (1 << bit) != 0);
            let sizes: Vec<_> = sizes.map(|bit| (512_u32 << bit).to_string()).collect();
            write!(f, ",units={}", sizes.join("+"))?;
        }
        if program_latency != default.program_latency {
            write!(f, ",program-latency={}", DurationText(program_latency))?;
        }
        if kdf != default.kdf {
            write!(f, ",kdf={kdf}")?;
        }
        if faults != default.faults {
            write!(f, ",faults={faults}")?;
        }
        if seed != default.seed {
            write!(f, ",seed={seed}")?;
        }
        if let Some(sample) = verify {
            write!(f, ",verify={sample}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineSpec;
    use crate::ice::Chance;
    use proptest::prelude::*;

    fn parse(text: &str) -> IceSpec {
        match text.parse().unwrap() {
            EngineSpec::Ice(spec) => spec,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn defaults_are_those_of_shipped_hardware() {
        for variant in IceVariant::ALL {
            let text = format!("ice:{}", variant.name());
            assert_eq!(parse(&text), IceSpec::new(variant));
            assert_eq!(parse(&text).to_string(), text);
        }
        assert_eq!(parse("ice:raw").keyslots, 32);
        assert_eq!(parse("ice:raw").units(), UnitMask::SERVED);
    }

    #[test]
    fn options_come_in_any_order_and_are_shown_in_one() {
        let text = "ice:hwkm-v2,slots=4,dun=4,units=512+4096,program-latency=50us,kdf=legacykdf,\
            faults=program-fail:0.01+commit-fail,seed=7,verify=all";
        let spec = parse(text);
        assert_eq!(spec.to_string(), text);
        assert_eq!((spec.keyslots, spec.dun_bytes, spec.unit_mask, spec.seed), (4, 4, 0b1001, 7));
        assert_eq!(spec.program_latency, Duration::from_micros(50));
        assert_eq!(spec.faults.program_fail, Chance::parse("0.01").unwrap());
        assert_eq!(parse("ice:hwkm-v2,verify=all,seed=7,units=4096+512").unit_mask, 0b1001);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_known() {
        for (text, expected) in [
            ("ice", "no ICE variant \"\"; the variants are: raw, hwkm-v1, hwkm-v2, next"),
            ("ice:", "the variants are: raw, hwkm-v1, hwkm-v2, next"),
            ("ice:v2", "no ICE variant \"v2\""),
            ("ice:slots=4", "no ICE variant \"slots=4\""),
            ("ice:raw,", "\"\" is not OPTION=VALUE"),
            ("ice:raw,slots=0", "not a number from 1 to 256"),
            ("ice:raw,slots=257", "not a number from 1 to 256"),
            ("ice:raw,slots=+1", "not a number from 1 to 256"),
            ("ice:raw,slots=", "not a number from 1 to 256"),
            ("ice:raw,slots=1,slots=1", "\"slots\" is given twice"),
            ("ice:raw,dun=16", "not 8 (UFS) or 4 (eMMC) bytes"),
            ("ice:raw,units=256", "powers of two"),
            ("ice:raw,units=131072", "powers of two"),
            ("ice:raw,units=", "powers of two"),
            ("ice:raw,program-latency=50", "ns, us, ms or s"),
            ("ice:raw,kdf=v1", "ice:raw derives no keys"),
            ("ice:next,kdf=v2", "the key derivations are: v1, legacykdf, rearranged"),
            ("ice:raw,faults=dragon", "the faults are: program-fail"),
            ("ice:raw,seed=x", "not a number below 2^64"),
            ("ice:raw,verify=0", "\"all\" or a number"),
            ("ice:raw,colour=red", "no option \"colour\"; the options are: slots, dun"),
        ] {
            let why = text.parse::<EngineSpec>().unwrap_err().to_string();
            assert!(why.contains(expected), "{text}: {why}");
            assert!(why.contains(&format!("{text:?}")) && why.lines().count() == 1, "{text}: {why}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back(
            (variant, kdf) in (0..4_usize, 0..3_usize),
            (keyslots, unit_mask, emmc) in (1..=256_u32, 1..=255_u8, any::<bool>()),
            (latency, seed) in (0..3_600_000_000_u64, any::<u64>()),
            verify in prop::option::of(1..=u32::MAX),
        ) {
            let variant = IceVariant::ALL[variant];
            let mut spec = IceSpec::new(variant);
            if variant.hwkm().is_some() {
                spec.kdf = KdfVariant::ALL[kdf];
            }
            spec.keyslots = keyslots;
            spec.unit_mask = unit_mask;
            spec.dun_bytes = if emmc { 4 } else { 8 };
            spec.program_latency = Duration::from_micros(latency);
            spec.seed = seed;
            spec.verify = verify.and_then(Sample::one_in);
            let spec = EngineSpec::Ice(spec);
            prop_assert_eq!(spec.to_string().parse::<EngineSpec>().unwrap(), spec);
        }

        #[test]
        fn no_text_makes_parsing_panic(text in "ice:(raw|next|hwkm-v2)?[a-z=,+:/0-9é.-]{0,40}") {
            let _ = text.parse::<EngineSpec>();
        }
    }
}
