//! Re-encryption of a volume, as far as it is written down in files.
//!
//! ```text
//!   VOLUME.toml        says `reencrypt = "VOLUME.reencrypt"` from before the first zone until after the last
//!   VOLUME.reencrypt   how far it is, and the plan: the description that VOLUME.toml becomes
//!   VOLUME.XXXXXXXX.key   the new key, if it was made for this; XXXXXXXX begins its identifier
//! ```
//!
//! In the order in which a crash spoils nothing: the new key, the state, the mark in the description; the zones; the new
//! description, then the old key goes if that was asked for, and the state. What a kill leaves of that goes at the next start. Until the mark is there nothing has happened,
//! and what lies around is written anew. A program that does not know the mark refuses the description, as it should.
//!
//! The state is ours (`core::reencrypt::state`, docs/reencryption.md). A LUKS2 container has it in its header instead, as cryptsetup
//! writes it: then there is no other file, and the header is all that changes (`luks.rs`).

mod begin;
mod job;
mod luks;
mod progress;

pub(crate) use begin::{Backings, Old, Terms, begin, go_on};
pub(crate) use job::Job;
pub(crate) use luks::{LuksTerms, settle as settle_container};
pub(crate) use progress::{EVERY, Progress, Show};

use crate::cli::{FallbackArg, LayoutArgs};
use crate::files::{self, Medium, Staged, shell_word};
use crate::host;
use crate::identifier::Identifier;
use crate::keyfile::{KeySource, LoadedKey, Wanted};
use crate::luks::keep::OtherKeyslots;
use crate::luks::look::Luks;
use crate::places::{beside, directory_of};
use crate::plan::{Description, EnginePlan, LayoutPlan, SlotsPlan};
use crate::report::{Code, Failure};
use crate::size::Size;
use inlinecrypt_core::backing::Backing;
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::key::LongTermWrappedKey;
use inlinecrypt_core::profile::{Admission, CryptoProfile};
use inlinecrypt_core::reencrypt::state::{PREFIX_BYTES, State, StateFacts};
use inlinecrypt_core::reencrypt::{Holes, check_layouts};
use inlinecrypt_core::volume::Layout;
use inlinecrypt_io::backing::{FileBacking, OpenOptions};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Zones if nothing is said: so short that clients hardly notice that they wait for one. Larger ones are faster while nobody
/// comes, by a half on a disk where flushing costs something; then random requests get through a quarter as often
/// (docs/performance.md).
pub(crate) const ZONE_BYTES: u64 = 1 << 20;

/// What to do where an engine takes no wrapped keys.
const NO_LADDER: &str = "If its server was started without a root, since no key needed one, start it with --root SPEC, or do \
                         it with --offline; for an engine that takes raw keys only, name one: --key raw:FILE.";

/// The plan of a state: what is to become of the volume, and how.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Intent {
    /// The description that the volume is to have.
    pub(crate) description: String,
    /// The file of the old key, to be removed in the end.
    pub(crate) remove_old_key: Option<PathBuf>,
    /// Most bytes in a second; 0 for as many as there are.
    pub(crate) throttle_bytes: u64,
    /// Whether parts without storage are left as they are.
    pub(crate) keep_holes: bool,
}

impl Intent {
    pub(crate) fn holes(&self) -> Holes {
        if self.keep_holes { Holes::Kept } else { Holes::Rewritten }
    }
}

/// Where it is written down how far a re-encryption is, and what comes of it.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    /// In a file of ours.
    File { state: PathBuf, intent: Intent },
    /// In the header of the container, which may lie elsewhere than its data.
    Header { header: PathBuf, is_detached: bool },
}

impl Record {
    /// The last steps: the volume is what it was to become, and says so.
    fn settle(&self, volume: &Path) -> Result<(), Failure> {
        match self {
            Self::File { state, intent } => settle(volume, state, intent),
            // The header did with its last zone.
            Self::Header { .. } => Ok(()),
        }
    }

