//! LUKS2.
//!
//! ```text
//!   offset 0          header 1: binary part (4 KiB), JSON area
//!   hdr_size          header 2: the same
//!   2 * hdr_size      areas of LUKS keyslots
//!   keyslots_size on  data segment (or in another file: then this one is a detached header)
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `header.rs` | the two copies: checksums, sequence ids, which of them counts |
//! | `metadata.rs` | what the JSON says: kept as it is, and looked at through checked views |
//! | `container.rs` | opening with a passphrase; LUKS keyslots and tokens added, changed and removed; backups |
//! | `create.rs` | new containers |
//! | `reencrypt.rs` | another key for the data, in cryptsetup's own way |
//!
//! # What a crash leaves
//!
//! One copy is written and made stable, then the other. Key material is stable before the first copy names it, in an area that
//! neither copy names. So whenever the writer is killed, at least one copy is whole, and it is the old or the new one; the next
//! change begins by making both the same. An area is wiped after both copies have forgotten it: its salt is gone with them.

mod container;
mod create;
mod header;
mod metadata;
mod reencrypt;

pub use container::{Container, Opened};
pub use create::{DATA_OFFSET_DEFAULT, NewContainer};
pub use header::{CopyState, HEADER_SIZES, Header};
pub use metadata::{Digest, Keyslot, Metadata, Segment};
pub use reencrypt::{Kept, Leftovers, NewData, Others, Reencryption, Resilience};
