//! Sessions over memory: any byte stream, and valid ones with mistakes in them, end in order.

use inlinecrypt_core::disk::Disk;
use inlinecrypt_io::export::nbd::cores::Cores;
use inlinecrypt_io::export::nbd::negotiate::{Handshake, Next, Terms, TlsState, greet, haggle};
use inlinecrypt_io::export::nbd::session::{Ended, Session};
use inlinecrypt_io::export::nbd::stream::Inbox;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::export::{Export, ExportSpec, Exports};
use inlinecrypt_testkit::nbd::{cmd, opt, request_header, text_field};
use proptest::prelude::*;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const SIZE: u64 = 1 << 20;

fn spec() -> ExportSpec {
    ExportSpec { name: "disk".to_owned(), description: "text".to_owned(), disk: Arc::new(RamDisk::new(SIZE)) }
}

/// Gives bytes in portions of at most `step`.
struct Portions<'a> {
    rest: &'a [u8],
    step: usize,
}

impl Read for Portions<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = into.len().min(self.step);
        self.rest.read(&mut into[..len])
    }
}

/// Feeds bytes to a handshake, TLS state and all, and says where that led and what was said.
fn shake_hands(bytes: &[u8], step: usize, tls: TlsState) -> (Option<Next>, Vec<u8>) {
    let exports = Exports::default();
    exports.add(spec()).unwrap();
    let stopping = AtomicBool::new(false);
    let mut inbox = Inbox::new(Portions { rest: bytes, step });
    let mut said = Vec::new();
    let Ok(Some(client)) = greet(&mut inbox, &mut said) else { return (None, said) };
    let mut handshake = Handshake::new(&exports, &stopping, client, tls);
    (haggle(&mut handshake, &mut inbox, &mut said).ok(), said)
}

/// Feeds bytes to a session; says how it ended, what was said, and what the disk holds now.
fn transmit(bytes: &[u8], step: usize, structured: bool, workers: usize) -> (Ended, Vec<u8>, Arc<RamDisk>) {
    transmit_on(bytes, step, structured, workers, 1)
}

/// The same, with so many cores.
fn transmit_on(
    bytes: &[u8],
    step: usize,
    structured: bool,
    workers: usize,
    cores: usize,
) -> (Ended, Vec<u8>, Arc<RamDisk>) {
    let disk = Arc::new(RamDisk::new(SIZE).with_pool_of(1));
    let export = ExportSpec { disk: disk.clone(), ..spec() };
    let terms = Terms { export: Arc::new(Export::new(export)), structured, allocation: structured };
    let stopping = AtomicBool::new(false);
    let mut said = Vec::new();
    let mut inbox = Inbox::new(Portions { rest: bytes, step });
    let cores = Cores::new(cores);
    let session = Session::new(&terms, &stopping, workers, &|| {}).on(&cores);
    let ended = session.run(&mut inbox, &mut said);
    (ended, said, disk)
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let meta = [text_field("disk"), vec![0, 0, 0, 1], text_field("base:allocation")].concat();
    let info = [text_field("disk"), vec![0, 2, 0, 1, 0, 3]].concat();
    prop_oneof![
        Just(option(opt::LIST, &[])),
        Just(option(opt::STRUCTURED_REPLY, &[])),
        Just(option(opt::SET_META_CONTEXT, &meta)),
        Just(option(opt::LIST_META_CONTEXT, &meta)),
        Just(option(opt::INFO, &info)),
        Just(option(opt::GO, &info)),
        Just(option(opt::EXPORT_NAME, b"disk")),
        Just(option(opt::STARTTLS, &[])),
        Just(option(opt::ABORT, &[])),
        (any::<u32>(), proptest::collection::vec(any::<u8>(), 0..60))
            .prop_map(|(kind, data)| option(kind, &data)),
    ]
}

#[derive(Clone, Debug)]
struct Sent {
    kind: u16,
    flags: u16,
    offset: u64,
    len: u32,
    fill: u8,
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes =
            request_header(self.kind, self.flags, self.fill.into(), self.offset, self.len).to_vec();
        if self.kind == cmd::WRITE {
            bytes.resize(28 + self.len as usize, self.fill);
        }
        bytes
    }
}

fn any_request() -> impl Strategy<Value = Sent> {
    let offset = prop_oneof![0..SIZE + 1000, any::<u64>(), Just(0)];
    let len = prop_oneof![0u32..70_000, Just(512), Just(4096), Just(300_000)];
    (0u16..9, prop_oneof![4 => Just(0u16), 1 => 0u16..64], offset, len, any::<u8>())
        .prop_map(|(kind, flags, offset, len, fill)| Sent { kind, flags, offset, len, fill })
}

fn any_tls() -> impl Strategy<Value = TlsState> {
    prop_oneof![Just(TlsState::Unavailable), Just(TlsState::Offered), Just(TlsState::Demanded)]
}