    fn throttle_bytes(&self) -> u64 {
        match self {
            Self::File { intent, .. } => intent.throttle_bytes,
            Self::Header { .. } => 0,
        }
    }

    fn holes(&self) -> Holes {
        match self {
            Self::File { intent, .. } => intent.holes(),
            Self::Header { .. } => Holes::Rewritten,
        }
    }
}

/// What a volume is being re-encrypted to.
#[derive(Clone, Debug)]
pub(crate) struct NextPlan {
    /// How messages call it.
    pub(crate) label: String,
    pub(crate) record: Record,
    pub(crate) key: KeySource,
    pub(crate) key_id: Option<Identifier>,
    pub(crate) layout: LayoutPlan,
    /// Index in `Plan::engines`.
    pub(crate) engine: usize,
    /// How far it was when this was read, in bytes.
    pub(crate) done_bytes: u64,
    pub(crate) size_bytes: u64,
}

/// Where the state of a re-encryption of `volume` is: beside the file itself, so that each name of it leads there.
/// A device's is beside the name that was given, which is where its description is: /dev does not outlive a reboot.
pub(crate) fn state_path(volume: &Path) -> PathBuf {
    beside(&files::itself(volume), ".reencrypt")
}

/// What the state at `path` says.
pub(crate) fn look(path: &Path) -> Result<(StateFacts, Intent), Failure> {
    let what = "state of a re-encryption";
    let unusable = |why: String| {
        Failure::new(
            Code::File,
            format!("{what} {}: {why}", path.display()),
            "Bring it back from a copy. Without it nobody knows which part of the volume is under which key; it must \
             not be served.",
        )
    };
    let prefix = files::read_prefix(path, what, PREFIX_BYTES).map_err(|failure| unusable(failure.what))?;
    let facts = StateFacts::parse(&prefix).map_err(|error| unusable(Failure::of("damaged", &error).what))?;
    let intent = serde_json::from_slice(&facts.plan).map_err(|why| unusable(format!("its plan: {why}")))?;
    Ok((facts, intent))
}

/// What becomes of `volume`, if its description says `marked`, with the engine that it names then. Refuses a volume whose
/// mark was lost on the way.
pub(crate) fn next_plan(
    volume: &Path,
    marked: Option<&Path>,
    container: Option<&Luks>,
    label: &str,
) -> Result<Option<(NextPlan, Option<EnginePlan>)>, Vec<Failure>> {
    if let Some(container) = container {
        let next = luks::next_plan(volume, container, label).map_err(|failure| vec![failure])?;
        return Ok(next.map(|next| (next, None)));
    }
    let Some(state) = marked else {
        return match is_forgotten(volume) {
            Ok(()) => Ok(None),
            Err(failure) => Err(vec![failure.within(label)]),
        };
    };
    let (facts, intent) = look(state).map_err(|failure| vec![failure.within(label)])?;
    let next = Description::of_text(intent.description.clone(), volume)?;
    let label = format!("{label} (re-encrypted)");
    let Some(key) = next.settings.key.clone() else {
        let why = format!("{label}: the state {} does not name the new key", state.display());
        return Err(vec![Failure::new(Code::File, why, "Bring the state back from a copy.")]);
    };
    let plan = NextPlan {
        label,
        record: Record::File { state: state.to_owned(), intent },
        key,
        key_id: next.settings.key_id,
        layout: next.settings.layout(),
        engine: 0,
        done_bytes: facts.boundary,
        size_bytes: facts.size_bytes,
    };
    Ok(Some((plan, next.engine)))
}

/// Refuses a volume with a state that has begun, whose description does not say so.
fn is_forgotten(volume: &Path) -> Result<(), Failure> {
    [state_path(volume), beside(volume, ".reencrypt")]
        .iter()
        .filter(|state| files::exists(state))
        .try_for_each(|state| is_not_of(state, volume))
}

