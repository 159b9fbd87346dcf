//! Engines in a process of their own: whoever reads the memory of the process that serves clients finds no key in it.
//!
//! ```text
//!   host process                                     engine process (process.rs), in its cage (sandbox.rs)
//!     IsolatedEngine  (an Engine like any other)       software or ice; keyslots, raw keys and wrapping keys in secret memory
//!       program, evict, ladder -- proto.rs ---------->   control thread
//!       crypt ------------------- ring.rs ----------->   lane threads, on data in shared memory
//!     watch thread: starts the process, and again when it ends
//! ```
//!
//! If the engine process ends, the watch thread starts another, opens the root again and repeats what was decided; keyslots are
//! found empty and programmed again by the framework; wrapped keys are prepared again from their long-term form, raw ones got
//! again from where they came, if that is possible without asking. What was in flight is put back as it was (ring.rs) and handed
//! in again. Clients see a pause.
//!
//! Start reading at [`client`], then `ring.rs`, then `process.rs`. [`realtime`] is a matter of its own.

pub mod client;
mod launch;
pub mod process;
pub(crate) mod proto;
pub mod realtime;
mod ring;
mod sandbox;

/// The names of the system calls that an engine process may make, each with the code that needs it.
#[doc(hidden)]
pub fn allowed_system_calls() -> impl Iterator<Item = (&'static str, &'static str)> {
    sandbox::allowed()
}

#[doc(hidden)]
pub use process::fuzzing;

pub use client::{Isolated, IsolatedEngine, Options, start};
pub use realtime::LanePriority;
/// The first argument of a program that is to become an engine process: it calls [`process::run`] then, before anything else,
/// with the [`LanePriority`] of the arguments behind it.
pub const PROCESS_VERB: &str = "engine-process";

pub use launch::{Launched, Launcher, ProcessLauncher, SocketLauncher, ThreadLauncher};
