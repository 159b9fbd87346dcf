//! How far a container's re-encryption is, in its header: as cryptsetup writes it, so that either goes on where the other stopped.

use super::file::ReencryptionLock;
use super::{failure, random};
use crate::report::{Code, Failure};
use crate::size::Size;
use inlinecrypt_core::backing::{Backing, Durability};
use inlinecrypt_core::disk::CHUNK_BYTES;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::memory::{HeapSource, MemorySource as _};
use inlinecrypt_core::reencrypt::ledger::{Keeps, Ledger};
use inlinecrypt_luks::Storage;
use inlinecrypt_luks::luks2::{Container, Reencryption, Resilience};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Writes are whole blocks of so many bytes, so that any backing takes them.
const BLOCK_BYTES: usize = 4096;

/// A header on what the data lies on as well.
#[derive(Debug)]
pub(crate) struct OnBacking(pub(crate) Arc<dyn Backing>);

impl Storage for OnBacking {
    fn len_bytes(&self) -> u64 {
        self.0.facts().len_bytes
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let align = u64::from(self.0.facts().align_bytes);
        let (start, end) = (offset / align * align, (offset + data.len() as u64).next_multiple_of(align));
        if end > self.len_bytes() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut room = room(end - start)?;
        self.0.read(start, room.bytes_mut()).map_err(io::Error::other)?;
        let skipped = usize::try_from(offset - start).expect("less than an alignment");
        data.copy_from_slice(&room.bytes()[skipped..skipped + data.len()]);
        Ok(())
    }

    /// Of whole blocks: headers and areas are.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > self.len_bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if is_for_any(data) {
            return self.0.write(offset, data, Durability::Cached).map_err(io::Error::other);
        }
        let mut room = room(data.len() as u64)?;
        room.bytes_mut().copy_from_slice(data);
        self.0.write(offset, room.bytes(), Durability::Cached).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(io::Error::other)
    }
}

/// Whether any backing takes it as it lies in memory: the ciphertext of zones does, which is most of what is written.
fn is_for_any(data: &[u8]) -> bool {
    data.as_ptr().addr().is_multiple_of(BLOCK_BYTES) && data.len().is_multiple_of(BLOCK_BYTES)
}

/// Memory that any backing takes.
fn room(bytes: u64) -> io::Result<Box<dyn inlinecrypt_core::memory::Memory>> {
    let bytes = usize::try_from(bytes).map_err(|_long| io::ErrorKind::OutOfMemory)?;
    HeapSource.allocate(bytes).map_err(io::Error::other)
}

/// The ledger of a container.
pub(crate) struct LuksLedger {
    container: Container<Box<dyn Storage + Send>>,
    resilience: Resilience,
    area_offset: u64,
    size_bytes: u64,
    /// How much is re-encrypted at once.
    zone_bytes: u64,
    boundary: u64,
    /// Length of the zone that was committed.
    hot_bytes: Option<u64>,
    /// Hashes of the blocks of the zone that is at hand, if it is protected by them.
    sums: Vec<u8>,
    /// Nobody else re-encrypts it.
    _lock: Option<ReencryptionLock>,
}

impl LuksLedger {
    /// The ledger in the header on `storage`, of data of `size_bytes`. Nobody else changes the header meanwhile. What was complete
    /// but for its last step is completed.
    pub(crate) fn open(
        storage: Box<dyn Storage + Send>,
        size_bytes: u64,
        zone_bytes: u64,
        label: &str,
    ) -> Result<Self, Failure> {
        let failed = |error: inlinecrypt_luks::Error| failure(label, &error);
        let container = Container::read(storage).map_err(failed)?;
        let lock = ReencryptionLock::take(&container.header().uuid, label)?;
        Self::open_locked(container.into_storage(), lock, size_bytes, zone_bytes, label)
    }

