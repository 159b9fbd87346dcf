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
//! Our own kernels decrypt many blocks of a unit at once, and encrypt several units in step (`simd::aes`); for a CPU
//! without AES instructions AWS-LC does both, unit by unit.

use crate::simd::aes::{CbcKey, Kernel};
use crate::simd::awslc;
use crate::unit::{assert_promise, low_128_bits};
use crate::{Dun, Mode, UnitCipher};
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes256Enc, Block};
use sha2::{Digest, Sha256};
use std::fmt;
use zeroize::Zeroizing;

/// AES-128-CBC-ESSIV with a key of 16 bytes.
pub(crate) fn aes_128(key: &[u8]) -> Box<dyn UnitCipher> {
    match Kernel::best() {
        Some(kernel) => aes_128_by(kernel, key),
        None => aes_128_by_library(key),
    }
}

/// The same by one of our kernels.
pub(crate) fn aes_128_by(kernel: Kernel, key: &[u8]) -> Box<dyn UnitCipher> {
    let key = key.try_into().expect("length checked by ModeInfo::expand");
    Box::new(Aes128CbcEssiv::new(key, Cbc::Kernel(CbcKey::new(kernel, key))))
}

/// The same by AWS-LC, for CPUs without AES instructions and for comparison.
pub(crate) fn aes_128_by_library(key: &[u8]) -> Box<dyn UnitCipher> {
    let key = key.try_into().expect("length checked by ModeInfo::expand");
    Box::new(Aes128CbcEssiv::new(
        key,
        Cbc::Library(Box::new(awslc::Key::new(awslc::Algorithm::Aes128Cbc, key))),
    ))
}

/// Data units whose IVs are made together: AES takes several blocks at once faster than one by one. A multiple of what
/// goes in step, so that no units are left over in the midst of a long call.
const UNITS: usize = 64;

struct Aes128CbcEssiv {
    cbc: Cbc,
    iv: Aes256Enc,
}

/// Who computes CBC.
#[derive(Debug)]
enum Cbc {
    Kernel(Box<CbcKey>),
    Library(Box<awslc::Key<16>>),
}

impl Aes128CbcEssiv {
    fn new(key: &[u8; 16], cbc: Cbc) -> Self {
        let mut salt = Zeroizing::new([0; 32]);
        Sha256::new_with_prefix(key).finalize_into((&mut *salt).into());
        Self { cbc, iv: Aes256Enc::new((&*salt).into()) }
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
        match &self.cbc {
            Cbc::Kernel(key) => {
                self.for_runs(first, unit_bytes, data, |ivs, run| key.encrypt(ivs, unit_bytes, run));
            }
            Cbc::Library(key) => key.with(awslc::Direction::Encrypt, |context| {
                self.for_runs(first, unit_bytes, data, |ivs, run| crypt_units(context, unit_bytes, ivs, run));
            }),
        }
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        match &self.cbc {
            Cbc::Kernel(key) => {
                self.for_runs(first, unit_bytes, data, |ivs, run| key.decrypt(ivs, unit_bytes, run));
            }
            Cbc::Library(key) => key.with(awslc::Direction::Decrypt, |context| {
                self.for_runs(first, unit_bytes, data, |ivs, run| crypt_units(context, unit_bytes, ivs, run));
            }),
        }
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
        let Self { cbc, iv: _ } = self;
        f.debug_struct("Aes128CbcEssiv").field("cbc", cbc).finish_non_exhaustive()
    }
}
