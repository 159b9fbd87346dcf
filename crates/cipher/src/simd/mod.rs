//! The one place of this crate where `unsafe` is allowed: calls into AWS-LC, and vector instructions.
//!
//! Each file has a safe surface that cannot be misused; what is vectorised has a portable twin and a test that the
//! two agree.

pub(crate) mod aes;
pub(crate) mod awslc;
pub(crate) mod nh;
