//! Lanes: where a host's threads leave orders for an engine process's, in shared memory.
//!
//! ```text
//!   shared memory:  lane 0 | lane 1 | ... | data, lent piece by piece
//!   a lane:         turn, who sleeps, the order, its result and progress, an undo buffer
//!
//!   host thread                                 engine thread of the lane
//!     takes the lane, writes the order
//!     turn = its, wakes    ------------------->   copies the order, checks the copy
//!     sleeps                                      programs a keyslot, or decrypts in place, or
//!                                                 per chunk: undo <- chunk, progress, encrypt in place, progress
//!     wakes  <---------------------------------   result, turn = HOST, wakes
//! ```
//!
//! - The engine trusts nothing here: it copies an order once, checks the copy, and never looks again. A bad order gets an error.
//! - Should the engine die while it encrypts, the progress and the undo buffer say exactly what was encrypted: the host puts the
//!   chunk that was being worked on back as it was, takes off the order what was done, and hands in the rest again. So nobody
//!   else notices. Should it die while it decrypts, nothing is put back: the volume reads the ciphertext again. Not keeping that
//!   saves a third of what decrypting a large piece costs.
//! - Engine threads run on the CPU of the host thread whose order they work on: waking a thread there costs a few microseconds,
//!   waking one on another CPU that sleeps costs fifty (docs/performance.md).

use crate::sys::Region;
use inlinecrypt_cipher::Dun;
use inlinecrypt_core::engine::Piece;
use rustix::thread::futex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

/// Most pieces of one order.
pub(crate) const PIECES_MAX: usize = 64;

/// Most bytes that are transformed between two notes of progress: the largest data unit.
pub(crate) const UNDO_BYTES: usize = 64 * 1024;

/// How much is transformed at once if data units allow: what stays in the fastest cache together with its undo copy.
pub(crate) const CHUNK_BYTES: usize = 4 * 1024;

const TURN: usize = 0;
const ENGINE_SLEEPS: usize = 64;
const HOST_SLEEPS: usize = 128;
const ORDER: usize = 192;
const ORDER_BYTES: usize = 32;
const RESULT: usize = 256;
const PROGRESS: usize = 264;
const TEXT: usize = 512;
const TEXT_BYTES_MAX: usize = 512;
const PIECES: usize = 1024;
const PIECE_BYTES: usize = 48;
const UNDO: usize = 4096;
/// Length of a lane, in bytes.
pub(crate) const LANE_BYTES: usize = UNDO + UNDO_BYTES;

const _: () = assert!(PIECES + PIECES_MAX * PIECE_BYTES <= UNDO && TEXT + TEXT_BYTES_MAX <= PIECES);

const HOST: u32 = 0;
/// Somebody puts back what a process that is gone was working on.
const TAKEN_BACK: u32 = 1;
/// The engine's thread is to end.
const STOP: u32 = 2;

/// The turn of the engine process of a start. Each has a turn of its own, so that a later process never works on an order that was
/// left for an earlier one, which the host takes back.
fn turn_of(generation: u64) -> u32 {
    const FIRST: u32 = STOP + 1;
    FIRST + u32::try_from(generation % u64::from(u32::MAX - FIRST)).expect("less than it was divided by")
}

/// The result of an order that nobody could work on: the engine process was gone.
pub(crate) const RESULT_LOST: u32 = 1000;

/// What to do with the pieces or a keyslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Encrypt,
    Decrypt,
    /// Programs this keyslot with the remembered key. There are no pieces.
    Program {
        slot: u32,
    },
}

/// What to do with which key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// 0 for the main engine, 1 for its fallback.
    pub engine: u8,
    /// Whether `key` is a keyslot, else the handle of a remembered key.
    pub is_slot: bool,
    pub deed: Deed,
    /// Keyslot or handle.
    pub key: u32,
    /// On which CPU the host thread runs.
    pub cpu: u32,
    /// How many pieces.
    pub pieces: u32,
}

impl Head {
    fn to_bytes(self) -> [u8; ORDER_BYTES] {
        let mut bytes = [0; ORDER_BYTES];
        bytes[0] = self.engine;
        bytes[1] = self.is_slot.into();
        let (deed, slot) = match self.deed {
            Deed::Decrypt => (0, 0),
            Deed::Encrypt => (1, 0),
            Deed::Program { slot } => (2, slot),
        };
        bytes[2] = deed;
        bytes[4..8].copy_from_slice(&self.key.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.cpu.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.pieces.to_le_bytes());
        bytes[16..20].copy_from_slice(&slot.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; ORDER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Self {
            engine: bytes[0],
            is_slot: bytes[1] != 0,
            // Whatever the other side wrote, it is one of the three.
            deed: match bytes[2] {
                0 => Deed::Decrypt,
                2 => Deed::Program { slot: word(16) },
                _ => Deed::Encrypt,
            },
            key: word(4),
            cpu: word(8),
            pieces: word(12),
        }
    }
}

/// A piece of an order: where it lies in the shared memory, and the DUN of its first data unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WirePiece {
    /// In bytes from the beginning of the shared memory.
    pub offset: u64,
    /// In bytes.
    pub len: u64,
    /// Of the first data unit.
    pub first: Dun,
}

