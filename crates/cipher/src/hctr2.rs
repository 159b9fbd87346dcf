//! HCTR2 with AES-256: `hctr2(aes)` of Linux.
//!
//! A wide-block mode: every ciphertext bit depends on every plaintext bit. The message is split into its first 16 bytes M and the
//! rest N:
//!
//! ```text
//!        M                    N
//!        + <------ hash ------|
//!      AES-256, S = in ^ out ^ L
//!        |        XCTR, from S --> +
//!        + <------ hash ------|
//! ```
//!
//! where + is XOR, and the hash is POLYVAL, under the key AES(0), of the lengths, the IV (32 bytes: the whole DUN) and that part
//! of the message; L is AES(1). XCTR's block i, from 1 on, is AES(S ^ i). Numbers are little-endian.
//!
//! Source: Crowley, Huckleberry and Biggers, "Length-preserving encryption with HCTR2" (IACR ePrint 2021/1441), section 3;
//! Linux `crypto/hctr2.c` for the length of the IV. No crate of HCTR2 is kept up (`hctr2` 0.2 needs a nightly compiler and
//! two generations old ciphers), so the mode is ours and AES and POLYVAL are RustCrypto's.

use crate::Dun;
use crate::names::{MessageCipher, assert_message};
use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use std::fmt;

/// AES-256-HCTR2 with a key of 32 bytes.
pub(crate) fn aes_256(key: &[u8]) -> Box<dyn MessageCipher> {
    Box::new(Hctr2::new(key))
}

struct Hctr2 {
    block: Aes256,
    hash: Polyval,
    l: u128,
}

impl Hctr2 {
    fn new(key: &[u8]) -> Self {
        let block = Aes256::new_from_slice(key).expect("length checked by NamesMode::expand");
        let encrypt = |number: u128| {
            let mut data = Array(number.to_le_bytes());
            block.encrypt_block(&mut data);
            data
        };
        let (hash, l) = (Polyval::new(&encrypt(0)), u128::from_le_bytes(encrypt(1).0));
        Self { hash, l, block }
    }

    /// The hash of `tweak` and `rest`.
    fn hash(&self, tweak: &[u8], rest: &[u8]) -> u128 {
        let (blocks, end) = rest.as_chunks::<16>();
        // ePrint 2021/1441, section 3: twice the tweak's bits plus 2 if the message ends with a block, else plus 3.
        let lengths = tweak.len() as u128 * 16 + if end.is_empty() { 2 } else { 3 };
        let mut hash = self.hash.clone();
        hash.update(&[Array(lengths.to_le_bytes())]);
        hash.update_padded(tweak);
        for block in blocks {
            hash.update(&[Array(*block)]);
        }
        if !end.is_empty() {
            let mut last = [0; 16];
            last[..end.len()].copy_from_slice(end);
            last[end.len()] = 1;
            hash.update(&[Array(last)]);
        }
        u128::from_le_bytes(hash.finalize().into())
    }

    /// XORs the key stream from `s` onto `data`.
    fn xctr(&self, s: u128, data: &mut [u8]) {
        for (number, chunk) in (1_u128..).zip(data.chunks_mut(16)) {
            let mut stream = Array((s ^ number).to_le_bytes());
            self.block.encrypt_block(&mut stream);
            for (byte, stream) in chunk.iter_mut().zip(stream) {
                *byte ^= stream;
            }
        }
    }

    fn crypt(&self, tweak: &[u8], message: &mut [u8], crypt_block: impl Fn(&Aes256, &mut aes::Block)) {
        let (first, rest) = message.split_first_chunk_mut::<16>().expect("a message has 16 bytes or more");
        let input = u128::from_le_bytes(*first) ^ self.hash(tweak, rest);
        let mut block = Array(input.to_le_bytes());
        crypt_block(&self.block, &mut block);
        let output = u128::from_le_bytes(block.0);
        self.xctr(input ^ output ^ self.l, rest);
        *first = (output ^ self.hash(tweak, rest)).to_le_bytes();
    }

    fn encrypt_message(&self, tweak: &[u8], message: &mut [u8]) {
        self.crypt(tweak, message, |aes, block| aes.encrypt_block(block));
    }

    fn decrypt_message(&self, tweak: &[u8], message: &mut [u8]) {
        self.crypt(tweak, message, |aes, block| aes.decrypt_block(block));
    }
}

impl MessageCipher for Hctr2 {
    fn encrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        self.encrypt_message(&dun.to_le_bytes(), message);
    }

    fn decrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        self.decrypt_message(&dun.to_le_bytes(), message);
    }
}

impl fmt::Debug for Hctr2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block: _, hash: _, l: _ } = self;
        f.debug_struct("Hctr2").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// google/hctr2 at 1913bddafea9797108446d4284a1e3f8e43a1b5a, `HCTR2_AES256.json`: key, plaintext, ciphertext; the tweak is
    /// empty. Those with a tweak of 32 bytes are in `tests/names.rs`.
    const EMPTY_TWEAK: [[&str; 3]; 4] = [
        [
            "7fc7152ae1f5fda4176769aec92bba82a314e7cfadfd8540da7b7d24bdf17d07",
            "9be382c65ac19fad4659b80bacc857a0",
            "596a76ff906fbe9b792767778fed2361",
        ],
        [
            "93ea527d3af227fc39a45851f4e0fda3d790112f8bd7ecaf583d93980800decd",
            "84ece276218ef95b3909227107a9d89192",
            "8e6816ce7b66973882fcb55200bb784fdb",
        ],
        [
            "4260244fcf1dc13d3132cb3fb7a49c7b88e575bd726d052a6a5cd7264ad24a7a",
            "7912c8f77406549a2d23df49a163046a3f7990b3da30b94395043a8a8fba19",
            "d51f77959d19eae5ef71a43c0fa16667d833c31f642c5ec9ebeaa046a5325e",
        ],
        [
            "237b361ac1ff51118f8c8aa571924b36b81cdece0fa879734ac251650489f93b",
            "d3ab7a35b2396a4211e0eba57f2c6001ede0e4014746d83fa0e35e3db0588eb8f351c2ad89aa50e385aaaf5c266a56fb",
            "9305214b337a9d451ef12cb28ab19777b7b0b58209cadb9a8e5a74b86b05446946c67fbf0c77394697088a0ba2eeb5ca",
        ],
    ];

    #[test]
    fn known_answers_without_a_tweak() {
        for row in EMPTY_TWEAK {
            let [key, plaintext, ciphertext] = row.map(|digits| hex::decode(digits).unwrap());
            let cipher = Hctr2::new(&key);
            let mut data = plaintext.clone();
            cipher.encrypt_message(&[], &mut data);
            assert_eq!(data, ciphertext);
            cipher.decrypt_message(&[], &mut data);
            assert_eq!(data, plaintext);
        }
    }
}
