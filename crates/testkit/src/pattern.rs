//! Data that can be told apart: a function of a seed and a place, so that a misplaced block is noticed.

/// The next number of the splitmix64 sequence.
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The 512 bytes that belong at block `block`, for a seed.
#[must_use]
pub fn block(seed: u64, block: u64) -> [u8; 512] {
    let mut state = seed ^ block.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mut bytes = [0; 512];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&splitmix64(&mut state).to_le_bytes());
    }
    bytes
}

/// The bytes that belong at `offset..offset + len`, for a seed.
#[must_use]
pub fn bytes(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 1024);
    let mut index = offset / 512;
    let skip = usize::try_from(offset % 512).expect("less than 512");
    while out.len() < skip + len {
        out.extend_from_slice(&block(seed, index));
        index += 1;
    }
    out.drain(..skip);
    out.truncate(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_its_blocks_are() {
        let whole = bytes(7, 0, 4096);
        assert_eq!(whole[512..1024], block(7, 1));
        assert_eq!(bytes(7, 700, 900), whole[700..1600]);
        assert_ne!(block(7, 1), block(8, 1));
        assert_ne!(block(7, 1), block(7, 2));
    }
}
