//! Anti-forensic splitting (LUKS1 specification 2.4): a key is stored as many stripes, of which every one is needed.

use crate::{Hash, Random};
use std::io;
use zeroize::Zeroizing;

/// The key whose stripes `material` is.
///
/// # Panics
///
/// If `material` is not `stripes` times `key_bytes` long.
pub(crate) fn merge(material: &[u8], key_bytes: usize, stripes: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    assert_eq!(material.len(), key_bytes * stripes, "whole stripes");
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    for (index, stripe) in material.chunks_exact(key_bytes).enumerate() {
        xor(&mut key, stripe);
        if index + 1 < stripes {
            diffuse(&mut key, hash);
        }
    }
    key
}

/// Stripes of `key`: all but the last are random.
pub(crate) fn split(
    key: &[u8],
    stripes: usize,
    hash: Hash,
    random: &mut Random<'_>,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes]);
    let last = key.len() * (stripes - 1);
    random(&mut material[..last])?;
    let mut sum = Zeroizing::new(vec![0; key.len()]);
    let (random_stripes, last) = material.split_at_mut(last);
    for stripe in random_stripes.chunks_exact(key.len()) {
        xor(&mut sum, stripe);
        diffuse(&mut sum, hash);
    }
    last.copy_from_slice(&sum);
    xor(last, key);
    Ok(material)
}

fn xor(into: &mut [u8], other: &[u8]) {
    into.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

/// Each piece of the hash's length is replaced by the hash of its number and itself.
fn diffuse(block: &mut [u8], hash: Hash) {
    let mut digest = Zeroizing::new([0; 64]);
    for (index, piece) in block.chunks_mut(hash.bytes()).enumerate() {
        let number = u32::try_from(index).expect("keys are short").to_be_bytes();
        hash.digest(&[&number, piece], &mut *digest);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_split_is_merged_and_needs_every_bit(
            key in prop::collection::vec(any::<u8>(), 16..80),
            stripes in 1_usize..60,
            at in any::<prop::sample::Index>(),
            seed in any::<u8>(),
        ) {
            for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
                let mut state = seed;
                let mut random = |bytes: &mut [u8]| {
                    bytes.iter_mut().for_each(|byte| {
                        state = state.wrapping_mul(29).wrapping_add(71);
                        *byte = state;
                    });
                    Ok(())
                };
                let mut material = split(&key, stripes, hash, &mut random).unwrap();
                prop_assert_eq!(&*merge(&material, key.len(), stripes, hash), &key);
                let at = at.index(material.len());
                material[at] ^= 1;
                prop_assert_ne!(&*merge(&material, key.len(), stripes, hash), &key);
            }
        }
    }
}
