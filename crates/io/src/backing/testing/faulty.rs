//! Failures on demand.

use super::enter;
use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::io;
use std::sync::Mutex;

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// [`Backing::read`].
    Read,
    /// [`Backing::write`], of either durability.
    Write,
    /// [`Backing::flush`].
    Flush,
    /// [`Backing::discard`].
    Discard,
    /// [`Backing::extents`].
    Extents,
}

impl FaultOp {
    const COUNT: usize = 5;

    fn op(self) -> Op {
        match self {
            Self::Read => Op::Read,
            Self::Write => Op::Write,
            Self::Flush => Op::Flush,
            Self::Discard => Op::Trim,
            Self::Extents => Op::Extents,
        }
    }
}

/// What a failed write leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// The old content.
    Old,
    /// The new content.
    New,
    /// New content in the first half, old content in the second.
    Torn,
}

/// A wrapper that fails as told, and else passes everything on. It keeps the bargain in failure too: after a failed flush
/// or durable write, no flush succeeds, unless the write failed for lack of space.
///
/// Calls of each kind are counted from 0 on.
#[derive(Debug)]
pub struct FaultyBacking<B> {
    inner: B,
    facts: BackingFacts,
    /// Nothing else is taken while it is held, and it is not held while `inner` is called.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    calls: [u64; FaultOp::COUNT],
    faults: Vec<Fault>,
    leaving: Leaving,
    /// How many more bytes can be written.
    room_bytes: u64,
    /// Where the medium ends now.
    end: u64,
    lost: bool,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    on: FaultOp,
    first: u64,
    last: u64,
    kind: ErrorKind,
}

impl<B: Backing> FaultyBacking<B> {
    /// A wrapper of `inner` that does not fail yet.
    #[must_use]
    pub fn new(inner: B) -> Self {
        let facts = inner.facts();
        let state = State {
            calls: [0; FaultOp::COUNT],
            faults: Vec::new(),
            leaving: Leaving::Torn,
            room_bytes: u64::MAX,
            end: facts.len_bytes,
            lost: false,
        };
        Self { inner, facts, state: Mutex::new(state) }
    }

    /// The same, but asking for another alignment than `inner`.
    ///
    /// # Panics
    ///
    /// If it is not a power of two from `inner`'s to 4096, or the length is no multiple of it.
    #[must_use]
    pub fn with_align(mut self, align_bytes: u32) -> Self {
        assert!(align_bytes.is_power_of_two() && align_bytes <= 4096, "{align_bytes} is no alignment");
        assert!(align_bytes >= self.inner.facts().align_bytes, "what is below needs more");
        assert!(self.facts.len_bytes.is_multiple_of(align_bytes.into()), "the length is no multiple");
        self.facts.align_bytes = align_bytes;
        self
    }

    /// What is wrapped.
    #[must_use]
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// How many calls of a kind there have been.
    #[must_use]
    pub fn calls(&self, on: FaultOp) -> u64 {
        enter(&self.state).calls[on as usize]
    }

    /// The call of a kind after `skip` more good ones fails with `kind`.
    pub fn fail_after(&self, on: FaultOp, skip: u64, kind: ErrorKind) {
        let mut state = enter(&self.state);
        let at = state.calls[on as usize] + skip;
        state.faults.push(Fault { on, first: at, last: at, kind });
    }

    /// From now on every call of a kind fails with `kind`.
    pub fn fail_always(&self, on: FaultOp, kind: ErrorKind) {
        let mut state = enter(&self.state);
        let first = state.calls[on as usize];
        state.faults.push(Fault { on, first, last: u64::MAX, kind });
    }

    /// What failed writes leave behind from now on; [`Leaving::Torn`] until told.
    pub fn leave(&self, leaving: Leaving) {
        enter(&self.state).leaving = leaving;
    }

    /// The medium takes `room_bytes` more bytes and then is full, as a thin or sparse one may be. Discards make no room.
    pub fn fill_after(&self, room_bytes: u64) {
        enter(&self.state).room_bytes = room_bytes;
    }

    /// The medium ends at `len_bytes` from now on, whatever was said of it.
    pub fn truncate(&self, len_bytes: u64) {
        enter(&self.state).end = len_bytes;
    }

    /// Forgets all scripted failures, a full and a short medium. What was lost stays lost.
    pub fn heal(&self) {
        let mut state = enter(&self.state);
        state.faults.clear();
        state.room_bytes = u64::MAX;
        state.end = self.facts.len_bytes;
    }

