//! What a client sends in transmission. The first byte chooses the dialect and who does the work.
#![no_main]

use inlinecrypt_io::export::nbd::negotiate::Terms;
use inlinecrypt_io::export::nbd::session::Session;
use inlinecrypt_io::export::nbd::stream::Inbox;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::export::{Export, ExportSpec};
use libfuzzer_sys::fuzz_target;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};

static EXPORT: LazyLock<Arc<Export>> = LazyLock::new(|| {
    let disk = Arc::new(RamDisk::new(1 << 20).with_pool_of(1));
    Arc::new(Export::new(ExportSpec { name: String::new(), description: String::new(), disk }))
});

/// Counts what is said; a session must not say more than it was asked for.
struct Counter(usize);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        // Requests are 28 bytes and may ask for all of the disk; do not spend the day on that.
        if self.0 > 16 << 20 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let terms = Terms { export: EXPORT.clone(), structured: first & 1 != 0, allocation: first & 2 != 0 };
    let stopping = AtomicBool::new(first & 4 != 0);
    let workers = usize::from(first >> 6);
    let mut inbox = Inbox::new(rest);
    Session::new(&terms, &stopping, workers, &|| {}).run(&mut inbox, Counter(0));
});
