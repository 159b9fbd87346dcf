//! The NBD export: fixed newstyle handshake, TLS, structured replies, allocation status.
//!
//! ```text
//!   accept --> negotiate --[STARTTLS]--> tls --> negotiate --[GO]--> session --> close
//!                  |                                 |                  |
//!               wire (pure)                       wire            wire, execute --> Disk
//! ```
//!
//! One thread serves a connection and blocks: it was measured that waking another thread for a request costs more than
//! everything else. Requests that came together are answered together. Only the pieces of long requests go to a second
//! thread, the helper, while the machine has a core for it: it encrypts and writes one piece while the next is received.
//! Where the disk itself waits and does many transfers at once, small requests that came together wait together (direct I/O:
//! one call of io_uring), and the pieces of long ones in a few workers. For other media that wait (a cold page cache),
//! [`ServerOptions::workers`] gives a connection workers for all its requests.
//!
//! Invariants:
//!
//! - What a client sends is an error at worst, never a panic, and never more memory than one request's piece.
//! - A client that stalls holds its own threads and at most one large buffer for each; everybody else goes on.
//! - A reply with data is sent only after that data was read without error, but for the later pieces of long reads in
//!   simple replies, where the protocol knows only one answer to a late error: the connection is closed.
//!
//! Start reading at [`Session::run`](session::Session::run).

pub mod activity;
pub mod cores;
mod execute;
mod helper;
mod hold;
mod lend;
pub mod negotiate;
mod parts;
mod place;
mod reply;
mod request;
mod server;
pub mod session;
mod status;
pub mod stream;
mod tls;
pub mod wire;
mod workers;

pub use hold::{Handed, Held};
pub use server::{ExportStatus, NbdServer, ServerOptions, ServerStatus, Stopped};
pub use status::NbdError;
pub use tls::{ClientCertificates, TlsFiles, TlsMode, TlsSetup};
