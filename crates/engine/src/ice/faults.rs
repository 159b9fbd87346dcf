//! Hardware at its worst: what goes wrong on purpose, how often, and the dice that decide.
//!
//! Every fault is one that real controllers show or that a correct upper layer has to survive. The same seed and the same
//! order of calls give the same faults.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A probability in millionths. Written as a decimal number from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chance(u32);

impl Chance {
    /// It does not happen.
    pub const NEVER: Self = Self(0);
    /// It happens every time.
    pub const ALWAYS: Self = Self(1_000_000);

    /// The probability of so many millionths, if there are no more than a million.
    #[must_use]
    pub const fn from_millionths(millionths: u32) -> Option<Self> {
        if millionths <= Self::ALWAYS.0 { Some(Self(millionths)) } else { None }
    }

    /// In millionths.
    #[must_use]
    pub const fn millionths(self) -> u32 {
        self.0
    }

    /// The probability written as `text`: at most six decimals.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(whole) || !is_number(decimals) || decimals.len() > 6 {
            return None;
        }
        let millionths: u32 = format!("{decimals:0<6}").parse().ok()?;
        Self::from_millionths(whole.parse::<u32>().ok()?.checked_mul(1_000_000)?.checked_add(millionths)?)
    }
}

impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// What goes wrong on purpose. Option `faults`: names joined by `+`, each with what the list in [`HELP`](Self::HELP) says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// A program fails; the keyslot is off.
    pub program_fail: Chance,
    /// The first so many programs fail.
    pub program_fail_next: u32,
    /// A program fails with half of the key in the keyslot; the keyslot is off.
    pub half_program: Chance,
    /// An evict fails, and the key stays in the hardware; the keyslot is off.
    pub evict_fail: Chance,
    /// A request finds that the keyslot was lost a moment ago.
    pub lose_slot: Chance,
    /// A request comes out with one byte wrong.
    pub wrong_ciphertext: Chance,
    /// A good blob is refused.
    pub refuse_blobs: Chance,
    /// A program takes longer by [`slow_time`](Self::slow_time).
    pub slow: Chance,
    /// How much longer.
    pub slow_time: Duration,
    /// The switch between key types fails: the engine is poisoned.
    pub commit_fail: bool,
    /// The power-on self test never ends: the engine does not start.
    pub bist_fail: bool,
    /// The key manager's self test failed: the engine starts and takes raw keys only.
    pub hwkm_bist_fail: bool,
    /// A fuse is blown: the engine does not start.
    pub fuse_blown: bool,
    /// It does not come back from reset or suspend: its self test never ends then.
    pub resume_fail: bool,
}

impl Faults {
    /// What can be written.
    pub const HELP: &str = "program-fail[:P], program-fail-next:N, half-program[:P], evict-fail[:P], lose-slot[:P], \
        wrong-ciphertext[:P], refuse-blobs[:P], slow[:P]/TIME, commit-fail, bist-fail, hwkm-bist-fail, fuse-blown, \
        resume-fail; P from 0 to 1, without it 1";