fn is_not_of(state: &Path, volume: &Path) -> Result<(), Failure> {
    // What cannot be read as a state is somebody else's file.
    let Ok((facts, intent)) = look(state) else { return Ok(()) };
    let has_begun = facts.boundary > 0 || facts.is_interrupted;
    if !has_begun || (facts.is_complete() && is_described_as(volume, &intent)) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Refused,
        format!(
            "{} of it are re-encrypted, says {}, and its description does not say so",
            Size(facts.boundary),
            state.display()
        ),
        format!(
            "If the description was brought back from a copy, add the line: reencrypt = {:?}. If this is a link, or \
             the target of one, use the name under which it was begun.",
            named_from(volume, state)
        ),
    ))
}

/// Whether the volume's description is what it was to become.
fn is_described_as(volume: &Path, intent: &Intent) -> bool {
    Description::find(volume).is_ok_and(|found| found.is_some_and(|found| found.text == intent.description))
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) layout: LayoutArgs,
    /// The new key; one is made if none is named.
    pub(crate) key: Option<KeySource>,
    pub(crate) zone_bytes: u64,
    pub(crate) throttle_bytes: u64,
    pub(crate) keep_holes: bool,
    pub(crate) remove_old_key: bool,
    /// What becomes of a container's LUKS keyslots besides that of the passphrase.
    pub(crate) others: OtherKeyslots,
    /// The engine and root that the new description is to name, if it is another than now.
    pub(crate) engine: Option<EnginePlan>,
}

/// The volume as it is.
#[derive(Clone, Debug)]
struct Present {
    pub(crate) path: PathBuf,
    pub(crate) label: String,
    pub(crate) layout: Layout,
    /// What its description says of its layout.
    pub(crate) planned: LayoutPlan,
    pub(crate) identifier: Identifier,
    pub(crate) fallback: FallbackArg,
    pub(crate) slots: SlotsPlan,
}

/// All that has to be known before anything is written: the new key is admitted beside the old one.
#[derive(Debug)]
struct Prepared {
    pub(crate) layout: Layout,
    pub(crate) identifier: Identifier,
    pub(crate) intent: Intent,
    pub(crate) state: PathBuf,
    zone_bytes: u64,
    /// A new key that is nowhere yet, and where it goes.
    new_key: Option<(PathBuf, LongTermWrappedKey)>,
    /// The old description, with the mark.
    marked: String,
}