    /// Counts a call and says how it is to fail, if at all.
    fn count(&self, on: FaultOp, offset: u64, len: u64) -> Result<(), Error> {
        let mut state = enter(&self.state);
        let call = state.calls[on as usize];
        state.calls[on as usize] += 1;
        let hit = |fault: &&Fault| fault.on == on && (fault.first..=fault.last).contains(&call);
        match state.faults.iter().find(hit) {
            Some(fault) => Err(scripted(fault.kind, on.op(), offset, len)),
            None => Ok(()),
        }
    }

    fn fits(&self, op: Op, offset: u64, len: u64) -> Result<(), Error> {
        let mut state = enter(&self.state);
        if offset.saturating_add(len) > state.end {
            let error = Error::new(ErrorKind::Backing, op).at(offset, len);
            return Err(error
                .detail("the file has become shorter")
                .because(io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        if op == Op::Write {
            let Some(room_bytes) = state.room_bytes.checked_sub(len) else {
                return Err(scripted(ErrorKind::NoSpace, op, offset, len));
            };
            state.room_bytes = room_bytes;
        }
        Ok(())
    }
}

/// An error as a real backing would make it.
fn scripted(kind: ErrorKind, op: Op, offset: u64, len: u64) -> Error {
    let cause = match kind {
        ErrorKind::NoSpace => io::Error::from(rustix::io::Errno::NOSPC),
        _ => io::Error::from(rustix::io::Errno::IO),
    };
    let error = Error::new(kind, op).because(cause);
    if len > 0 { error.at(offset, len) } else { error }
}

impl<B: Backing> Backing for FaultyBacking<B> {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let len = data.len() as u64;
        self.count(FaultOp::Read, offset, len)?;
        self.fits(Op::Read, offset, len)?;
        self.inner.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        let len = data.len() as u64;
        let fate = self.count(FaultOp::Write, offset, len).and_then(|()| self.fits(Op::Write, offset, len));
        let Err(error) = fate else {
            if durability == Durability::Durable && enter(&self.state).lost {
                return Err(Error::new(ErrorKind::FlushLost, Op::Write).at(offset, len));
            }
            let result = self.inner.write(offset, data, durability);
            if durability == Durability::Durable
                && let Err(error) = &result
            {
                enter(&self.state).lost |= error.kind() != ErrorKind::NoSpace;
            }
            return result;
        };
        let (leaving, end) = {
            let mut state = enter(&self.state);
            state.lost |= durability == Durability::Durable && error.kind() != ErrorKind::NoSpace;
            (state.leaving, state.end)
        };
        let align = self.facts.align_bytes as usize;
        let within = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX) / align * align;
        let left = match leaving {
            Leaving::Old => 0,
            Leaving::New => data.len(),
            Leaving::Torn => (data.len() / 2).next_multiple_of(align),
        };
        let left = left.min(data.len()).min(within);
        if left > 0 {
            self.inner.write(offset, &data[..left], Durability::Cached)?;
        }
        Err(error)
    }

    fn flush(&self) -> Result<(), Error> {
        let fate = self.count(FaultOp::Flush, 0, 0);
        if enter(&self.state).lost {
            return Err(Error::new(ErrorKind::FlushLost, Op::Flush));
        }
        let result = fate.and_then(|()| self.inner.flush());
        if result.is_err() {
            enter(&self.state).lost = true;
        }
        result
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.count(FaultOp::Discard, offset, len)?;
        self.fits(Op::Trim, offset, len)?;
        self.inner.discard(offset, len)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.count(FaultOp::Extents, offset, len)?;
        self.inner.extents(offset, len, extents_max)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemBacking;
    use super::*;
    use proptest::prelude::*;

    fn disk() -> FaultyBacking<MemBacking> {
        FaultyBacking::new(MemBacking::new(64 << 10))
    }

    #[test]
    fn the_call_that_was_named_fails_and_no_other() {
        let disk = disk();
        disk.fail_after(FaultOp::Read, 2, ErrorKind::Backing);
        let results: Vec<bool> = (0..5).map(|_| disk.read(0, &mut [0; 512]).is_ok()).collect();
        assert_eq!(results, [true, true, false, true, true]);
        assert_eq!(disk.calls(FaultOp::Read), 5);
    }

    #[test]
    fn a_failed_write_leaves_what_was_asked_for() {
        let disk = disk();
        for (leaving, expected) in [(Leaving::Old, 0), (Leaving::Torn, 512), (Leaving::New, 1024)] {
            disk.write(0, &[1; 1024], Durability::Cached).expect("no fault yet");
            disk.leave(leaving);
            disk.fail_after(FaultOp::Write, 0, ErrorKind::Backing);
            disk.write(0, &[2; 1024], Durability::Cached).unwrap_err();
            let new = disk.inner().snapshot(0, 1024).iter().filter(|byte| **byte == 2).count();
            assert_eq!(new, expected, "{leaving:?}");
        }
    }

    #[test]
    fn full_and_short_media_say_so_and_heal() {
        let disk = disk();
        disk.fill_after(1024);
        disk.write(0, &[1; 1024], Durability::Cached).expect("room for it");
        let full = disk.write(1024, &[1; 512], Durability::Cached).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::NoSpace);
        let full = disk.write(1024, &[1; 512], Durability::Durable).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::NoSpace);
        disk.flush().expect("what was refused is not lost");
        disk.heal();
        disk.truncate(2048);
        let short = disk.read(1536, &mut [0; 1024]).unwrap_err();
        assert_eq!(short.kind(), ErrorKind::Backing);
        assert!(short.to_string().contains("shorter"), "{short}");
        disk.heal();
        disk.read(1536, &mut [0; 1024]).expect("healed");
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Write { block: u8, fill: u8, durability: Durability, fails: bool },
        Flush { fails: bool },
        Discard { block: u8, fails: bool },
        Heal,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let durability = prop_oneof![3 => Just(Durability::Cached), 1 => Just(Durability::Durable)];
        let fails = prop::bool::weighted(0.2);
        let step = prop_oneof![
            6 => (0..16u8, 1..=255u8, durability, fails)
                .prop_map(|(block, fill, durability, fails)| Step::Write { block, fill, durability, fails }),
            2 => fails.prop_map(|fails| Step::Flush { fails }),
            1 => (0..16u8, fails).prop_map(|(block, fails)| Step::Discard { block, fails }),
            1 => Just(Step::Heal),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        /// A failed write touches its own range only, and there leaves old or new bytes; what succeeded is read back;
        /// nothing is flushed after a loss, not even after healing.
        #[test]
        fn the_bargain_is_kept_in_failure(steps in steps()) {
            const BLOCK: usize = 4096;
            let disk = disk();
            // What each byte may be.
            let mut model: Vec<Vec<u8>> = vec![vec![0]; 16];
            let mut lost = false;
            for step in steps {
                match step {
                    Step::Write { block, fill, durability, fails } => {
                        if fails {
                            disk.fail_after(FaultOp::Write, 0, ErrorKind::Backing);
                        }
                        let result =
                            disk.write(u64::from(block) * BLOCK as u64, &[fill; BLOCK], durability);
                        let durable = durability == Durability::Durable;
                        prop_assert_eq!(result.is_err(), fails || (lost && durable));
                        match result {
                            Ok(()) => model[usize::from(block)] = vec![fill],
                            Err(_) => model[usize::from(block)].push(fill),
                        }
                        lost |= fails && durable;
                    }
                    Step::Flush { fails } => {
                        if fails {
                            disk.fail_after(FaultOp::Flush, 0, ErrorKind::FlushLost);
                        }
                        lost |= fails;
                        let result = disk.flush();
                        prop_assert_eq!(result.is_err(), lost);
                        if let Err(error) = result {
                            prop_assert_eq!(error.kind(), ErrorKind::FlushLost);
                        }
                    }
                    Step::Discard { block, fails } => {
                        if fails {
                            disk.fail_after(FaultOp::Discard, 0, ErrorKind::Backing);
                        }
                        let result = disk.discard(u64::from(block) * BLOCK as u64, BLOCK as u64);
                        prop_assert_eq!(result.is_err(), fails);
                        if !fails {
                            model[usize::from(block)] = vec![0];
                        }
                    }
                    Step::Heal => disk.heal(),
                }
                for (block, allowed) in model.iter().enumerate() {
                    let mut data = vec![0; BLOCK];
                    disk.read((block * BLOCK) as u64, &mut data).expect("reads do not fail here");
                    prop_assert!(data.iter().all(|byte| allowed.contains(byte)), "block {}", block);
                }
            }
        }
    }
}
