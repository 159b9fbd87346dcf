//! Adiantum with XChaCha12 and AES-256: `adiantum(xchacha12,aes)` of Linux.
//!
//! A wide-block mode: every ciphertext bit of a data unit depends on every plaintext bit of it. The unit is split into
//! a long left part and the last 16 bytes:
//!
//! ```text
//!        left                      right
//!          |------- hash --- + ----->|
//!          |                     AES-256
//!      XChaCha12 <----- nonce -------|
//!          |------- hash --- - ----->|
//! ```
//!
//! where + and - are modulo 2^128, little-endian, and the hash is the sum of two:
//!
//! - Poly1305 of the left part's length in bits (16 bytes) and the IV (32 bytes: the whole DUN);
//! - Poly1305, under another key, of the left part's NH hashes: 32 bytes for each 1024 of it.
//!
//! Both leave out Poly1305's final addition of a one-time key.
//!
//! Source: Crowley and Biggers, "Adiantum: length-preserving encryption for entry-level processors" (IACR ToSC 2018/4),
//! sections 2 to 4 and 6.4; Linux `crypto/adiantum.c` and `crypto/nhpoly1305.c` for the sizes.

use crate::names::{MessageCipher, assert_message};
use crate::poly1305;
use crate::simd::nh;
use crate::unit::assert_promise;
use crate::{Dun, Mode, UnitCipher};
use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, KeyIvInit, StreamCipher};
use chacha20::XChaCha12;
use std::fmt;
use zeroize::Zeroizing;

/// Adiantum with a key of 32 bytes.
pub(crate) fn xchacha12_aes(key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Adiantum::new(key))
}

/// The same for messages of any length.
pub(crate) fn xchacha12_aes_messages(key: &[u8]) -> Box<dyn MessageCipher> {
    Box::new(Adiantum::new(key))
}

/// Length of the right part: one AES block.
const RIGHT_BYTES: usize = 16;
/// Length of a Poly1305 key without its one-time half.
const POLY_KEY_BYTES: usize = 16;
/// What is derived from the key: AES-256's, the two Poly1305 keys, and NH's.
const DERIVED_BYTES: usize = 32 + POLY_KEY_BYTES + POLY_KEY_BYTES + nh::KEY_BYTES;

struct Adiantum {
    stream_key: Zeroizing<[u8; 32]>,
    block: Aes256,
    header_hash: poly1305::Key,
    message_hash: poly1305::Key,
    nh: Box<nh::Key>,
}

impl Adiantum {
    fn new(key: &[u8]) -> Self {
        let stream_key =
            Zeroizing::new(<[u8; 32]>::try_from(key).expect("length checked by ModeInfo::expand"));
        // Linux crypto/adiantum.c, adiantum_setkey: the derived keys are the key stream under the nonce 1.
        let mut nonce = [0; 24];
        nonce[0] = 1;
        let mut derived = Zeroizing::new([0; DERIVED_BYTES]);
        XChaCha12::new(&Array(*stream_key), &Array(nonce)).apply_keystream(&mut *derived);
        let (block_key, rest) = derived.split_at(32);
        let (header_key, rest) =
            rest.split_first_chunk().expect("DERIVED_BYTES has room for two Poly1305 keys");
        let (message_key, nh_key) =
            rest.split_first_chunk().expect("DERIVED_BYTES has room for two Poly1305 keys");
        Self {
            block: Aes256::new_from_slice(block_key).expect("split off 32 bytes"),
            header_hash: poly1305::Key::new(header_key),
            message_hash: poly1305::Key::new(message_key),
            nh: nh::Key::new(nh_key),
            stream_key,
        }
    }

    /// The hash of left length and IV, which both hash steps add.
    fn hash_header(&self, left_bytes: usize, dun: Dun) -> u128 {
        let iv = dun.to_le_bytes();
        let (iv, _) = iv.as_chunks();
        self.header_hash.hash([(left_bytes as u128 * 8).to_le_bytes(), iv[0], iv[1]])
    }

    /// The hash of the left part.
    fn hash_message(&self, left: &[u8]) -> u128 {
        if !left.len().is_multiple_of(16) {
            // Only names come here. NH takes words of 16 bytes; zeroes fill up the last (Linux crypto/nhpoly1305.c).
            let mut padded = Zeroizing::new(vec![0; left.len().next_multiple_of(16)]);
            padded[..left.len()].copy_from_slice(left);
            return self.hash_message(&padded);
        }
        self.message_hash.hash(left.chunks(nh::MESSAGE_BYTES_MAX).flat_map(|chunk| self.nh.hash(chunk)))
    }

    /// XChaCha12 over the left part, its nonce made from the right part between the hash steps.
    fn apply_stream(&self, middle: [u8; 16], left: &mut [u8]) {
        // Linux crypto/adiantum.c, adiantum_crypt: the nonce is those 16 bytes, then a one in 8 bytes.
        let mut nonce = [0; 24];
        nonce[..16].copy_from_slice(&middle);
        nonce[16] = 1;
        XChaCha12::new(&Array(*self.stream_key), &Array(nonce)).apply_keystream(left);
    }

    fn encrypt_unit(&self, dun: Dun, unit: &mut [u8]) {
        let (left, right) = split(unit);
        let header = self.hash_header(left.len(), dun);
        let middle = u128::from_le_bytes(*right).wrapping_add(header).wrapping_add(self.hash_message(left));
        let mut block = Array(middle.to_le_bytes());
        self.block.encrypt_block(&mut block);
        self.apply_stream(block.0, left);
        let middle = u128::from_le_bytes(block.0);
        *right = middle.wrapping_sub(header).wrapping_sub(self.hash_message(left)).to_le_bytes();
    }

    fn decrypt_unit(&self, dun: Dun, unit: &mut [u8]) {
        let (left, right) = split(unit);
        let header = self.hash_header(left.len(), dun);
        let middle = u128::from_le_bytes(*right).wrapping_add(header).wrapping_add(self.hash_message(left));
        let mut block = Array(middle.to_le_bytes());
        self.apply_stream(block.0, left);
        self.block.decrypt_block(&mut block);
        let middle = u128::from_le_bytes(block.0);
        *right = middle.wrapping_sub(header).wrapping_sub(self.hash_message(left)).to_le_bytes();
    }

    fn crypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8], crypt_unit: fn(&Self, Dun, &mut [u8])) {
        assert_promise(Mode::Adiantum, unit_bytes, data.len());
        let mut dun = first;
        for unit in data.chunks_exact_mut(unit_bytes) {
            crypt_unit(self, dun, unit);
            dun = dun.wrapping_add(1);
        }
    }
}

impl UnitCipher for Adiantum {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(first, unit_bytes, data, Self::encrypt_unit);
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(first, unit_bytes, data, Self::decrypt_unit);
    }
}

impl MessageCipher for Adiantum {
    fn encrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        self.encrypt_unit(dun, message);
    }

    fn decrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        self.decrypt_unit(dun, message);
    }
}

impl fmt::Debug for Adiantum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream_key: _, block: _, header_hash: _, message_hash: _, nh: _ } = self;
        f.debug_struct("Adiantum").finish_non_exhaustive()
    }
}

/// A unit's left part and its last 16 bytes.
fn split(unit: &mut [u8]) -> (&mut [u8], &mut [u8; RIGHT_BYTES]) {
    unit.split_last_chunk_mut().expect("a data unit has 16 bytes or more")
}