    /// The faults written as `text`, or what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut faults = Self::default();
        for fault in text.split('+') {
            let (name, value) = match fault.split_once([':', '/']) {
                Some((name, _)) => (name, Some(&fault[name.len()..])),
                None => (fault, None),
            };
            let malformed = || format!("fault {fault:?}: the faults are: {}", Self::HELP);
            let chance = || match value {
                None => Ok(Chance::ALWAYS),
                Some(value) => value.strip_prefix(':').and_then(Chance::parse).ok_or_else(malformed),
            };
            let plain = || if value.is_none() { Ok(true) } else { Err(malformed()) };
            match name {
                "program-fail" => faults.program_fail = chance()?,
                "program-fail-next" => {
                    let digits = value.and_then(|value| value.strip_prefix(':'));
                    let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
                    faults.program_fail_next =
                        digits.and_then(|digits| digits.parse().ok()).ok_or_else(malformed)?;
                }
                "half-program" => faults.half_program = chance()?,
                "evict-fail" => faults.evict_fail = chance()?,
                "lose-slot" => faults.lose_slot = chance()?,
                "wrong-ciphertext" => faults.wrong_ciphertext = chance()?,
                "refuse-blobs" => faults.refuse_blobs = chance()?,
                "slow" => {
                    let (chance, time) =
                        value.and_then(|value| value.split_once('/')).ok_or_else(malformed)?;
                    faults.slow = match chance.strip_prefix(':') {
                        Some(chance) => Chance::parse(chance).ok_or_else(malformed)?,
                        None if chance.is_empty() => Chance::ALWAYS,
                        None => return Err(malformed()),
                    };
                    faults.slow_time = parse_duration(time).ok_or_else(malformed)?;
                }
                "commit-fail" => faults.commit_fail = plain()?,
                "bist-fail" => faults.bist_fail = plain()?,
                "hwkm-bist-fail" => faults.hwkm_bist_fail = plain()?,
                "fuse-blown" => faults.fuse_blown = plain()?,
                "resume-fail" => faults.resume_fail = plain()?,
                _ => return Err(malformed()),
            }
        }
        Ok(faults)
    }
}

/// The shortest text that parses back to the same.
impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program_fail,
            program_fail_next,
            half_program,
            evict_fail,
            lose_slot,
            wrong_ciphertext,
            refuse_blobs,
            slow,
            slow_time,
            commit_fail,
            bist_fail,
            hwkm_bist_fail,
            fuse_blown,
            resume_fail,
        } = *self;
        let mut parts = Vec::new();
        let with_chance = |name: &str, chance: Chance| match chance {
            Chance::ALWAYS => name.to_owned(),
            chance => format!("{name}:{chance}"),
        };
        for (name, chance) in [
            ("program-fail", program_fail),
            ("half-program", half_program),
            ("evict-fail", evict_fail),
            ("lose-slot", lose_slot),
            ("wrong-ciphertext", wrong_ciphertext),
            ("refuse-blobs", refuse_blobs),
        ] {
            if chance != Chance::NEVER {
                parts.push(with_chance(name, chance));
            }
        }
        if program_fail_next > 0 {
            parts.push(format!("program-fail-next:{program_fail_next}"));
        }
        if slow != Chance::NEVER || !slow_time.is_zero() {
            parts.push(format!("{}/{}", with_chance("slow", slow), DurationText(slow_time)));
        }
        for (name, on) in [
            ("commit-fail", commit_fail),
            ("bist-fail", bist_fail),
            ("hwkm-bist-fail", hwkm_bist_fail),
            ("fuse-blown", fuse_blown),
            ("resume-fail", resume_fail),
        ] {
            if on {
                parts.push(name.to_owned());
            }
        }
        f.write_str(&parts.join("+"))
    }
}

const UNITS: [(&str, u64); 4] = [("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000), ("ns", 1)];

/// The most that a time may be: an hour.
const TIME_MAX: Duration = Duration::from_secs(3600);

/// A whole number with its unit, at most an hour: `50us`. Zero needs no unit.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    if number == 0 && unit.is_empty() {
        return Some(Duration::ZERO);
    }
    let (_, nanos) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_nanos(number.checked_mul(nanos)?)).filter(|time| *time <= TIME_MAX)
}

/// A duration in the largest unit of which it is a whole number.
pub(crate) struct DurationText(pub(crate) Duration);

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0");
        }
        let (unit, per) = UNITS
            .into_iter()
            .find(|(_, per)| nanos.is_multiple_of(u128::from(*per)))
            .expect("every number of nanoseconds is a multiple of one");
        write!(f, "{}{unit}", nanos / u128::from(per))
    }
}

/// The faults of one engine, and its dice.
#[derive(Debug)]
pub(crate) struct Dice {
    pub(crate) faults: Faults,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    random: u64,
    programs_to_fail: u32,
}

impl Dice {
    pub(crate) fn new(faults: Faults, seed: u64) -> Self {
        Self { faults, state: Mutex::new(State { random: seed, programs_to_fail: faults.program_fail_next }) }
    }

