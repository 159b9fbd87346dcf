//! Sizes as people write and read them.

use std::fmt;
use std::str::FromStr;

/// A size in bytes. Written with a unit whose meaning everybody agrees on: `4096`, `64k`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number
            .parse()
            .map_err(|_why| "a size is a whole number and a unit: 4096, 64k, 512MiB, 1G".to_owned())?;
        let unit = unit.trim_start();
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "p" | "pib" => 50,
            "e" | "eib" => 60,
            "kb" | "mb" | "gb" | "tb" | "pb" | "eb" => {
                let letter = unit.chars().next().expect("two letters").to_ascii_uppercase();
                return Err(format!(
                    "{unit} means powers of 1000 to some and of 1024 to others: write {letter}iB for 1024"
                ));
            }
            _ => {
                return Err(format!(
                    "no unit {unit:?}: use k, M, G, T, P, E or KiB, MiB, GiB, TiB, PiB, EiB"
                ));
            }
        };
        number
            .checked_shl(shift)
            .filter(|bytes| bytes >> shift == number)
            .map(Self)
            .ok_or_else(|| "more than 2^64 bytes".to_owned())
    }
}

/// Exact if a power of 1024 divides it, else with the bytes: `1 GiB`, `10.3 MiB (10809344 bytes)`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let bytes = self.0;
        let power = (0..UNITS.len()).rev().find(|&power| bytes >> (10 * (power + 1)) > 0);
        match power {
            None => write!(f, "{bytes} bytes"),
            Some(power) => {
                let unit = 1u64 << (10 * (power + 1));
                let (whole, rest) = (bytes / unit, bytes % unit);
                if rest == 0 {
                    write!(f, "{whole} {}", UNITS[power])
                } else {
                    let tenths = u128::from(rest) * 10 / u128::from(unit);
                    write!(f, "{whole}.{tenths} {} ({bytes} bytes)", UNITS[power])
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("64k", 65_536),
            ("64KiB", 65_536),
            ("3M", 3 << 20),
            ("1 GiB", 1 << 30),
            ("2t", 2 << 40),
            ("16777215TiB", 16_777_215 << 40),
            ("1P", 1 << 50),
            ("15 EiB", 15 << 60),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_could_be_misread_is_refused() {
        for (text, expected) in [
            ("", "whole number"),
            ("GiB", "whole number"),
            ("1.5G", "no unit \".5G\""),
            ("-1", "whole number"),
            ("1GB", "write GiB"),
            ("1kb", "write KiB"),
            ("1Z", "no unit"),
            ("1EB", "write EiB"),
            ("16E", "2^64"),
            ("16777216T", "2^64"),
            ("99999999999999999999", "whole number"),
        ] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1 << 30, "1 GiB"),
            (10_809_344, "10.3 MiB (10809344 bytes)"),
            (u64::MAX, "15.9 EiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
