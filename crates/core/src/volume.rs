//! Encrypted volumes: the life of a request, start to finish. The file to read.
//!
//! ```text
//! 1 align     whole data units; a write that begins or ends inside one reads the rest of it first (read-modify-write)
//! 2 lock      the data units' range: writes alone, reads together; so nobody sees half of a request
//! 3 context   key, and first DUN = (iv_offset + offset / 512) in data units, or as another IV layout says
//! 4 crypt     write: encrypt in place, then backing.write         read: backing.read, then decrypt in place
//!             (the admission takes a keyslot, for as long as the engine computes or for all of this step)
//! 5 unlock    then the export answers
//! ```
//!
//! The layout is that of dm-crypt's `aes-xts-plain64` with `sector_size:N iv_large_sectors`: data unit `n` at byte
//! `n * N`, no header. So nothing on the disk tells whether a key is the right one. Others that exist differ in the DUNs
//! alone ([`IvLayout`]). Where the DUNs of neighbours are not neighbours, an engine, which counts by ones, is handed each
//! data unit by itself.
//!
//! # What an interrupted write may damage
//!
//! A plain disk that loses power during a write leaves each 512-byte sector *of that write* old or new, and no other sector
//! changed. With XTS the same holds here even if the logical block is smaller than the data unit: each 16-byte block of
//! ciphertext depends on its own plaintext, so a rewritten data unit differs only in the sectors that were written, and
//! only those are sent to the backing. With CBC a changed sector changes the ciphertext of all later ones in the unit,
//! and with a wide-block mode that of all; torn, the unit's untouched sectors would be damaged, and nothing short of a
//! journal prevents it. So for those modes the logical block is the data unit, and requests that are not whole blocks
//! are refused. (And even a whole data unit of theirs, torn, decrypts to garbage instead of to old and new sectors, as
//! with dm-crypt; a backing that writes `data unit size` bytes atomically does not tear it.)

use crate::backing::{Access, Backing, Extent};
use crate::batch::{Batch, Item};
use crate::config::{CryptoConfig, DataUnitSize, Mode};
use crate::disk::{Disk, Geometry, SIZE_BYTES_MAX, Span, Unaligned};
use crate::engine::{Direction, Piece};
use crate::error::{Error, ErrorKind, Op};
use crate::memory::Buffer;
use crate::profile::{Admission, Request};
use crate::range_lock::{RangeLock, Sharing};
use inlinecrypt_cipher::{Dun, SectorUpdate};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// How often in a row the engine may end in the midst of one decryption: whoever starts it again gives up sooner.
const INTERRUPTIONS_MAX: u32 = 16;

/// Bytes of a sector: the unit of IV offsets, and the least that disks write at once.
pub const SECTOR_BYTES: u32 = 512;

/// Which DUN the data unit at a place has: what the IV is made of. Places count from the volume's start, with the IV
/// offset added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IvLayout {
    /// Its number: 0, 1, 2. dm-crypt's `plain64` with `iv_large_sectors`, dm-inlinecrypt, hardware.
    #[default]
    DataUnits,
    /// The number of its first 512-byte sector: 0, 8, 16 for data units of 4096 bytes. dm-crypt's `plain64` without
    /// `iv_large_sectors`.
    Sectors,
    /// Its number in the upper half of an IV of 16 bytes: 0, 2^64, 2 * 2^64. What SPDK writes in software
    /// (`lib/accel/accel_sw.c`), and ubiblk, both with data units of a logical block.
    UpperHalf,
}

impl IvLayout {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::DataUnits, Self::Sectors, Self::UpperHalf];

    /// The name that our command line and descriptions take.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DataUnits => "data-units",
            Self::Sectors => "sectors",
            Self::UpperHalf => "upper-half",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.name() == name)
    }
}

impl fmt::Display for IvLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a volume lies on its backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    mode: Mode,
    data_unit_size: DataUnitSize,
    logical_block_bytes: u32,
    iv: IvLayout,
    iv_offset_sectors: u64,
    size_bytes: u64,
}

