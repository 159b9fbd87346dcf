//! Without vector instructions of ours: the library's ChaCha12, and NH by its definition.

use super::{StreamKeys, Streams};
use chacha20::cipher::{Array, KeyIvInit, StreamCipher};
use chacha20::{ChaCha12, R12, hchacha};
use zeroize::{Zeroize, Zeroizing};

pub(super) use super::nh::sums as nh_sums;

pub(super) fn stream_keys(key: &[u8; 32], nonces: &[[u8; 16]], keys: &mut StreamKeys) {
    for (unit, nonce) in nonces.iter().enumerate() {
        let mut derived = hchacha::<R12>(&Array(*key), &Array(*nonce));
        for (row, word) in keys.rows.iter_mut().zip(derived.0.as_chunks::<4>().0) {
            row[4 * unit..][..4].copy_from_slice(word);
        }
        derived.zeroize();
    }
}

pub(super) fn apply_streams(streams: &Streams<'_>, units: &mut [u8]) {
    let Streams { keys, first_unit, unit_bytes } = *streams;
    // Linux crypto/adiantum.c, adiantum_crypt: the rest of the nonce is a one, in 8 bytes.
    let nonce = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    for (unit, number) in units.chunks_exact_mut(unit_bytes).zip(first_unit..) {
        let mut key = Zeroizing::new([0; 32]);
        for (word, row) in key.as_chunks_mut::<4>().0.iter_mut().zip(&keys.rows) {
            word.copy_from_slice(&row[4 * number..][..4]);
        }
        let (left, _) = unit.split_at_mut(unit_bytes - 16);
        ChaCha12::new(&Array(*key), &Array(nonce)).apply_keystream(left);
    }
}
