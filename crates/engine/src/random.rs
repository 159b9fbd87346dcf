//! Random bytes from the system.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use zeroize::Zeroizing;

/// A new secret, wiped when dropped. On the heap, so that moving it leaves no copy behind.
pub(crate) fn secret(op: Op) -> Result<Box<Zeroizing<[u8; 32]>>, Error> {
    let mut secret = Box::new(Zeroizing::new([0; 32]));
    getrandom::fill(&mut secret[..]).map_err(|why| {
        Error::new(ErrorKind::EngineFailed, op).detail("the system gave no random bytes").because(why)
    })?;
    Ok(secret)
}
