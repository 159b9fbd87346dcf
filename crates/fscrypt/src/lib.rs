//! Linux's fscrypt without the kernel: from a master key and a policy every derived key, identifier, IV and DUN; names; and what
//! lies encrypted on an ext4 image, read and verified.
//!
//! ```text
//!   master key    raw, or of a hardware-wrapped one: software secret + inline key
//!       |  HKDF-SHA512                                      policy   (context: policy + nonce, an xattr of each file)
//!       v                                                     |
//!   key of a file, of a mode, of dirhashes, of inode hashes <-'
//!       |
//!   contents: data unit i under the DUN of (i, inode, nonce)          names, link targets: one message under DUN of unit 0
//! ```
//!
//! - [`policy`] has the formats on disk; [`master`] derives keys; [`file`](mod@file) encrypts contents; [`names`] names and targets.
//! - [`ext4`] reads images: no crate that reads ext4 shows encrypted directories, raw extents or the context's attribute.
//! - [`image`] joins them: a tree of decrypted names and contents; [`verify`](mod@verify) asks whether all of it is as policy and
//!   key say.
//!
//! Nothing here writes, and bytes of an image never reach an assertion.
//!
//! Source: Linux 7.3, `fs/crypto/` and `Documentation/filesystems/fscrypt.rst`, throughout.
//!
//! Start reading at [`policy`], then [`master`].
#![forbid(unsafe_code)]

pub mod ext4;
pub mod file;
pub mod image;
pub mod master;
pub mod names;
pub mod policy;
pub mod verify;

pub use master::{KeyName, MasterKey};
pub use policy::{Context, Policy};
