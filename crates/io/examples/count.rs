//! Work whose instructions are counted, so that a change that makes it dearer is noticed: `cargo xtask count`.
//!
//!     count WHAT TIMES
//!
//! Does it so many times and prints nothing. Who counts the instructions of two runs, of N and 2 N times, knows what one costs,
//! whatever the start costs.

use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::keyslot::{Keyslots, Policy, Whereabouts};
use inlinecrypt_core::testing::FakeEngine;
use inlinecrypt_io::export::nbd::negotiate::Terms;
use inlinecrypt_io::export::nbd::session::Session;
use inlinecrypt_io::export::nbd::stream::Inbox;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::export::{Export, ExportSpec};
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Something to be done so many times.
type Work = fn(u32);

/// What there is to count, and what it is.
const WORK: &[(&str, Work)] = &[
    ("xts-512", |times| xts(times, 512)),
    ("xts-4096", |times| xts(times, 4096)),
    ("keyslot-hit", keyslot_hit),
    ("nbd-reads", nbd_reads),
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (what, times) = (args.next(), args.next().and_then(|times| times.parse().ok()));
    let work = WORK.iter().find(|(name, _)| Some(*name) == what.as_deref());
    match (work, times) {
        (Some((_, work)), Some(times)) => work(times),
        _ => {
            let names: Vec<_> = WORK.iter().map(|(name, _)| *name).collect();
            eprintln!("count WHAT TIMES; WHAT is one of {}", names.join(", "));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// 64 KiB in data units of so many bytes.
fn xts(times: u32, unit_bytes: usize) {
    let raw: Vec<u8> = (0..64).collect();
    let cipher = Mode::Aes256Xts.info().expand(&raw).expect("halves that differ");
    let mut data = vec![0; 65_536];
    for _ in 0..times {
        cipher.encrypt(0.into(), unit_bytes, black_box(&mut data));
    }
}

/// A keyslot that holds the key, taken and given back.
fn keyslot_hit(times: u32) {
    let raw: Vec<u8> = (0..64).collect();
    let form = KeyForm::Raw(RawKey::new(&raw));
    let key = Key::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, 8, form, Hardware::Allowed);
    let key: Arc<Key> = key.expect("a good key");
    let keyslots = Keyslots::new(Arc::new(FakeEngine::with_keyslots(32)), Policy::default());
    let whereabouts = Whereabouts::default();
    for _ in 0..times {
        drop(black_box(keyslots.acquire(&key, &whereabouts)).expect("programmed once"));
    }
}

/// 16 reads of 512 bytes, parsed, executed on memory and answered: little of it is copying.
fn nbd_reads(times: u32) {
    let disk = Arc::new(RamDisk::new(1 << 20));
    let export = Arc::new(Export::new(ExportSpec { name: String::new(), description: String::new(), disk }));
    let terms = Terms { export, structured: true, allocation: false };
    let mut requests = Vec::new();
    for index in 0..16u64 {
        requests.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        requests.extend_from_slice(&[0; 4]);
        requests.extend_from_slice(&index.to_be_bytes());
        requests.extend_from_slice(&(index * 4096).to_be_bytes());
        requests.extend_from_slice(&512u32.to_be_bytes());
    }
    let requests = requests.repeat(usize::try_from(times).expect("a few thousand"));
    let stopping = AtomicBool::new(false);
    Session::new(&terms, &stopping, 0, &|| {}).run(&mut Inbox::new(&requests[..]), std::io::sink());
}
