//! Power cuts while a container is re-encrypted: header, area and data are on one disk, each call to which may be the last.

use super::*;
use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::backing::{Access, BackingFacts, Extent};
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::disk::{Disk, LARGE_BUFFER_BYTES};
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::MemoryPool;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::LiveVolume;
use inlinecrypt_core::testing::FakeEngine;
use inlinecrypt_core::volume::{Discard, IvLayout, Layout, Volume};
use inlinecrypt_io::backing::Window;
use inlinecrypt_io::backing::testing::{PowerCutBacking, SplitMix64, seed};
use inlinecrypt_luks::Hash;
use inlinecrypt_luks::kdf::Kdf;
use inlinecrypt_luks::luks2::{Kept, NewContainer, NewData, Others};
use std::sync::{Mutex, PoisonError};

const DATA_AT: u64 = 1 << 20;
/// Four zones, the last a short one.
const SIZE: usize = 3 * CHUNK_BYTES + 16384;
const SECTOR: usize = 512;

/// A disk that loses power after so many calls, and goes on as if nothing were.
#[derive(Debug)]
struct Cut {
    disk: PowerCutBacking,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    calls_left: u64,
    rng: SplitMix64,
    left: Option<PowerCutBacking>,
}

impl Cut {
    fn call(&self) {
        let State { calls_left, rng, left } = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *calls_left == 0 && left.is_none() {
            *left = Some(self.disk.power_cut(rng));
        }
        *calls_left = calls_left.saturating_sub(1);
    }

    fn has_come(&self) -> bool {
        self.state.lock().unwrap().left.is_some()
    }
}

impl Backing for Cut {
    fn facts(&self) -> BackingFacts {
        self.disk.facts()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.disk.read(offset, data)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.call();
        // Torn at a kill, too: the half that came first is there.
        let half = data.len() / SECTOR / 2 * SECTOR;
        if half > 0 {
            self.disk.write(offset, &data[..half], durability)?;
            self.call();
        }
        self.disk.write(offset + half as u64, &data[half..], durability)
    }
    fn flush(&self) -> Result<(), Error> {
        self.call();
        self.disk.flush()?;
        self.call();
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.disk.discard(offset, len)
    }
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.disk.extents(offset, len, extents_max)
    }
    fn prefetch(&self, _: u64, _: u64) {}
}

fn key(of: u8) -> Vec<u8> {
    (0..64).map(|byte| byte ^ of).collect()
}

fn data_of(disk: &Arc<dyn Backing>) -> Arc<dyn Backing> {
    Window::over(disk.clone(), DATA_AT).unwrap()
}

fn volume(unit: u32, of: u8, data: &Arc<dyn Backing>) -> Volume {
    let engine = Arc::new(FakeEngine::with_keyslots(2));
    let pool = MemoryPool::new(LARGE_BUFFER_BYTES, 2);
    let profile = Arc::new(CryptoProfile::new(engine, pool, Policy::default()).unwrap());
    let unit = DataUnitSize::from_bytes(unit).unwrap();
    let layout = Layout::new(Mode::Aes256Xts, unit, None, 0, SIZE as u64).unwrap();
    let layout = layout.with_iv(IvLayout::Sectors).unwrap();
    let form = KeyForm::Raw(RawKey::new(&key(of)));
    let key = Key::new(Mode::Aes256Xts, unit, layout.dun_bytes(), form, Hardware::Allowed).unwrap();
    let admission = profile.admit(key, Fallback::Off).unwrap();
    Volume::new(layout, admission, data.clone(), Access::ReadWrite, Discard::Pass).unwrap()
}

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut buffer = disk.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let mut data = Vec::new();
    while data.len() < SIZE {
        let span = disk.span(data.len() as u64, (SIZE - data.len()) as u64, LARGE_BUFFER_BYTES);
        disk.read(span, &mut buffer).unwrap();
        data.extend_from_slice(&buffer.bytes()[span.payload()]);
    }
    data
}

fn write(disk: &dyn Disk, offset: usize, data: &[u8]) {
    let mut buffer = disk.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let mut done = 0;
    while done < data.len() {
        let (at, len) = ((offset + done) as u64, (data.len() - done) as u64);
        let span = disk.span(at, len, LARGE_BUFFER_BYTES);
        let len = span.payload().len();
        buffer.bytes_mut()[span.payload()].copy_from_slice(&data[done..done + len]);
        disk.write(span, &mut buffer, Durability::Cached).unwrap();
        done += len;
    }
}

/// A container with content, in which a re-encryption has begun.
fn begun(units: (u32, u32), resilience: Resilience, content: &[u8]) -> PowerCutBacking {
    let (old, new) = (key(1), key(2));
    let wanted = NewContainer {
        mode: Mode::Aes256Xts,
        sector_bytes: units.0,
        data_offset: DATA_AT,
        header_bytes: DATA_AT,
        uuid: "01234567-89ab-cdef-0123-456789abcdef",
        label: "",
        subsystem: "",
        key: Some((&old, 1)),
        tokens: Vec::new(),
    };
    let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1 };
    let header = vec![0; usize::try_from(DATA_AT).unwrap() + SIZE];
    let mut container = wanted.write(header, &mut random).unwrap();
    container.add_keyslot(&old, 0, b"zero", kdf, None, &mut random).unwrap();
    let opened = container.open(b"zero", None).unwrap();
    let new = NewData {
        mode: Mode::Aes256Xts,
        sector_bytes: units.1,
        key: &new,
        iterations: 1,
        resilience,
        zone_bytes_min: CHUNK_BYTES as u64,
    };
    let kept = [Kept { opened, passphrase: b"zero" }];
    container.begin_reencryption(&kept, Others::Refused, new, &mut random).unwrap();
    let disk = PowerCutBacking::new(DATA_AT + SIZE as u64);
    disk.write(0, &container.into_storage(), Durability::Durable).unwrap();
    let disk = Arc::new(disk);
    let whole: Arc<dyn Backing> = disk.clone();
    write(&volume(units.0, 1, &data_of(&whole)), 0, content);
    drop(whole);
    disk.flush().unwrap();
    Arc::try_unwrap(disk).unwrap()
}

