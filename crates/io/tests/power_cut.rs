//! Power cuts under a volume: what was flushed or written durably is there, and nothing else is damaged.
//!
//! The disk below forgets, reorders and tears whatever was not flushed, sector by sector. Every content that a sector of
//! the volume may have had since it was last stable is remembered; after the cut it must have one of them.

use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::backing::{Access, Backing, Durability};
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::disk::{Disk, LARGE_BUFFER_BYTES, Unaligned};
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::{Buffer, MemoryPool};
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::testing::FakeEngine;
use inlinecrypt_core::volume::{Discard, Layout, Volume};
use inlinecrypt_io::backing::testing::{PowerCutBacking, SplitMix64, seed};
use std::sync::Arc;

const SIZE: usize = 256 * 1024;
const SECTOR: usize = 512;

/// A volume with the key that all volumes of this test have.
fn volume(mode: Mode, unit: u32, backing: Arc<PowerCutBacking>) -> Volume {
    let engine = Arc::new(FakeEngine::with_keyslots(1));
    let pool = MemoryPool::new(LARGE_BUFFER_BYTES, 1);
    let profile = Arc::new(CryptoProfile::new(engine, pool, Policy::default()).unwrap());
    let unit = DataUnitSize::from_bytes(unit).unwrap();
    let layout = Layout::new(mode, unit, None, 0, backing.facts().len_bytes).unwrap();
    let bytes: Vec<u8> = (0..u8::try_from(mode.info().key_bytes).unwrap()).collect();
    let form = KeyForm::Raw(RawKey::new(&bytes));
    let key = Key::new(mode, unit, layout.dun_bytes(), form, Hardware::Allowed).unwrap();
    let admission = profile.admit(key, Fallback::Off).unwrap();
    Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Pass).unwrap()
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let mut buffer = volume.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let mut data = Vec::new();
    while data.len() < SIZE {
        let span = volume.span(data.len() as u64, (SIZE - data.len()) as u64, LARGE_BUFFER_BYTES);
        volume.read(span, &mut buffer).unwrap();
        data.extend_from_slice(&buffer.bytes()[span.payload()]);
    }
    data
}

fn write(volume: &Volume, offset: usize, data: &[u8], durability: Durability, buffer: &mut Buffer) {
    let mut done = 0;
    while done < data.len() {
        let at = (offset + done) as u64;
        let span = volume.span(at, (data.len() - done) as u64, LARGE_BUFFER_BYTES);
        let len = span.payload().len();
        buffer.bytes_mut()[span.payload()].copy_from_slice(&data[done..done + len]);
        volume.write(span, buffer, durability).unwrap();
        done += len;
    }
}

/// What one sector of the volume may hold after a power cut.
#[derive(Clone)]
enum May {
    /// One of these, the last being what is read now.
    Be(Vec<Vec<u8>>),
    /// Anything: it was trimmed since it was last stable. What is read now, if it was written after that.
    BeAnything(Option<Vec<u8>>),
}

impl May {
    fn now(&self) -> Option<&[u8]> {
        match self {
            Self::Be(contents) => contents.last().map(Vec::as_slice),
            Self::BeAnything(now) => now.as_deref(),
        }
    }

    fn written(&mut self, content: Vec<u8>) {
        match self {
            Self::Be(contents) => contents.push(content),
            Self::BeAnything(now) => *now = Some(content),
        }
    }

    /// Only what is read now is left. A trimmed sector that nobody wrote stays arbitrary.
    fn stable(&mut self) {
        if let Some(now) = self.now().map(<[u8]>::to_vec) {
            *self = Self::Be(vec![now]);
        }
    }

    fn allows(&self, content: &[u8]) -> bool {
        match self {
            Self::Be(contents) => contents.iter().any(|allowed| allowed == content),
            Self::BeAnything(_) => true,
        }
    }
}

/// A volume with its oracle.
struct World {
    volume: Volume,
    disk: Arc<PowerCutBacking>,
    sectors: Vec<May>,
    /// Sectors that a torn write may turn into noise: whole data units, for modes that chain.
    torn_together: usize,
    /// Writes begin and end at multiples of this.
    grain: usize,
}

impl World {
    fn open(mode: Mode, unit: u32, disk: PowerCutBacking) -> Self {
        let disk = Arc::new(disk);
        let volume = volume(mode, unit, disk.clone());
        let sectors = read_all(&volume).chunks(SECTOR).map(|now| May::Be(vec![now.to_vec()])).collect();
        let local = volume.geometry().unaligned == Unaligned::Served;
        let torn_together = if local { 1 } else { unit as usize / SECTOR };
        let grain = if local { 1 } else { unit as usize };
        Self { volume, disk, sectors, torn_together, grain }
    }