    fn open_locked(
        storage: Box<dyn Storage + Send>,
        lock: Option<ReencryptionLock>,
        size_bytes: u64,
        zone_bytes: u64,
        label: &str,
    ) -> Result<Self, Failure> {
        let failed = |error: inlinecrypt_luks::Error| failure(label, &error);
        let mut container = Container::read(storage).map_err(failed)?;
        container.repair(&mut random).map_err(failed)?;
        let re = container.reencryption().map_err(failed)?;
        let Reencryption { resilience, area_offset, area_bytes, boundary, hot_bytes, fixed_bytes, .. } = re;
        let ends_at = boundary.unwrap_or(0).checked_add(hot_bytes.unwrap_or(0));
        let block_bytes = match resilience {
            Resilience::Checksum { block_bytes, .. } => block_bytes.into(),
            Resilience::Journal => 512,
        };
        let most = resilience.zone_bytes_max(area_bytes);
        if ends_at.is_none_or(|end| end > size_bytes)
            || boundary == Some(size_bytes)
            || fixed_bytes.is_some_and(|fixed| fixed != size_bytes)
            || hot_bytes.is_some_and(|hot| hot > most || hot % block_bytes != 0)
            || !size_bytes.is_multiple_of(block_bytes)
        {
            return Err(Failure::new(
                Code::File,
                format!(
                    "{label}: its data has {size_bytes} bytes, which is not what its re-encryption by {resilience} began with"
                ),
                "Give it the size that it had: nothing may be added or cut off until it is done.",
            ));
        }
        let most = most / CHUNK_BYTES as u64 * CHUNK_BYTES as u64;
        if most == 0 {
            return Err(Failure::new(
                Code::Wrong,
                format!(
                    "{label}: its header has {} left to protect what is being re-encrypted by {resilience}, which is too little",
                    Size(area_bytes)
                ),
                "Remove LUKS keyslots first; what has begun, cryptsetup finishes: cryptsetup reencrypt --resume-only",
            ));
        }
        if boundary.is_none() {
            let left = container.finish_reencryption(&mut random).map_err(failed)?;
            container.wipe_leftovers(left, &mut random).map_err(failed)?;
        }
        Ok(Self {
            container,
            resilience,
            area_offset,
            size_bytes,
            zone_bytes: zone_bytes.min(most),
            boundary: boundary.unwrap_or(size_bytes),
            hot_bytes,
            sums: Vec::new(),
            _lock: lock,
        })
    }

    fn storage(&mut self) -> &mut dyn Storage {
        self.container.storage_mut()
    }

    /// Bytes of all hashes of a zone.
    fn sums_len(&self, zone_bytes: u64) -> usize {
        match self.resilience {
            Resilience::Journal => 0,
            Resilience::Checksum { hash, block_bytes } => {
                let blocks = zone_bytes / u64::from(block_bytes);
                usize::try_from(blocks).expect("they were bound by the area") * hash.bytes()
            }
        }
    }
}

fn bad(what: &'static str, error: io::Error) -> Error {
    Error::new(ErrorKind::Backing, Op::Reencrypt).detail(what).because(error)
}

const HEADER: &str = "the LUKS header cannot be written";

impl Ledger for LuksLedger {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn boundary(&self) -> u64 {
        self.boundary
    }

    fn is_interrupted(&self) -> bool {
        self.hot_bytes.is_some()
    }

    fn next_zone(&self) -> Range<u64> {
        let Self { boundary, size_bytes, zone_bytes, hot_bytes, .. } = *self;
        if let Some(hot) = hot_bytes {
            return boundary..boundary + hot;
        }
        let chunk = CHUNK_BYTES as u64;
        let end = match boundary.is_multiple_of(chunk) {
            true => boundary.saturating_add(zone_bytes),
            // cryptsetup stops anywhere.
            false => boundary.next_multiple_of(chunk),
        };
        boundary..end.min(size_bytes)
    }

    fn keeps(&self) -> Keeps {
        Keeps::Past
    }

    fn check(&mut self) -> Result<(), Error> {
        let Some(hot) = self.hot_bytes else { return Ok(()) };
        let mut sums = vec![0; self.sums_len(hot)];
        let area = self.area_offset;
        self.storage().read(area, &mut sums).map_err(|error| bad("the LUKS header cannot be read", error))?;
        self.sums = sums;
        Ok(())
    }

