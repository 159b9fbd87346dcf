//! From a plan to admitted keys: roots, engines, keys, layouts, admissions. Opens nothing for writing, so `check` and
//! `serve` share it.

use crate::ask::Asker;
use crate::cli::{FallbackArg, TlsArg};
use crate::engine_process::{self, EngineHome, Started};
use crate::files::{self, Medium, quoted, shell_word};
use crate::identifier::Identifier;
use crate::keyfile::{KeySource, LoadedKey, Wanted};
use crate::luks::unlock::LuksKey;
use crate::orders::{self, Candidate};
use crate::places::{self, beside};
use crate::plain::ReadyPlain;
use crate::plan::{EnginePlan, LayoutPlan, Plan, Settings, SlotsPlan, TlsPlan, VolumePlan};
use crate::reencrypt::NextPlan;
use crate::report::{Code, Failure, note};
use crate::size::Size;
use inlinecrypt_core::admission::{Fallback, Mode, Reason, Terms, Timestamp};
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::caps::Capabilities;
use inlinecrypt_core::config::{DataUnitSize, Hardware, InvalidKey, KeyType};
use inlinecrypt_core::disk::LARGE_BUFFER_BYTES;
use inlinecrypt_core::env::Clock;
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_core::key::{Key, KeyForm};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::MemoryPool;
use inlinecrypt_core::profile::{Admission, CryptoProfile};
use inlinecrypt_core::volume::{IvLayout, Layout};
use inlinecrypt_engine::{EngineSpec, Root, SoftwareSpec, WrappingKeyId};
use inlinecrypt_io::export::nbd::{ClientCertificates, TlsFiles, TlsMode, TlsSetup};
use rustix::io::Errno;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Large buffers of one engine: enough for as many requests in flight as matter, 20 MiB if all are ever touched.
pub(crate) const LARGE_BUFFERS: usize = 64;

/// Keyslots of the software fallback: what Linux gives its own (`blk_crypto_fallback_num_keyslots`).
const FALLBACK_KEYSLOTS: u32 = 100;

/// An engine that runs.
#[derive(Debug)]
pub(crate) struct HostEngine {
    pub(crate) name: String,
    pub(crate) spec: EngineSpec,
    /// Of the root that wraps its keys, if it has one.
    pub(crate) root: Option<WrappingKeyId>,
    pub(crate) profile: Arc<CryptoProfile>,
    /// Software for raw keys that it does not serve, if a volume asks for that.
    pub(crate) fallback: Option<Arc<CryptoProfile>>,
}

impl HostEngine {
    /// Starts the engine of `plan` in this process, with `root` or for raw keys only.
    pub(crate) fn start(plan: &EnginePlan, root: Option<&Root>) -> Result<Self, Error> {
        let engine = inlinecrypt_engine::open(&plan.spec, root)?;
        let started = Started { engine, fallback: None, root: root.map(Root::id), isolated: None };
        Self::of(plan, started)
    }

    /// Starts the engine of `plan` in the process where it shall run, with its root if `wants_root`, and with software
    /// beside it if `wants_fallback`.
    pub(crate) fn start_at_home(
        plan: &EnginePlan,
        wants_root: bool,
        wants_fallback: bool,
        asker: &mut Asker,
    ) -> Result<Self, Error> {
        let fallback = SoftwareSpec { keyslots: FALLBACK_KEYSLOTS, ..SoftwareSpec::default() };
        let fallback = wants_fallback.then_some(EngineSpec::Software(fallback));
        Self::of(plan, engine_process::start(plan, wants_root, fallback, asker)?)
    }

