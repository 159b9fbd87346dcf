//! Crypto contexts: which key and which DUN go with a request; when two requests may be one; where one must be cut.

use crate::config::CryptoConfig;
use crate::error::{Error, ErrorKind, Op};
use crate::key::Key;
use inlinecrypt_cipher::Dun;
use std::ops::Range;
use std::sync::Arc;

/// The key of a request and the DUN of its first data unit (`struct bio_crypt_ctx`).
#[derive(Clone, Debug)]
pub struct CryptoContext {
    key: Arc<Key>,
    dun: Dun,
}

impl CryptoContext {
    /// A context that begins with data unit `dun` of `key`.
    #[must_use]
    pub fn new(key: Arc<Key>, dun: Dun) -> Self {
        Self { key, dun }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// The DUN of the first data unit.
    #[must_use]
    pub fn dun(&self) -> Dun {
        self.dun
    }

    /// Moves on by `len_bytes`. What is not a whole number of data units is dropped: alignment is the caller's promise.
    pub fn advance(&mut self, len_bytes: u64) {
        self.dun = self.dun.wrapping_add(len_bytes >> self.key.config().data_unit_size().log2());
    }

    fn is_contiguous(&self, len_bytes: u64, next: Dun) -> bool {
        self.dun.is_followed_by(len_bytes >> self.key.config().data_unit_size().log2(), next)
    }
}

/// Whether two requests could share one context: both without, or both with the same key (`bio_crypt_ctx_compatible`).
///
/// The same *handle*: two keys with equal bytes are two keys.
#[must_use]
pub fn are_compatible(a: Option<&CryptoContext>, b: Option<&CryptoContext>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.key.id() == b.key.id(),
        _ => false,
    }
}

/// Whether a request of `first_len_bytes` and the one behind it may be merged into one (`bio_crypt_ctx_mergeable`).
///
/// They must be compatible, and the second must begin with the DUN at which the first ends. A wrap through zero is
/// never mergeable. A merged request keeps the context of its first part.
#[must_use]
pub fn are_mergeable(
    first: Option<&CryptoContext>,
    first_len_bytes: u64,
    second: Option<&CryptoContext>,
) -> bool {
    match (first, second) {
        (None, None) => true,
        (Some(first), Some(second)) => {
            first.key.id() == second.key.id() && first.is_contiguous(first_len_bytes, second.dun)
        }
        _ => false,
    }
}

/// A part of a request within which DUNs count up without a wrap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The DUN of its first data unit.
    pub first: Dun,
    /// Its bytes within the request.
    pub bytes: Range<usize>,
}

/// Cuts a request of `len_bytes` where its DUN wraps to zero, since engines do not wrap below 2^256 by themselves.
///
/// A DUN has `dun_bytes` of the config, so it wraps at `2^(8 * dun_bytes)`; eMMC's wraps at 2^32.
///
/// # Errors
///
/// [`ErrorKind::Misaligned`] if the length is not a whole number of data units; [`ErrorKind::Invalid`] if `first` needs more
/// than `dun_bytes`.
pub fn runs(config: &CryptoConfig, first: Dun, len_bytes: usize) -> Result<Runs, Error> {
    let size = config.data_unit_size();
    let units = u64::try_from(len_bytes).ok().and_then(|len| size.units_in(len)).ok_or_else(|| {
        Error::new(ErrorKind::Misaligned, Op::Crypt).detail("not a whole number of data units")
    })?;
    if first.significant_bytes() > config.dun_bytes() {
        return Err(Error::new(ErrorKind::Invalid, Op::Crypt)
            .detail(format!("the data unit number needs more than the key's {} bytes", config.dun_bytes())));
    }
    Ok(Runs {
        next: first,
        units,
        start: 0,
        unit_bytes: size.bytes() as usize,
        dun_bytes: config.dun_bytes(),
    })
}

/// See [`runs`].
#[derive(Clone, Debug)]
pub struct Runs {
    next: Dun,
    units: u64,
    start: usize,
    unit_bytes: usize,
    dun_bytes: u8,
}

impl Iterator for Runs {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.units == 0 {
            return None;
        }
        let first = self.next;
        let (units, next) = match units_until_wrap(first, self.dun_bytes) {
            Some(left) if left <= self.units => (left, Dun::ZERO),
            _ => (self.units, first.wrapping_add(self.units)),
        };
        let len = usize::try_from(units).expect("part of a length that fits") * self.unit_bytes;
        let bytes = self.start..self.start + len;
        self.start += len;
        self.units -= units;
        self.next = next;
        Some(Run { first, bytes })
    }
}

