//! Re-encryption: a volume gets another key and another layout while it is used.
//!
//! ```text
//!   0             boundary       zone's end                 size
//!   |  new volume    |    zone       |       old volume       |      both over one backing
//!                     being moved:
//!                     who comes waits
//! ```
//!
//! A [`LiveVolume`] is what exports see. Mostly it is one [`Volume`]; while it is re-encrypted it is two, the old and the
//! new, and a boundary. A [`Reencryption`] moves the boundary over one zone after the other, from the front to the end:
//!
//! - Zones are whole chunks, and no piece of a request crosses the border of a chunk; so every piece lies on one side.
//! - Which side that is, is decided while the piece's range is locked, and a zone is moved while all of it is locked. So a
//!   request finds its data units wholly under the one key or the other, and waits no longer than for one zone.
//! - What a zone becomes, or what it was, is stable in a [`Ledger`] before the zone is touched, so that a kill or a power cut at
//!   any moment loses nothing ([`state`] says in which order). Clients write to a zone again only once it is done for good.
//! - No request fails since it came at the wrong time.
//!
//! While nothing is re-encrypted a request does one thing more than with a plain volume: once it has its ranges, it looks which
//! volumes there are. Those change while nobody has a range, for the moments when a re-encryption begins and ends.
//!
//! Start reading at [`Reencryption::step`].

pub mod ledger;
pub mod state;

use crate::backing::{Access, Durability, Extent};
use crate::batch::{Batch, Item, Transfer};
use crate::config::Mode;
use crate::disk::{CHUNK_BYTES, Disk, Geometry, LARGE_BUFFER_BYTES, Span, Unaligned};
use crate::engine::Direction;
use crate::error::{Error, ErrorKind, Op};
use crate::memory::Buffer;
use crate::profile::CryptoProfile;
use crate::range_lock::{EVERYTHING, RangeGuard, RangeLock, Sharing};
use crate::volume::{Layout, Volume, again_if_interrupted};
use arc_swap::{ArcSwap, Guard};
use inlinecrypt_cipher::SectorUpdate;
use ledger::{Keeps, Ledger};
use state::chunks;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A volume that can be re-encrypted while it is used.
#[derive(Debug)]
pub struct LiveVolume {
    /// Constant while clients know it.
    geometry: Geometry,
    /// Instead of the volumes' own, so that there is one order for both.
    locks: RangeLock,
    /// Which volumes there are. Changed while [`EVERYTHING`] is locked, so it stays the same for who has a range.
    sides: ArcSwap<Sides>,
    /// The larger data unit of the volumes that there are, in bytes: for laying out pieces, and for what of them is to be
    /// locked. Who reads it a moment too early does so for data units that are no more, which is seen once a range is locked.
    unit_bytes: AtomicU32,
    /// Whose memory buffers are in: that of the first volume's engine, whatever comes later.
    home: Arc<CryptoProfile>,
}

#[derive(Clone, Debug)]
enum Sides {
    One(Arc<Volume>),
    Two(Two),
}

/// A volume that is half under one key and half under another.
#[derive(Clone, Debug)]
struct Two {
    old: Arc<Volume>,
    new: Arc<Volume>,
    border: Arc<Border>,
}

/// Where the new volume ends and the old one begins. Changed while the zone behind it is locked only.
#[derive(Debug, Default)]
struct Border {
    /// In bytes.
    boundary: AtomicU64,
    /// Where a zone ends that could not be completed: nobody may use it until it is. 0 if there is none.
    broken_end: AtomicU64,
}

impl Sides {
    /// The one with the larger data units: those are whole for both.
    fn coarse(&self) -> &Arc<Volume> {
        match self {
            Self::One(volume) => volume,
            Self::Two(Two { old, new, .. }) if new.unit_bytes() > old.unit_bytes() => new,
            Self::Two(Two { old, .. }) => old,
        }
    }

    /// Whose a piece is that is locked.
    fn side_of(&self, span: Span) -> Result<&Arc<Volume>, Error> {
        let Two { old, new, border } = match self {
            Self::One(volume) => return Ok(volume),
            Self::Two(two) => two,
        };
        let boundary = border.boundary.load(Ordering::Relaxed);
        if span.offset() < boundary {
            return Ok(new);
        }
        if span.offset() < border.broken_end.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Backing, Op::Reencrypt)
                .at(span.offset(), span.payload().len() as u64)
                .detail("this part was being re-encrypted when the backing failed"));
        }
        Ok(old)
    }
}