impl WirePiece {
    fn to_bytes(self) -> [u8; PIECE_BYTES] {
        let mut bytes = [0; PIECE_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        for (into, limb) in bytes[16..].chunks_exact_mut(8).zip(self.first.limbs()) {
            into.copy_from_slice(&limb.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Self {
            offset: long(0),
            len: long(8),
            first: Dun::from_limbs([long(16), long(24), long(32), long(40)]),
        }
    }
}

/// How far an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    /// Pieces that are done.
    pub pieces: u8,
    /// Bytes of the next one that are done.
    pub bytes: u32,
    /// How many bytes behind them are being transformed; the undo buffer has them as they were.
    pub undo_bytes: u32,
}

impl Progress {
    fn pack(self) -> u64 {
        u64::from(self.pieces) << 56 | u64::from(self.bytes) << 24 | u64::from(self.undo_bytes)
    }

    fn unpack(bits: u64) -> Self {
        let low = |bits: u64, width: u32| u32::try_from(bits & ((1 << width) - 1)).expect("masked");
        Self {
            pieces: u8::try_from(bits >> 56).expect("eight bits are left"),
            bytes: low(bits >> 24, 32),
            undo_bytes: low(bits, 24),
        }
    }
}

/// A lane, seen from either side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane<'r> {
    region: &'r Region,
    base: usize,
}

impl<'r> Lane<'r> {
    /// Lane `index`.
    pub(crate) fn new(region: &'r Region, index: usize) -> Self {
        Self { region, base: index * LANE_BYTES }
    }

    fn turn(&self) -> &'r AtomicU32 {
        self.region.word(self.base + TURN)
    }

