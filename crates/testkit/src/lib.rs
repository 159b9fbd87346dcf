//! Test support: an NBD client of its own, real programs or a loud skip, servers that stop by themselves.
//!
//! Depends on none of our other crates, so that a misunderstanding of the protocol in them is not shared here.
#![forbid(unsafe_code)]

pub mod nbd;
pub mod pattern;
pub mod process;
pub mod tools;

pub use nbd::{Block, Client, Export, NbdError, Reply};
pub use process::ServerProcess;
pub use tools::{require_tool, temp_dir};
