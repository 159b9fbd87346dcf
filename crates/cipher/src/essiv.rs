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
//! Encryption takes several data units in step where the CPU has code for that (`simd::cbc`); the rest, and all
//! decryption, is AWS-LC's, unit by unit.

use crate::simd::{awslc, cbc};
use crate::unit::{assert_promise, low_128_bits};
use crate::{Dun, Mode, UnitCipher};
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes256Enc, Block};
use sha2::{Digest, Sha256};
use std::fmt;
use zeroize::Zeroizing;

/// AES-128-CBC-ESSIV with a key of 16 bytes.
pub(crate) fn aes_128(key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Aes128CbcEssiv::new(key.try_into().expect("length checked by ModeInfo::expand")))
}

/// Data units whose IVs are made together: AES takes several blocks at once faster than one by one.
const UNITS: usize = 64;

const _: () = assert!(UNITS.is_multiple_of(cbc::LANES_MAX), "no units left over in the midst of a long call");

struct Aes128CbcEssiv {
    cbc: awslc::Key<16>,
    /// The same key, for encryption in step. `None` if this CPU has no code for it.
    in_step: Option<cbc::Key>,
    iv: Aes256Enc,
}

impl Aes128CbcEssiv {
    fn new(key: &[u8; 16]) -> Self {
        let mut salt = Zeroizing::new([0; 32]);
        Sha256::new_with_prefix(key).finalize_into((&mut *salt).into());
        Self {
            cbc: awslc::Key::new(awslc::Algorithm::Aes128Cbc, key),
            in_step: cbc::Key::new(key),
            iv: Aes256Enc::new((&*salt).into()),
        }
    }

    /// Calls `crypt` for runs of up to [`UNITS`] data units, with their IVs.
    fn for_runs(
        &self,
        first: Dun,
        unit_bytes: usize,
        data: &mut [u8],
        mut crypt: impl FnMut(&[[u8; 16]], &mut [u8]),
    ) {
        assert_promise(Mode::Aes128CbcEssiv, unit_bytes, data.len());
        let mut low = low_128_bits(first);
        for run in data.chunks_mut(UNITS * unit_bytes) {
            let mut ivs = [Block::default(); UNITS];
            let ivs = &mut ivs[..run.len() / unit_bytes];
            for iv in &mut *ivs {
                iv.0 = low.to_le_bytes();
                low = low.wrapping_add(1);
            }
            self.iv.encrypt_blocks(ivs);
            crypt(Block::cast_slice_to_core(ivs), run);
        }
    }
}

impl UnitCipher for Aes128CbcEssiv {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        let Some(in_step) = &self.in_step else {
            self.cbc.with(awslc::Direction::Encrypt, |context| {
                self.for_runs(first, unit_bytes, data, |ivs, run| crypt_units(context, unit_bytes, ivs, run));
            });
            return;
        };
        self.for_runs(first, unit_bytes, data, |ivs, run| {
            let done = in_step.encrypt(ivs, unit_bytes, run);
            // Only a call's last run leaves units over, so a context is borrowed once at the most.
            if done < ivs.len() {
                self.cbc.with(awslc::Direction::Encrypt, |context| {
                    crypt_units(context, unit_bytes, &ivs[done..], &mut run[done * unit_bytes..]);
                });
            }
        });
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.cbc.with(awslc::Direction::Decrypt, |context| {
            self.for_runs(first, unit_bytes, data, |ivs, run| crypt_units(context, unit_bytes, ivs, run));
        });
    }
}

/// One unit after the other, through AWS-LC.
fn crypt_units(context: &mut awslc::Context, unit_bytes: usize, ivs: &[[u8; 16]], units: &mut [u8]) {
    for (unit, iv) in units.chunks_exact_mut(unit_bytes).zip(ivs) {
        context.crypt(iv, unit);
    }
}

impl fmt::Debug for Aes128CbcEssiv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cbc: _, in_step: _, iv: _ } = self;
        f.debug_struct("Aes128CbcEssiv").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_without_code_for_it_gets_the_same_bytes() {
        let key = [3; 16];
        let with = Aes128CbcEssiv::new(&key);
        let without = Aes128CbcEssiv { in_step: None, ..Aes128CbcEssiv::new(&key) };
        for units in [1, 4, 7, 8, 64, 65, 150] {
            let dun = Dun::from_limbs([u64::MAX - 3, 0, 0, 0]);
            let (mut one, mut other) = (vec![5; units * 512], vec![5; units * 512]);
            with.encrypt(dun, 512, &mut one);
            without.encrypt(dun, 512, &mut other);
            assert!(one == other, "{units} units");
        }
    }
}