    fn put(&mut self, offset: u64, ciphertext: &[u8]) -> Result<(), Error> {
        if offset == self.boundary {
            self.sums.clear();
        }
        match self.resilience {
            Resilience::Journal => {
                let at = self.area_offset + (offset - self.boundary);
                if ciphertext.len().is_multiple_of(BLOCK_BYTES) {
                    return self.storage().write(at, ciphertext).map_err(|error| bad(HEADER, error));
                }
                let mut whole = ciphertext.to_vec();
                whole.resize(whole.len().next_multiple_of(BLOCK_BYTES), 0);
                self.storage().write(at, &whole).map_err(|error| bad(HEADER, error))
            }
            Resilience::Checksum { block_bytes, .. } => {
                for block in ciphertext.chunks(block_bytes as usize) {
                    self.sums.extend(self.resilience.checksum(block).expect("it has them"));
                }
                Ok(())
            }
        }
    }

    fn seal(&mut self) -> Result<(), Error> {
        if !self.sums.is_empty() {
            let mut whole = self.sums.clone();
            whole.resize(whole.len().next_multiple_of(BLOCK_BYTES), 0);
            let area = self.area_offset;
            self.storage().write(area, &whole).map_err(|error| bad(HEADER, error))?;
        }
        self.storage().flush().map_err(|error| bad(HEADER, error))
    }

    fn commit(&mut self, zone: &Range<u64>) -> Result<(), Error> {
        let hot = zone.end - zone.start;
        self.container
            .set_boundary(self.boundary, Some(hot), self.size_bytes, &mut random)
            .map_err(|error| bad(HEADER, io::Error::other(error)))?;
        self.hot_bytes = Some(hot);
        Ok(())
    }

    fn recall(
        &mut self,
        backing: &dyn Backing,
        offset: u64,
        room: &mut [u8],
    ) -> Result<Vec<Range<usize>>, Error> {
        let Resilience::Checksum { hash, block_bytes } = self.resilience else {
            let at = self.area_offset + (offset - self.boundary);
            self.storage().read(at, room).map_err(|error| bad("the LUKS header cannot be read", error))?;
            return Ok(std::iter::once(0..room.len()).collect());
        };
        backing.read(offset, room)?;
        let block_bytes = block_bytes as usize;
        let first = usize::try_from(offset - self.boundary).expect("within a zone") / block_bytes;
        let sums =
            self.sums.get(first * hash.bytes()..first * hash.bytes() + self.sums_len(room.len() as u64));
        let sums = sums
            .ok_or_else(|| Error::new(ErrorKind::Bug, Op::Reencrypt).detail("a zone without its hashes"))?;
        let sums = sums.chunks(hash.bytes());
        let mut old: Vec<Range<usize>> = Vec::new();
        for ((number, block), sum) in room.chunks(block_bytes).enumerate().zip(sums) {
            // What is not the old one is the new one: a block is written whole or not at all.
            if self.resilience.checksum(block).as_deref() != Some(sum) {
                continue;
            }
            let range = number * block_bytes..(number + 1) * block_bytes;
            match old.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => old.push(range),
            }
        }
        Ok(old)
    }

    fn advance_to(&mut self, boundary: u64) -> Result<(), Error> {
        let failed = |error| bad(HEADER, io::Error::other(error));
        if boundary < self.size_bytes {
            self.container.set_boundary(boundary, None, self.size_bytes, &mut random).map_err(failed)?;
        } else {
            let left = self.container.finish_reencryption(&mut random).map_err(failed)?;
            // The header has forgotten them, and their salts with it: nothing depends on this.
            if let Err(error) = self.container.wipe_leftovers(left, &mut random) {
                tracing::warn!("the old key's LUKS keyslots could not be overwritten: {error}");
            }
        }
        self.boundary = boundary;
        self.hot_bytes = None;
        Ok(())
    }
}

impl fmt::Debug for LuksLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LuksLedger({} of {} bytes)", self.boundary, self.size_bytes)
    }
}

#[cfg(test)]
mod tests;