/// How many data units from `first` on still have a DUN below `2^(8 * dun_bytes)`; `None` if 2^64 or more.
fn units_until_wrap(first: Dun, dun_bytes: u8) -> Option<u64> {
    let limbs = first.limbs();
    let bits = u32::from(dun_bytes) * 8;
    if bits < 64 {
        return Some((1 << bits) - limbs[0]);
    }
    // 2^bits - first is below 2^64 only if every limb above the lowest is all ones, as far as `bits` reach.
    let mut above = (1u32..4).zip(&limbs[1..]);
    let near_the_top = above.all(|(index, &limb)| {
        let ones = match bits.saturating_sub(index * 64) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        limb == ones
    });
    (near_the_top && limbs[0] != 0).then(|| limbs[0].wrapping_neg())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DataUnitSize, Hardware, Mode};
    use crate::key::{KeyForm, RawKey};
    use proptest::prelude::*;

    fn key(dun_bytes: u8) -> Arc<Key> {
        let bytes: Vec<u8> = (0..64).collect();
        let unit = DataUnitSize::from_bytes(512).unwrap();
        Key::new(Mode::Aes256Xts, unit, dun_bytes, KeyForm::Raw(RawKey::new(&bytes)), Hardware::Allowed)
            .unwrap()
    }

    fn collect(key: &Key, first: Dun, units: usize) -> Vec<(Dun, usize)> {
        let runs = runs(key.config(), first, units * 512).unwrap();
        runs.map(|run| (run.first, run.bytes.len() / 512)).collect()
    }

    #[test]
    fn a_32_bit_dun_is_cut_at_the_wrap_and_does_not_carry() {
        let first = Dun::from(0xffff_fffe);
        assert_eq!(collect(&key(4), first, 5), [(first, 2), (Dun::ZERO, 3)]);
        assert_eq!(collect(&key(5), first, 5), [(first, 5)]);
    }

    #[test]
    fn wider_duns_are_cut_at_their_own_wrap() {
        let top = Dun::from_limbs([u64::MAX, 0, 0, 0]);
        assert_eq!(collect(&key(8), top, 3), [(top, 1), (Dun::ZERO, 2)]);
        assert_eq!(collect(&key(9), top, 3), [(top, 3)]);
        let top = Dun::from_limbs([u64::MAX - 1, 0xff, 0, 0]);
        assert_eq!(collect(&key(9), top, 3), [(top, 2), (Dun::ZERO, 1)]);
        let top = Dun::from_limbs([u64::MAX, u64::MAX, 0, 0]);
        assert_eq!(collect(&key(16), top, 3), [(top, 1), (Dun::ZERO, 2)]);
    }

    #[test]
    fn a_dun_that_is_too_wide_for_the_key_is_an_error() {
        let error = runs(key(4).config(), Dun::from(1 << 32), 512).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn part_of_a_data_unit_is_an_error() {
        let error = runs(key(4).config(), Dun::ZERO, 513).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misaligned);
    }

    proptest! {
        /// Cutting changes nothing but the wrap: unit `i` of the request has DUN `(first + i) mod 2^(8 * dun_bytes)`.
        #[test]
        fn every_unit_keeps_its_dun(dun_bytes in 1u8..=2, first in 0u64..65536, units in 0usize..2000) {
            let modulus = 1u64 << (8 * u32::from(dun_bytes));
            let first = first % modulus;
            let mut expected = first;
            let mut seen = 0;
            let key = key(dun_bytes);
            for run in runs(key.config(), Dun::from(first), units * 512).unwrap() {
                prop_assert_eq!(run.bytes.start, seen);
                for n in 0..(run.bytes.len() / 512) as u64 {
                    prop_assert_eq!(run.first.limbs()[0] + n, expected);
                    expected = (expected + 1) % modulus;
                }
                seen = run.bytes.end;
            }
            prop_assert_eq!(seen, units * 512);
        }

        /// Merging asks for the same handle and for the DUN that follows without a wrap.
        #[test]
        fn only_neighbours_with_one_key_merge(dun in any::<u64>(), units in 0u64..1000, skip in 0u64..2) {
            let key = key(16);
            let first = CryptoContext::new(key.clone(), Dun::from(dun));
            let mut second = first.clone();
            second.advance((units + skip) * 512);
            prop_assert_eq!(are_mergeable(Some(&first), units * 512, Some(&second)), skip == 0);
            let twin = CryptoContext::new(super::tests::key(16), second.dun());
            prop_assert!(!are_mergeable(Some(&first), units * 512, Some(&twin)));
            prop_assert!(!are_compatible(Some(&first), Some(&twin)));
        }
    }

    #[test]
    fn a_wrap_through_zero_is_never_mergeable() {
        let key = key(16);
        let first = CryptoContext::new(key.clone(), Dun::from_limbs([u64::MAX; 4]));
        let second = CryptoContext::new(key, Dun::ZERO);
        assert!(are_compatible(Some(&first), Some(&second)));
        assert!(!are_mergeable(Some(&first), 512, Some(&second)));
    }

    #[test]
    fn requests_without_context_merge_with_each_other_only() {
        let context = CryptoContext::new(key(8), Dun::ZERO);
        assert!(are_mergeable(None, 512, None) && are_compatible(None, None));
        assert!(!are_mergeable(Some(&context), 512, None) && !are_mergeable(None, 512, Some(&context)));
    }
}
