//! What must be true: a shadow of each volume, in plaintext, with everything that a power cut may leave.

use super::disk::SECTOR;
use std::collections::BTreeMap;
use std::ops::Range;

/// A sector's content; `None` is anything, for what was never written or was trimmed.
type Content = Option<Box<[u8]>>;

/// What a volume should hold.
#[derive(Clone, Debug)]
pub struct Shadow {
    sectors: Vec<Sector>,
    under_way: BTreeMap<u64, (usize, Vec<u8>)>,
    /// Moments: acknowledgements and flushes in order.
    now: u64,
    last_write: u64,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    /// What a flush has made stable.
    stable: Content,
    /// What was acknowledged since, with its moment, oldest first.
    since: Vec<(u64, Content)>,
}

impl Sector {
    fn newest(&self) -> &Content {
        self.since.last().map_or(&self.stable, |(_, content)| content)
    }
}

fn is(content: &Content, found: &[u8]) -> bool {
    content.as_ref().is_none_or(|content| **content == *found)
}

impl Shadow {
    /// Nothing was written.
    #[must_use]
    pub fn new(sectors: usize) -> Self {
        Self { sectors: vec![Sector::default(); sectors], under_way: BTreeMap::new(), now: 0, last_write: 0 }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// What reads would find now, as far as it is known.
    #[must_use]
    pub fn newest(&self, sector: usize) -> Option<&[u8]> {
        self.sectors[sector].newest().as_deref()
    }

    /// A write begins: from now on a power cut may leave it there. Whole sectors.
    pub fn begin_write(&mut self, first: usize, data: &[u8]) -> u64 {
        self.last_write += 1;
        self.under_way.insert(self.last_write, (first, data.to_vec()));
        self.last_write
    }

    /// It was acknowledged.
    pub fn end_write(&mut self, write: u64, is_durable: bool) {
        let now = self.tick();
        let (first, data) = self.under_way.remove(&write).expect("it was begun");
        for (sector, content) in self.sectors[first..].iter_mut().zip(data.chunks_exact(SECTOR)) {
            if is_durable {
                *sector = Sector { stable: Some(content.into()), since: Vec::new() };
            } else {
                sector.since.push((now, Some(content.into())));
            }
        }
    }

    /// It failed before anything was changed.
    pub fn cancel_write(&mut self, write: u64) {
        self.under_way.remove(&write);
    }

    /// A trim begins or ends: its sectors hold anything.
    pub fn trim(&mut self, range: Range<usize>) {
        let now = self.tick();
        for sector in &mut self.sectors[range] {
            sector.since.push((now, None));
        }
    }

    /// A flush begins: it is for what was acknowledged until now.
    #[must_use]
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// It was acknowledged.
    pub fn end_flush(&mut self, begun: u64) {
        for sector in &mut self.sectors {
            let flushed = sector.since.partition_point(|(moment, _)| *moment < begun);
            if let Some((_, content)) = sector.since.drain(..flushed).next_back() {
                sector.stable = content;
            }
        }
    }

    /// Whether a read found what it should.
    ///
    /// # Errors
    ///
    /// The first sector that is wrong.
    pub fn check_read(&self, first: usize, found: &[u8]) -> Result<(), usize> {
        for (sector, found) in (first..).zip(found.chunks_exact(SECTOR)) {
            if !is(self.sectors[sector].newest(), found) {
                return Err(sector);
            }
        }
        Ok(())
    }

    /// The power was cut, and this is what is there. From now on that is what should be.
    ///
    /// # Errors
    ///
    /// The first sector that holds what it cannot.
    pub fn check_after_power_cut(&mut self, found: &[u8]) -> Result<(), usize> {
        let under_way = std::mem::take(&mut self.under_way);
        for (number, (sector, found)) in self.sectors.iter_mut().zip(found.chunks_exact(SECTOR)).enumerate() {
            let begun = under_way.values().filter_map(|(first, data)| {
                let at = number.checked_sub(*first)? * SECTOR;
                data.get(at..at + SECTOR)
            });
            let mut candidates =
                std::iter::once(&sector.stable).chain(sector.since.iter().map(|(_, content)| content));
            if !candidates.any(|content| is(content, found))
                && !begun.into_iter().any(|content| *content == *found)
            {
                return Err(number);
            }
            *sector = Sector { stable: Some(found.into()), since: Vec::new() };
        }
        Ok(())
    }
}