    fn engine_sleeps(&self) -> &'r AtomicU32 {
        self.region.word(self.base + ENGINE_SLEEPS)
    }

    fn host_sleeps(&self) -> &'r AtomicU32 {
        self.region.word(self.base + HOST_SLEEPS)
    }

    // The host's side.

    /// Leaves an order for the process of `generation` and wakes it. The lane is the caller's alone until the order is done.
    pub(crate) fn post(&self, generation: u64, head: Head, pieces: impl Iterator<Item = WirePiece>) {
        for (index, piece) in pieces.enumerate() {
            self.region.copy_in(self.base + PIECES + index * PIECE_BYTES, &piece.to_bytes());
        }
        self.region.copy_in(self.base + ORDER, &head.to_bytes());
        self.region.long(self.base + PROGRESS).store(0, Ordering::Relaxed);
        self.hand_over(generation);
    }

    /// The order is complete: wakes the engine.
    pub(crate) fn hand_over(&self, generation: u64) {
        self.turn().store(turn_of(generation), Ordering::SeqCst);
        if self.engine_sleeps().load(Ordering::SeqCst) != 0 {
            wake(self.turn());
        }
    }

    /// Waits until the order is done, or taken back since `is_gone` says that the process of `generation` has ended.
    pub(crate) fn wait(&self, generation: u64, is_gone: impl Fn() -> bool) {
        let turn = self.turn();
        loop {
            let whose = turn.load(Ordering::SeqCst);
            if whose == HOST {
                return;
            }
            if is_gone() {
                self.take_back(generation);
            }
            self.host_sleeps().store(1, Ordering::SeqCst);
            if turn.load(Ordering::SeqCst) == whose {
                sleep_while(turn, whose);
            }
            self.host_sleeps().store(0, Ordering::SeqCst);
        }
    }

    /// The engine process of `generation` is gone: puts back what it was working on. Whoever comes first does it; the host
    /// thread that waits finds its order lost. Every thread of that process must have ended.
    pub(crate) fn take_back(&self, generation: u64) {
        let its = turn_of(generation);
        if self.turn().compare_exchange(its, TAKEN_BACK, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return;
        }
        let progress = self.progress();
        if progress.undo_bytes > 0 && usize::from(progress.pieces) < PIECES_MAX {
            let piece = self.piece(progress.pieces.into());
            let at = usize::try_from(piece.offset).expect("our own order") + progress.bytes as usize;
            self.region.copy_within(self.base + UNDO, at, progress.undo_bytes as usize);
            let done = Progress { undo_bytes: 0, ..progress };
            self.region.long(self.base + PROGRESS).store(done.pack(), Ordering::SeqCst);
        }
        self.region.word(self.base + RESULT).store(RESULT_LOST, Ordering::SeqCst);
        self.turn().store(HOST, Ordering::SeqCst);
        wake(self.turn());
    }

    /// The result of the order that is done: 0, or a code of `proto`, or [`RESULT_LOST`].
    pub(crate) fn result(&self) -> u32 {
        self.region.word(self.base + RESULT).load(Ordering::SeqCst)
    }

    /// What the engine said to an order that failed.
    pub(crate) fn text(&self) -> String {
        let mut bytes = [0; TEXT_BYTES_MAX];
        self.region.copy_out(self.base + TEXT, &mut bytes);
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress::unpack(self.region.long(self.base + PROGRESS).load(Ordering::SeqCst))
    }

    /// Takes what is done off `pieces`, whose data units have `unit_bytes`.
    pub(crate) fn take_off(&self, pieces: &mut [Piece], unit_bytes: usize) {
        let progress = self.progress();
        let done = usize::from(progress.pieces).min(pieces.len());
        pieces[..done].iter_mut().for_each(Piece::finish);
        if let Some(piece) = pieces.get_mut(done) {
            let bytes = (progress.bytes as usize).min(piece.range.len());
            piece.range.start += bytes;
            piece.first = piece.first.wrapping_add((bytes / unit_bytes) as u64);
        }
    }

    /// What `post` leaves of an order that nobody has checked, from where the order begins.
    pub(crate) fn bytes_of(head: Head, pieces: &[WirePiece]) -> Vec<u8> {
        let mut bytes = head.to_bytes().to_vec();
        bytes.resize(PIECES - ORDER, 0);
        bytes.extend(pieces.iter().flat_map(|piece| piece.to_bytes()));
        bytes
    }

    // The engine's side.

    /// Ends the lane's thread, which [`next_order`](Self::next_order) tells so.
    pub(crate) fn stop(&self) {
        self.turn().store(STOP, Ordering::SeqCst);
        wake(self.turn());
    }

    /// Waits for an order to the process of `generation` and copies it. `None` if there will be none, as `is_over` knows.
    pub(crate) fn next_order(
        &self,
        generation: u64,
        is_over: &AtomicBool,
        pieces: &mut Vec<WirePiece>,
    ) -> Option<Head> {
        let turn = self.turn();
        let ours = turn_of(generation);
        while turn.load(Ordering::SeqCst) != ours {
            if is_over.load(Ordering::SeqCst) {
                return None;
            }
            self.engine_sleeps().store(1, Ordering::SeqCst);
            let whose = turn.load(Ordering::SeqCst);
            if whose != ours && !is_over.load(Ordering::SeqCst) {
                sleep_while(turn, whose);
            }
            self.engine_sleeps().store(0, Ordering::SeqCst);
        }
        let mut bytes = [0; ORDER_BYTES];
        self.region.copy_out(self.base + ORDER, &mut bytes);
        let head = Head::from_bytes(&bytes);
        pieces.clear();
        for index in 0..(head.pieces as usize).min(PIECES_MAX) {
            pieces.push(self.piece(index));
        }
        Some(head)
    }

    fn piece(&self, index: usize) -> WirePiece {
        let mut bytes = [0; PIECE_BYTES];
        self.region.copy_out(self.base + PIECES + index * PIECE_BYTES, &mut bytes);
        WirePiece::from_bytes(&bytes)
    }

    /// Notes that `chunk` is about to be transformed, having saved it.
    pub(crate) fn begin_chunk(&self, progress: Progress, chunk: &[u8]) {
        self.region.copy_in(self.base + UNDO, chunk);
        self.region.long(self.base + PROGRESS).store(progress.pack(), Ordering::SeqCst);
        // No byte of the chunk is changed before the note can be read.
        fence(Ordering::SeqCst);
    }

    /// Notes how far the order is.
    pub(crate) fn note(&self, progress: Progress) {
        fence(Ordering::SeqCst);
        self.region.long(self.base + PROGRESS).store(progress.pack(), Ordering::SeqCst);
    }

    /// Tells the host that the order is done.
    pub(crate) fn answer(&self, result: u32, text: &str) {
        if result != 0 {
            let mut bytes = [0; TEXT_BYTES_MAX];
            let mut len = text.len().min(TEXT_BYTES_MAX - 1);
            while !text.is_char_boundary(len) {
                len -= 1;
            }
            bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
            self.region.copy_in(self.base + TEXT, &bytes);
        }
        self.region.word(self.base + RESULT).store(result, Ordering::SeqCst);
        self.turn().store(HOST, Ordering::SeqCst);
        if self.host_sleeps().load(Ordering::SeqCst) != 0 {
            wake(self.turn());
        }
    }
}

/// Sleeps while `word` has `value`, and sometimes shorter.
fn sleep_while(word: &AtomicU32, value: u32) {
    // Any error means to look again: somebody was faster, or a signal came.
    let _ = futex::wait(word, futex::Flags::empty(), value, None);
}

fn wake(word: &AtomicU32) {
    // Fails for a bad address only.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}