    /// The framework around an engine that was started.
    pub(crate) fn of(plan: &EnginePlan, started: Started) -> Result<Self, Error> {
        let Started { engine, fallback, root, isolated } = started;
        let pool = || MemoryPool::new(LARGE_BUFFER_BYTES, LARGE_BUFFERS);
        let clock = Arc::new(SystemClock(Instant::now()));
        let mut profile = CryptoProfile::new(engine, pool(), plan.policy)?.with_clock(clock);
        let fallback = match fallback {
            Some(engine) => Some(Arc::new(CryptoProfile::new(engine, pool(), Policy::default())?)),
            None => None,
        };
        if let Some(fallback) = &fallback {
            profile = profile.with_fallback(fallback.clone());
        }
        let profile = Arc::new(profile);
        if let Some(isolated) = isolated {
            let restarted = Arc::downgrade(&profile);
            isolated.when_restarted(move || {
                if let Some(Err(error)) = restarted.upgrade().map(|profile| profile.restarted()) {
                    tracing::error!("{}", error.chain());
                }
            });
        }
        Ok(Self { name: plan.name.clone(), spec: plan.spec, root, profile, fallback })
    }
}

/// Time for the keyslots' quanta.
#[derive(Debug)]
struct SystemClock(Instant);

impl Clock for SystemClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A volume whose key is admitted.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) plan: VolumePlan,
    pub(crate) layout: Layout,
    pub(crate) admission: Admission,
    pub(crate) identifier: Identifier,
    /// Bytes behind the last whole data unit.
    pub(crate) unused_bytes: u64,
    /// What it is being re-encrypted to, if it is.
    pub(crate) next: Option<ReadyNext>,
}

/// The other half of a volume that is being re-encrypted.
#[derive(Debug)]
pub(crate) struct ReadyNext {
    pub(crate) plan: NextPlan,
    pub(crate) layout: Layout,
    pub(crate) admission: Admission,
    pub(crate) identifier: Identifier,
}

/// Everything but the backings.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) engines: Vec<Option<HostEngine>>,
    pub(crate) volumes: Vec<Ready>,
    pub(crate) plain: Vec<ReadyPlain>,
}

impl Host {
    /// Starts the engines and admits the keys of all volumes. Every failure is reported; what failed is left out.
    pub(crate) fn prepare(plan: &Plan, asker: &mut Asker) -> (Self, Vec<Failure>) {
        let mut failures = Vec::new();
        let mut host = Self::default();
        for (index, engine) in plan.engines.iter().enumerate() {
            let mut its = plan.volumes.iter().filter(|volume| volume.engine == index);
            let mut nexts = plan.volumes.iter().filter_map(|volume| volume.next.as_ref());
            let may_come = engine.wants_root && files::exists(engine.root.path());
            let wants_root = may_come
                || its.clone().any(|volume| volume.key.wanted == Wanted::Wrapped)
                || nexts.any(|next| next.engine == index && next.key.wanted == Wanted::Wrapped);
            let wants_fallback = its.any(|volume| volume.fallback != FallbackArg::Off);
            match HostEngine::start_at_home(engine, wants_root, wants_fallback, asker) {
                Ok(engine) => host.engines.push(Some(engine)),
                Err(error) => {
                    let failure = Failure::of_file(format!("engine {}", engine.name), &error);
                    let root_is_missing = wants_root
                        && error.kind() == ErrorKind::NotFound
                        && !files::exists(engine.root.path());
                    failures.push(if root_is_missing {
                        failure.advise(
                            "Name the root that wrapped the keys with --root SPEC, or bring it back; a new one \
                             cannot open them.",
                        )
                    } else {
                        failure
                    });
                    host.engines.push(None);
                }
            }
        }
        host.settle_key_types(plan, &mut failures);
        for volume in &plan.volumes {
            // Looked at first: a missing volume is told even if its engine does not run.
            let medium = match Medium::look(&volume.path) {
                Ok(medium) => medium,
                Err(failure) => {
                    failures.push(missing(relabel(failure, &volume.path, &volume.label), volume, plan));
                    continue;
                }
            };
            if let Err(failure) = check_writable(&volume.path, volume.access, &volume.label) {
                failures.push(failure);
                continue;
            }
            let Some(engine) = &host.engines[volume.engine] else { continue };
            let asked = volume.key.asked(asker).map(|key| VolumePlan { key, ..volume.clone() });
            let mut ready = match asked.and_then(|volume| admit(&volume, &medium, engine)) {
                Ok(ready) => ready,
                Err(failure) => {
                    failures.push(failure);
                    continue;
                }
            };
            if let Some(next) = &volume.next {
                let Some(engine) = &host.engines[next.engine] else { continue };
                let mut next = next.clone();
                if let (Some(old), Some(new)) = (ready.plan.key.luks_key(), next.key.luks_key()) {
                    // One passphrase opens both.
                    let which = new.which.clone();
                    next.key = KeySource::luks(LuksKey { which, ..old.clone() });
                }
                match admit_next(volume, &next, &medium, engine) {
                    Ok(next) => ready.next = Some(next),
                    Err(failure) => {
                        failures.push(failure);
                        continue;
                    }
                }
            }
            host.volumes.push(ready);
        }
        for volume in &plan.plain {
            match volume.prepare() {
                Ok(ready) => host.plain.push(ready),
                Err(failure) => failures.push(failure),
            }
        }
        (host, failures)
    }

