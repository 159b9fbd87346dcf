//! A disk that forgets what was not flushed, and looks for plaintext in what it is given.

use super::random::Random;
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::Error;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is written whole or not at all, in bytes.
pub const SECTOR: usize = 512;

/// Eight bytes that begin every sixteen of a simulated client's data: they never reach a disk unless somebody forgot to
/// encrypt (by chance, once in 2^64 blocks).
pub const PLAINTEXT: [u8; 8] = *b"PLAINTXT";

/// Whether client data is in here as it was.
#[must_use]
pub fn has_plaintext(bytes: &[u8]) -> bool {
    bytes.chunks_exact(8).any(|chunk| chunk == PLAINTEXT)
}

/// The disk. Sectors are stable, or pending in the order of their writing; a power cut leaves each at its stable content or any
/// of the pending ones.
#[derive(Debug)]
pub struct SimDisk {
    state: Mutex<Media>,
}

#[derive(Clone, Debug)]
struct Media {
    stable: Vec<u8>,
    pending: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    saw_plaintext: bool,
    /// Flushes do nothing, to see the checks catch it.
    forgets_flushes: bool,
}

impl SimDisk {
    /// So many sectors of zeroes.
    #[must_use]
    pub fn new(sectors: usize, forgets_flushes: bool) -> Self {
        let media = Media {
            stable: vec![0; sectors * SECTOR],
            pending: BTreeMap::new(),
            saw_plaintext: false,
            forgets_flushes,
        };
        Self { state: Mutex::new(media) }
    }

    fn media(&self) -> MutexGuard<'_, Media> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether plaintext was ever written, or is there now.
    #[must_use]
    pub fn saw_plaintext(&self) -> bool {
        let media = self.media();
        media.saw_plaintext || has_plaintext(&media.stable)
    }

    /// The power fails: what was pending survives or not, sector by sector.
    pub fn cut_power(&self, random: &mut Random) {
        let mut media = self.media();
        for (sector, changes) in std::mem::take(&mut media.pending) {
            let survivor = random.index(changes.len() + 1);
            if let Some(content) = changes.get(survivor) {
                media.stable[sector * SECTOR..][..SECTOR].copy_from_slice(content);
            }
        }
    }
}

impl Media {
    fn write(&mut self, offset: u64, data: &[u8], durability: Durability) {
        self.saw_plaintext |= has_plaintext(data);
        let first = usize::try_from(offset).expect("small") / SECTOR;
        for (sector, content) in (first..).zip(data.chunks_exact(SECTOR)) {
            let content: [u8; SECTOR] = content.try_into().expect("a sector");
            if durability == Durability::Durable && !self.forgets_flushes {
                self.pending.remove(&sector);
                self.stable[sector * SECTOR..][..SECTOR].copy_from_slice(&content);
            } else {
                self.pending.entry(sector).or_default().push(content);
            }
        }
    }
}

impl Backing for SimDisk {
    fn facts(&self) -> BackingFacts {
        let len_bytes = self.media().stable.len() as u64;
        BackingFacts {
            len_bytes,
            align_bytes: 512,
            access: Access::ReadWrite,
            can_discard: true,
            does_parts_at_once: false,
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let media = self.media();
        let start = usize::try_from(offset).expect("small");
        data.copy_from_slice(&media.stable[start..start + data.len()]);
        for (sector, content) in (start / SECTOR..).zip(data.chunks_exact_mut(SECTOR)) {
            if let Some(newest) = media.pending.get(&sector).and_then(|changes| changes.last()) {
                content.copy_from_slice(newest);
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.media().write(offset, data, durability);
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        let mut media = self.media();
        if !media.forgets_flushes {
            for (sector, changes) in std::mem::take(&mut media.pending) {
                let newest = changes.last().expect("never empty");
                media.stable[sector * SECTOR..][..SECTOR].copy_from_slice(newest);
            }
        }
        Ok(())
    }

    /// Zeroes, until the power is cut perhaps.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        let zeroes = vec![0; usize::try_from(len).expect("small")];
        self.media().write(offset, &zeroes, Durability::Cached);
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { offset, len, allocated: true }])
    }

    fn prefetch(&self, _: u64, _: u64) {}
}
