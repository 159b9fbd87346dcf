//! The profile and volumes as servers use them: unaligned requests, read-modify-write, admission and drop, reset, over a
//! disk that is cut from power. One request at a time, so that one thread will do.

use super::check::Shadow;
use super::disk::{PLAINTEXT, SECTOR, SimDisk};
use super::fault::{Rates, Sabotage, engine_faults};
use super::random::Random;
use super::{Failure, Seen, root};
use inlinecrypt_core::admission::{Fallback, Reason};
use inlinecrypt_core::backing::{Access, Durability};
use inlinecrypt_core::config::{DataUnitSize, Hardware, KeyType, Mode};
use inlinecrypt_core::disk::{Disk, SMALL_BUFFER_BYTES, Span};
use inlinecrypt_core::engine::Engine;
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_core::key::{Key, KeyForm, LongTermWrappedKey, RawKey};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::{Buffer, MemoryPool};
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::volume::{Discard, Layout, SECTOR_BYTES, Volume};
use inlinecrypt_engine::{EngineSpec, IceSpec, IceVariant, SoftwareSpec, open};
use std::sync::Arc;

const SECTORS: usize = 64;
const BYTES: usize = SECTORS * SECTOR;

enum Stored {
    Raw([u8; 64]),
    Wrapped(LongTermWrappedKey),
}

struct Client {
    stored: Stored,
    layout: Layout,
    disk: Arc<SimDisk>,
    shadow: Shadow,
    volume: Option<Volume>,
    may_fall_back: Fallback,
}

impl Client {
    fn key_type(&self) -> KeyType {
        match self.stored {
            Stored::Raw(_) => KeyType::Raw,
            Stored::Wrapped(_) => KeyType::HardwareWrapped,
        }
    }
}

/// A simulated world.
pub(super) struct World {
    seed: u64,
    sabotage: Option<Sabotage>,
    random: Random,
    rates: Rates,
    spec: EngineSpec,
    profile: Arc<CryptoProfile>,
    clients: Vec<Client>,
    seen: Seen,
}

type Step<T = ()> = Result<T, String>;

fn or_say<T>(result: Result<T, Error>, what: &str) -> Step<T> {
    result.map_err(|error| format!("{what}: {}", error.chain()))
}

fn profile(spec: &EngineSpec) -> Arc<CryptoProfile> {
    let engine = open(spec, Some(root())).expect("the engine starts");
    profile_of(engine)
}

fn profile_of(engine: Arc<dyn Engine>) -> Arc<CryptoProfile> {
    let software = EngineSpec::Software(SoftwareSpec { keyslots: 0, ..SoftwareSpec::default() });
    let software = open(&software, None).expect("software starts");
    let new = |engine| CryptoProfile::new(engine, MemoryPool::new(1 << 18, 0), Policy::default());
    let fallback = new(software).expect("a good engine");
    Arc::new(new(engine).expect("a good engine").with_fallback(Arc::new(fallback)))
}

