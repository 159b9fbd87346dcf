//! Backings: where the ciphertext of a volume is stored.
//!
//! ```text
//!   BackingSpec --open--> Arc<dyn Backing>      core::backing::Backing is the bargain
//!       File            file.rs   regular files and block devices
//!                       stable.rs what was lost stays lost: failed flushes are never forgotten
//!                       lock.rs   one writer at a time, and who it is
//!                       create.rs new files, whole or not at all
//!                       window.rs a part of another backing
//!                       testing/  memory, injected faults, power cuts, and the conformance suite
//! ```
//!
//! A new kind of backing is one file here, one variant of [`BackingSpec`] and its arm in [`open`].

mod create;
mod file;
mod lock;
mod stable;
pub mod testing;
#[cfg(test)]
mod tests;
mod window;

pub use create::create_file;
pub use file::FileBacking;
pub use window::Window;

use inlinecrypt_core::backing::{Access, Backing};
use inlinecrypt_core::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Names a backing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackingSpec {
    /// A regular file or block device at this path.
    File(PathBuf),
}

impl fmt::Display for BackingSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl<P: Into<PathBuf>> From<P> for BackingSpec {
    fn from(path: P) -> Self {
        Self::File(path.into())
    }
}

/// How to open a backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Whether it is to be written.
    pub access: Access,
    /// Whether the system may keep a second copy of it in memory.
    pub caching: Caching,
    /// What becomes of discards.
    pub discard: DiscardPolicy,
}

impl Default for OpenOptions {
    /// Read-write, through the page cache, discards passed down.
    fn default() -> Self {
        Self { access: Access::ReadWrite, caching: Caching::PageCache, discard: DiscardPolicy::PassDown }
    }
}

/// Whether the system keeps a copy of the backing in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// It may: reads and writes go through the page cache.
    PageCache,
    /// It may not: `O_DIRECT`. Requests must then be aligned, and not every filesystem can do it.
    Direct,
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardPolicy {
    /// They give storage back, if the backing can. Whoever sees the backing then learns which parts are in use.
    PassDown,
    /// They are not offered.
    Ignore,
}

/// Opens a backing and locks it against other servers: against all for writing, against writers for reading.
///
/// # Errors
///
/// [`NotFound`](inlinecrypt_core::error::ErrorKind::NotFound) if there is none,
/// [`Permission`](inlinecrypt_core::error::ErrorKind::Permission) if it may not be used so,
/// [`Busy`](inlinecrypt_core::error::ErrorKind::Busy) if somebody else uses it, with his name where it can be found,
/// [`Invalid`](inlinecrypt_core::error::ErrorKind::Invalid) if it is not something to store data in, or empty,
/// [`Unsupported`](inlinecrypt_core::error::ErrorKind::Unsupported) if it cannot do direct I/O but shall,
/// [`Backing`](inlinecrypt_core::error::ErrorKind::Backing) else.
pub fn open(spec: &BackingSpec, options: OpenOptions) -> Result<Arc<dyn Backing>, Error> {
    match spec {
        BackingSpec::File(path) => Ok(Arc::new(FileBacking::open(path, options)?)),
    }
}

/// How messages name a process: number and command.
pub(crate) fn process_name(pid: u32) -> String {
    lock::Process::of(pid).to_string()
}