    /// Proves that no order of admissions refuses a volume, and tells the engines what is declared. An engine whose
    /// volumes cannot all be served is left out.
    fn settle_key_types(&mut self, plan: &Plan, failures: &mut Vec<Failure>) {
        for (index, (slot, engine_plan)) in self.engines.iter_mut().zip(&plan.engines).enumerate() {
            let Some(engine) = slot else { continue };
            let exclusive = engine.profile.status().mode != Mode::Settled;
            let key_type = |wanted: Wanted| match wanted {
                Wanted::Wrapped => KeyType::HardwareWrapped,
                Wanted::Raw => KeyType::Raw,
            };
            let mut volumes: Vec<_> = plan
                .volumes
                .iter()
                .filter(|volume| {
                    volume.engine == index && !is_softwares(volume, engine.profile.capabilities())
                })
                .map(|volume| Candidate {
                    label: &volume.label,
                    key_type: key_type(volume.key.wanted),
                    hold: volume.slots.hold,
                    fallback_ready: volume.fallback == FallbackArg::Allowed
                        && volume.key.wanted == Wanted::Raw,
                })
                .collect();
            // Both keys of a volume that is being re-encrypted are needed together.
            volumes.extend(plan.volumes.iter().filter_map(|volume| {
                let next = volume.next.as_ref().filter(|next| next.engine == index)?;
                (volume.fallback != FallbackArg::Forced).then(|| Candidate {
                    label: &next.label,
                    key_type: key_type(next.key.wanted),
                    hold: volume.slots.hold,
                    fallback_ready: volume.fallback == FallbackArg::Allowed && next.key.wanted == Wanted::Raw,
                })
            }));
            let keyslots = engine.profile.capabilities().keyslots;
            let found = orders::conflicts(engine_plan, keyslots, exclusive, &volumes);
            if !found.is_empty() {
                failures.extend(found);
                *slot = None;
                continue;
            }
            if let Some(key_type) = engine_plan.key_type.declared()
                && let Err(refusal) = engine.profile.declare(key_type, Timestamp(seconds_now()))
            {
                failures.push(Failure::of(format!("engine {}", engine.name), &Error::from(refusal)));
                *slot = None;
            }
        }
    }

    /// Says which volumes an end of their engine's process would stop: their raw keys cannot be had again. Of LUKS containers
    /// that is known (docs/luks.md).
    pub(crate) fn tell_keys_given_once(&self, engines: &[EnginePlan]) {
        for Ready { plan, .. } in &self.volumes {
            let is_isolated = !matches!(engines[plan.engine].home, None | Some(EngineHome::None));
            if is_isolated
                && plan.luks.is_none()
                && plan.key.wanted == Wanted::Raw
                && !plan.key.can_be_had_again()
            {
                note(format_args!(
                    "{}: {} is not kept and cannot be read again: if the engine process ends, the volume fails with EIO \
                     until it is served anew. With --key raw:FILE it goes on.",
                    plan.label, plan.key
                ));
            }
        }
    }