impl World {
    pub(super) fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut random = Random::new(seed);
        let spec = if random.percent(30) {
            EngineSpec::Software(SoftwareSpec {
                keyslots: random.pick(&[0, 1, 2]),
                ..SoftwareSpec::default()
            })
        } else {
            let (variant, keyslots) = (random.pick(&IceVariant::ALL), random.pick(&[1, 2]));
            let faults = engine_faults(&mut random);
            EngineSpec::Ice(IceSpec { keyslots, faults, seed: random.draw(), ..IceSpec::new(variant) })
        };
        let rates = Rates::draw(&mut random);
        let profile = profile(&spec);
        let mut world =
            Self { seed, sabotage, random, rates, spec, profile, clients: Vec::new(), seen: Seen::default() };
        for _ in 0..2 + world.random.index(2) {
            let client = world.draw_client();
            world.clients.push(client);
        }
        world
    }

    fn draw_client(&mut self) -> Client {
        let random = &mut self.random;
        let unit_size = DataUnitSize::from_bytes(random.pick(&[512, 4096])).expect("powers of two");
        let offset = random.pick(&[0, 0, 1 << 20]);
        let layout =
            Layout::new(Mode::Aes256Xts, unit_size, None, offset, BYTES as u64).expect("a good layout");
        let mut raw = [0; 64];
        random.fill(&mut raw);
        let has_ladder = self.profile.capabilities().key_types.contains(KeyType::HardwareWrapped);
        let stored = if has_ladder && random.percent(50) {
            Stored::Wrapped(self.profile.generate().expect("a good engine generates"))
        } else {
            Stored::Raw(raw)
        };
        Client {
            stored,
            layout,
            disk: Arc::new(SimDisk::new(SECTORS, self.sabotage == Some(Sabotage::NoFlush))),
            shadow: Shadow::new(SECTORS),
            volume: None,
            may_fall_back: if random.percent(50) { Fallback::Allowed } else { Fallback::Off },
        }
    }

    pub(super) fn live(mut self) -> Result<Seen, Failure> {
        for event in 0..60 {
            let outcome = self.happen().and_then(|()| self.check());
            outcome.map_err(|what| Failure { seed: self.seed, event, what })?;
            self.seen.events += 1;
        }
        let outcome = (0..self.clients.len()).try_for_each(|number| self.compare_all(number));
        outcome.map_err(|what| Failure { seed: self.seed, event: 60, what })?;
        Ok(self.seen)
    }

    fn check(&self) -> Step {
        if self.clients.iter().any(|client| client.disk.saw_plaintext()) {
            return Err("plaintext reached a disk".into());
        }
        Ok(())
    }

    fn happen(&mut self) -> Step {
        let number = self.random.index(self.clients.len());
        if self.random.percent(self.rates.reset) {
            self.seen.resets += 1;
            or_say(self.profile.reset(), "a reset")?;
        }
        if self.random.percent(self.rates.power_cut) {
            return self.power_cut();
        }
        if self.clients[number].volume.is_none() {
            return self.open(number);
        }
        if self.random.percent(self.rates.close) {
            self.seen.closes += 1;
            self.clients[number].volume = None;
            return Ok(());
        }
        self.seen.requests += 1;
        let done = self.request(number)?;
        self.seen.answers += 1;
        self.seen.failed_requests += u64::from(!done);
        Ok(())
    }

    /// The key, prepared for one engine.
    fn key(&self, client: &Client, profile: &CryptoProfile) -> Step<Arc<Key>> {
        let form = match &client.stored {
            Stored::Raw(raw) => KeyForm::Raw(RawKey::new(raw)),
            Stored::Wrapped(long_term) => {
                KeyForm::Wrapped(or_say(profile.prepare(long_term), "preparing a good blob")?)
            }
        };
        let layout = &client.layout;
        let (mode, size, dun) = (layout.mode(), layout.data_unit_size(), layout.dun_bytes());
        Key::new(mode, size, dun, form, Hardware::Allowed).map_err(|why| why.to_string())
    }

    fn open(&mut self, number: usize) -> Step {
        let client = &self.clients[number];
        let key = self.key(client, &self.profile)?;
        match self.profile.admit(key, client.may_fall_back) {
            Ok(admission) => {
                self.seen.admissions += 1;
                let (layout, disk) = (client.layout, client.disk.clone());
                let volume = Volume::new(layout, admission, disk, Access::ReadWrite, Discard::Pass);
                self.clients[number].volume = Some(or_say(volume, "a good volume")?);
                Ok(())
            }
            Err(refusal) => {
                self.seen.refusals += 1;
                let is_right =
                    matches!(refusal.reason(), Reason::Locked(lock) if lock.key_type != client.key_type());
                if is_right { Ok(()) } else { Err(format!("refused without cause: {refusal}")) }
            }
        }
    }

    /// Whether it was done. An engine that fails to program a key, retries included, may fail a request; nothing else may.
    fn allowed<T>(result: Result<T, Error>) -> Step<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == ErrorKind::EngineFailed => Ok(None),
            Err(error) => Err(format!("AN ADMITTED KEY WAS REFUSED: {}", error.chain())),
        }
    }

    fn request(&mut self, number: usize) -> Step<bool> {
        let (sabotage, odd) = (self.sabotage, self.random.percent(20));
        let client = &mut self.clients[number];
        let Some(volume) = &client.volume else { return Ok(false) };
        let offset = self.random.index(BYTES);
        let offset = if self.random.percent(50) { offset & !(SECTOR - 1) } else { offset };
        let len = 1 + self.random.index((BYTES - offset).min(6000));
        let shadow = &mut client.shadow;
        match self.random.below(100) {
            0..45 => {
                let durability =
                    if self.random.percent(15) { Durability::Durable } else { Durability::Cached };
                let mut payload: Vec<u8> = PLAINTEXT.iter().copied().cycle().take(len).collect();
                payload
                    .iter_mut()
                    .skip(8)
                    .step_by(16)
                    .for_each(|byte| *byte = self.random.draw().to_le_bytes()[0]);
                let (first, last) = (offset / SECTOR, (offset + len).div_ceil(SECTOR));
                // What whole sectors will hold. Of a sector that nothing is known of, nothing is known afterwards.
                let known = (first..last).all(|sector| {
                    let inside = offset <= sector * SECTOR && (sector + 1) * SECTOR <= offset + len;
                    inside || shadow.newest(sector).is_some()
                });
                let mut content: Vec<u8> = (first..last)
                    .flat_map(|sector| shadow.newest(sector).map_or(vec![0; SECTOR], <[u8]>::to_vec))
                    .collect();
                content[offset - first * SECTOR..][..len].copy_from_slice(&payload);
                let token = shadow.begin_write(first, &content);
                if sabotage == Some(Sabotage::Plaintext) && odd {
                    let disk = &client.disk;
                    let at = (first * SECTOR) as u64;
                    or_say(
                        inlinecrypt_core::backing::Backing::write(&**disk, at, &content, durability),
                        "the disk",
                    )?;
                }
                let done = Self::allowed(write(volume, offset, &payload, durability))?.is_some();
                if done && known {
                    shadow.end_write(token, durability == Durability::Durable);
                } else {
                    shadow.cancel_write(token);
                    shadow.trim(first..last);
                }
                Ok(done)
            }
            45..75 => {
                let Some(found) = Self::allowed(read(volume, offset, len))? else { return Ok(false) };
                let whole = offset.next_multiple_of(SECTOR)..(offset + len) & !(SECTOR - 1);
                if whole.start < whole.end {
                    let found = &found[whole.start - offset..whole.end - offset];
                    let checked = shadow.check_read(whole.start / SECTOR, found);
                    checked
                        .map_err(|sector| format!("a read found sector {sector} of volume {number} wrong"))?;
                }
                Ok(true)
            }
            75..90 => {
                let begun = shadow.begin_flush();
                or_say(volume.flush(), "a flush")?;
                shadow.end_flush(begun);
                Ok(true)
            }
            _ => {
                or_say(volume.trim(offset as u64, len as u64), "a trim")?;
                // Whole data units inside; more is not known to be kept.
                shadow.trim(offset / SECTOR..(offset + len).div_ceil(SECTOR));
                Ok(true)
            }
        }
    }

    fn power_cut(&mut self) -> Step {
        self.seen.power_cuts += 1;
        for client in &mut self.clients {
            client.volume = None;
            client.disk.cut_power(&mut self.random);
        }
        self.profile = profile(&self.spec);
        for number in 0..self.clients.len() {
            let found = self.decrypt(number)?;
            let checked = self.clients[number].shadow.check_after_power_cut(&found);
            checked.map_err(|sector| {
                format!("after a power cut, sector {sector} of volume {number} is wrong")
            })?;
        }
        Ok(())
    }

    fn compare_all(&self, number: usize) -> Step {
        let found = self.decrypt(number)?;
        let checked = self.clients[number].shadow.check_read(0, &found);
        checked.map_err(|sector| format!("at the end, sector {sector} of volume {number} is wrong"))
    }

    /// The whole volume, through another engine: software for raw keys, a healthy one of the same kind for wrapped.
    fn decrypt(&self, number: usize) -> Step<Vec<u8>> {
        let client = &self.clients[number];
        let healthy = match (&self.spec, client.key_type()) {
            (_, KeyType::Raw) => {
                EngineSpec::Software(SoftwareSpec { keyslots: 0, ..SoftwareSpec::default() })
            }
            (EngineSpec::Ice(ice), KeyType::HardwareWrapped) => EngineSpec::Ice(IceSpec::new(ice.variant)),
            (EngineSpec::Software(_), KeyType::HardwareWrapped) => EngineSpec::default(),
        };
        let other = profile(&healthy);
        let key = self.key(client, &other)?;
        let admission = other.admit(key, Fallback::Off).map_err(|refusal| refusal.to_string())?;
        let volume =
            Volume::new(client.layout, admission, client.disk.clone(), Access::ReadOnly, Discard::Off);
        or_say(read(&or_say(volume, "a good volume")?, 0, BYTES), "the other engine")
    }
}

