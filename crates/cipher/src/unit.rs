//! What every mode's loop over data units needs.

use crate::{Dun, Mode};

/// Asserts what the caller of a [`UnitCipher`](crate::UnitCipher) promises.
pub(crate) fn assert_promise(mode: Mode, unit_bytes: usize, data_bytes: usize) {
    let max = usize::try_from(mode.info().unit_bytes_max).expect("a data unit fits memory");
    assert!(
        unit_bytes.is_power_of_two() && (16..=max).contains(&unit_bytes),
        "{mode}: a data unit of {unit_bytes} bytes is not a power of two from 16 to {max}"
    );
    assert!(
        data_bytes.is_multiple_of(unit_bytes),
        "{mode}: {data_bytes} bytes are not a whole number of data units of {unit_bytes} bytes"
    );
}

/// The part of a DUN that a 16-byte IV holds. Adding one to it, wrapping, gives that of the next DUN: what is carried
/// into the upper two limbs never reaches the IV.
pub(crate) fn low_128_bits(dun: Dun) -> u128 {
    let [low, high, _, _] = dun.limbs();
    u128::from(high) << 64 | u128::from(low)
}

/// How many cases a property test tries: `usual`, or as many as Miri, which is a thousand times slower, gets done.
#[cfg(test)]
pub(crate) fn cases(usual: u32) -> u32 {
    if cfg!(miri) { 2 } else { usual }
}