/// What both sides of a re-encryption can be to clients. The size is that of both.
fn common(old: Geometry, new: Geometry) -> Geometry {
    let refused = old.unaligned == Unaligned::Refused || new.unaligned == Unaligned::Refused;
    Geometry {
        size_bytes: old.size_bytes,
        logical_block_bytes: old.logical_block_bytes.max(new.logical_block_bytes),
        preferred_block_bytes: old.preferred_block_bytes.max(new.preferred_block_bytes),
        unaligned: if refused { Unaligned::Refused } else { Unaligned::Served },
        access: old.access,
        can_trim: old.can_trim && new.can_trim,
        does_batches_at_once: old.does_batches_at_once && new.does_batches_at_once,
    }
}

/// Why a volume of `old` cannot become one of `new`, whoever uses it: they are of one size.
///
/// # Errors
///
/// [`ErrorKind::Invalid`].
pub fn check_layouts(old: &Layout, new: &Layout) -> Result<(), Error> {
    if old.size_bytes() == new.size_bytes() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(format!(
        "the volume has {} bytes, and with data units of {} it would have {}",
        old.size_bytes(),
        new.data_unit_size(),
        new.size_bytes()
    )))
}

/// Whether clients of a disk of `geometry` can be served by a volume of `mode` with logical blocks of so many bytes: where
/// requests that are not whole blocks are refused, they must not come.
#[must_use]
pub fn clients_can_stay(geometry: &Geometry, mode: Mode, logical_block_bytes: u32) -> bool {
    mode.info().sector_update == SectorUpdate::Local
        || (geometry.unaligned == Unaligned::Refused && geometry.logical_block_bytes >= logical_block_bytes)
}

impl LiveVolume {
    /// A volume that nobody re-encrypts yet.
    #[must_use]
    pub fn new(volume: Volume) -> Self {
        let volume = Arc::new(volume);
        Self {
            geometry: volume.geometry(),
            locks: RangeLock::new(),
            unit_bytes: AtomicU32::new(volume.layout().data_unit_size().bytes()),
            home: volume.admission().profile().clone(),
            sides: ArcSwap::from_pointee(Sides::One(volume)),
        }
    }

    /// The same for clients that will also be served by `new`. To be called before there are any.
    #[must_use]
    pub fn for_clients_of(self, new: &Volume) -> Self {
        Self { geometry: common(self.geometry, new.geometry()), ..self }
    }

    /// The volume; while it is re-encrypted, the old one.
    #[must_use]
    pub fn current(&self) -> Arc<Volume> {
        match &**self.sides.load() {
            Sides::One(volume) | Sides::Two(Two { old: volume, .. }) => volume.clone(),
        }
    }

    /// The volume that it is becoming, and how many bytes of it are done. `None` if nobody re-encrypts it.
    #[must_use]
    pub fn becoming(&self) -> Option<(Arc<Volume>, u64)> {
        match &**self.sides.load() {
            Sides::One(_) => None,
            Sides::Two(Two { new, border, .. }) => {
                Some((new.clone(), border.boundary.load(Ordering::Relaxed)))
            }
        }
    }

    /// For who has locked everything.
    fn change_sides(&self, to: Sides) {
        let unit = to.coarse().layout().data_unit_size().bytes();
        self.unit_bytes.store(unit, Ordering::Relaxed);
        self.sides.store(Arc::new(to));
    }

    /// Locks the data units that these ranges touch, of whichever volume, and returns which volumes there are while they are
    /// locked. To be dropped before the lock.
    fn lock(
        &self,
        wanted: impl Iterator<Item = (Range<u64>, Sharing)> + Clone,
    ) -> (RangeGuard<'_>, Guard<Arc<Sides>>) {
        loop {
            let unit = u64::from(self.unit_bytes.load(Ordering::Relaxed));
            let units = |range: Range<u64>| range.start & !(unit - 1)..range.end.next_multiple_of(unit);
            let guard = self.locks.take_all(wanted.clone().map(|(range, sharing)| (units(range), sharing)));
            let sides = self.sides.load();
            if sides.coarse().unit_bytes() <= unit {
                return (guard, sides);
            }
            // A re-encryption to larger ones has begun just now.
        }
    }