impl Layout {
    /// A volume of `mode` over `backing_bytes`, of which whole data units are used. Its logical block is
    /// `logical_block_bytes`, or what suits the mode: 512 bytes for XTS, the data unit else.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the data unit is not 512 bytes to 64 KiB, the backing holds not even one, the logical
    /// block is not a power of two from 512 bytes to the data unit, smaller than the data unit though the mode would be
    /// torn (see the module), the IV offset is not a whole number of data units (dm-crypt refuses that, too), or the IVs
    /// would overflow.
    pub fn new(
        mode: Mode,
        data_unit_size: DataUnitSize,
        logical_block_bytes: Option<u32>,
        iv_offset_sectors: u64,
        backing_bytes: u64,
    ) -> Result<Self, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::Invalid, Op::Open).detail(detail);
        let unit_bytes = data_unit_size.bytes();
        if !(DataUnitSize::MIN_SERVED..=DataUnitSize::MAX_SERVED).contains(&data_unit_size) {
            return Err(invalid(format!("data units of {unit_bytes} bytes; volumes have 512 to 65536")));
        }
        let update = mode.info().sector_update;
        let logical_block_bytes = logical_block_bytes.unwrap_or(match update {
            SectorUpdate::Local => SECTOR_BYTES,
            SectorUpdate::Chained | SectorUpdate::Wide => unit_bytes,
        });
        if !logical_block_bytes.is_power_of_two()
            || !(SECTOR_BYTES..=unit_bytes).contains(&logical_block_bytes)
        {
            return Err(invalid(format!(
                "a logical block of {logical_block_bytes} bytes; it must be a power of two from 512 to the data \
                 unit's {unit_bytes}"
            )));
        }
        if logical_block_bytes < unit_bytes && update != SectorUpdate::Local {
            return Err(invalid(format!(
                "a logical block of {logical_block_bytes} bytes in data units of {unit_bytes}: with {mode} an \
                 interrupted write would damage blocks that were not written; use a logical block of {unit_bytes}, \
                 a data unit of {logical_block_bytes}, or an XTS mode"
            )));
        }
        let size_bytes = backing_bytes & !(u64::from(unit_bytes) - 1);
        if size_bytes == 0 {
            return Err(invalid(format!("{backing_bytes} bytes are not even one data unit of {unit_bytes}")));
        }
        if size_bytes > SIZE_BYTES_MAX {
            return Err(invalid(format!("{backing_bytes} bytes; a volume has {SIZE_BYTES_MAX} at the most")));
        }
        if !iv_offset_sectors.is_multiple_of(u64::from(unit_bytes / SECTOR_BYTES)) {
            return Err(invalid(format!(
                "an IV offset of {iv_offset_sectors} sectors; with data units of {unit_bytes} bytes it must be a multiple \
                 of {}",
                unit_bytes / SECTOR_BYTES
            )));
        }
        let sectors = size_bytes / u64::from(SECTOR_BYTES);
        if iv_offset_sectors.checked_add(sectors - 1).is_none() {
            return Err(invalid(format!(
                "with an IV offset of {iv_offset_sectors} sectors the IVs overflow"
            )));
        }
        let iv = IvLayout::default();
        Ok(Self { mode, data_unit_size, logical_block_bytes, iv, iv_offset_sectors, size_bytes })
    }

    /// The same with another IV layout. For data units of 512 bytes, sectors and data units are one thing and called
    /// [`IvLayout::DataUnits`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for [`IvLayout::UpperHalf`] with a mode other than XTS: nobody writes such, and a wider IV
    /// has no half that is meant.
    pub fn with_iv(self, iv: IvLayout) -> Result<Self, Error> {
        let is_xts = self.mode.info().sector_update == SectorUpdate::Local;
        if iv == IvLayout::UpperHalf && !is_xts {
            return Err(Error::new(ErrorKind::Invalid, Op::Open).detail(format!(
                "the IV layout {iv} with {}; SPDK and ubiblk, whose layout it is, have it with XTS alone",
                self.mode
            )));
        }
        let same = iv == IvLayout::Sectors && self.data_unit_size.bytes() == SECTOR_BYTES;
        Ok(Self { iv: if same { IvLayout::DataUnits } else { iv }, ..self })
    }

    /// How many bytes the volume's largest DUN needs: what its key must be made for.
    #[must_use]
    pub fn dun_bytes(&self) -> u8 {
        self.dun_at(self.size_bytes - 1).significant_bytes().max(1)
    }

    /// Its mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Its data unit size.
    #[must_use]
    pub fn data_unit_size(&self) -> DataUnitSize {
        self.data_unit_size
    }

    /// Least unit that clients should address, in bytes.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// Which DUN each data unit has.
    #[must_use]
    pub fn iv(&self) -> IvLayout {
        self.iv
    }

    /// What is added to the sector number before it becomes a DUN, in 512-byte sectors.
    #[must_use]
    pub fn iv_offset_sectors(&self) -> u64 {
        self.iv_offset_sectors
    }

    /// Its size in bytes: whole data units.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn dun_at(&self, offset_bytes: u64) -> Dun {
        let sector = self.iv_offset_sectors + offset_bytes / u64::from(SECTOR_BYTES);
        let number = sector >> (self.data_unit_size.log2() - 9);
        match self.iv {
            IvLayout::DataUnits => Dun::from(number),
            IvLayout::Sectors => Dun::from(number << (self.data_unit_size.log2() - 9)),
            IvLayout::UpperHalf => Dun::from_limbs([0, number, 0, 0]),
        }
    }

    /// Calls `each` for the pieces that data units beside each other on the disk, the first of them at `offset`, are to an
    /// engine that counts DUNs by ones.
    fn pieces(&self, offset: u64, range: Range<usize>, each: &mut impl FnMut(Piece)) {
        let step = match self.iv {
            IvLayout::DataUnits => range.len().max(1),
            IvLayout::Sectors | IvLayout::UpperHalf => self.data_unit_size.bytes() as usize,
        };
        for start in range.clone().step_by(step) {
            let first = self.dun_at(offset + (start - range.start) as u64);
            each(Piece { first, range: start..(start + step).min(range.end) });
        }
    }

    fn suits(&self, config: &CryptoConfig) -> bool {
        config.mode() == self.mode
            && config.data_unit_size() == self.data_unit_size
            && config.dun_bytes() >= self.dun_bytes()
    }
}

