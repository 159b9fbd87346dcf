//! Requests at random, for the tests of what is vectorised.

use crate::Dun;
use proptest::prelude::*;

/// Data as requests bring them: no pattern, any alignment, units of every size.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) unit_bytes: usize,
    /// Where the data start in memory, beyond a multiple of 64.
    offset: usize,
    pub(super) data: Vec<u8>,
}

pub(super) fn requests() -> impl Strategy<Value = Request> {
    // Small units are many in a group of vectors, and several groups; large ones are few, to save time.
    (4..=17_u32, 0..140_usize, 0..64_usize, any::<u64>()).prop_map(|(log2, units, offset, seed)| {
        let log2 = if cfg!(miri) { log2.min(10) } else { log2 };
        let units = units.min((1 << if cfg!(miri) { 10 } else { 18 }) >> log2).max(1);
        Request { unit_bytes: 1 << log2, offset, data: noise(seed, units << log2) }
    })
}

/// Bytes without a pattern (xorshift64; any generator would do).
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}

/// Numbers around each carry that matters, and any.
pub(super) fn numbers() -> impl Strategy<Value = u128> {
    prop_oneof![
        u128::MAX - 150..=u128::MAX,
        u128::from(u64::MAX - 150)..=u128::from(u64::MAX),
        u128::from(u32::MAX - 150)..=u128::from(u32::MAX),
        Just(0),
        any::<u128>(),
    ]
}

/// The DUN whose lower half is `low`.
pub(super) fn dun(low: u128, high: [u64; 2]) -> Dun {
    let bytes = low.to_le_bytes();
    let (limbs, _) = bytes.as_chunks();
    Dun::from_limbs([u64::from_le_bytes(limbs[0]), u64::from_le_bytes(limbs[1]), high[0], high[1]])
}

impl Request {
    /// What `work` makes of the data where they lie, after checking that it left everything around them alone.
    pub(super) fn transform(&self, work: impl FnOnce(&mut [u8])) -> Vec<u8> {
        const AROUND: usize = 128;
        let mut room = vec![0xa5; self.data.len() + 2 * AROUND + 128];
        let start = AROUND + room.as_ptr().align_offset(64) % 64 + self.offset;
        let end = start + self.data.len();
        room.resize(end + AROUND, 0xa5);
        room[start..end].copy_from_slice(&self.data);
        work(&mut room[start..end]);
        assert!(room[..start].iter().chain(&room[end..]).all(|&b| b == 0xa5), "bytes around the data");
        room[start..end].to_vec()
    }
}