    /// Begins to re-encrypt it, or goes on where `state` says. From now on it is served by both volumes, and each
    /// [`step`](Reencryption::step) moves the boundary.
    ///
    /// A zone that was interrupted is completed first; so with such a state, nobody may have used the volume before. If the
    /// backing does not let it, the zone is refused to clients until a step completes it
    /// ([`unfinished`](Reencryption::unfinished)).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if it is being re-encrypted already; [`ErrorKind::Invalid`] if the new volume has another
    /// backing or size, or blocks that clients do not know of, or the state is another volume's or damaged;
    /// [`ErrorKind::ReadOnly`]. What backing and state say. It is what it was then.
    ///
    /// # Blocking
    ///
    /// Waits for all requests that are under way.
    pub fn begin(self: &Arc<Self>, new: Volume, state: impl Ledger + 'static) -> Result<Reencryption, Error> {
        let mut state: Box<dyn Ledger> = Box::new(state);
        let invalid = |why: &str| Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(why.to_owned()));
        let _guard = self.locks.take(EVERYTHING, Sharing::Exclusive);
        let Sides::One(old) = &**self.sides.load() else {
            return Err(Error::new(ErrorKind::Busy, Op::Reencrypt).detail("it is being re-encrypted already"));
        };
        let old = old.clone();
        check_layouts(old.layout(), new.layout())?;
        if !Arc::ptr_eq(old.backing(), new.backing()) {
            return invalid("old and new volume are not over the same backing");
        }
        if state.size_bytes() != new.layout().size_bytes() {
            return invalid("the state of the re-encryption is that of a volume of another size");
        }
        if self.geometry.access == Access::ReadOnly || new.geometry().access == Access::ReadOnly {
            return Err(Error::new(ErrorKind::ReadOnly, Op::Reencrypt));
        }
        let block_bytes = new.layout().logical_block_bytes();
        if !clients_can_stay(&self.geometry, new.layout().mode(), block_bytes) {
            return Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(format!(
                "clients know logical blocks of {} bytes, and {} with data units of {} cannot write less than {block_bytes}",
                self.geometry.logical_block_bytes,
                new.layout().mode(),
                new.layout().data_unit_size(),
            )));
        }
        if self.geometry.can_trim && !new.geometry().can_trim {
            return invalid("clients know that it can be trimmed, and the new volume could not be");
        }
        state.check()?;
        let new = Arc::new(new);
        let room = match old.try_large_buffer() {
            Some(buffer) => buffer,
            None => old.private_buffer(LARGE_BUFFER_BYTES)?,
        };
        let other_room = match shares_memory(old.admission().profile(), &new) {
            true => None,
            false => Some(new.private_buffer(LARGE_BUFFER_BYTES)?),
        };
        let two = Two { old, new, border: Arc::default() };
        let mut running = Reencryption {
            live: self.clone(),
            two: two.clone(),
            state,
            rooms: Rooms { first: room, other: other_room },
            holes: Holes::Rewritten,
            unfinished: None,
        };
        let zone = running.state.next_zone();
        if running.state.is_interrupted() {
            // The rest can be served, and a later step completes it: media come back, and disks get room.
            running.unfinished = running.complete(&zone).err();
        }
        // From here on pieces of requests lie on one side each.
        if let Some(error) = running.unfinished.take_if(|_| !is_border(&zone)) {
            return Err(error);
        }
        while !is_border(&running.state.next_zone()) {
            let zone = running.state.next_zone();
            running.prepare(&zone)?;
            running.state.commit(&zone)?;
            running.complete(&zone)?;
        }
        two.border.boundary.store(running.state.boundary(), Ordering::Relaxed);
        if running.state.is_interrupted() {
            two.border.broken_end.store(zone.end, Ordering::Relaxed);
        }
        self.change_sides(Sides::Two(two));
        Ok(running)
    }

    /// Does the pieces at these indices of `batch`, all of which are `volume`'s and locked.
    ///
    /// A piece was laid out before it was known whose it is. Where its memory does not suit the volume's data units, or is
    /// not its engine's, it is done in other memory.
    fn transfer_some(&self, volume: &Volume, batch: &mut Batch, indices: &[usize], buffer: &mut Buffer) {
        let unit = u32::try_from(volume.unit_bytes()).expect("at most 64 KiB");
        let shares = shares_memory(&self.home, volume);
        let mut placed = Vec::with_capacity(indices.len());
        let mut others = Vec::new();
        for &index in indices {
            let item = &batch.items[index];
            let inner = item.span().recut(unit);
            let at = item.payload().start.checked_sub(inner.payload().start);
            match at.map(|at| Item::placed(inner, item.transfer(), at)) {
                Some(inner) if shares && inner.at() >= item.at() && inner.end() <= item.end() => {
                    placed.push((index, inner));
                }
                _ => others.push((index, inner)),
            }
        }
        let (indices, items): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
        if !items.is_empty() {
            let mut inner = Batch::of_placed(items);
            volume.transfer_locked(&mut inner, buffer);
            for (index, done) in indices.into_iter().zip(inner.items) {
                batch.items[index].set_result(done.into_result());
            }
        }
        for (index, span) in others {
            let item = &mut batch.items[index];
            let result = transfer_elsewhere(volume, span, item, buffer);
            item.set_result(result);
        }
    }
}