/// Changes some bytes, and perhaps cuts off the end.
fn mutate(bytes: &mut Vec<u8>, changes: &[(prop::sample::Index, u8)], keep: Option<prop::sample::Index>) {
    for (index, value) in changes {
        if !bytes.is_empty() {
            let index = index.index(bytes.len());
            bytes[index] ^= value;
        }
    }
    if let Some(keep) = keep {
        bytes.truncate(keep.index(bytes.len() + 1));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_are_survived_by_the_handshake(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        step in 1usize..40,
        tls in any_tls(),
    ) {
        shake_hands(&bytes, step, tls);
        shake_hands(&[&[0, 0, 0, 3], &bytes[..]].concat(), step, tls);
    }

    #[test]
    fn options_with_mistakes_are_survived(
        options in proptest::collection::vec(any_option(), 0..12),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        keep in proptest::option::of(any::<prop::sample::Index>()),
        step in 1usize..100,
        tls in any_tls(),
    ) {
        let mut bytes = [vec![0, 0, 0, 3], options.concat()].concat();
        mutate(&mut bytes, &changes, keep);
        let (next, said) = shake_hands(&bytes, step, tls);
        if tls == TlsState::Demanded {
            prop_assert!(!matches!(next, Some(Next::Transmit(_))), "transmission without TLS");
            prop_assert!(!said.windows(4).any(|text| text == b"text"), "told something without TLS");
        }
    }

    #[test]
    fn any_bytes_are_survived_by_a_session(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        step in 1usize..40,
        structured in any::<bool>(),
    ) {
        transmit(&bytes, step, structured, 0);
    }

    #[test]
    fn requests_with_mistakes_are_survived_and_what_was_said_does_not_depend_on_portions(
        requests in proptest::collection::vec(any_request(), 0..12),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        keep in proptest::option::of(any::<prop::sample::Index>()),
        step in 1usize..10_000,
        structured in any::<bool>(),
    ) {
        let mut bytes: Vec<u8> = requests.iter().flat_map(Sent::bytes).collect();
        mutate(&mut bytes, &changes, keep);
        let (_, said, disk) = transmit(&bytes, usize::MAX, structured, 0);
        let (_, again, other) = transmit(&bytes, step, structured, 0);
        prop_assert!(said == again);
        prop_assert!(content(&disk) == content(&other));
    }

    #[test]
    fn valid_requests_leave_what_a_model_says(
        requests in proptest::collection::vec(any_request(), 0..20),
        step in 1usize..100_000,
        structured in any::<bool>(),
    ) {
        // Done one after the other, so the model is an array. What a trim leaves behind is the disk's business.
        let requests: Vec<Sent> =
            requests.into_iter().filter(|sent| !matches!(sent.kind, cmd::DISC | cmd::TRIM)).collect();
        let bytes: Vec<u8> = requests.iter().flat_map(Sent::bytes).collect();
        let (ended, _, disk) = transmit(&bytes, step, structured, 0);
        prop_assert!(matches!(ended, Ended::Left), "{ended:?}");
        let mut model = vec![0; usize::try_from(SIZE).unwrap()];
        for sent in requests {
            let Sent { kind, flags, offset, len, fill } = sent;
            let within = len > 0 && offset.checked_add(len.into()).is_some_and(|end| end <= SIZE);
            let allowed = match kind {
                cmd::WRITE => cmd::FLAG_FUA,
                cmd::WRITE_ZEROES => cmd::FLAG_FUA | cmd::FLAG_NO_HOLE,
                _ => 0,
            };
            if within && matches!(kind, cmd::WRITE | cmd::WRITE_ZEROES) && flags & !allowed == 0 {
                let start = usize::try_from(offset).unwrap();
                model[start..start + len as usize].fill(if kind == cmd::WRITE { fill } else { 0 });
            }
        }
        prop_assert!(content(&disk) == model);
    }

    #[test]
    fn workers_and_helpers_survive_what_a_lone_thread_survives(
        requests in proptest::collection::vec(any_request(), 0..12),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        keep in proptest::option::of(any::<prop::sample::Index>()),
        structured in any::<bool>(),
    ) {
        let mut bytes: Vec<u8> = requests.iter().flat_map(Sent::bytes).collect();
        mutate(&mut bytes, &changes, keep);
        let (_, said, _) = transmit(&bytes, usize::MAX, structured, 0);
        let (_, by_workers, _) = transmit(&bytes, usize::MAX, structured, 3);
        let (_, by_two, _) = transmit_on(&bytes, usize::MAX, structured, 0, 8);
        if !structured {
            // In another order, but of the same replies.
            prop_assert_eq!(said.len(), by_workers.len());
            prop_assert_eq!(said.len(), by_two.len());
        }
    }
}

fn content(disk: &RamDisk) -> Vec<u8> {
    let mut buffer = disk.private_buffer(inlinecrypt_core::disk::SMALL_BUFFER_BYTES).unwrap();
    let mut content = Vec::new();
    while (content.len() as u64) < SIZE {
        let at = content.len() as u64;
        let span = disk.span(at, SIZE - at, buffer.bytes().len());
        disk.read(span, &mut buffer).unwrap();
        content.extend_from_slice(&buffer.bytes()[span.payload()]);
    }
    content
}
