//! Power cuts, kills and failures while a volume is re-encrypted and used: what was flushed is there, under the one key or
//! the other, and a re-encryption that is taken up again completes.
//!
//! Volume and state lie on disks that forget, reorder and tear what was not flushed. Every call to either may be the moment
//! at which both lose power, and between any two calls clients do something. Every content that a sector may have had since
//! it was last stable is remembered; after the cut it must have one of them.

use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::disk::{CHUNK_BYTES, Disk, LARGE_BUFFER_BYTES};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::MemoryPool;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::LiveVolume;
use inlinecrypt_core::reencrypt::state::State;
use inlinecrypt_core::testing::FakeEngine;
use inlinecrypt_core::volume::{Discard, Layout, Volume};
use inlinecrypt_io::backing::testing::{PowerCutBacking, SplitMix64, seed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

const SECTOR: usize = 512;
/// Four zones, the last a short one.
const SIZE: usize = 3 * CHUNK_BYTES + 16384;
const ZONE: u64 = CHUNK_BYTES as u64;

fn volume(unit: u32, key: u8, backing: Arc<dyn Backing>) -> Volume {
    let engine = Arc::new(FakeEngine::with_keyslots(2));
    let pool = MemoryPool::new(LARGE_BUFFER_BYTES, 2);
    let profile = Arc::new(CryptoProfile::new(engine, pool, Policy::default()).unwrap());
    let unit = DataUnitSize::from_bytes(unit).unwrap();
    let layout = Layout::new(Mode::Aes256Xts, unit, None, 0, SIZE as u64).unwrap();
    let bytes: Vec<u8> = (0..64).map(|byte| byte ^ key).collect();
    let form = KeyForm::Raw(RawKey::new(&bytes));
    let key = Key::new(Mode::Aes256Xts, unit, layout.dun_bytes(), form, Hardware::Allowed).unwrap();
    let admission = profile.admit(key, Fallback::Off).unwrap();
    Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Pass).unwrap()
}

/// What each sector may hold after a cut, the last being what is read now.
type May = Vec<Vec<[u8; SECTOR]>>;

fn written(may: &mut May, sector: usize, data: &[u8]) {
    may[sector].push(data.try_into().unwrap());
}

/// What both disks and the clients share.
struct Stage {
    rng: SplitMix64,
    /// Calls until the power goes.
    calls_left: u64,
    /// One call in so many fails, if not 0.
    failure_in: u64,
    volume_disk: Arc<PowerCutBacking>,
    state_disk: Arc<PowerCutBacking>,
    may: May,
    /// Sectors whose last write failed: it may have come through or not.
    unknown: Vec<bool>,
    /// What was left of both disks, and what may be on them.
    cut: Option<(PowerCutBacking, PowerCutBacking, May)>,
    live: Weak<LiveVolume>,
    /// A client of this moment is at work: no other comes.
    is_busy: bool,
    /// Where the zone is that may be locked.
    zone: u64,
}

type Shared = Arc<Mutex<Stage>>;

fn enter(stage: &Shared) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk each call to which may be the last, and at each call to which a client may come.
#[derive(Clone)]
struct Actor {
    disk: Arc<PowerCutBacking>,
    stage: Arc<OnceLock<Shared>>,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Actor")
    }
}

impl Actor {
    fn act(&self) -> Result<(), Error> {
        let Some(stage) = self.stage.get() else { return Ok(()) };
        let client = {
            let mut guard = enter(stage);
            let Stage { calls_left, cut, volume_disk, state_disk, rng, may, .. } = &mut *guard;
            if *calls_left == 0 && cut.is_none() {
                *cut = Some((volume_disk.power_cut(rng), state_disk.power_cut(rng), may.clone()));
            }
            *calls_left = calls_left.saturating_sub(1);
            if guard.failure_in > 0 {
                let bound = guard.failure_in;
                if guard.rng.below(bound) == 0 {
                    return Err(Error::new(ErrorKind::Backing, Op::Write).detail("told to fail"));
                }
            }
            let comes = !guard.is_busy && guard.rng.below(4) == 0;
            guard.is_busy |= comes;
            comes.then(|| guard.live.upgrade()).flatten()
        };
        if let Some(live) = client {
            // Not in the zone that may be locked by this very thread.
            let zone = enter(stage).zone;
            let others = (0..SIZE as u64).step_by(CHUNK_BYTES).filter(|start| *start != zone);
            let parts: Vec<u64> = others.collect();
            let pick = usize::try_from(enter(stage).rng.below(parts.len() as u64)).unwrap();
            client_comes(&live, stage, parts[pick]);
            enter(stage).is_busy = false;
        }
        Ok(())
    }
}