fn ledger(disk: &Arc<dyn Backing>) -> LuksLedger {
    let storage = Box::new(OnBacking(disk.clone()));
    LuksLedger::open_locked(storage, None, SIZE as u64, CHUNK_BYTES as u64, "test").unwrap()
}

/// One history: a re-encryption with a client between its zones, a cut somewhere in it, and what is found afterwards. Says whether
/// the cut came in the middle of a zone.
fn history(units: (u32, u32), resilience: Resilience, seed: u64) -> bool {
    let mut rng = SplitMix64::new(seed);
    let mut content = vec![0; SIZE];
    rng.fill(&mut content);
    let state = State { calls_left: rng.below(100), rng: SplitMix64::new(rng.next_u64()), left: None };
    let disk = Arc::new(Cut { disk: begun(units, resilience, &content), state: Mutex::new(state) });
    let backing: Arc<dyn Backing> = disk.clone();
    let data = data_of(&backing);
    let live = Arc::new(LiveVolume::new(volume(units.0, 1, &data)));
    let mut running = live.begin(volume(units.1, 2, &data), ledger(&backing)).unwrap();
    let mut under_way: Option<(usize, Vec<u8>)> = None;
    while !disk.has_come() && !running.step().unwrap().is_complete() {
        if disk.has_come() {
            break;
        }
        let at = usize::try_from(rng.below((SIZE / SECTOR) as u64)).unwrap() * SECTOR;
        let mut data = vec![0; (1 + usize::try_from(rng.below(20)).unwrap()) * SECTOR];
        data.truncate(SIZE - at);
        rng.fill(&mut data);
        under_way = Some((at, data.clone()));
        write(&*live, at, &data);
        live.flush().unwrap();
        if !disk.has_come() {
            content[at..at + data.len()].copy_from_slice(&data);
            under_way = None;
        }
    }
    let left = disk.state.lock().unwrap().left.take();
    let left = left.unwrap_or_else(|| disk.disk.power_cut(&mut rng));
    drop((running, live));

    // The next start.
    let backing: Arc<dyn Backing> = Arc::new(left);
    let data = data_of(&backing);
    let mut container = Container::read(OnBacking(backing.clone())).unwrap();
    let header = container.header().metadata.reencryption().unwrap();
    let in_the_middle = header.as_ref().is_some_and(|re| re.hot_bytes.is_some());
    let found = match header {
        None => read_all(&volume(units.1, 2, &data)),
        Some(re) => {
            let old = container.open_digest(b"zero", re.previous_digest).unwrap().key;
            let new = container.open_digest(b"zero", re.next_digest).unwrap().key;
            assert!(old[..] == key(1) && new[..] == key(2));
            container.check_reencryption(&old, &new).unwrap();
            let new = volume(units.1, 2, &data);
            let old = volume(units.0, 1, &data);
            let live = Arc::new(LiveVolume::new(old).for_clients_of(&new));
            let mut running = live.begin(new, ledger(&backing)).unwrap();
            let found = read_all(&*live);
            while !running.step().unwrap().is_complete() {}
            running.finish().unwrap();
            assert!(read_all(&*live) == found, "seed {seed}: completing it changed something");
            found
        }
    };
    for (sector, (was, is)) in content.chunks(SECTOR).zip(found.chunks(SECTOR)).enumerate() {
        let newer = under_way.as_ref().and_then(|(at, data)| {
            let start = (sector * SECTOR).checked_sub(*at)?;
            data.get(start..start + SECTOR)
        });
        assert!(was == is || newer == Some(is), "seed {seed}: sector {sector} is neither");
    }
    // And by the new key alone, which the passphrase opens, and which is the only one.
    assert!(read_all(&volume(units.1, 2, &data)) == found, "seed {seed}");
    let mut container = Container::read(OnBacking(backing)).unwrap();
    container.repair(&mut random).unwrap();
    let metadata = &container.header().metadata;
    assert!(metadata.data().is_ok() && metadata.digests().len() == 1 && metadata.keyslots().len() == 1);
    assert_eq!(metadata.json()["keyslots"].as_object().unwrap().len(), 1);
    assert!(container.open(b"zero", None).unwrap().key[..] == key(2));
    in_the_middle
}

fn histories(name: &str, units: (u32, u32), resilience: Resilience, count: u64) {
    let seed = seed(name);
    let middle = (0..count).filter(|run| history(units, resilience, seed ^ run)).count();
    println!("{name}: {middle} of {count} cuts left a zone half written");
    assert!(middle as u64 > count / 50, "the cuts hit nothing: {middle}");
}

/// How many histories. More where nobody waits for them.
fn count() -> u64 {
    if std::env::var_os("CI").is_some_and(|value| value == "true") { 200 } else { 60 }
}

#[test]
fn power_cuts_lose_nothing_under_checksums() {
    let resilience = Resilience::Checksum { hash: Hash::Sha256, block_bytes: 512 };
    histories("LUKS, checksums, 512 to 512", (512, 512), resilience, count());
}

#[test]
fn power_cuts_lose_nothing_under_a_journal() {
    histories("LUKS, journal, 4096 to 4096", (4096, 4096), Resilience::Journal, count());
    histories("LUKS, journal, 512 to 4096", (512, 4096), Resilience::Journal, count());
    histories("LUKS, journal, 4096 to 512", (4096, 512), Resilience::Journal, count());
}
