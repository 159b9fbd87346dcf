//! Which engine, and how: the text that people write.

use crate::ice::{IceSpec, IceVariant};
use crate::verify::Sample;
use inlinecrypt_cipher::kdf::KdfVariant;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::fmt;
use std::str::FromStr;

/// Which engine to start, with its options. Written `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`.
///
/// ```
/// use inlinecrypt_engine::EngineSpec;
///
/// let spec: EngineSpec = "software:slots=4,kdf=legacykdf".parse()?;
/// assert_eq!(spec.to_string(), "software:slots=4,kdf=legacykdf");
///
/// let why = "hardware".parse::<EngineSpec>().unwrap_err();
/// assert!(why.to_string().contains("the engines are: software"));
/// # Ok::<(), inlinecrypt_core::error::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineSpec {
    /// The cipher in this process.
    Software(SoftwareSpec),
    /// The model of a storage controller with its key manager and secure world.
    Ice(IceSpec),
}

impl EngineSpec {
    /// What can be written, for help texts: one line per engine.
    pub const HELP: &str = "software[:OPTION,...], options slots=0..65536 and kdf=v1|legacykdf|rearranged\n\
        ice:raw|hwkm-v1|hwkm-v2|next[,OPTION,...], options slots=1..256, dun=8|4, units=512+...+65536, \
        program-latency=TIME, kdf=v1|legacykdf|rearranged, faults=FAULT+..., seed=N and verify=N|all";
    /// Every engine's name.
    const NAMES: &str = "software, ice";

    /// The specs that every test of engines in general iterates.
    #[must_use]
    pub fn all_for_tests() -> Vec<Self> {
        let software = |keyslots, kdf| Self::Software(SoftwareSpec { keyslots, kdf });
        vec![
            software(SoftwareSpec::KEYSLOTS_DEFAULT, KdfVariant::V1),
            software(1, KdfVariant::V1),
            // Few, and the other key derivations.
            software(4, KdfVariant::LegacyKdf),
            software(4, KdfVariant::Rearranged),
            // The key comes with every request.
            software(0, KdfVariant::V1),
        ]
        .into_iter()
        .chain(Self::ice_for_tests())
        .collect()
    }

    /// Each variant as it is shipped, and one odd one of each generation.
    fn ice_for_tests() -> impl Iterator<Item = Self> {
        let shipped = IceVariant::ALL.map(IceSpec::new);
        let verified = Some(Sample::ALL);
        let odd = [
            // As in eMMC, with few sizes.
            IceSpec { keyslots: 1, dun_bytes: 4, unit_mask: 0b1001, ..IceSpec::new(IceVariant::Raw) },
            IceSpec { kdf: KdfVariant::LegacyKdf, keyslots: 4, ..IceSpec::new(IceVariant::HwkmV1) },
            IceSpec { kdf: KdfVariant::Rearranged, keyslots: 2, ..IceSpec::new(IceVariant::HwkmV2) },
            // Everything compared with software.
            IceSpec { keyslots: IceSpec::KEYSLOTS_MAX, verify: verified, ..IceSpec::new(IceVariant::Next) },
        ];
        shipped.into_iter().chain(odd).map(Self::Ice)
    }

    /// The same, comparing this share of its work with software; `None` for the engine that is software.
    #[must_use]
    pub fn verified(self, sample: Sample) -> Option<Self> {
        match self {
            Self::Software(_) => None,
            Self::Ice(ice) => Some(Self::Ice(IceSpec { verify: Some(sample), ..ice })),
        }
    }

    /// How the engine derives inline encryption keys and software secrets.
    #[must_use]
    pub fn kdf(&self) -> KdfVariant {
        match self {
            Self::Software(software) => software.kdf,
            Self::Ice(ice) => ice.kdf,
        }
    }
}

impl Default for EngineSpec {
    fn default() -> Self {
        Self::Software(SoftwareSpec::default())
    }
}