impl Backing for Actor {
    fn facts(&self) -> BackingFacts {
        self.disk.facts()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.disk.read(offset, data)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.act()?;
        // Torn at a kill, too: the half that came first is there.
        let half = data.len() / SECTOR / 2 * SECTOR;
        if half > 0 {
            self.disk.write(offset, &data[..half], durability)?;
            self.act()?;
        }
        self.disk.write(offset + half as u64, &data[half..], durability)
    }
    fn flush(&self) -> Result<(), Error> {
        self.act()?;
        self.disk.flush()?;
        self.act()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.disk.discard(offset, len)
    }
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.disk.extents(offset, len, extents_max)
    }
    fn prefetch(&self, _: u64, _: u64) {}
}

/// A client reads, writes or flushes in the chunk at `chunk`.
fn client_comes(live: &LiveVolume, stage: &Shared, chunk: u64) {
    let (dice, at, sectors, durable) = {
        let rng = &mut enter(stage).rng;
        (rng.below(10), rng.below(ZONE / SECTOR as u64), 1 + rng.below(20), rng.below(4) == 0)
    };
    let at = chunk + at * SECTOR as u64;
    let end = (at + sectors * SECTOR as u64).min(chunk + ZONE).min(SIZE as u64);
    if at >= end {
        return;
    }
    let (first, count) = (usize::try_from(at).unwrap() / SECTOR, usize::try_from(end - at).unwrap() / SECTOR);
    let mut buffer = live.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let span = live.span(at, end - at, LARGE_BUFFER_BYTES);
    match dice {
        0 => {
            let is = enter(stage).may.iter().map(Vec::len).collect::<Vec<_>>();
            if live.flush().is_ok() {
                // What was written before the flush began.
                let mut guard = enter(stage);
                let Stage { may, unknown, .. } = &mut *guard;
                for ((may, count), unknown) in may.iter_mut().zip(is).zip(unknown) {
                    if !*unknown {
                        may.drain(..count - 1);
                    }
                }
            }
        }
        1..4 => {
            if live.read(span, &mut buffer).is_ok() {
                let payload = &buffer.bytes()[span.payload()];
                let guard = enter(stage);
                for (sector, data) in (first..).zip(payload.chunks(SECTOR)) {
                    // A write that failed may have come through or not.
                    let may = &guard.may[sector];
                    let is_known = guard.failure_in == 0;
                    assert!(may.last().unwrap() == data || (!is_known && may.iter().any(|one| one == data)));
                }
            }
        }
        _ => {
            let mut data = vec![0; count * SECTOR];
            enter(stage).rng.fill(&mut data);
            // Before: the power may go in the middle of it.
            {
                let mut guard = enter(stage);
                for (sector, data) in (first..).zip(data.chunks(SECTOR)) {
                    written(&mut guard.may, sector, data);
                }
            }
            buffer.bytes_mut()[span.payload()].copy_from_slice(&data);
            let durable = if durable { Durability::Durable } else { Durability::Cached };
            let is_done = live.write(span, &mut buffer, durable).is_ok();
            let mut guard = enter(stage);
            guard.unknown[first..first + count].fill(!is_done);
            if is_done && durable == Durability::Durable {
                for may in &mut guard.may[first..first + count] {
                    let now = *may.last().unwrap();
                    may.clear();
                    may.push(now);
                }
            }
        }
    }
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

/// One history: a re-encryption with clients, a cut somewhere in it, and what is found afterwards. Says whether the cut came
/// in the middle of a zone.
fn history(units: (u32, u32), seed: u64, fails: bool) -> bool {
    let mut rng = SplitMix64::new(seed);
    let stage = Arc::new(OnceLock::new());
    let actor = |len| Actor { disk: Arc::new(PowerCutBacking::new(len)), stage: stage.clone() };
    let (volume_actor, state_actor) = (actor(SIZE as u64), actor(State::medium_bytes(ZONE)));
    let backing: Arc<dyn Backing> = Arc::new(volume_actor.clone());
    let live = Arc::new(LiveVolume::new(volume(units.0, 1, backing.clone())));
    let state = State::create(Arc::new(state_actor.clone()), SIZE as u64, ZONE, b"plan").unwrap();
    let may = read_all(&*live).chunks(SECTOR).map(|now| vec![now.try_into().unwrap()]).collect();
    let shared: Shared = Arc::new(Mutex::new(Stage {
        // A zone takes some twenty calls, and clients more of them.
        calls_left: rng.below(150),
        failure_in: if fails { 25 } else { 0 },
        rng: SplitMix64::new(rng.next_u64()),
        volume_disk: volume_actor.disk.clone(),
        state_disk: state_actor.disk.clone(),
        may,
        unknown: vec![false; SIZE / SECTOR],
        cut: None,
        live: Arc::downgrade(&live),
        is_busy: false,
        zone: 0,
    }));
    let mut running = live.begin(volume(units.1, 2, backing), state).unwrap();
    stage.set(shared.clone()).map_err(drop).unwrap();
    while enter(&shared).cut.is_none() {
        let at = running.progress().done_bytes;
        enter(&shared).zone = at;
        if running.progress().is_complete() {
            break;
        }
        // Between two zones clients also come to the one that is next.
        enter(&shared).is_busy = true;
        for _ in 0..rng.below(3) {
            client_comes(&live, &shared, at);
        }
        enter(&shared).is_busy = false;
        let done = running.step();
        assert!(fails || done.is_ok(), "{done:?}");
    }
    let (volume_disk, state_disk, may) = {
        let mut guard = enter(&shared);
        let Stage { cut, volume_disk, state_disk, rng, may, .. } = &mut *guard;
        cut.take().unwrap_or_else(|| (volume_disk.power_cut(rng), state_disk.power_cut(rng), may.clone()))
    };
    drop((running, live));

    // The next start.
    let backing: Arc<dyn Backing> = Arc::new(volume_disk);
    let state = State::open(Arc::new(state_disk)).expect("there is a whole one at every moment");
    assert_eq!(state.plan(), b"plan");
    let in_the_middle = state.is_interrupted();
    let (old, new) = (volume(units.0, 1, backing.clone()), volume(units.1, 2, backing.clone()));
    let live = Arc::new(LiveVolume::new(old).for_clients_of(&new));
    let mut running = live.begin(new, state).unwrap();
    let found = read_all(&*live);
    for (sector, (may, is)) in may.iter().zip(found.chunks(SECTOR)).enumerate() {
        assert!(
            may.iter().any(|allowed| allowed == is),
            "seed {seed}: sector {sector} holds what was never written there, boundary {:?}",
            running.progress()
        );
    }
    while !running.step().unwrap().is_complete() {}
    running.finish().unwrap();
    assert!(read_all(&*live) == found, "seed {seed}: completing it changed something");
    // And without what was in memory: by the new key alone.
    assert!(read_all(&volume(units.1, 2, backing)) == found, "seed {seed}");
    in_the_middle
}

fn histories(name: &str, units: (u32, u32), count: u64, fails: bool) {
    let seed = seed(name);
    let middle = (0..count).filter(|run| history(units, seed ^ run, fails)).count();
    println!("{name}: {middle} of {count} cuts left a zone in the journal");
    assert!(middle as u64 > count / 50, "the cuts hit nothing: {middle}");
}

#[test]
fn a_thousand_power_cuts_lose_nothing() {
    histories("re-encryption, 4096 to 4096", (4096, 4096), 400, false);
    histories("re-encryption, 512 to 4096", (512, 4096), 300, false);
    histories("re-encryption, 4096 to 512", (4096, 512), 300, false);
}

/// The same, where calls fail at random: of the state's medium, of the volume's, in requests of clients.
#[test]
fn failures_and_a_power_cut_lose_nothing() {
    histories("re-encryption with failures", (4096, 4096), 300, true);
}

#[test]
fn soak_reencryption_power_cuts() {
    let seconds =
        std::env::var("INLINECRYPT_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while std::time::Instant::now() < end {
        histories("re-encryption, soak", (4096, 512), 100, false);
        histories("re-encryption, soak with failures", (512, 4096), 100, true);
    }
}