/// What a volume gives back when clients trim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The backing's storage. Whoever sees the backing learns which parts are unused.
    Pass,
    /// Nothing: trim is not offered.
    Off,
}

/// A volume: an admitted key over a backing.
#[derive(Debug)]
pub struct Volume {
    layout: Layout,
    admission: Admission,
    backing: Arc<dyn Backing>,
    /// Bytes to whose multiples writes are widened: what the backing asks for, and never less than a sector.
    granule: u64,
    access: Access,
    can_discard: bool,
    does_batches_at_once: bool,
    locks: RangeLock,
}

impl Volume {
    /// A volume of `layout` on `backing`, with the key of `admission`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the key was not made for the layout, the backing is shorter than it, or cannot be
    /// addressed in its data units.
    pub fn new(
        layout: Layout,
        admission: Admission,
        backing: Arc<dyn Backing>,
        access: Access,
        discard: Discard,
    ) -> Result<Self, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::Invalid, Op::Open).detail(detail);
        let facts = backing.facts();
        if !layout.suits(admission.key().config()) {
            return Err(invalid("the key was made for another mode, data unit size or DUN width".to_owned()));
        }
        if facts.len_bytes < layout.size_bytes {
            return Err(invalid(format!(
                "the backing has {} bytes, the volume {}",
                facts.len_bytes, layout.size_bytes
            )));
        }
        let unit_bytes = layout.data_unit_size.bytes();
        if facts.align_bytes > unit_bytes {
            return Err(invalid(format!(
                "the backing is addressed in blocks of {} bytes, the data units have {unit_bytes}",
                facts.align_bytes
            )));
        }
        if facts.access == Access::ReadOnly && access == Access::ReadWrite {
            return Err(Error::new(ErrorKind::ReadOnly, Op::Open).detail("the backing is read-only"));
        }
        Ok(Self {
            granule: u64::from(facts.align_bytes.max(SECTOR_BYTES)),
            can_discard: facts.can_discard && discard == Discard::Pass && access == Access::ReadWrite,
            does_batches_at_once: facts.does_parts_at_once,
            layout,
            admission,
            backing,
            access,
            locks: RangeLock::new(),
        })
    }

    /// How it lies on its backing.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The right to its key.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// What is below it.
    pub(crate) fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    pub(crate) fn unit_bytes(&self) -> u64 {
        self.layout.data_unit_size.bytes().into()
    }

    fn unit_floor(&self, offset: u64) -> u64 {
        offset & !(self.unit_bytes() - 1)
    }

    /// Puts the plaintext of the data unit at `offset` into the scratch room.
    fn read_edge(
        &self,
        request: &mut Request<'_>,
        offset: u64,
        scratch: Range<usize>,
        buffer: &mut Buffer,
    ) -> Result<(), Error> {
        again_if_interrupted(|| {
            self.backing.read(offset, &mut buffer.bytes_mut()[scratch.clone()])?;
            let first = self.layout.dun_at(offset);
            request.crypt(Direction::Decrypt, first, buffer.memory_mut(), scratch.clone())
        })
    }

    /// Does all that is read.
    fn fetch_all(&self, request: &mut Request<'_>, batch: &mut Batch, buffer: &mut Buffer) {
        let fetched = again_if_interrupted(|| {
            batch.do_parts(
                |item| item.goes(Access::ReadOnly).then(|| (item.span().units().start, item.units())),
                |parts| self.backing.read_parts(buffer.bytes_mut(), parts),
            );
            self.crypt_all(request, Direction::Decrypt, batch, buffer)
        });
        batch.fail(Access::ReadOnly, fetched);
    }

    /// Encrypts or decrypts the data units of all that is read, or written: one call of the engine.
    fn crypt_all(
        &self,
        request: &mut Request<'_>,
        direction: Direction,
        batch: &mut Batch,
        buffer: &mut Buffer,
    ) -> Result<(), Error> {
        let access = match direction {
            Direction::Encrypt => Access::ReadWrite,
            Direction::Decrypt => Access::ReadOnly,
        };
        let Batch { items, pieces, .. } = batch;
        pieces.clear();
        for item in items.iter().filter(|item| item.goes(access)) {
            self.layout.pieces(item.span().units().start, item.units(), &mut |piece| pieces.push(piece));
        }
        if pieces.is_empty() {
            return Ok(());
        }
        request.crypt_pieces(direction, buffer.memory_mut(), pieces)
    }

    /// Encrypts or decrypts the data units of `range`, of which the first lies at `offset`. Reads and writes nothing.
    pub(crate) fn crypt_units(
        &self,
        direction: Direction,
        offset: u64,
        buffer: &mut Buffer,
        range: Range<usize>,
    ) -> Result<(), Error> {
        let mut pieces = Vec::new();
        self.layout.pieces(offset, range, &mut |piece| pieces.push(piece));
        self.admission.begin()?.crypt_pieces(direction, buffer.memory_mut(), &mut pieces)
    }

    /// Does what [`transfer`](Disk::transfer) does, for who holds the ranges already. Pieces that have failed before are
    /// left alone.
    pub(crate) fn transfer_locked(&self, batch: &mut Batch, buffer: &mut Buffer) {
        let mut request = match self.admission.begin() {
            Ok(request) => request,
            Err(error) => {
                batch.fail(Access::ReadOnly, Err(error.duplicate()));
                batch.fail(Access::ReadWrite, Err(error));
                return;
            }
        };
        self.fetch_all(&mut request, batch, buffer);
        for item in batch.items.iter_mut().filter(|item| item.goes(Access::ReadWrite)) {
            if item.span().scratch_len > 0 {
                let filled = item.fill_edges(self.unit_bytes(), buffer, |offset, scratch, buffer| {
                    self.read_edge(&mut request, offset, scratch, buffer)
                });
                item.set_result(filled);
            }
        }
        let encrypted = self.crypt_all(&mut request, Direction::Encrypt, batch, buffer);
        batch.fail(Access::ReadWrite, encrypted);
        batch.store(&*self.backing, self.granule, buffer);
    }

    /// The whole data units within `range`: what a trim of it gives back. `None` if there are none, or nothing is given
    /// back.
    fn trimmed(&self, range: Range<u64>) -> Option<Range<u64>> {
        let start = range.start.next_multiple_of(self.unit_bytes());
        let end = self.unit_floor(range.end);
        (self.can_discard && start < end).then_some(start..end)
    }

    /// Does what [`trim`](Disk::trim) does, for who holds the range already.
    pub(crate) fn trim_locked(&self, range: Range<u64>) -> Result<(), Error> {
        match self.trimmed(range) {
            Some(Range { start, end }) => self.backing.discard(start, end - start),
            None => Ok(()),
        }
    }

    /// Whether a piece may be worked on at all. The export has checked the request; this guards against others.
    fn check_piece(&self, item: &Item, buffer: &Buffer) -> Result<(), Error> {
        let span = item.span();
        self.check(span.offset, span.len as u64, item.transfer().access())?;
        item.fits(buffer)
    }
}