fn pieces(
    volume: &Volume,
    offset: usize,
    len: usize,
    mut each: impl FnMut(Span, &mut Buffer, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut buffer = volume.private_buffer(SMALL_BUFFER_BYTES)?;
    let mut at = 0;
    while at < len {
        let span = volume.span((offset + at) as u64, (len - at) as u64, buffer.bytes().len());
        each(span, &mut buffer, at)?;
        at += span.payload().len();
    }
    Ok(())
}

fn write(volume: &Volume, offset: usize, payload: &[u8], durability: Durability) -> Result<(), Error> {
    pieces(volume, offset, payload.len(), |span, buffer, at| {
        let len = span.payload().len();
        buffer.bytes_mut()[span.payload()].copy_from_slice(&payload[at..at + len]);
        volume.write(span, buffer, durability)
    })
}

fn read(volume: &Volume, offset: usize, len: usize) -> Result<Vec<u8>, Error> {
    let mut found = vec![0; len];
    pieces(volume, offset, len, |span, buffer, at| {
        volume.read(span, buffer)?;
        let payload = &buffer.bytes()[span.payload()];
        found[at..at + payload.len()].copy_from_slice(payload);
        Ok(())
    })?;
    Ok(found)
}

/// Sectors are what the shadow and the volume agree on.
const _: () = assert!(SECTOR == SECTOR_BYTES as usize);
