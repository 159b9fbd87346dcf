//! A state of a re-encryption, as it lies beside a volume: its headers and its plan, and a journal to be recovered from.
//!
//! As it is, and with magic, version and digests made good, so that what is behind them is reached.
#![no_main]

use inlinecrypt_core::backing::{Backing as _, Durability};
use inlinecrypt_core::reencrypt::state::{MAGIC, PREFIX_BYTES, State, StateFacts, VERSION, repair_digests};
use inlinecrypt_core::testing::MemBacking;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

const LEN: usize = PREFIX_BYTES + (512 << 10);

fuzz_target!(|data: &[u8]| {
    let mut bytes = vec![0; LEN];
    // The first header, and then what is left as plan and journal.
    let (header, rest) = data.split_at(data.len().min(512));
    bytes[..header.len()].copy_from_slice(header);
    let rest = &rest[..rest.len().min(4096)];
    bytes[8192..8192 + rest.len()].copy_from_slice(rest);
    let _ = StateFacts::parse(&bytes);
    bytes[..MAGIC.len()].copy_from_slice(MAGIC);
    bytes[MAGIC.len()..][..4].copy_from_slice(&VERSION.to_le_bytes());
    repair_digests(&mut bytes);
    let Ok(facts) = StateFacts::parse(&bytes) else { return };
    assert!(facts.boundary <= facts.size_bytes);
    let medium = Arc::new(MemBacking::new(LEN, 1));
    medium.write(0, &bytes, Durability::Cached).expect("memory");
    let Ok(mut state) = State::open(medium) else { return };
    if facts.size_bytes <= 1 << 20 {
        let volume = MemBacking::new(usize::try_from(facts.size_bytes).expect("checked"), 1);
        let _ = state.recover(&volume);
    }
});