/// Whether a zone begins and ends at borders of chunks, or of the volume: what is empty is at its end.
fn is_border(zone: &Range<u64>) -> bool {
    zone.is_empty() || zone.start.is_multiple_of(CHUNK_BYTES as u64)
}

/// Whether the engine of `volume` reaches the memory of `profile`'s.
fn shares_memory(profile: &Arc<CryptoProfile>, volume: &Volume) -> bool {
    Arc::ptr_eq(profile, volume.admission().profile())
}

/// Does a piece in memory of the volume's engine.
fn transfer_elsewhere(volume: &Volume, span: Span, item: &Item, buffer: &mut Buffer) -> Result<(), Error> {
    let mut own = match volume.try_large_buffer() {
        Some(own) => own,
        None => volume.private_buffer(span.buffer_bytes())?,
    };
    let (theirs, ours) = (item.payload(), span.payload());
    if item.transfer() != Transfer::Read {
        own.bytes_mut()[ours.clone()].copy_from_slice(&buffer.bytes()[theirs.clone()]);
    }
    let mut batch = Batch::of_one(span, item.transfer());
    volume.transfer_locked(&mut batch, &mut own);
    batch.into_only_result()?;
    if item.transfer() == Transfer::Read {
        buffer.bytes_mut()[theirs].copy_from_slice(&own.bytes()[ours]);
    }
    Ok(())
}

/// Whether the piece lies in its memory as a volume of data units of `unit_bytes` would lay it.
fn is_cut_for(span: Span, unit_bytes: u32) -> bool {
    span == span.recut(unit_bytes)
}

