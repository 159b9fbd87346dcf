//! A disk that forgets.

use super::{SplitMix64, enter};
use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

/// What is written whole or not at all, in bytes.
const SECTOR_BYTES: usize = 512;

type Sector = [u8; SECTOR_BYTES];

/// A disk with a volatile write cache, to cut the power of.
///
/// Each sector of 512 bytes has a stable content and the contents written since, in order. Reads see the newest. A flush
/// makes the newest of every sector stable, a durable write those of its own sectors, and nothing else becomes stable.
///
/// When the power is cut, each sector by itself keeps its stable content or any of those written since: so writes are
/// lost, overtaken by younger and by older ones, and torn between sectors, but never within one. A discarded sector may
/// also come back as zeroes or as rubbish.
///
/// A sector that is written in part is written whole, with what it had before.
pub struct PowerCutBacking {
    facts: BackingFacts,
    disk: Mutex<Disk>,
}

#[derive(Clone, Default)]
struct Disk {
    /// What survives for sure. Sectors never written are zeroes.
    stable: BTreeMap<u64, Sector>,
    /// What was done since, oldest first, never empty.
    pending: BTreeMap<u64, Vec<Change>>,
}

#[derive(Clone, Copy)]
struct Change {
    /// What is read while the power is on; zeroes after a discard.
    content: Sector,
    discarded: bool,
}

impl Disk {
    fn newest(&self, sector: u64) -> Sector {
        match self.pending.get(&sector).and_then(|changes| changes.last()) {
            Some(change) => change.content,
            None => self.stable.get(&sector).copied().unwrap_or([0; SECTOR_BYTES]),
        }
    }

    fn write(&mut self, sector: u64, content: Sector, durability: Durability) {
        match durability {
            Durability::Cached => {
                self.pending.entry(sector).or_default().push(Change { content, discarded: false });
            }
            Durability::Durable => {
                // What was pending is older, and cannot win any more.
                self.pending.remove(&sector);
                self.stable.insert(sector, content);
            }
        }
    }

    fn flush(&mut self) {
        for (sector, changes) in std::mem::take(&mut self.pending) {
            match changes.last().expect("never empty") {
                Change { discarded: true, .. } => drop(self.stable.remove(&sector)),
                Change { content, .. } => drop(self.stable.insert(sector, *content)),
            }
        }
    }

    fn power_cut(&self, rng: &mut SplitMix64) -> Self {
        let mut stable = self.stable.clone();
        for (&sector, changes) in &self.pending {
            let pick = usize::try_from(rng.below(changes.len() as u64 + 1)).expect("came from a usize");
            let Some(change) = pick.checked_sub(1).map(|index| changes[index]) else { continue };
            let mut content = change.content;
            if change.discarded && rng.below(2) == 0 {
                rng.fill(&mut content);
            }
            stable.insert(sector, content);
        }
        Self { stable, pending: BTreeMap::new() }
    }
}

impl PowerCutBacking {
    /// An empty disk of `len_bytes` that can be written and discarded, with any alignment.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        Self { facts: super::facts_in_memory(len_bytes), disk: Mutex::default() }
    }

    /// The same disk, asking for an alignment.
    ///
    /// # Panics
    ///
    /// If it is not a power of two up to 4096, or the length is no multiple of it.
    #[must_use]
    pub fn with_align(mut self, align_bytes: u32) -> Self {
        assert!(align_bytes.is_power_of_two() && align_bytes <= 4096, "{align_bytes} is no alignment");
        assert!(self.facts.len_bytes.is_multiple_of(align_bytes.into()), "the length is no multiple");
        self.facts.align_bytes = align_bytes;
        self
    }

    /// What the medium may hold after a power cut at this moment. The disk itself goes on, so that many outcomes of one
    /// moment can be looked at.
    #[must_use]
    pub fn power_cut(&self, rng: &mut SplitMix64) -> Self {
        Self { facts: self.facts, disk: Mutex::new(enter(&self.disk).power_cut(rng)) }
    }

    /// How many sectors have content that a power cut may lose.
    #[must_use]
    pub fn pending_sectors(&self) -> usize {
        enter(&self.disk).pending.len()
    }

    fn check(&self, op: Op, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.facts.len_bytes => Ok(()),
            _ => Err(Error::new(ErrorKind::Backing, op).at(offset, len).detail("past the end")),
        }
    }
}