impl fmt::Display for EngineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Software(software) => software.fmt(f),
            Self::Ice(ice) => ice.fmt(f),
        }
    }
}

impl FromStr for EngineSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, options) = text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest)));
        let options = Options { spec: text, options };
        match name {
            SoftwareSpec::NAME => SoftwareSpec::parse(&options).map(Self::Software),
            IceSpec::NAME => IceSpec::parse(&options).map(Self::Ice),
            _ => Err(options.error(format!("no engine {name:?}; the engines are: {}", Self::NAMES))),
        }
    }
}

/// Options of the [software engine](crate::software).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SoftwareSpec {
    /// How many keys it holds at once, 0 to [`KEYSLOTS_MAX`](Self::KEYSLOTS_MAX); 0: it takes the key with every
    /// request. Option `slots`.
    pub keyslots: u32,
    /// How it derives inline encryption keys and software secrets. Option `kdf`.
    pub kdf: KdfVariant,
}

impl SoftwareSpec {
    /// The engine's name.
    pub const NAME: &str = "software";
    /// What hardware has: 32 in UFS host controllers that are common today.
    pub const KEYSLOTS_DEFAULT: u32 = 32;
    /// More would only cost memory: a keyslot is there to be one of few.
    pub const KEYSLOTS_MAX: u32 = 65_536;

    fn parse(options: &Options<'_>) -> Result<Self, Error> {
        let (mut keyslots, mut kdf) = (None, None);
        for option in options.iter() {
            let (name, value) = option?;
            let repeated = match name {
                "slots" => keyslots.replace(Self::parse_keyslots(options, value)?).is_some(),
                "kdf" => kdf.replace(options.kdf(value)?).is_some(),
                _ => return Err(options.error(format!("no option {name:?}; the options are: slots, kdf"))),
            };
            if repeated {
                return Err(options.error(format!("option {name:?} is given twice")));
            }
        }
        let default = Self::default();
        Ok(Self { keyslots: keyslots.unwrap_or(default.keyslots), kdf: kdf.unwrap_or(default.kdf) })
    }

    fn parse_keyslots(options: &Options<'_>, value: &str) -> Result<u32, Error> {
        // Digits alone: `parse` would take a plus sign, too.
        let digits = value.bytes().all(|byte| byte.is_ascii_digit()).then_some(value);
        digits
            .and_then(|digits| digits.parse().ok())
            .filter(|&keyslots| keyslots <= Self::KEYSLOTS_MAX)
            .ok_or_else(|| {
                options.error(format!("slots={value:?}: not a number from 0 to {}", Self::KEYSLOTS_MAX))
            })
    }
}

impl Default for SoftwareSpec {
    fn default() -> Self {
        Self { keyslots: Self::KEYSLOTS_DEFAULT, kdf: KdfVariant::default() }
    }
}

/// The shortest text that parses back to the same.
impl fmt::Display for SoftwareSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { keyslots, kdf } = *self;
        let default = Self::default();
        f.write_str(Self::NAME)?;
        let mut before = ':';
        if keyslots != default.keyslots {
            write!(f, "{before}slots={keyslots}")?;
            before = ',';
        }
        if kdf != default.kdf {
            write!(f, "{before}kdf={kdf}")?;
        }
        Ok(())
    }
}

/// What stands behind the colon, and the whole text for messages.
#[derive(Clone, Copy)]
pub(crate) struct Options<'s> {
    spec: &'s str,
    options: Option<&'s str>,
}

impl<'s> Options<'s> {
    /// What stands first, and the options behind it.
    pub(crate) fn split_first(self) -> (&'s str, Self) {
        let Self { spec, options } = self;
        let (first, rest) = match options.unwrap_or_default().split_once(',') {
            Some((first, rest)) => (first, Some(rest)),
            None => (options.unwrap_or_default(), None),
        };
        (first, Self { spec, options: rest })
    }

