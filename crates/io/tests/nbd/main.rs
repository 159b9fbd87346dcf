//! The NBD export as its clients see it: a client written apart from it, hostile ones, TLS, and real programs.

mod handshake;
mod hold;
mod hostile;
mod programs;
mod server;
mod streams;
mod tls;
mod transmission;

use inlinecrypt_core::disk::{Disk, Geometry};
use inlinecrypt_io::export::ExportSpec;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_testkit::Client;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Long enough for a loaded machine; nothing waits so long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A server with one disk, reached over socket pairs.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) server: NbdServer,
    pub(crate) disk: Arc<RamDisk>,
}

impl Rig {
    pub(crate) fn new(disk: RamDisk) -> Self {
        Self::with_options(disk, ServerOptions::default())
    }

    pub(crate) fn with_options(disk: RamDisk, options: ServerOptions) -> Self {
        let disk = Arc::new(disk);
        let server = NbdServer::new([spec("disk", &disk)], options).unwrap();
        Self { server, disk }
    }

    /// A new connection.
    pub(crate) fn dial(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        self.server.serve(theirs).unwrap();
        ours
    }

    /// A client with structured replies and allocation status.
    pub(crate) fn client(&self) -> Client<UnixStream> {
        Client::connect(self.dial(), "disk").unwrap()
    }

    /// A client with neither.
    pub(crate) fn simple_client(&self) -> Client<UnixStream> {
        Client::connect_simple(self.dial(), "disk").unwrap()
    }
}

/// A disk on a medium that does many transfers at once, whose connections have workers of their own accord.
pub(crate) fn at_once(size_bytes: u64) -> RamDisk {
    let geometry = RamDisk::new(size_bytes).geometry();
    RamDisk::with_geometry(Geometry { does_batches_at_once: true, ..geometry })
}

pub(crate) fn spec(name: &str, disk: &Arc<RamDisk>) -> ExportSpec {
    ExportSpec { name: name.to_owned(), description: String::new(), disk: disk.clone() }
}

/// Waits until something becomes true.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_true() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
