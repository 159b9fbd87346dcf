//! The one place of this crate where `unsafe` is allowed: calls into AWS-LC, and vector instructions.
//!
//! Each file has a safe surface that cannot be misused; what is vectorised has a portable twin and a test that the
//! two agree. `aes`, `sm4` and `adiantum` each have kernels, one for each kind of registers; `width` and `xts` are what
//! these share.

pub(crate) mod adiantum;
pub(crate) mod aes;
// Miri runs no C.
#[cfg_attr(miri, path = "awslc_miri.rs")]
pub(crate) mod awslc;
#[cfg(test)]
mod requests;
#[cfg_attr(not(target_arch = "x86_64"), allow(unused, unreachable_code, reason = "no kernel there"))]
pub(crate) mod sm4;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(unused, reason = "no kernel there")
)]
mod width;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(unused, reason = "no kernel there")
)]
pub(crate) mod xts;

use zeroize::Zeroize;

/// Zeroes, sixteen bytes at a time: byte by byte takes longer than a key schedule.
fn wipe(bytes: &mut [u8]) {
    // SAFETY: any bytes make a `u128`, and any `u128` makes bytes.
    let (before, words, after) = unsafe { bytes.align_to_mut::<u128>() };
    before.zeroize();
    words.zeroize();
    after.zeroize();
}