impl fmt::Debug for PowerCutBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { facts, disk } = self;
        let Disk { stable, pending } = &*enter(disk);
        f.debug_struct("PowerCutBacking")
            .field("facts", facts)
            .field("stable_sectors", &stable.len())
            .field("pending_sectors", &pending.len())
            .finish()
    }
}

/// The pieces of a range, sector by sector: sector number, where in the sector, where in the data.
fn pieces(
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let sector_bytes = SECTOR_BYTES as u64;
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let head = usize::try_from(at % sector_bytes).expect("less than a sector");
        let take = (SECTOR_BYTES - head).min(len - done);
        let piece = (at / sector_bytes, head..head + take, done..done + take);
        done += take;
        Some(piece)
    })
}

impl Backing for PowerCutBacking {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check(Op::Read, offset, data.len() as u64)?;
        let disk = enter(&self.disk);
        for (sector, in_sector, in_data) in pieces(offset, data.len()) {
            data[in_data].copy_from_slice(&disk.newest(sector)[in_sector]);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.check(Op::Write, offset, data.len() as u64)?;
        let mut disk = enter(&self.disk);
        for (sector, in_sector, in_data) in pieces(offset, data.len()) {
            let mut content = disk.newest(sector);
            content[in_sector].copy_from_slice(&data[in_data]);
            disk.write(sector, content, durability);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        enter(&self.disk).flush();
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check(Op::Trim, offset, len)?;
        let sector_bytes = SECTOR_BYTES as u64;
        let whole = offset.div_ceil(sector_bytes)..(offset + len) / sector_bytes;
        let mut disk = enter(&self.disk);
        for sector in whole {
            // What holds nothing need not remember that it was emptied; terabytes may be discarded at once.
            if disk.stable.contains_key(&sector) || disk.pending.contains_key(&sector) {
                disk.pending
                    .entry(sector)
                    .or_default()
                    .push(Change { content: [0; SECTOR_BYTES], discarded: true });
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.check(Op::Extents, offset, len)?;
        let all = Extent { offset, len, allocated: true };
        Ok(std::iter::once(all).filter(|run| run.len > 0).take(extents_max).collect())
    }

    fn prefetch(&self, _offset: u64, _len: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const CUTS: u64 = 64;

    fn sector(disk: &PowerCutBacking, sector: u64) -> Sector {
        let mut data = [0; SECTOR_BYTES];
        disk.read(sector * SECTOR_BYTES as u64, &mut data).expect("on the disk");
        data
    }

    #[test]
    fn writes_are_lost_reordered_and_torn() {
        let disk = PowerCutBacking::new(4096);
        disk.write(0, &[1; 1024], Durability::Cached).unwrap();
        disk.write(0, &[2; 1024], Durability::Cached).unwrap();
        let outcomes: BTreeSet<(u8, u8)> = (0..CUTS)
            .map(|seed| disk.power_cut(&mut SplitMix64::new(seed)))
            .map(|cut| (sector(&cut, 0)[0], sector(&cut, 1)[0]))
            .collect();
        // Each sector nothing, the older or the newer, in every combination.
        assert_eq!(outcomes.len(), 9, "{outcomes:?}");
        assert_eq!(sector(&disk, 0), [2; SECTOR_BYTES], "the disk itself goes on");
    }

    #[test]
    fn one_seed_is_one_outcome() {
        let disk = PowerCutBacking::new(1 << 20);
        for block in 0..64 {
            disk.write(block * 8192, &[7; 4096], Durability::Cached).unwrap();
        }
        let outcome = |seed| {
            let mut data = vec![0; 1 << 20];
            disk.power_cut(&mut SplitMix64::new(seed)).read(0, &mut data).unwrap();
            data
        };
        assert_eq!(outcome(5), outcome(5));
        assert_ne!(outcome(5), outcome(6));
    }

    #[test]
    fn discarding_a_terabyte_that_holds_nothing_remembers_nothing_more() {
        let disk = PowerCutBacking::new(1 << 30);
        disk.write(0, &[1; 512], Durability::Durable).unwrap();
        disk.discard(0, 1 << 30).unwrap();
        assert_eq!(disk.pending_sectors(), 1);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Write { at: u16, len: u16, fill: u8, durability: Durability },
        Discard { at: u16, len: u16 },
        Flush,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let durability = prop_oneof![3 => Just(Durability::Cached), 1 => Just(Durability::Durable)];
        let step = prop_oneof![
            8 => (0..7000u16, 1..1192u16, any::<u8>(), durability)
                .prop_map(|(at, len, fill, durability)| Step::Write { at, len, fill, durability }),
            1 => (0..7000u16, 1..1192u16).prop_map(|(at, len)| Step::Discard { at, len }),
            1 => Just(Step::Flush),
        ];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        /// After any history and any cut, each sector is its last stable content or one written later, whole; without a
        /// pending discard nothing else is possible. While the power is on, reads see the newest.
        #[test]
        fn flushed_survives_and_the_rest_is_one_of_what_was_written(steps in steps(), cut_seed: u64) {
            const SECTORS: usize = 16;
            let disk = PowerCutBacking::new((SECTORS * SECTOR_BYTES) as u64);
            let mut newest = vec![0u8; SECTORS * SECTOR_BYTES];
            // Per sector, what may survive, and whether rubbish may.
            let mut possible: Vec<(Vec<Vec<u8>>, bool)> = vec![(vec![vec![0; SECTOR_BYTES]], false); SECTORS];
            for step in steps {
                let touched = match step {
                    Step::Write { at, len, fill, durability } => {
                        let (at, len) = (usize::from(at), usize::from(len));
                        newest[at..at + len].fill(fill);
                        disk.write(at as u64, &vec![fill; len], durability).unwrap();
                        Some((at / SECTOR_BYTES..(at + len).div_ceil(SECTOR_BYTES), durability, false))
                    }
                    Step::Discard { at, len } => {
                        let (at, len) = (usize::from(at), usize::from(len));
                        disk.discard(at as u64, len as u64).unwrap();
                        let whole = at.div_ceil(SECTOR_BYTES)..(at + len) / SECTOR_BYTES;
                        for sector in whole.clone() {
                            newest[sector * SECTOR_BYTES..][..SECTOR_BYTES].fill(0);
                        }
                        Some((whole, Durability::Cached, true))
                    }
                    Step::Flush => {
                        disk.flush().unwrap();
                        None
                    }
                };
                let content = |sector: usize| newest[sector * SECTOR_BYTES..][..SECTOR_BYTES].to_vec();
                match touched {
                    None => {
                        for (sector, may) in possible.iter_mut().enumerate() {
                            *may = (vec![content(sector)], false);
                        }
                        prop_assert_eq!(disk.pending_sectors(), 0);
                    }
                    Some((sectors, Durability::Durable, _)) => {
                        for sector in sectors {
                            possible[sector] = (vec![content(sector)], false);
                        }
                    }
                    Some((sectors, Durability::Cached, discarded)) => {
                        for sector in sectors {
                            possible[sector].0.push(content(sector));
                            possible[sector].1 |= discarded;
                        }
                    }
                }
            }
            let mut data = vec![0; newest.len()];
            disk.read(0, &mut data).unwrap();
            prop_assert_eq!(&data, &newest);

            let cut = disk.power_cut(&mut SplitMix64::new(cut_seed));
            prop_assert_eq!(cut.pending_sectors(), 0);
            for (number, (contents, rubbish)) in possible.iter().enumerate() {
                let survived = sector(&cut, number as u64).to_vec();
                prop_assert!(*rubbish || contents.contains(&survived), "sector {}", number);
            }
        }
    }
}
