//! What a disk must hold, sector by sector, also while writes are under way or after they were cut short.

use crate::pattern;

const SECTOR_BYTES: u64 = 512;

/// Which write a sector's content is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(u32);

impl Version {
    /// All zeroes.
    pub const ZEROES: Self = Self(0);
}

/// A stretch of a disk: for each sector the write that was acknowledged last, and those that were not yet.
///
/// Every write has content of its own, different in each sector, so a misplaced, lost or torn one is noticed. Offsets and
/// lengths are multiples of 512.
#[derive(Clone, Debug)]
pub struct Shadow {
    seed: u64,
    offset: u64,
    sectors: Vec<Sector>,
    last: u32,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    /// What it holds if none of `pending` came through. `None`: not known.
    settled: Option<Version>,
    /// Writes of which nobody knows yet.
    pending: Vec<Version>,
}

impl Shadow {
    /// The stretch from `offset` on, of which nothing is known.
    #[must_use]
    pub fn new(seed: u64, offset: u64, len: u64) -> Self {
        assert!((offset | len).is_multiple_of(SECTOR_BYTES), "whole sectors");
        let count = usize::try_from(len / SECTOR_BYTES).expect("tests have small disks");
        Self { seed, offset, sectors: vec![Sector::default(); count], last: 0 }
    }

    /// Where it begins, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR_BYTES
    }

    /// Whether it has no sector.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// A write begins: its version, and its data.
    pub fn begin(&mut self, offset: u64, len: u64) -> (Version, Vec<u8>) {
        self.last += 1;
        let version = Version(self.last);
        self.mark(offset, len, version);
        let first = offset / SECTOR_BYTES;
        let data = (first..first + len / SECTOR_BYTES)
            .flat_map(|number| content(self.seed, version, number))
            .collect();
        (version, data)
    }

    /// A write of zeroes begins.
    pub fn begin_zeroes(&mut self, offset: u64, len: u64) -> Version {
        self.mark(offset, len, Version::ZEROES);
        Version::ZEROES
    }

    /// A write was acknowledged.
    pub fn settle(&mut self, offset: u64, len: u64, version: Version) {
        for sector in self.range_mut(offset, len) {
            sector.settled = Some(version);
            sector.pending.retain(|pending| *pending != version);
        }
    }

    /// The content is anybody's guess from now on, as after a trim.
    pub fn forget(&mut self, offset: u64, len: u64) {
        for sector in self.range_mut(offset, len) {
            *sector = Sector::default();
        }
    }

    /// Whether `data` is what may be found at `offset`.
    ///
    /// # Errors
    ///
    /// Says which sectors are wrong, and how.
    pub fn check(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        self.look(offset, data).map(drop)
    }

    /// The same, and takes what was found for what is there: nothing is under way any more.
    ///
    /// # Errors
    ///
    /// Says which sectors are wrong, and how.
    pub fn adopt(&mut self, offset: u64, data: &[u8]) -> Result<(), String> {
        let found = self.look(offset, data)?;
        for (sector, version) in self.range_mut(offset, data.len() as u64).iter_mut().zip(found) {
            *sector = Sector { settled: version, pending: Vec::new() };
        }
        Ok(())
    }

    fn look(&self, offset: u64, data: &[u8]) -> Result<Vec<Option<Version>>, String> {
        let mut found = Vec::with_capacity(data.len() / 512);
        let mut wrong = Vec::new();
        let first = offset / SECTOR_BYTES;
        for (index, bytes) in data.chunks(512).enumerate() {
            let number = first + index as u64;
            let Sector { settled, pending } = &self.sectors[self.index(number)];
            let is_of = |version: &Version| content(self.seed, *version, number) == bytes;
            match (settled, pending.iter().find(|version| is_of(version))) {
                (_, Some(version)) => found.push(Some(*version)),
                (Some(version), None) if is_of(version) => found.push(Some(*version)),
                (None, None) => found.push(None),
                (Some(version), None) => wrong.push(format!(
                    "sector {number} should hold version {}{}, and holds {}",
                    version.0,
                    if pending.is_empty() { String::new() } else { format!(" or one of {pending:?}") },
                    self.guess(number, bytes)
                )),
            }
        }
        match wrong.len() {
            0 => Ok(found),
            count => {
                wrong.truncate(5);
                Err(format!("{count} sectors are wrong; {}", wrong.join("; ")))
            }
        }
    }

    /// What a wrong sector looks like, for people.
    fn guess(&self, number: u64, bytes: &[u8]) -> String {
        if bytes.iter().all(|byte| *byte == 0) {
            return "zeroes".to_owned();
        }
        let newest = (1..=self.last).rev().take(2000);
        for version in newest {
            if content(self.seed, Version(version), number) == bytes {
                return format!("version {version}");
            }
        }
        "something else".to_owned()
    }

    fn mark(&mut self, offset: u64, len: u64, version: Version) {
        for sector in self.range_mut(offset, len) {
            sector.pending.push(version);
        }
    }

    fn index(&self, number: u64) -> usize {
        usize::try_from(number - self.offset / SECTOR_BYTES).expect("within the stretch")
    }

    fn range_mut(&mut self, offset: u64, len: u64) -> &mut [Sector] {
        let start = self.index(offset / SECTOR_BYTES);
        let end = self.index((offset + len) / SECTOR_BYTES);
        &mut self.sectors[start..end]
    }
}

fn content(seed: u64, version: Version, number: u64) -> [u8; 512] {
    match version {
        Version::ZEROES => [0; 512],
        Version(version) => pattern::block(seed.rotate_left(32) ^ u64::from(version), number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_must_be_there_and_another_may() {
        let mut shadow = Shadow::new(1, 4096, 4096);
        let (first, old) = shadow.begin(4096, 1024);
        shadow.settle(4096, 1024, first);
        assert!(shadow.check(4096, &old).is_ok());
        assert!(shadow.check(4096, &[0; 512]).unwrap_err().contains("zeroes"));

        let (_, new) = shadow.begin(4096, 1024);
        let torn = [&new[..512], &old[512..]].concat();
        assert!(shadow.check(4096, &torn).is_ok());
        let within = [&new[..100], &old[100..]].concat();
        assert!(shadow.check(4096, &within).is_err());
        shadow.adopt(4096, &torn).unwrap();
        assert!(shadow.check(4096, &old).unwrap_err().contains("version 1"));
        // Sectors of which nothing is known.
        assert!(shadow.check(6144, &[7; 512]).is_ok());
    }

    #[test]
    fn a_misplaced_sector_is_noticed() {
        let mut shadow = Shadow::new(1, 0, 4096);
        let (version, data) = shadow.begin(0, 1024);
        shadow.settle(0, 1024, version);
        assert!(shadow.check(0, &data[512..]).is_err());
    }
}