impl Prepared {
    /// Makes or loads the new key, and has it admitted by `profile`.
    pub(crate) fn of(
        present: &Present,
        wish: &Wish,
        profile: &Arc<CryptoProfile>,
    ) -> Result<(Self, Admission), Failure> {
        let Present { path, label, layout: old, planned, identifier: old_identifier, .. } = present;
        let found = Description::find(path).map_err(first)?;
        let Some(description) = found else {
            return Err(Failure::new(
                Code::File,
                format!("{label} has no description, so nothing would say that it is half under another key"),
                format!(
                    "Write {} first, with [[volume]], path, key, key_id, mode and data_unit; a new volume's shows how.",
                    Description::path_for(path).display()
                ),
            ));
        };
        if description.settings.reencrypt.is_some() {
            return Err(under_way(label));
        }
        if wish.layout.offset.is_some() {
            return Err(Failure::new(
                Code::Wrong,
                format!("{label}: a re-encryption leaves the volume where it is"),
                "Leave --offset out.",
            ));
        }
        if description.settings.table.is_some() {
            return Err(Failure::new(
                Code::Wrong,
                format!(
                    "{label}: its description says what it is by dm_table, which could not say half of it"
                ),
                "Write mode, data_unit, iv, iv_offset, offset and length there instead; volume info shows them.",
            ));
        }
        is_forgotten(path).map_err(|failure| failure.within(label))?;
        let planned = changed(*planned, &wish.layout);
        let layout = host::layout(&planned, old.size_bytes(), label)?;
        check_layouts(old, &layout).map_err(|error| {
            Failure::of(label, &error).advise("Choose data units of which the volume is a multiple.")
        })?;
        let (loaded, new_key, source) = match &wish.key {
            Some(source) => (source.load()?, None, source.clone()),
            None => {
                let blob = profile
                    .generate()
                    .map_err(|error| Failure::of("cannot make a new key", &error).advise(NO_LADDER))?;
                let key = LoadedKey::Wrapped(blob);
                let form = key.form(profile, &KeySource::wrapped(path.clone()))?;
                let name = Identifier::of(&form, profile).map_err(|error| Failure::of(label, &error))?;
                let file = beside(path, &format!(".{}.key", &name.to_string()[..8]));
                let LoadedKey::Wrapped(blob) = &key else { unreachable!("made above") };
                let new_key = Some((file.clone(), LongTermWrappedKey::new(blob.as_bytes())));
                (key, new_key, KeySource::wrapped(file))
            }
        };
        let fallback = match source.wanted {
            Wanted::Raw => present.fallback,
            Wanted::Wrapped => FallbackArg::Off,
        };
        let (admission, identifier) =
            host::admit_key(&loaded, &source, &layout, fallback, present.slots, profile, label).map_err(
                |failure| {
                    let is_for_nobody = source.wanted == Wanted::Wrapped
                        && !profile.capabilities().key_types.contains(KeyType::HardwareWrapped);
                    let failure = failure.within(label);
                    if is_for_nobody { failure.advise(NO_LADDER) } else { failure }
                },
            )?;
        if identifier == *old_identifier && *old == layout {
            return Err(Failure::new(
                Code::Wrong,
                format!("{label} is under key {identifier} already, in that very layout"),
                "Name another key, or leave --key out for a new one; or ask for another layout.",
            ));
        }
        let old_key = match &description.settings.key {
            Some(key) => key.path().map(Path::to_owned),
            None => Some(beside(path, ".key")),
        };
        let remove_old_key = match old_key.filter(|_| wish.remove_old_key) {
            Some(file) if identifier == *old_identifier || is_one_file(source.path(), &file) => {
                return Err(Failure::new(
                    Code::Wrong,
                    format!(
                        "{label}: --remove-old-key would remove {}, and the new key is that key",
                        file.display()
                    ),
                    "Leave --remove-old-key out; or leave --key out, for a new key.",
                ));
            }
            Some(file) => Some(std::path::absolute(&file).unwrap_or(file)),
            None => None,
        };
        let state = state_path(path);
        let intent = Intent {
            description: described(&description, path, &layout, &planned, identifier, &source, wish)?,
            remove_old_key,
            throttle_bytes: wish.throttle_bytes,
            keep_holes: wish.keep_holes,
        };
        let marked = with_mark(&description, &state)?;
        // Before anything is written: what is to be read later can be.
        Description::of_text(intent.description.clone(), path).map_err(first)?;
        Description::of_text(marked.clone(), path).map_err(first)?;
        let zone_bytes = wish.zone_bytes;
        Ok((Self { layout, identifier, intent, state, zone_bytes, new_key, marked }, admission))
    }

    /// Writes key, state and mark. From here on the volume is one that is being re-encrypted.
    pub(crate) fn write_down(&self, volume: &Path) -> Result<State, Failure> {
        if let Some((path, blob)) = &self.new_key {
            files::write_new(path, "wrapped key", blob.as_bytes())?;
        }
        let medium = self.make_state().inspect_err(|_| {
            if let Some((path, _)) = &self.new_key {
                let _ = files::remove(path, "the new key");
            }
        })?;
        files::replace(&Description::path_for(volume), "description", self.marked.as_bytes()).inspect_err(
            |_| {
                let _ = files::remove(&self.state, "state");
            },
        )?;
        Ok(medium)
    }