    /// Says what cannot be known or will not be used, and is no failure.
    pub(crate) fn tell_notes(&self) {
        for (i, Ready { plan, layout, identifier, unused_bytes, .. }) in self.volumes.iter().enumerate() {
            if plan.key_id.is_none() && plan.luks.is_none() {
                note(format_args!(
                    "{} has no description, and the format has no header: whether key and layout are the right ones \
                     cannot be known. With wrong ones, reads give noise and writes destroy data.",
                    plan.label
                ));
            }
            if *unused_bytes > 0 {
                note(format_args!(
                    "{}: its last {unused_bytes} bytes are not a whole data unit of {} and stay unused",
                    plan.label,
                    layout.data_unit_size()
                ));
            }
            let same_key = |other: &&Ready| other.identifier == *identifier;
            if let Some(other) = self.volumes[..i].iter().find(same_key) {
                note(format_args!(
                    "{} and {} have one key: where both have the same content at the same place, their ciphertext is \
                     the same, too",
                    other.plan.label, plan.label
                ));
            }
        }
        self.plain.iter().for_each(ReadyPlain::tell_notes);
    }
}

/// Whether software serves the volume whatever else the engine serves: it never asks the engine for anything.
fn is_softwares(volume: &VolumePlan, engine: &Capabilities) -> bool {
    match volume.fallback {
        FallbackArg::Forced => true,
        FallbackArg::Off => false,
        FallbackArg::Allowed => {
            let LayoutPlan { mode, data_unit, .. } = volume.layout;
            let layout = Medium::look(&volume.path)
                .and_then(|medium| layout(&volume.layout, medium.len_bytes, &volume.label));
            let is_beyond = !engine.units[mode.index()].contains(data_unit)
                || layout.is_ok_and(|layout| layout.dun_bytes() > engine.dun_bytes_max);
            is_beyond && volume.key.wanted == Wanted::Raw
        }
    }
}

/// The label says more than the path alone, if it is longer.
pub(crate) fn relabel(failure: Failure, path: &Path, label: &str) -> Failure {
    match failure.what.strip_prefix(&path.display().to_string()) {
        Some(rest) => Failure { what: format!("{label}{rest}"), ..failure },
        None => failure.within(label),
    }
}

fn admit(volume: &VolumePlan, medium: &Medium, engine: &HostEngine) -> Result<Ready, Failure> {
    let label = &volume.label;
    check_size(volume.size, &volume.said_by, medium, label)?;
    let layout = layout(&volume.layout, medium.len_bytes, label).map_err(|failure| match &volume.luks {
        Some(luks) => luks.cut_short(failure),
        None => failure,
    })?;
    let key = volume.key.load().map_err(|failure| failure.within(label))?;
    let (admission, identifier) =
        admit_key(&key, &volume.key, &layout, volume.fallback, volume.slots, &engine.profile, label)
            .map_err(|failure| failure.within(label))?;
    if let Some(expected) = volume.key_id.filter(|expected| *expected != identifier) {
        return Err(Failure::new(
            Code::Refused,
            format!(
                "{label}: wrong key: {} has identifier {identifier}, and {} says {expected}",
                volume.key, volume.said_by
            ),
            "Give the key with that identifier. The format itself is headerless: with another key, reads would give \
             noise and writes destroy data.",
        ));
    }
    let unused_bytes = volume.layout.unused(&layout, medium.len_bytes);
    Ok(Ready { plan: volume.clone(), layout, admission, identifier, unused_bytes, next: None })
}