impl Disk for LiveVolume {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn try_large_buffer(&self) -> Option<Buffer> {
        self.home.try_large_buffer()
    }

    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        self.home.private_buffer(len_bytes)
    }

    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span {
        Span::cut(self.unit_bytes.load(Ordering::Relaxed), offset, len, buffer_bytes)
    }

    fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error> {
        self.geometry.check(offset, len, access)
    }

    fn transfer(&self, batch: &mut Batch, buffer: &mut Buffer) {
        for item in &mut batch.items {
            let span = item.span();
            let checked = self.check(span.offset(), span.payload().len() as u64, item.transfer().access());
            item.set_result(checked.and_then(|()| item.fits(buffer)));
        }
        let tried = batch.items.iter().filter(|item| item.result().is_ok());
        let (_guard, sides) = self.lock(tried.map(|item| {
            let sharing = match item.transfer() {
                Transfer::Read => Sharing::Shared,
                Transfer::Write(_) => Sharing::Exclusive,
            };
            (item.span().range(), sharing)
        }));
        if let Sides::One(volume) = &**sides
            && shares_memory(&self.home, volume)
        {
            let unit = u32::try_from(volume.unit_bytes()).expect("at most 64 KiB");
            if batch.items.iter().all(|item| is_cut_for(item.span(), unit)) {
                return volume.transfer_locked(batch, buffer);
            }
        }
        let mut of_each: [(Option<Arc<Volume>>, Vec<usize>); 2] = Default::default();
        for (index, item) in batch.items.iter_mut().enumerate().filter(|(_, item)| item.result().is_ok()) {
            match sides.side_of(item.span()) {
                Ok(volume) => {
                    let is_first = of_each[0].0.as_ref().is_none_or(|first| Arc::ptr_eq(first, volume));
                    let (side, indices) = &mut of_each[usize::from(!is_first)];
                    side.get_or_insert_with(|| volume.clone());
                    indices.push(index);
                }
                Err(error) => item.set_result(Err(error)),
            }
        }
        for (side, indices) in of_each {
            if let Some(volume) = side {
                self.transfer_some(&volume, batch, &indices, buffer);
            }
        }
    }

    fn flush(&self) -> Result<(), Error> {
        // Both have one backing.
        let volume = self.sides.load().coarse().clone();
        volume.flush()
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check(offset, len, Access::ReadWrite)?;
        if len == 0 || !self.geometry.can_trim {
            return Ok(());
        }
        let range = offset..offset + len;
        // Held until the storage is given back, so that no later write is lost to an earlier trim.
        let (_guard, sides) = self.lock(std::iter::once((range.clone(), Sharing::Exclusive)));
        let Two { old, new, border } = match &**sides {
            Sides::One(volume) => return volume.trim_locked(range),
            Sides::Two(two) => two,
        };
        let boundary = border.boundary.load(Ordering::Relaxed).clamp(range.start, range.end);
        // What could not be completed stays for who completes it.
        let behind = border.broken_end.load(Ordering::Relaxed).clamp(boundary, range.end);
        new.trim_locked(range.start..boundary)?;
        old.trim_locked(behind..range.end)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.check(offset, len, Access::ReadOnly)?;
        let volume = self.sides.load().coarse().clone();
        volume.extents(offset, len, extents_max)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let volume = self.sides.load().coarse().clone();
        volume.prefetch(offset, len);
    }
}

/// What becomes of parts of the volume that have no storage: never written, or trimmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// They are re-encrypted like everything else, so that they read as before and have storage afterwards.
    Rewritten,
    /// They stay, and what is read there changes: from one noise to another.
    Kept,
}

/// A re-encryption under way. Dropping it stops it where it is; the volume goes on being served by both keys.
#[derive(Debug)]
pub struct Reencryption {
    live: Arc<LiveVolume>,
    two: Two,
    state: Box<dyn Ledger>,
    rooms: Rooms,
    holes: Holes,
    /// Why the zone that was interrupted could not be completed when this began.
    unfinished: Option<Error>,
}

/// Memory for one chunk at a time, whatever the zone.
#[derive(Debug)]
struct Rooms {
    first: Buffer,
    /// If the new volume's engine has memory of its own.
    other: Option<Buffer>,
}

impl Rooms {
    /// Makes new ciphertext of the old one that is in the first room at `range`, and lies on the volume at `at`. It is at the same
    /// range of the buffer that is returned.
    fn convert(&mut self, two: &Two, at: u64, range: Range<usize>) -> Result<&Buffer, Error> {
        let Self { first, other } = self;
        two.old.crypt_units(Direction::Decrypt, at, first, range.clone())?;
        let ciphertext = match other {
            None => first,
            Some(other) => {
                other.bytes_mut()[range.clone()].copy_from_slice(&first.bytes()[range.clone()]);
                other
            }
        };
        two.new.crypt_units(Direction::Encrypt, at, ciphertext, range)?;
        Ok(ciphertext)
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes under the new key.
    pub done_bytes: u64,
    /// Bytes of the volume.
    pub size_bytes: u64,
}

impl Progress {
    /// Whether there is nothing left to do but [`finish`](Reencryption::finish).
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.done_bytes == self.size_bytes
    }
}

impl Reencryption {
    /// The same, with holes treated so.
    #[must_use]
    pub fn with_holes(self, holes: Holes) -> Self {
        Self { holes, ..self }
    }