    fn step(&mut self, rng: &mut SplitMix64, buffer: &mut Buffer) {
        let below = |rng: &mut SplitMix64, bound: usize| usize::try_from(rng.below(bound as u64)).unwrap();
        let grains = SIZE / self.grain;
        let start = below(rng, grains) * self.grain;
        // Mostly short, now and then over several pieces.
        let longest = if below(rng, 10) == 0 { 100_000 } else { 6000 };
        let len = (1 + below(rng, longest)).next_multiple_of(self.grain).min(SIZE - start);
        match below(rng, 10) {
            0 => {
                self.volume.flush().unwrap();
                self.sectors.iter_mut().for_each(May::stable);
            }
            1 => {
                self.volume.trim(start as u64, len as u64).unwrap();
                let unit = self.volume.layout().data_unit_size().bytes() as usize;
                let whole = start.next_multiple_of(unit) / SECTOR..(start + len) / unit * unit / SECTOR;
                if !whole.is_empty() {
                    self.sectors[whole].fill(May::BeAnything(None));
                }
            }
            n => {
                let durability = if n < 4 { Durability::Durable } else { Durability::Cached };
                let mut data = vec![0; len];
                rng.fill(&mut data);
                self.complete_trimmed(start, len, buffer);
                write(&self.volume, start, &data, durability, buffer);
                let touched = start / SECTOR..(start + len).div_ceil(SECTOR);
                for sector in touched {
                    let at = sector * SECTOR;
                    let mut content = self.sectors[sector].now().expect("completed above").to_vec();
                    let (from, to) = (start.max(at), (start + len).min(at + SECTOR));
                    content[from - at..to - at].copy_from_slice(&data[from - start..to - start]);
                    self.sectors[sector].written(content);
                    if durability == Durability::Durable {
                        self.sectors[sector].stable();
                    }
                }
            }
        }
    }

    /// A sector that was trimmed and is about to be written in part keeps what it reads as now: learn that.
    fn complete_trimmed(&mut self, start: usize, len: usize, buffer: &mut Buffer) {
        for sector in start / SECTOR..(start + len).div_ceil(SECTOR) {
            if self.sectors[sector].now().is_some() {
                continue;
            }
            // Where only whole data units are written, nothing of the old content is kept.
            let mut now = vec![0; SECTOR];
            if self.grain == 1 {
                let span = self.volume.span((sector * SECTOR) as u64, SECTOR as u64, LARGE_BUFFER_BYTES);
                self.volume.read(span, buffer).unwrap();
                now.copy_from_slice(&buffer.bytes()[span.payload()]);
            }
            self.sectors[sector] = May::BeAnything(Some(now));
        }
    }

    /// Cuts the power and looks at what is left.
    fn check(&self, mode: Mode, rng: &mut SplitMix64) {
        let unit = self.volume.layout().data_unit_size().bytes();
        let after = read_all(&volume(mode, unit, Arc::new(self.disk.power_cut(rng))));
        for (group, contents) in
            self.sectors.chunks(self.torn_together).zip(after.chunks(SECTOR * self.torn_together))
        {
            let stable = group.iter().all(|may| matches!(may, May::Be(contents) if contents.len() == 1));
            if self.torn_together > 1 && !stable {
                // A data unit of a mode that chains, written and not flushed: torn, it is noise, and says so nowhere.
                continue;
            }
            for (may, content) in group.iter().zip(contents.chunks(SECTOR)) {
                assert!(may.allows(content), "a sector holds what was never written there");
            }
        }
    }
}

fn cuts(mode: Mode, unit: u32, align: u32, runs: u64, cuts_per_run: u64) {
    let seed = seed(&format!("power cuts, {mode} in units of {unit}, alignment {align}"));
    for run in 0..runs {
        let mut rng = SplitMix64::new(seed ^ run);
        let mut world = World::open(mode, unit, PowerCutBacking::new(SIZE as u64).with_align(align));
        let mut buffer = world.volume.private_buffer(LARGE_BUFFER_BYTES).unwrap();
        for _ in 0..cuts_per_run {
            for _ in 0..1 + rng.below(30) {
                world.step(&mut rng, &mut buffer);
            }
            world.check(mode, &mut rng);
        }
    }
}

#[test]
fn small_blocks_in_4096_byte_units_survive_400_power_cuts() {
    cuts(Mode::Aes256Xts, 4096, 1, 40, 10);
}

#[test]
fn a_disk_with_4096_byte_blocks_survives_200_power_cuts() {
    cuts(Mode::Aes256Xts, 4096, 4096, 20, 10);
}

#[test]
fn small_blocks_in_64_kib_units_survive_200_power_cuts() {
    cuts(Mode::Sm4Xts, 65536, 512, 20, 10);
}

#[test]
fn modes_that_chain_damage_no_unit_that_was_not_being_written_in_200_power_cuts() {
    cuts(Mode::Aes128CbcEssiv, 4096, 512, 10, 10);
    cuts(Mode::Adiantum, 4096, 512, 10, 10);
}

#[test]
fn soak_power_cuts() {
    let seconds =
        std::env::var("INLINECRYPT_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while std::time::Instant::now() < end {
        cuts(Mode::Aes256Xts, 4096, 512, 1, 10);
    }
}
