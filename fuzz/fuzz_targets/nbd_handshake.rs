//! What a client sends before transmission. The first byte says how it stands with TLS.
#![no_main]

use inlinecrypt_io::export::nbd::negotiate::{Handshake, Next, TlsState, greet, haggle};
use inlinecrypt_io::export::nbd::stream::Inbox;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::export::{ExportSpec, Exports};
use libfuzzer_sys::fuzz_target;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};

static EXPORTS: LazyLock<Exports> = LazyLock::new(|| {
    let exports = Exports::default();
    let disk = Arc::new(RamDisk::new(1 << 20));
    for name in ["", "disk"] {
        let spec = ExportSpec { name: name.to_owned(), description: "SECRET".to_owned(), disk: disk.clone() };
        exports.add(spec).expect("two good names");
    }
    exports
});

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let tls = match first % 3 {
        0 => TlsState::Unavailable,
        1 => TlsState::Offered,
        _ => TlsState::Demanded,
    };
    let stopping = AtomicBool::new(first & 0x80 != 0);
    let mut inbox = Inbox::new(rest);
    let mut said = Vec::new();
    let Ok(Some(client)) = greet(&mut inbox, &mut said) else { return };
    let mut handshake = Handshake::new(&EXPORTS, &stopping, client, tls);
    let mut next = haggle(&mut handshake, &mut inbox, &mut said);
    if tls == TlsState::Demanded {
        assert!(!matches!(next, Ok(Next::Transmit(_))), "transmission without TLS");
        assert!(!said.windows(6).any(|text| text == b"SECRET"), "told something without TLS");
    }
    if matches!(next, Ok(Next::StartTls)) {
        handshake.tls_is_running();
        next = haggle(&mut handshake, &mut inbox, &mut said);
        assert!(!matches!(next, Ok(Next::StartTls)), "TLS within TLS");
    }
});