/// Admits the key that a volume is being re-encrypted to.
fn admit_next(
    volume: &VolumePlan,
    next: &NextPlan,
    medium: &Medium,
    engine: &HostEngine,
) -> Result<ReadyNext, Failure> {
    let NextPlan { label, key, .. } = next;
    let layout = layout(&next.layout, medium.len_bytes, label)?;
    if layout.size_bytes() != next.size_bytes {
        let file_bytes = next.layout.offset.saturating_add(next.size_bytes);
        return Err(Failure::new(
            Code::File,
            format!(
                "{label}: the volume has {}, and had {} when its re-encryption began",
                Size(layout.size_bytes()),
                Size(next.size_bytes)
            ),
            format!(
                "Give it that size until it is done: truncate -s {file_bytes} {}. What lies behind would be lost by that, so \
                 copy it first.",
                shell_word(&volume.path)
            ),
        ));
    }
    let loaded = key.load().map_err(|failure| failure.within(label))?;
    let (admission, identifier) =
        admit_key(&loaded, key, &layout, volume.fallback, volume.slots, &engine.profile, label)
            .map_err(|failure| failure.within(label))?;
    // In a container both keys have digests, which were compared.
    if next.key_id.is_some_and(|expected| expected != identifier) {
        return Err(Failure::new(
            Code::Refused,
            format!(
                "{label}: wrong key: {key} has identifier {identifier}, and the re-encryption began with another"
            ),
            "Bring the key file back from a copy: half of the volume is under that key.",
        ));
    }
    Ok(ReadyNext { plan: next.clone(), layout, admission, identifier })
}

/// Refuses a volume that is to be written and that this user may not write.
pub(crate) fn check_writable(path: &Path, access: Access, label: &str) -> Result<(), Failure> {
    use rustix::fs::{Access as May, AtFlags, CWD, accessat};
    if access == Access::ReadOnly {
        return Ok(());
    }
    // As whom the system opens it, which access(2) alone does not ask.
    match accessat(CWD, path, May::WRITE_OK, AtFlags::EACCESS) {
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => Err(Failure::of_io(
            format!("{label} is not writable"),
            &errno.into(),
            "Serve it with --read-only (read_only = true in a config), or get the right to write it.",
        )),
        // Whatever else there is, opening it tells better.
        _ => Ok(()),
    }
}

/// A volume that is missing is made with one command, whose options are those it is to be served with.
fn missing(failure: Failure, volume: &VolumePlan, plan: &Plan) -> Failure {
    if files::exists(&volume.path) {
        return failure;
    }
    let LayoutPlan { mode, data_unit, block, iv_offset, iv, offset, length: _ } = volume.layout;
    let mut options = String::new();
    let mut option = |name: &str, value: String| {
        let _ = write!(options, " --{name} {}", quoted(&value));
    };
    let sibling = beside(&volume.path, ".key");
    let has_own_key = volume.key.wanted == Wanted::Wrapped && volume.key.path() == Some(&*sibling);
    if !has_own_key {
        option("key", volume.key.written());
    }
    if mode != Settings::default().layout().mode {
        option("mode", mode.to_string());
    }
    if data_unit != DataUnitSize::DEFAULT {
        option("data-unit", data_unit.to_string());
    }
    if let Some(block) = block {
        option("block", block.to_string());
    }
    if iv_offset != 0 {
        option("iv-offset", iv_offset.to_string());
    }
    if iv != IvLayout::default() {
        option("iv", iv.to_string());
    }
    if offset != 0 {
        option("offset", offset.to_string());
    }
    let EnginePlan { spec, root, .. } = &plan.engines[volume.engine];
    let derives_as_usual = match spec {
        EngineSpec::Software(spec) => spec.kdf == SoftwareSpec::default().kdf,
        EngineSpec::Ice(_) => false,
    };
    if !derives_as_usual {
        option("engine", spec.to_string());
    }
    if places::default_root().ok().as_ref() != Some(root) {
        option("root", root.to_string());
    }
    let path = shell_word(&volume.path);
    if options.is_empty() && volume.label == volume.path.display().to_string() {
        // On the command line: `serve --create` does it, as the failure says.
        return failure;
    }
    let key = match (&volume.key.wanted, volume.key.path()) {
        (Wanted::Wrapped, Some(key)) if !has_own_key && !files::exists(key) => {
            let root = options.find(" --engine").or(options.find(" --root")).map_or("", |at| &options[at..]);
            format!("inlinecrypt key generate{root} --out {} && ", shell_word(key))
        }
        _ => String::new(),
    };
    failure.advise(format!("To make it: {key}inlinecrypt volume create --size SIZE{options} {path}"))
}