    fn make_state(&self) -> Result<State, Failure> {
        let what = || format!("cannot make {}", self.state.display());
        if files::exists(&self.state) {
            look(&self.state).map_err(|_not_ours| {
                Failure::new(
                    Code::Busy,
                    format!("{} exists already, and is no state of a re-encryption", self.state.display()),
                    "It was left alone. Move it away: the state is to lie there.",
                )
            })?;
            // Of an attempt that came to nothing: nothing of it had begun, as was looked at.
            files::remove(&self.state, "state")?;
        }
        let staged = Staged::beside(&self.state);
        let fail = |error: &_| Failure::of_file(what(), error);
        let len = State::medium_bytes(self.zone_bytes);
        inlinecrypt_io::backing::create_file(staged.temporary(), len).map_err(|error| fail(&error))?;
        let medium =
            FileBacking::open(staged.temporary(), OpenOptions::default()).map_err(|error| fail(&error))?;
        let plan = serde_json::to_vec(&self.intent).expect("strings and numbers");
        let state = State::create(Arc::new(medium), self.layout.size_bytes(), self.zone_bytes, &plan)
            .map_err(|error| fail(&error))?;
        staged.publish("state of the re-encryption")?;
        Ok(state)
    }
}

/// Opens and locks the state of a re-encryption that has begun.
fn open_state(path: &Path) -> Result<State, Failure> {
    let what = format!("state of a re-encryption {}", path.display());
    let medium: Arc<dyn Backing> = Arc::new(
        FileBacking::open(path, OpenOptions::default()).map_err(|error| Failure::of_file(&what, &error))?,
    );
    State::open(medium).map_err(|error| Failure::of_file(&what, &error).advise("Bring it back from a copy."))
}

/// The last steps: the volume is what it was to become, and says so.
pub(crate) fn settle(volume: &Path, state: &Path, intent: &Intent) -> Result<(), Failure> {
    if !is_described_as(volume, intent) {
        files::replace(&Description::path_for(volume), "description", intent.description.as_bytes())?;
    }
    if let Some(key) = &intent.remove_old_key {
        files::remove(key, "the old key")?;
    }
    // Last, since it knows what else is to be done.
    files::remove(state, "state of the re-encryption")
}

/// Whether all of `volume` is re-encrypted and described, and only what is of no use any more is left: the state, and
/// perhaps the old key.
pub(crate) fn has_remains(volume: &Path) -> bool {
    remains(volume).is_some()
}

fn remains(volume: &Path) -> Option<(PathBuf, Intent)> {
    let state = state_path(volume);
    let (facts, intent) = look(&state).ok()?;
    (facts.is_complete() && is_described_as(volume, &intent)).then_some((state, intent))
}

/// Removes what a kill at the very end left of a re-encryption. To be called by who has locked the volume.
pub(crate) fn settle_remains(volume: &Path) -> Result<(), Failure> {
    match remains(volume) {
        Some((state, intent)) => settle(volume, &state, &intent),
        None => Ok(()),
    }
}

pub(crate) fn under_way(label: &str) -> Failure {
    Failure::new(
        Code::Busy,
        format!("{label} is being re-encrypted already"),
        "To go on: inlinecrypt volume reencrypt --resume VOLUME. It takes another key once that is done.",
    )
}

/// Whether the new key's file is `old`, whatever it is called: through symbolic and hard links.
fn is_one_file(new: Option<&Path>, old: &Path) -> bool {
    let identity = |path: &Path| Medium::look(path).ok().map(|file| file.identity);
    let Some(new) = new else { return false };
    new == old || identity(new).is_some_and(|new| identity(old) == Some(new))
}

fn first(failures: Vec<Failure>) -> Failure {
    failures
        .into_iter()
        .next()
        .unwrap_or_else(|| Failure::new(Code::Wrong, "nothing is known", "Report this."))
}

/// The layout with what was asked for. A logical block that was the old mode's is not the new one's.
fn changed(planned: LayoutPlan, asked: &LayoutArgs) -> LayoutPlan {
    let LayoutArgs { mode, data_unit, block, iv_offset, iv, offset: _ } = *asked;
    let is_other = mode.is_some_and(|mode| mode != planned.mode)
        || data_unit.is_some_and(|data_unit| data_unit != planned.data_unit);
    LayoutPlan {
        mode: mode.unwrap_or(planned.mode),
        data_unit: data_unit.unwrap_or(planned.data_unit),
        block: block.or(planned.block.filter(|_| !is_other)),
        iv_offset: iv_offset.unwrap_or(planned.iv_offset),
        iv: iv.unwrap_or(planned.iv),
        ..planned
    }
}

