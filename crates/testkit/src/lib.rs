//! Test support: an NBD client of its own, what a disk must hold, what a process has in memory, real programs or a loud skip,
//! servers and mounts that are gone with the test.
//!
//! Depends on none of our other crates, so that a misunderstanding of the protocol in them is not shared here.
#![forbid(unsafe_code)]

pub mod memory;
pub mod nbd;
pub mod pattern;
pub mod process;
pub mod shadow;
pub mod tools;
pub mod undo;

pub use nbd::{Block, Client, Export, NbdError, Reply};
pub use process::ServerProcess;
pub use shadow::{Shadow, Version};
pub use tools::{require_tool, temp_dir};