/// Refuses a volume that has lost its end since `said_by` noted how long it is: it would be served smaller, and clients
/// would take that for the end of their data. One that has grown is served whole.
pub(crate) fn check_size(
    said: Option<u64>,
    said_by: &str,
    medium: &Medium,
    label: &str,
) -> Result<(), Failure> {
    let (Some(was), is) = (said, medium.len_bytes) else { return Ok(()) };
    if is < was {
        return Err(Failure::new(
            Code::File,
            format!(
                "{label} has lost its end: it has {}, and had {} according to {said_by}",
                Size(is),
                Size(was)
            ),
            format!(
                "Bring the missing {} back from a copy. If it was made smaller on purpose, say size = {is} there.",
                Size(was - is)
            ),
        ));
    }
    if is > was {
        note(format_args!(
            "{label} has grown: it has {}, and had {} according to {said_by}. All of it is served; say size = {is} \
             there",
            Size(is),
            Size(was)
        ));
    }
    Ok(())
}

/// The layout of a volume on a backing of `backing_bytes`.
pub(crate) fn layout(plan: &LayoutPlan, backing_bytes: u64, label: &str) -> Result<Layout, Failure> {
    let LayoutPlan { mode, data_unit, block, iv_offset, iv, offset, length } = *plan;
    let Some(room) = backing_bytes.checked_sub(offset) else {
        return Err(Failure::new(
            Code::File,
            format!("{label} has {}, and the volume begins at {}", Size(backing_bytes), Size(offset)),
            "Check that it is the right file, and its offset.",
        ));
    };
    if let Some(length) = length.filter(|&length| length > room) {
        return Err(Failure::new(
            Code::File,
            format!(
                "{label} has {}, and the volume is to have {} from {} on",
                Size(backing_bytes),
                Size(length),
                Size(offset)
            ),
            "Check that it is the right file and that nothing of it is missing, and the volume's length.",
        ));
    }
    if let Some(length) = length.filter(|length| !length.is_multiple_of(data_unit.bytes().into())) {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{label}: a length of {length} bytes is not a multiple of the data unit, {data_unit} bytes"
            ),
            "Correct the length, or leave it out.",
        ));
    }
    let backing_bytes = length.unwrap_or(room);
    if backing_bytes < u64::from(data_unit.bytes()) {
        return Err(Failure::new(
            Code::File,
            format!("{label} has {}, which is not even one data unit of {data_unit}", Size(backing_bytes)),
            "Check that it is the right file. An empty one can be removed and made anew with --create SIZE.",
        ));
    }
    Layout::new(mode, data_unit, block, iv_offset, backing_bytes)
        .and_then(|layout| layout.with_iv(iv))
        .map_err(|error| Failure::of(label, &error))
}

impl LayoutPlan {
    /// Bytes behind the last whole data unit that nothing says are not the volume's.
    pub(crate) fn unused(&self, layout: &Layout, backing_bytes: u64) -> u64 {
        match self.length {
            Some(_) => 0,
            None => backing_bytes - self.offset - layout.size_bytes(),
        }
    }
}