impl Disk for Volume {
    fn geometry(&self) -> Geometry {
        let Layout { mode, data_unit_size, logical_block_bytes, size_bytes, iv: _, iv_offset_sectors: _ } =
            self.layout;
        Geometry {
            size_bytes,
            logical_block_bytes,
            // Below a page, clients would be told to do what costs the page cache a read.
            preferred_block_bytes: data_unit_size.bytes().max(4096),
            unaligned: match mode.info().sector_update {
                SectorUpdate::Local => Unaligned::Served,
                SectorUpdate::Chained | SectorUpdate::Wide => Unaligned::Refused,
            },
            access: self.access,
            can_trim: self.can_discard,
            does_batches_at_once: self.does_batches_at_once,
        }
    }

    fn try_large_buffer(&self) -> Option<Buffer> {
        self.admission.try_large_buffer()
    }

    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        self.admission.private_buffer(len_bytes)
    }

    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span {
        Span::cut(self.layout.data_unit_size.bytes(), offset, len, buffer_bytes)
    }

    fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error> {
        self.geometry().check(offset, len, access)
    }

    fn transfer(&self, batch: &mut Batch, buffer: &mut Buffer) {
        for item in &mut batch.items {
            item.set_result(self.check_piece(item, buffer));
        }
        let _guard = batch.lock(&self.locks);
        self.transfer_locked(batch, buffer);
    }

    fn flush(&self) -> Result<(), Error> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.backing.flush(),
        }
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check(offset, len, Access::ReadWrite)?;
        let Some(range) = self.trimmed(offset..offset + len) else { return Ok(()) };
        // Held until the storage is given back, so that no later write is lost to an earlier trim.
        let _guard = self.locks.take(range.clone(), Sharing::Exclusive);
        self.trim_locked(range)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.check(offset, len, Access::ReadOnly)?;
        if len == 0 || extents_max == 0 {
            return Ok(Vec::new());
        }
        let end = offset + len;
        let (first, last) = (self.unit_floor(offset), end.next_multiple_of(self.unit_bytes()));
        let mut whole: Vec<Extent> = Vec::new();
        for extent in self.backing.extents(first, last - first, extents_max)? {
            // A data unit is allocated if any part of it is.
            let (mut from, to) = (extent.offset, extent.offset + extent.len);
            let (from_unit, to_unit) = if extent.allocated {
                (self.unit_floor(from), to.next_multiple_of(self.unit_bytes()))
            } else {
                (from.next_multiple_of(self.unit_bytes()), self.unit_floor(to))
            };
            from = whole.last().map_or(first, |last| last.offset + last.len).max(from_unit);
            if to_unit <= from {
                continue;
            }
            match whole.last_mut() {
                Some(last) if last.allocated == extent.allocated => last.len = to_unit - last.offset,
                _ => whole.push(Extent { offset: from, len: to_unit - from, allocated: extent.allocated }),
            }
        }
        clip(&mut whole, offset..end);
        Ok(whole)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        if self.check(offset, len, Access::ReadOnly).is_ok() {
            let start = self.unit_floor(offset);
            self.backing.prefetch(start, (offset + len).next_multiple_of(self.unit_bytes()) - start);
        }
    }
}

/// Reads and decrypts, again if the engine ended in the midst of the decryption.
pub(crate) fn again_if_interrupted(mut read: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
    for _ in 1..INTERRUPTIONS_MAX {
        match read() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
    read()
}

/// Cuts extents to what was asked for.
pub(crate) fn clip(extents: &mut Vec<Extent>, range: Range<u64>) {
    for extent in extents.iter_mut() {
        let (start, end) = (extent.offset.max(range.start), (extent.offset + extent.len).min(range.end));
        *extent = Extent { offset: start, len: end.saturating_sub(start), allocated: extent.allocated };
    }
    extents.retain(|extent| extent.len > 0);
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
