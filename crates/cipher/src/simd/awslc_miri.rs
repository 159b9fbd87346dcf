//! What `awslc.rs` has, for Miri, which runs no C: by the library of single blocks, one after the other.
//!
//! So the tests that compare our kernels with the library are tests under Miri too, with another judge.

use crate::simd::xts::double;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256};
use std::fmt;

/// There is no memory of a library here.
pub(crate) fn allocate_as_rust_does() -> bool {
    false
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Aes256Xts,
    Aes128Cbc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Encrypt,
    Decrypt,
}

#[derive(Debug)]
pub(crate) struct Context {
    cipher: Cipher,
    direction: Direction,
}

#[derive(Debug)]
enum Cipher {
    Xts { data: Aes256, tweak: Aes256 },
    Cbc(Aes128),
}

impl Context {
    pub(crate) fn new(algorithm: Algorithm, direction: Direction, key: &[u8]) -> Self {
        let cipher = match algorithm {
            Algorithm::Aes256Xts => {
                let (data, tweak) = key.split_at(32);
                let expand = |half| Aes256::new_from_slice(half).expect("half of 64 bytes");
                Cipher::Xts { data: expand(data), tweak: expand(tweak) }
            }
            Algorithm::Aes128Cbc => Cipher::Cbc(Aes128::new_from_slice(key).expect("16 bytes")),
        };
        Self { cipher, direction }
    }

    pub(crate) fn crypt(&mut self, iv: &[u8; 16], unit: &mut [u8]) {
        let (blocks, rest) = unit.as_chunks_mut::<16>();
        assert!(rest.is_empty(), "whole blocks");
        let xor = |a: [u8; 16], b: [u8; 16]| (u128::from_le_bytes(a) ^ u128::from_le_bytes(b)).to_le_bytes();
        match &self.cipher {
            Cipher::Xts { data, tweak } => {
                let mut first = Array(*iv);
                tweak.encrypt_block(&mut first);
                let mut tweak = u128::from_le_bytes(first.0);
                for block in blocks {
                    let mut state = Array(xor(*block, tweak.to_le_bytes()));
                    match self.direction {
                        Direction::Encrypt => data.encrypt_block(&mut state),
                        Direction::Decrypt => data.decrypt_block(&mut state),
                    }
                    *block = xor(state.0, tweak.to_le_bytes());
                    tweak = double(tweak);
                }
            }
            Cipher::Cbc(cipher) => {
                let mut before = *iv;
                for block in blocks {
                    let input = *block;
                    match self.direction {
                        Direction::Encrypt => {
                            let mut state = Array(xor(input, before));
                            cipher.encrypt_block(&mut state);
                            *block = state.0;
                            before = state.0;
                        }
                        Direction::Decrypt => {
                            let mut state = Array(input);
                            cipher.decrypt_block(&mut state);
                            *block = xor(state.0, before);
                            before = input;
                        }
                    }
                }
            }
        }
    }
}

pub(crate) struct Key<const KEY_BYTES: usize> {
    algorithm: Algorithm,
    bytes: [u8; KEY_BYTES],
}

impl<const KEY_BYTES: usize> Key<KEY_BYTES> {
    pub(crate) fn new(algorithm: Algorithm, key: &[u8]) -> Self {
        Self { algorithm, bytes: key.try_into().expect("a key of the algorithm's length") }
    }

    pub(crate) fn with<R>(&self, direction: Direction, work: impl FnOnce(&mut Context) -> R) -> R {
        work(&mut Context::new(self.algorithm, direction, &self.bytes))
    }
}

impl<const KEY_BYTES: usize> fmt::Debug for Key<KEY_BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}