    /// Why the zone that was interrupted could not be completed at the beginning: until a [step](Self::step) does, it is
    /// refused to clients.
    #[must_use]
    pub fn unfinished(&self) -> Option<&Error> {
        self.unfinished.as_ref()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { done_bytes: self.state.boundary(), size_bytes: self.state.size_bytes() }
    }

    /// Moves the boundary over the next zone, or completes the one that failed before. Nothing at the end.
    ///
    /// # Errors
    ///
    /// What backing, engine and state say. Either the zone is untouched, and clients notice nothing; or it has been half
    /// written, and is refused to clients until a later step completes it. It is safe to try again, and to stop.
    ///
    /// # Blocking
    ///
    /// Waits for requests to the zone that are under way; who comes to it meanwhile waits until it is done.
    pub fn step(&mut self) -> Result<Progress, Error> {
        let zone = self.state.next_zone();
        if zone.is_empty() {
            return Ok(self.progress());
        }
        let live = self.live.clone();
        let _guard = live.locks.take(zone.clone(), Sharing::Exclusive);
        let is_hole = !self.state.is_interrupted() && self.holes == Holes::Kept && self.is_hole(&zone)?;
        let is_new = !self.state.is_interrupted() && !is_hole;
        if is_new {
            self.prepare(&zone)?;
        }
        // From here on what was prepared may count, and nobody may see what is between old and new, or write what a repair
        // would undo.
        let border = self.two.border.clone();
        let Border { boundary, broken_end } = &*border;
        broken_end.store(zone.end, Ordering::Relaxed);
        if is_new {
            self.state.commit(&zone)?;
        }
        match is_hole {
            true => self.state.advance_to(zone.end)?,
            false => self.complete(&zone)?,
        }
        boundary.store(zone.end, Ordering::Relaxed);
        broken_end.store(0, Ordering::Relaxed);
        Ok(self.progress())
    }

    fn is_hole(&self, zone: &Range<u64>) -> Result<bool, Error> {
        let len = zone.end - zone.start;
        let runs = self.two.old.backing().extents(zone.start, len, 1)?;
        Ok(runs.first().is_some_and(|run| !run.allocated && run.len >= len))
    }

    /// Has the ledger keep what it keeps of the zone.
    fn prepare(&mut self, zone: &Range<u64>) -> Result<(), Error> {
        let Self { two, state, rooms, .. } = self;
        for (at, len) in chunks(zone.clone()) {
            again_if_interrupted(|| {
                two.old.backing().read(at, &mut rooms.first.bytes_mut()[..len])?;
                let ciphertext = match state.keeps() {
                    Keeps::Past => &rooms.first,
                    Keeps::Future => rooms.convert(two, at, 0..len)?,
                };
                state.put(at, &ciphertext.bytes()[..len])
            })?;
        }
        state.seal()
    }

    /// Writes the zone as the ledger has kept it, and moves the boundary behind it. Whoever finds it interrupted does the same.
    fn complete(&mut self, zone: &Range<u64>) -> Result<(), Error> {
        let Self { two, state, rooms, .. } = self;
        let backing = two.old.backing();
        for (at, len) in chunks(zone.clone()) {
            again_if_interrupted(|| {
                for part in state.recall(&**backing, at, &mut rooms.first.bytes_mut()[..len])? {
                    let from = at + part.start as u64;
                    let ciphertext = match state.keeps() {
                        Keeps::Future => &rooms.first,
                        Keeps::Past => rooms.convert(two, from, part.clone())?,
                    };
                    backing.write(from, &ciphertext.bytes()[part], Durability::Cached)?;
                }
                Ok(())
            })?;
        }
        backing.flush()?;
        state.advance_to(zone.end)
    }

    /// Leaves the old volume behind, and returns the new one. The old key is evicted when this is dropped, if nobody else
    /// has it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if it is not complete.
    ///
    /// # Blocking
    ///
    /// Waits for all requests that are under way.
    pub fn finish(&self) -> Result<Arc<Volume>, Error> {
        if !self.progress().is_complete() {
            return Err(Error::new(ErrorKind::Busy, Op::Reencrypt).detail("it is not complete"));
        }
        let _guard = self.live.locks.take(EVERYTHING, Sharing::Exclusive);
        self.live.change_sides(Sides::One(self.two.new.clone()));
        Ok(self.two.new.clone())
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