/// Admits a key for a layout: from here on it is served, or refused with its reason.
pub(crate) fn admit_key(
    key: &LoadedKey,
    source: &KeySource,
    layout: &Layout,
    fallback: FallbackArg,
    slots: SlotsPlan,
    profile: &Arc<CryptoProfile>,
    label: &str,
) -> Result<(Admission, Identifier), Failure> {
    key.check_length(layout.mode(), source)?;
    if fallback != FallbackArg::Off && matches!(key, LoadedKey::Wrapped(_)) {
        if fallback == FallbackArg::Forced {
            return Err(Failure::new(
                Code::Wrong,
                "software fallback is forced, and a hardware-wrapped key is never served by software",
                "Leave --fallback out, or give a raw key (--key raw:FILE).",
            ));
        }
        note(format_args!(
            "{source} is hardware-wrapped: software never serves it, whatever --fallback says"
        ));
    }
    let form = key.form(profile, source)?;
    let identifier = Identifier::of(&form, profile)
        .map_err(|error| Failure::of(format!("{source} is refused"), &error))?;
    let key = new_key(form, layout, fallback).map_err(|why| refused_key(source, why))?;
    let allowed = if fallback == FallbackArg::Off { Fallback::Off } else { Fallback::Allowed };
    let SlotsPlan { priority, hold, preprogram, spill_after_ns } = slots;
    let (label, now) = (label.to_owned(), Timestamp(seconds_now()));
    let terms = Terms { fallback: allowed, hold, priority, preprogram, spill_after_ns, label, now };
    let admission = profile.admit(key, terms).map_err(|refusal| {
        let advice = match refusal.reason() {
            Reason::FallbackOff(_) => {
                "Choose what it can do (inlinecrypt engine info), or allow --fallback allowed."
            }
            Reason::Rejected(_) => "Restore the key file from a copy, or name the root that wrapped it.",
            Reason::Locked(_) => {
                "Use a key of that type or another engine; software may serve a raw key (--fallback)."
            }
            Reason::Poisoned(_) => "Start the engine again; if it fails again, use another.",
            Reason::NoPinLeft { .. } => "Pin fewer keys, or give the engine more keyslots (slots=N).",
            _ => "Choose what it can do: inlinecrypt engine info",
        };
        Failure::of(source, &Error::from(refusal)).advise(advice)
    })?;
    Ok((admission, identifier))
}

/// Seconds since the beginning of 1970.
pub(crate) fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn new_key(form: KeyForm, layout: &Layout, fallback: FallbackArg) -> Result<Arc<Key>, InvalidKey> {
    let hardware = if fallback == FallbackArg::Forced { Hardware::Forbidden } else { Hardware::Allowed };
    Key::new(layout.mode(), layout.data_unit_size(), layout.dun_bytes(), form, hardware)
}

fn refused_key(source: &KeySource, why: InvalidKey) -> Failure {
    let code = match why {
        InvalidKey::EqualHalves | InvalidKey::KeySize { .. } => Code::Refused,
        _ => Code::Wrong,
    };
    Failure::new(
        code,
        format!("{source} cannot be used: {why}"),
        "Give another key, or another layout; a wrapped key is made with: inlinecrypt key generate --out FILE",
    )
}

/// Reads and checks the certificates.
pub(crate) fn tls(plan: &TlsPlan) -> Result<TlsMode, Failure> {
    let TlsPlan { when, cert, key, client_ca, verify_client } = plan;
    let (TlsArg::Required | TlsArg::Allowed, Some(cert), Some(key)) = (when, cert, key) else {
        return Ok(TlsMode::Off);
    };
    let files = TlsFiles {
        certificates: cert.clone(),
        key: key.clone(),
        client_authority: client_ca.clone(),
        client_certificates: match (client_ca, verify_client) {
            (None, _) => ClientCertificates::None,
            (Some(_), false) => ClientCertificates::Optional,
            (Some(_), true) => ClientCertificates::Required,
        },
    };
    let setup = TlsSetup::load(&files).map_err(|error| Failure::of_file("TLS", &error))?;
    Ok(if *when == TlsArg::Required { TlsMode::Required(setup) } else { TlsMode::Allowed(setup) })
}