/// The lines that a description begins with, which say what it is.
fn head(text: &str) -> String {
    text.lines().take_while(|line| line.starts_with('#')).map(|line| format!("{line}\n")).collect()
}

/// Changes the only `[[volume]]` of a description.
fn edited(
    description: &Description,
    edit: impl FnOnce(&mut toml::Table, &mut toml::Table),
) -> Result<String, Failure> {
    let strange = || {
        Failure::new(
            Code::File,
            format!("{} cannot be rewritten", description.path.display()),
            "Correct it: it has one [[volume]].",
        )
    };
    let mut table: toml::Table = description.text.parse().map_err(|_why| strange())?;
    let volumes = table.remove("volume");
    let Some(toml::Value::Array(mut volumes)) = volumes else { return Err(strange()) };
    let Some(toml::Value::Table(volume)) = volumes.first_mut() else { return Err(strange()) };
    edit(&mut table, volume);
    table.insert("volume".to_owned(), toml::Value::Array(volumes));
    Ok(format!("{}{table}", head(&description.text)))
}

/// How the description of `volume` names the state.
fn named_from(volume: &Path, state: &Path) -> String {
    let folder = |path: &Path| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        directory_of(&path).canonicalize().ok()
    };
    match state.file_name() {
        Some(name) if folder(volume) == folder(state) => name.to_string_lossy().into_owned(),
        _ => state.display().to_string(),
    }
}

fn with_mark(description: &Description, state: &Path) -> Result<String, Failure> {
    let name = named_from(&description.path, state);
    edited(description, |_, volume| {
        volume.insert("reencrypt".to_owned(), toml::Value::String(name));
    })
}

/// The description of the volume as it is to be: what it said before, but for key and layout.
fn described(
    description: &Description,
    path: &Path,
    layout: &Layout,
    planned: &LayoutPlan,
    identifier: Identifier,
    key: &KeySource,
    wish: &Wish,
) -> Result<String, Failure> {
    let key = key.described_from(directory_of(path)).and_then(|key| key.into_string().ok());
    let Some(key) = key else {
        return Err(Failure::new(
            Code::Wrong,
            "the new key is on standard input, and the description has to name a file",
            format!("Name it: inlinecrypt volume reencrypt --key FILE {}", shell_word(path)),
        ));
    };
    // Where it lies is as it was.
    let LayoutPlan { mode, data_unit, block: _, iv_offset, iv, offset: _, length: _ } = *planned;
    let number = |number: u64| toml::Value::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    edited(description, |table, volume| {
        let mut set = |name: &str, value: toml::Value| drop(volume.insert(name.to_owned(), value));
        set("key", toml::Value::String(key));
        set("key_id", toml::Value::String(identifier.to_string()));
        set("mode", toml::Value::String(mode.info().name.to_owned()));
        set("data_unit", number(data_unit.bytes().into()));
        set("block", number(layout.logical_block_bytes().into()));
        set("iv_offset", number(iv_offset));
        set("iv", toml::Value::String(iv.name().to_owned()));
        if let Some(EnginePlan { spec, root, .. }) = &wish.engine {
            let here = std::env::current_dir().unwrap_or_default();
            let root = root.clone().relative_to(&here);
            let engine =
                [("name", "default".to_owned()), ("spec", spec.to_string()), ("root", root.to_string())];
            let engine = engine.map(|(name, value)| (name.to_owned(), toml::Value::String(value)));
            let engines = vec![toml::Value::Table(engine.into_iter().collect())];
            table.insert("engine".to_owned(), toml::Value::Array(engines));
            volume.remove("engine");
        }
    })
}
