//! AES-128-CBC with ESSIV: `essiv(cbc(aes),sha256)` of Linux.
//!
//! ```text
//!   IV of a unit = AES-256-encrypt(key: SHA-256(the 16-byte key), block: DUN, little-endian, low 16 bytes)
//!   C(0) = E(P(0) ^ IV)      C(j+1) = E(P(j+1) ^ C(j))
//! ```
//!
//! Source: Linux `crypto/essiv.c`, and `Documentation/filesystems/fscrypt.rst`, "Contents encryption"; CBC: SP 800-38A
//! 6.2.
//!
//! CBC encryption of one unit cannot use more than one AES pipeline: each block waits for the one before. Units do
//! not wait for each other, so encryption goes through [`UNITS`] of them in step. Decryption has no such chain; AWS-LC
//! does it unit by unit.

use crate::simd::awslc;
use crate::unit::{assert_promise, low_128_bits};
use crate::{Dun, Mode, UnitCipher};
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use aes::{Aes128Enc, Aes256Enc, Block};
use sha2::{Digest, Sha256};
use std::fmt;
use zeroize::Zeroizing;

/// AES-128-CBC-ESSIV with a key of 16 bytes.
pub(crate) fn aes_128(key: &[u8]) -> Box<dyn UnitCipher> {
    let mut salt = Zeroizing::new([0; 32]);
    Sha256::new_with_prefix(key).finalize_into((&mut *salt).into());
    Box::new(Aes128CbcEssiv {
        cbc: awslc::Key::new(awslc::Algorithm::Aes128Cbc, key),
        data: Aes128Enc::new_from_slice(key).expect("length checked by ModeInfo::expand"),
        iv: Aes256Enc::new(&Array(*salt)),
    })
}

/// Data units that are encrypted in step. More would hide more of AES's latency, but units start a multiple of 4096
/// bytes apart, so that their blocks compete for one set of the CPU's first-level cache, and that has 8 to 12 ways.
const UNITS: usize = 8;

/// Below this many units in a call, AWS-LC's single chain is faster than ours in step (measured with
/// `benches/cipher.rs`).
const UNITS_IN_STEP_MIN: usize = 4;

struct Aes128CbcEssiv {
    cbc: awslc::Key<16>,
    /// The same key as `cbc`, for encryption in step.
    data: Aes128Enc,
    iv: Aes256Enc,
}

impl Aes128CbcEssiv {
    /// The IVs of the units from `low` on.
    fn ivs(&self, low: u128, ivs: &mut [Block]) {
        for (iv, dun) in ivs.iter_mut().zip((0..).map(|i| low.wrapping_add(i))) {
            iv.0 = dun.to_le_bytes();
        }
        self.iv.encrypt_blocks(ivs);
    }
}

impl UnitCipher for Aes128CbcEssiv {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Aes128CbcEssiv, unit_bytes, data.len());
        let mut low = low_128_bits(first);
        for run in data.chunks_mut(UNITS * unit_bytes) {
            let units = run.len() / unit_bytes;
            let mut chains = [Block::default(); UNITS];
            let chains = &mut chains[..units];
            self.ivs(low, chains);
            if units < UNITS_IN_STEP_MIN {
                self.cbc.with(awslc::Direction::Encrypt, |context| {
                    for (unit, iv) in run.chunks_exact_mut(unit_bytes).zip(&*chains) {
                        context.crypt(&iv.0, unit);
                    }
                });
            } else {
                encrypt_in_step(&self.data, unit_bytes, run, chains);
            }
            low = low.wrapping_add(UNITS as u128);
        }
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Aes128CbcEssiv, unit_bytes, data.len());
        self.cbc.with(awslc::Direction::Decrypt, |context| {
            let mut low = low_128_bits(first);
            for run in data.chunks_mut(UNITS * unit_bytes) {
                let mut ivs = [Block::default(); UNITS];
                let ivs = &mut ivs[..run.len() / unit_bytes];
                self.ivs(low, ivs);
                for (unit, iv) in run.chunks_exact_mut(unit_bytes).zip(ivs) {
                    context.crypt(&iv.0, unit);
                }
                low = low.wrapping_add(UNITS as u128);
            }
        });
    }
}

impl fmt::Debug for Aes128CbcEssiv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cbc: _, data: _, iv: _ } = self;
        f.debug_struct("Aes128CbcEssiv").finish_non_exhaustive()
    }
}

/// CBC encryption of the units of `run`, one block of each at a time. `chains` holds the units' IVs at first, then
/// their latest ciphertext blocks.
fn encrypt_in_step(aes: &Aes128Enc, unit_bytes: usize, run: &mut [u8], chains: &mut [Block]) {
    for at in (0..unit_bytes).step_by(16) {
        for (chain, unit) in chains.iter_mut().zip(run.chunks_exact(unit_bytes)) {
            let plain: [u8; 16] = unit[at..at + 16].try_into().expect("16 bytes");
            chain.0 = (u128::from_le_bytes(chain.0) ^ u128::from_le_bytes(plain)).to_le_bytes();
        }
        aes.encrypt_blocks(chains);
        for (chain, unit) in chains.iter().zip(run.chunks_exact_mut(unit_bytes)) {
            unit[at..at + 16].copy_from_slice(chain);
        }
    }
}