    /// The key derivation of this name.
    pub(crate) fn kdf(&self, value: &str) -> Result<KdfVariant, Error> {
        KdfVariant::from_name(value).ok_or_else(|| {
            let known = KdfVariant::ALL.map(KdfVariant::name).join(", ");
            self.error(format!("kdf={value:?}: the key derivations are: {known}"))
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Result<(&'s str, &'s str), Error>> {
        self.options.into_iter().flat_map(|options| options.split(',')).map(|option| {
            option.split_once('=').ok_or_else(|| {
                self.error(format!("{option:?} is not OPTION=VALUE, several separated by commas"))
            })
        })
    }

    pub(crate) fn error(&self, why: String) -> Error {
        Error::new(ErrorKind::Invalid, Op::Open).detail(format!("engine {:?}: {why}", self.spec))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(text: &str) -> String {
        let error = text.parse::<EngineSpec>().expect_err(text);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    }

    #[test]
    fn a_name_alone_means_the_defaults() {
        assert_eq!("software".parse::<EngineSpec>().unwrap(), EngineSpec::default());
        assert_eq!(EngineSpec::default().to_string(), "software");
    }

    #[test]
    fn what_is_not_known_is_refused_with_a_list_of_what_is() {
        for (text, expected) in [
            ("", "no engine \"\"; the engines are: software"),
            ("tpm", "no engine \"tpm\"; the engines are: software, ice"),
            ("Software", "the engines are: software"),
            ("software:", "\"\" is not OPTION=VALUE"),
            ("software:slots", "\"slots\" is not OPTION=VALUE"),
            ("software:slots=4,", "\"\" is not OPTION=VALUE"),
            ("software:keys=4", "no option \"keys\"; the options are: slots, kdf"),
            ("software:slots=65537", "not a number from 0 to 65536"),
            ("software:slots=-1", "not a number from 0 to 65536"),
            ("software:slots=+1", "not a number from 0 to 65536"),
            ("software:slots=", "not a number from 0 to 65536"),
            ("software:slots=4294967297", "not a number from 0 to 65536"),
            ("software:kdf=v2", "the key derivations are: v1, legacykdf, rearranged"),
            ("software:slots=1,slots=1", "\"slots\" is given twice"),
        ] {
            let message = refusal(text);
            assert!(message.contains(expected), "{text}: {message}");
            assert!(message.contains(&format!("{text:?}")), "{text}: {message}");
            assert_eq!(message.lines().count(), 1);
        }
    }

    #[test]
    fn the_bounds_of_the_number_of_keyslots_are_accepted() {
        for slots in [0, 1, 65_536] {
            let spec: EngineSpec = format!("software:slots={slots}").parse().unwrap();
            assert_eq!(
                spec,
                EngineSpec::Software(SoftwareSpec { keyslots: slots, ..SoftwareSpec::default() })
            );
        }
    }

    #[test]
    fn help_parses_when_one_choice_is_taken() {
        assert!(EngineSpec::HELP.starts_with(SoftwareSpec::NAME));
        assert!(EngineSpec::HELP.contains(&KdfVariant::ALL.map(KdfVariant::name).join("|")));
        assert!(EngineSpec::HELP.contains(&format!("0..{}", SoftwareSpec::KEYSLOTS_MAX)));
        assert!(EngineSpec::HELP.ends_with(IceSpec::HELP));
        assert!(IceSpec::HELP.contains(&IceVariant::ALL.map(IceVariant::name).join("|")));
        assert_eq!(EngineSpec::NAMES, [SoftwareSpec::NAME, IceSpec::NAME].join(", "));
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back_to_the_same(keyslots in 0..=65_536_u32, kdf in 0..3_usize) {
            let spec = EngineSpec::Software(SoftwareSpec { keyslots, kdf: KdfVariant::ALL[kdf] });
            prop_assert_eq!(spec.to_string().parse::<EngineSpec>().unwrap(), spec);
        }

        #[test]
        fn no_text_makes_parsing_panic(text in "(software)?:?[a-z=,0-9é]{0,20}") {
            let _ = text.parse::<EngineSpec>();
        }
    }
}