    /// Whether something of this probability happens now. What never or always happens does not throw the dice, so
    /// that a healthy engine takes no lock for it.
    pub(crate) fn strikes(&self, chance: Chance) -> bool {
        match chance {
            Chance::NEVER => false,
            Chance::ALWAYS => true,
            Chance(millionths) => self.below(1_000_000) < u64::from(millionths),
        }
    }

    /// A number below `bound`.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        // The bias of the remainder is of no account here.
        self.next() % bound
    }

    /// Whether this program is one of the first that fail.
    pub(crate) fn fails_as_one_of_the_first(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fails = state.programs_to_fail > 0;
        state.programs_to_fail -= u32::from(fails);
        fails
    }

    /// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
    fn next(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.random = state.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn chances_are_decimal_numbers_up_to_one() {
        for (text, millionths) in
            [("0", 0), ("1", 1_000_000), ("0.01", 10_000), ("0.000001", 1), ("1.0", 1_000_000)]
        {
            assert_eq!(Chance::parse(text), Chance::from_millionths(millionths), "{text}");
        }
        for bad in ["", ".", "1.1", "2", "-1", "0.0000001", ".5", "5.", "1e-3", "0.1 "] {
            assert_eq!(Chance::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        for (text, nanos) in
            [("0", 0), ("50us", 50_000), ("1ms", 1_000_000), ("2s", 2_000_000_000), ("7ns", 7)]
        {
            assert_eq!(parse_duration(text), Some(Duration::from_nanos(nanos)), "{text}");
        }
        for bad in ["", "5", "us", "1h", "5 us", "3601s", "-1us", "1.5ms", "99999999999999999999s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_fault_is_answered_with_the_list() {
        for bad in [
            "",
            "nonsense",
            "program-fail:2",
            "program-fail-next",
            "program-fail-next:x",
            "slow",
            "slow:1",
            "slow:x/1ms",
            "commit-fail:1",
            "lose-slot+",
            "bist-fail/1ms",
            "lose-slot/1ms",
        ] {
            let why = Faults::parse(bad).unwrap_err();
            assert!(why.contains("the faults are: program-fail"), "{bad}: {why}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_faults_and_about_as_many_as_asked() {
        let chance = Chance::parse("0.25").unwrap();
        let throws = |seed| {
            let dice = Dice::new(Faults::default(), seed);
            (0..10_000).map(|_| dice.strikes(chance)).collect::<Vec<_>>()
        };
        assert_eq!(throws(1), throws(1));
        assert_ne!(throws(1), throws(2));
        let struck = throws(3).into_iter().filter(|struck| *struck).count();
        assert!((2300..2700).contains(&struck), "{struck}");
    }

    fn faults() -> impl Strategy<Value = Faults> {
        let chances =
            prop::array::uniform7((0..=1_000_000_u32).prop_map(|n| Chance::from_millionths(n).unwrap()));
        let switches = prop::array::uniform5(any::<bool>());
        let time = (0..=3_600_000_000_u64).prop_map(Duration::from_micros);
        (chances, switches, any::<u32>(), time).prop_map(|(chances, switches, program_fail_next, slow_time)| {
            let [program_fail, half_program, evict_fail, lose_slot, wrong_ciphertext, refuse_blobs, slow] = chances;
            let [commit_fail, bist_fail, hwkm_bist_fail, fuse_blown, resume_fail] = switches;
            Faults {
                program_fail, program_fail_next, half_program, evict_fail, lose_slot, wrong_ciphertext, refuse_blobs,
                slow, slow_time, commit_fail, bist_fail, hwkm_bist_fail, fuse_blown, resume_fail,
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back(faults in faults()) {
            if faults != Faults::default() {
                prop_assert_eq!(Faults::parse(&faults.to_string()), Ok(faults));
            }
        }

        #[test]
        fn no_text_makes_parsing_panic(text in "[a-z:/+0-9.é-]{0,30}") {
            let _ = (Faults::parse(&text), parse_duration(&text), Chance::parse(&text));
        }
    }
}
