//! What is to be served: command line, config and descriptions put together, with every contradiction found.
//!
//! What a volume's description says about its layout and key cannot be overruled: the volume has no header, so a wrong
//! value would be noticed by nobody until the data is gone.

use crate::cli::{
    DiscardArg, EngineArgs, FallbackArg, KeyTypeArg, LayoutArgs, PolicyArg, PriorityArg, SandboxArg, Serve,
    TlsArg, TlsArgs, WORKERS_MAX,
};
use crate::config::{ConfigFile, EngineTable, ListenTable, ServerTable, VolumeTable};
use crate::engine_process::EngineHome;
use crate::files::{self, Medium};
use crate::host;
use crate::identifier::Identifier;
use crate::keyfile::{KeySource, Wanted};
use crate::luks::look::Luks;
use crate::luks::unlock::{LuksKey, Passphrase, PassphraseFile};
use crate::places::{self, beside, directory_of, relative_to};
use crate::plain::{self, PlainPlan};
use crate::reencrypt::{self, NextPlan};
use crate::report::{Code, Failure};
use crate::table::{self, TableTerms};
use inlinecrypt_core::admission::Hold;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::config::{DataUnitSize, Mode};
use inlinecrypt_core::keyslot::{Policy, Priority};
use inlinecrypt_core::volume::{Discard, IvLayout};
use inlinecrypt_engine::isolated::client::DEATHS_MAX;
use inlinecrypt_engine::isolated::realtime;
use inlinecrypt_engine::{EngineSpec, RootSpec, Sample};
use inlinecrypt_io::backing::Caching;
use inlinecrypt_io::listen::Listen;
use std::fmt::Display;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;

/// All that is to be served.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) engines: Vec<EnginePlan>,
    pub(crate) volumes: Vec<VolumePlan>,
    /// Those without encryption.
    pub(crate) plain: Vec<PlainPlan>,
    pub(crate) listen: ListenPlan,
    pub(crate) server: ServerPlan,
}

/// An engine to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EnginePlan {
    pub(crate) name: String,
    pub(crate) spec: EngineSpec,
    pub(crate) root: RootSpec,
    /// Whether it is opened even if no key needs it yet: one may come.
    pub(crate) wants_root: bool,
    /// What the root asks for, if it does.
    pub(crate) passphrase_file: Option<PathBuf>,
    pub(crate) key_type: KeyTypeArg,
    pub(crate) policy: Policy,
    /// In which process it runs; this one if nothing is said, for what only looks or makes keys.
    pub(crate) home: Option<EngineHome>,
    /// Whether not to run if its process cannot be locked up entirely.
    pub(crate) require_sandbox: bool,
    /// Whether its lanes have real-time priority; not to run if they may not.
    pub(crate) realtime: bool,
    /// How many ends of its process within a minute are too many.
    pub(crate) deaths_max: u32,
}

/// A volume to serve.
#[derive(Clone, Debug)]
pub(crate) struct VolumePlan {
    /// How messages call it: its path, and where it was asked for.
    pub(crate) label: String,
    /// The name of its export.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) key: KeySource,
    /// Which key it must be, if anything says so.
    pub(crate) key_id: Option<Identifier>,
    /// How long its file was when it was made, if anything says so.
    pub(crate) size: Option<u64>,
    /// What says which key it must be, and how long.
    pub(crate) said_by: String,
    /// Index in [`Plan::engines`].
    pub(crate) engine: usize,
    pub(crate) layout: LayoutPlan,
    /// The container that it is the data of, if it is one.
    pub(crate) luks: Option<Luks>,
    pub(crate) access: Access,
    pub(crate) fallback: FallbackArg,
    pub(crate) slots: SlotsPlan,
    pub(crate) discard: Discard,
    pub(crate) caching: Caching,
    /// What it is being re-encrypted to, if it is.
    pub(crate) next: Option<Box<NextPlan>>,
    /// Whether a config or the command line names its key or layout, besides its description.
    pub(crate) is_named_twice: bool,
}

/// What a volume's key gets of the engine's keyslots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotsPlan {
    pub(crate) priority: Priority,
    pub(crate) hold: Hold,
    pub(crate) preprogram: bool,
    pub(crate) spill_after_ns: Option<u64>,
}

/// How a volume lies on its backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayoutPlan {
    pub(crate) mode: Mode,
    pub(crate) data_unit: DataUnitSize,
    pub(crate) block: Option<u32>,
    pub(crate) iv_offset: u64,
    pub(crate) iv: IvLayout,
    /// Where it begins, in bytes.
    pub(crate) offset: u64,
    /// Its length in bytes; to the end, if nothing says it.
    pub(crate) length: Option<u64>,
}

/// Where clients come in.
#[derive(Clone, Debug)]
pub(crate) struct ListenPlan {
    pub(crate) places: Vec<Listen>,
    /// Whether anybody named them. If not, sockets handed over by the service manager replace them.
    pub(crate) asked_for: bool,
    pub(crate) tls: TlsPlan,
}

/// Whether and how TLS is used.
#[derive(Clone, Debug)]
pub(crate) struct TlsPlan {
    pub(crate) when: TlsArg,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    pub(crate) client_ca: Option<PathBuf>,
    pub(crate) verify_client: bool,
}

/// How the server behaves.
#[derive(Clone, Debug)]
pub(crate) struct ServerPlan {
    pub(crate) control: ControlPlan,
    /// `None`: as suits each volume.
    pub(crate) workers: Option<usize>,
    pub(crate) connections_max: Option<usize>,
    pub(crate) stop_time_max: Duration,
    pub(crate) zero_copy: bool,
}

/// Where `status` finds the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ControlPlan {
    /// In the usual directory.
    Default,
    /// Here.
    At(PathBuf),
    /// Nowhere.
    None,
}

impl ControlPlan {
    fn parse(path: PathBuf) -> Self {
        if path.as_os_str() == "none" { Self::None } else { Self::At(path) }
    }
}

/// How long clients get to finish when the server stops.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// What somebody said about a volume; what nobody says has a default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) name: Option<String>,
    pub(crate) key: Option<KeySource>,
    pub(crate) key_id: Option<Identifier>,
    pub(crate) size: Option<u64>,
    pub(crate) mode: Option<Mode>,
    pub(crate) data_unit: Option<DataUnitSize>,
    pub(crate) block: Option<u32>,
    pub(crate) iv_offset: Option<u64>,
    pub(crate) iv: Option<IvLayout>,
    pub(crate) offset: Option<u64>,
    pub(crate) length: Option<u64>,
    /// What the line of a dm table says of its key, if one was given.
    pub(crate) table: Option<TableTerms>,
    pub(crate) read_only: Option<bool>,
    pub(crate) fallback: Option<FallbackArg>,
    pub(crate) discard: Option<DiscardArg>,
    pub(crate) direct: Option<bool>,
    pub(crate) priority: Option<PriorityArg>,
    pub(crate) pin: Option<bool>,
    pub(crate) preprogram: Option<bool>,
    pub(crate) spill_after_us: Option<u64>,
    pub(crate) luks: LuksSettings,
    /// The state of its re-encryption, while that is under way.
    pub(crate) reencrypt: Option<PathBuf>,
    /// Whether it is not encrypted at all.
    pub(crate) plain: Option<bool>,
}

/// What somebody said about a LUKS container.
#[derive(Clone, Debug, Default)]
pub(crate) struct LuksSettings {
    /// Where its header is, if not with its data.
    pub(crate) header: Option<PathBuf>,
    /// What its passphrase is read from.
    pub(crate) passphrase: Option<PassphraseFile>,
    /// Whether to open it by a passphrase though there is a wrapped key in it.
    pub(crate) recover: bool,
}

impl LuksSettings {
    fn from_table(table: &VolumeTable, base: &Path) -> Result<Self, String> {
        let path = |text: &Option<String>| text.as_ref().map(|text| relative_to(base, Path::new(text)));
        let passphrase = match (path(&table.passphrase_file), path(&table.key_file)) {
            (Some(_), Some(_)) => return Err("passphrase_file and key_file: only one of them".to_owned()),
            (Some(path), None) => Some(PassphraseFile { path, whole: false }),
            (None, Some(path)) => Some(PassphraseFile { path, whole: true }),
            (None, None) => None,
        };
        Ok(Self { header: path(&table.header), passphrase, recover: table.recover == Some(true) })
    }

    fn over(self, described: &Self) -> Self {
        Self {
            header: self.header.or_else(|| described.header.clone()),
            passphrase: self.passphrase.or_else(|| described.passphrase.clone()),
            recover: self.recover || described.recover,
        }
    }
}

impl Settings {
    pub(crate) fn with_layout(layout: &LayoutArgs) -> Self {
        let LayoutArgs { mode, data_unit, block, iv_offset, iv, offset } = *layout;
        Self { mode, data_unit, block, iv_offset, iv, offset, ..Self::default() }
    }

    fn from_table(table: &VolumeTable, base: &Path) -> Result<Self, Vec<String>> {
        /// Tells what is wrong, and goes on.
        fn parsed<T, E: Display>(
            whys: &mut Vec<String>,
            what: &str,
            value: Option<Result<T, E>>,
        ) -> Option<T> {
            value.transpose().unwrap_or_else(|error| {
                whys.push(format!("{what}: {error}"));
                None
            })
        }
        let mut whys = Vec::new();
        let block = table.block.map(|bytes| {
            let fits = bytes.is_power_of_two() && (512..=65_536).contains(&bytes);
            if fits { Ok(bytes) } else { Err(format!("{bytes} is no power of two from 512 to 65536")) }
        });
        let asked = Self {
            name: table.name.clone(),
            key: parsed(&mut whys, "key", table.key.as_ref().map(|key| KeySource::parse(key.as_ref(), base))),
            key_id: parsed(&mut whys, "key_id", table.key_id.as_ref().map(|id| id.parse())),
            size: table.size,
            mode: parsed(&mut whys, "mode", table.mode.as_deref().map(crate::cli::parse_mode)),
            data_unit: parsed(
                &mut whys,
                "data_unit",
                table.data_unit.map(|bytes| crate::cli::data_unit(bytes.into())),
            ),
            block: parsed(&mut whys, "block", block),
            iv_offset: table.iv_offset,
            iv: parsed(&mut whys, "iv", table.iv.as_deref().map(crate::cli::parse_iv)),
            offset: parsed(&mut whys, "offset", table.offset.map(crate::cli::offset)),
            length: table.length,
            table: None,
            read_only: table.read_only,
            fallback: parsed(&mut whys, "fallback", table.fallback.as_deref().map(choice)),
            discard: parsed(&mut whys, "discard", table.discard.as_deref().map(choice)),
            direct: table.direct,
            priority: parsed(&mut whys, "priority", table.priority.as_deref().map(choice)),
            pin: table.pin,
            preprogram: table.preprogram,
            spill_after_us: table.spill_after_us,
            reencrypt: table.reencrypt.as_ref().map(|path| relative_to(base, Path::new(path))),
            plain: table.plain,
            luks: LuksSettings::from_table(table, base).unwrap_or_else(|why| {
                whys.push(why);
                LuksSettings::default()
            }),
        };
        if asked.is_plain() {
            let (dm_table, engine) =
                (table.dm_table.as_ref().map(|_| "dm_table"), table.engine.as_ref().map(|_| "engine"));
            let said = asked.of_encryption().chain(dm_table).chain(engine);
            whys.extend(said.map(plain::contradiction));
        }
        if !whys.is_empty() {
            return Err(whys);
        }
        match &table.dm_table {
            None => Ok(asked),
            Some(line) => {
                let found = table::in_config(line, base).map_err(|why| vec![why])?;
                asked.over(&found.settings).map_err(|conflict| vec![format!("dm_table says {conflict}")])
            }
        }
    }

    /// Decides what the mode is, where a table's cipher may be several: the key's length tells.
    pub(crate) fn settle_mode(&mut self, key: &KeySource) -> Result<(), Failure> {
        match (&self.table, self.mode) {
            (None, _) => {}
            (Some(terms), Some(mode)) => terms.check_mode(mode)?,
            (Some(terms), None) => self.mode = terms.mode_by(key)?,
        }
        Ok(())
    }

    /// These, and what they leave open from the description. `Err` names what both say, and differently.
    fn over(self, described: &Self) -> Result<Self, String> {
        let mut conflicts = Vec::new();
        let mut conflict = |what: &str, ours: Option<String>, theirs: Option<String>| {
            if let (Some(ours), Some(theirs)) = (ours, theirs)
                && ours != theirs
            {
                conflicts.push(format!("{what} = {theirs}, and {ours} is asked for"));
            }
        };
        fn text<T: ToString>(value: Option<T>) -> Option<String> {
            value.map(|value| value.to_string())
        }
        conflict("mode", text(self.mode), text(described.mode));
        conflict("data_unit", text(self.data_unit), text(described.data_unit));
        conflict("iv_offset", text(self.iv_offset), text(described.iv_offset));
        conflict("iv", text(self.iv), text(described.iv));
        conflict("offset", text(self.offset), text(described.offset));
        conflict("length", text(self.length), text(described.length));
        conflict("key_id", text(self.key_id), text(described.key_id));
        conflict("size", text(self.size), text(described.size));
        conflict("plain", text(self.plain), text(described.plain));
        if !conflicts.is_empty() {
            return Err(conflicts.join("; "));
        }
        Ok(Self {
            name: self.name.or_else(|| described.name.clone()),
            key: self.key.or_else(|| described.key.clone()),
            key_id: self.key_id.or(described.key_id),
            size: self.size.or(described.size),
            mode: self.mode.or(described.mode),
            data_unit: self.data_unit.or(described.data_unit),
            block: self.block.or(described.block),
            iv_offset: self.iv_offset.or(described.iv_offset),
            iv: self.iv.or(described.iv),
            offset: self.offset.or(described.offset),
            length: self.length.or(described.length),
            table: self.table.or_else(|| described.table.clone()),
            read_only: self.read_only.or(described.read_only),
            fallback: self.fallback.or(described.fallback),
            discard: self.discard.or(described.discard),
            direct: self.direct.or(described.direct),
            priority: self.priority.or(described.priority),
            pin: self.pin.or(described.pin),
            preprogram: self.preprogram.or(described.preprogram),
            spill_after_us: self.spill_after_us.or(described.spill_after_us),
            luks: self.luks.over(&described.luks),
            reencrypt: self.reencrypt.or_else(|| described.reencrypt.clone()),
            plain: self.plain.or(described.plain),
        })
    }

    /// Whether it is to be served without encryption.
    pub(crate) fn is_plain(&self) -> bool {
        self.plain == Some(true)
    }

    /// Whether it says anything that a re-encryption changes.
    fn names_key_or_layout(&self) -> bool {
        let Self { key, key_id, mode, data_unit, iv_offset, .. } = self;
        key.is_some() || key_id.is_some() || mode.is_some() || data_unit.is_some() || iv_offset.is_some()
    }

    pub(crate) fn access(&self) -> Access {
        if self.read_only == Some(true) { Access::ReadOnly } else { Access::ReadWrite }
    }

    pub(crate) fn discard(&self) -> Discard {
        match self.discard {
            Some(DiscardArg::Off) => Discard::Off,
            Some(DiscardArg::Pass) | None => Discard::Pass,
        }
    }

    pub(crate) fn caching(&self) -> Caching {
        if self.direct == Some(true) { Caching::Direct } else { Caching::PageCache }
    }

    fn slots(&self) -> SlotsPlan {
        SlotsPlan {
            priority: match self.priority {
                Some(PriorityArg::Low) => Priority::Low,
                Some(PriorityArg::High) => Priority::High,
                Some(PriorityArg::Normal) | None => Priority::Normal,
            },
            hold: if self.pin == Some(true) { Hold::Pin } else { Hold::Register },
            preprogram: self.preprogram == Some(true),
            spill_after_ns: self.spill_after_us.map(|us| us.saturating_mul(1000)),
        }
    }

    pub(crate) fn layout(&self) -> LayoutPlan {
        LayoutPlan {
            mode: self.mode.unwrap_or(Mode::Aes256Xts),
            data_unit: self.data_unit.unwrap_or(DataUnitSize::DEFAULT),
            block: self.block,
            iv_offset: self.iv_offset.unwrap_or(0),
            iv: self.iv.unwrap_or_default(),
            offset: self.offset.unwrap_or(0),
            length: self.length,
        }
    }
}

/// A word that the command line takes, too.
fn choice<T: clap::ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_why| {
        let known: Vec<_> = T::value_variants()
            .iter()
            .filter_map(|value| Some(value.to_possible_value()?.get_name().to_owned()))
            .collect();
        format!("{text:?} is none of: {}", known.join(", "))
    })
}

/// What lies beside a volume and says how to read it.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) path: PathBuf,
    pub(crate) settings: Settings,
    pub(crate) engine: Option<EnginePlan>,
    /// As it is written.
    pub(crate) text: String,
}

impl Description {
    /// Where the description of `volume` is, if it has one.
    pub(crate) fn path_for(volume: &Path) -> PathBuf {
        beside(volume, ".toml")
    }

    /// The description of `volume`, if there is one.
    pub(crate) fn find(volume: &Path) -> Result<Option<Self>, Vec<Failure>> {
        let path = Self::path_for(volume);
        if !files::exists(&path) {
            return Ok(None);
        }
        Self::of(&ConfigFile::read(&path)?, volume).map(Some)
    }

    /// What `text` says about `volume`, if it were its description.
    pub(crate) fn of_text(text: String, volume: &Path) -> Result<Self, Vec<Failure>> {
        Self::of(&ConfigFile::of_text(text, &Self::path_for(volume))?, volume)
    }

    fn of(file: &ConfigFile, volume: &Path) -> Result<Self, Vec<Failure>> {
        let path = file.path.clone();
        let name = volume.file_name();
        let base = directory_of(&path);
        let describes =
            |table: &VolumeTable| volume_path(table, base).is_ok_and(|path| path.file_name() == name);
        let [table] = &file.config.volume[..] else {
            return Err(vec![Self::strange(&path, volume, "it has not exactly one [[volume]]")]);
        };
        if !describes(table.get_ref()) {
            return Err(vec![Self::strange(&path, volume, "its path is that of another volume")]);
        }
        let place = file.place(table);
        let mut settings = Settings::from_table(table.get_ref(), base)
            .map_err(|whys| whys.iter().map(|why| wrong(&place, why)).collect::<Vec<_>>())?;
        if settings.mode.is_some() && settings.data_unit.is_some() && settings.iv_offset.is_some() {
            // It says all about the layout, so what it leaves out is as usual and cannot be overruled either.
            settings.iv.get_or_insert_default();
            settings.offset.get_or_insert_default();
        }
        let mut failures = Vec::new();
        let engine = match &file.config.engine[..] {
            [] => None,
            [engine, ..] => engine_plan(file, engine, base, &mut failures),
        };
        let text = file.text().to_owned();
        if failures.is_empty() { Ok(Self { path, settings, engine, text }) } else { Err(failures) }
    }

    /// Refuses another description, beside the file that `volume` leads to, that says something else of key or layout:
    /// one of the two is out of date.
    fn check_itself(&self, volume: &Path) -> Result<(), Vec<Failure>> {
        let itself = files::itself(volume);
        let path = Self::path_for(&itself);
        let is_same = path.canonicalize().ok() == self.path.canonicalize().ok();
        if is_same || !files::exists(&path) {
            return Ok(());
        }
        let Ok(Some(other)) = Self::find(&itself) else { return Ok(()) };
        fn differ<T: PartialEq>(ours: &Option<T>, theirs: &Option<T>) -> bool {
            ours.is_some() && theirs.is_some() && ours != theirs
        }
        let (ours, theirs) = (&self.settings, &other.settings);
        let differ = differ(&ours.key_id, &theirs.key_id)
            || differ(&ours.mode, &theirs.mode)
            || differ(&ours.data_unit, &theirs.data_unit)
            || differ(&ours.iv_offset, &theirs.iv_offset)
            || differ(&ours.iv, &theirs.iv)
            || differ(&ours.offset, &theirs.offset);
        if !differ {
            return Ok(());
        }
        Err(vec![Failure::new(
            Code::Refused,
            format!(
                "{} leads to {}, and their descriptions say different things of key or layout",
                volume.display(),
                itself.display()
            ),
            format!(
                "Move away the one that is out of date, {} or {}: the one that a re-encryption did not change, if there \
                 was one.",
                self.path.display(),
                path.display()
            ),
        )])
    }

    /// Refuses an engine that derives other inline encryption keys from a wrapped key than the one that is described: the
    /// key's identifier does not always tell. A description that says which key it is, and no engine, means what is usual.
    fn check_kdf(&self, asked: &EngineSpec) -> Result<(), Failure> {
        let described = match (&self.engine, self.settings.key_id) {
            (Some(engine), _) => engine.spec,
            (None, Some(_)) => EngineSpec::default(),
            (None, None) => return Ok(()),
        };
        if described.kdf() == asked.kdf() {
            return Ok(());
        }
        Err(Failure::new(
            Code::Wrong,
            format!(
                "its description {} says {}engine {described}, which derives keys by {}, and engine {asked} derives them \
                 by {}",
                self.path.display(),
                if self.engine.is_some() { "" } else { "by leaving it out " },
                described.kdf(),
                asked.kdf()
            ),
            format!(
                "Leave the engine out, or add the option: kdf={}. With another derivation reads give noise and writes \
                 destroy data.",
                described.kdf()
            ),
        ))
    }

    fn strange(path: &Path, volume: &Path, why: &str) -> Failure {
        Failure::new(
            Code::File,
            format!("{} is not the description of {}: {why}", path.display(), volume.display()),
            "Correct it, or move it away and say everything with options.",
        )
    }
}

/// Where the volume of a `[[volume]]` is: as its `path` says, else its `dm_table`.
fn volume_path(table: &VolumeTable, base: &Path) -> Result<PathBuf, String> {
    match (&table.path, &table.dm_table) {
        (Some(path), _) => Ok(relative_to(base, Path::new(path))),
        (None, Some(line)) => Ok(table::in_config(line, base)?.path),
        (None, None) => Err("[[volume]] has no path".to_owned()),
    }
}

/// A value in a config that cannot be.
fn wrong(place: &str, why: &str) -> Failure {
    Failure::new(
        Code::Wrong,
        format!("{place}: {why}"),
        "Correct the line. `inlinecrypt serve --help` shows a config.",
    )
}

/// The engine that command-line options ask for.
pub(crate) fn engine_from(args: &EngineArgs) -> Result<EnginePlan, Failure> {
    let root = match &args.root {
        Some(root) => root.clone(),
        None => places::default_root()?,
    };
    let key_type = args.key_type.unwrap_or_default();
    Ok(EnginePlan {
        name: "default".to_owned(),
        spec: args.engine.unwrap_or_default(),
        root,
        wants_root: args.root.is_some(),
        passphrase_file: None,
        key_type,
        policy: Policy::default(),
        home: None,
        require_sandbox: false,
        realtime: false,
        deaths_max: DEATHS_MAX,
    })
}

fn engine_plan(
    file: &ConfigFile,
    table: &Spanned<EngineTable>,
    base: &Path,
    failures: &mut Vec<Failure>,
) -> Option<EnginePlan> {
    let place = file.place(table);
    let EngineTable {
        name,
        spec,
        root,
        passphrase_file,
        key_type,
        policy,
        program_share,
        process,
        sandbox,
        realtime,
        deaths_max,
    } = table.get_ref();
    let deaths_max = match deaths_max.unwrap_or(DEATHS_MAX) {
        0 => Err(
            "deaths_max = 0: how many ends of the engine process within a minute are too many, at least 1",
        ),
        some => Ok(some),
    };
    let home = process.as_deref().map(str::parse::<EngineHome>).transpose();
    let sandbox = sandbox.as_deref().map_or(Ok(SandboxArg::Report), choice);
    let policy = policy_from(policy.as_deref(), *program_share);
    let key_type = key_type.as_deref().map_or(Ok(KeyTypeArg::First), choice);
    let spec = spec.as_deref().map_or(Ok(EngineSpec::default()), str::parse);
    let root = match root.as_deref().map(str::parse::<RootSpec>) {
        None => places::default_root(),
        Some(Ok(root)) => Ok(root.relative_to(base)),
        Some(Err(error)) => Err(Failure::of("root", &error)),
    };
    match (spec, root, key_type, policy, home, sandbox, deaths_max) {
        (Ok(spec), Ok(root), Ok(key_type), Ok(policy), Ok(home), Ok(sandbox), Ok(deaths_max)) => {
            let passphrase_file = passphrase_file.as_ref().map(|path| relative_to(base, Path::new(path)));
            let home = home.map(|home| home.relative_to(base));
            let require_sandbox = sandbox == SandboxArg::Require;
            let realtime = realtime.unwrap_or(false);
            let name = name.clone();
            Some(EnginePlan {
                name,
                spec,
                root,
                wants_root: false,
                passphrase_file,
                key_type,
                policy,
                home,
                require_sandbox,
                realtime,
                deaths_max,
            })
        }
        (spec, root, key_type, policy, home, sandbox, deaths_max) => {
            failures.extend(deaths_max.err().map(|why| wrong(&place, why)));
            failures.extend(home.err().map(|why| wrong(&place, &format!("process: {why}"))));
            failures.extend(sandbox.err().map(|why| wrong(&place, &format!("sandbox: {why}"))));
            failures.extend(policy.err().map(|why| wrong(&place, &why)));
            failures.extend(key_type.err().map(|why| wrong(&place, &format!("key_type: {why}"))));
            failures.extend(spec.err().map(|error| Failure::of(format!("{place}: spec"), &error)));
            failures.extend(root.err().map(|failure| failure.within(&place)));
            None
        }
    }
}

/// Whether an engine that shall work at real-time priority can, if this process starts it. What an engine service may do shows when
/// it is asked.
pub(crate) fn check_realtime(engine: &EnginePlan) -> Result<(), Failure> {
    check_realtime_home(engine)?;
    match &engine.home {
        Some(EngineHome::Own) | None if engine.realtime => {
            let what = format!("engine {}", engine.name);
            realtime::check_permitted().map_err(|error| Failure::of(what, &error))
        }
        _ => Ok(()),
    }
}

/// Whether an engine that shall work at real-time priority is one that can, whoever starts it.
pub(crate) fn check_realtime_home(engine: &EnginePlan) -> Result<(), Failure> {
    let what = format!("engine {}", engine.name);
    match &engine.home {
        Some(EngineHome::None) if engine.realtime => Err(Failure::new(
            Code::Wrong,
            format!(
                "{what}: real-time priority is for a process of its own, and it is to run in the serving one"
            ),
            "Leave out --engine-process none (process in a config), or --engine-realtime (realtime).",
        )),
        _ => Ok(()),
    }
}

/// How an engine's keyslots are shared.
fn policy_from(policy: Option<&str>, program_share: Option<u8>) -> Result<Policy, String> {
    let mut chosen = match policy.map(choice).transpose().map_err(|why| format!("policy: {why}"))? {
        Some(PolicyArg::Upstream) => Policy::UPSTREAM,
        Some(PolicyArg::Fair) | None => Policy::default(),
    };
    match program_share {
        None => {}
        Some(percent @ 1..=100) => chosen.program_share_percent = percent,
        Some(other) => return Err(format!("program_share = {other}: a percentage from 1 to 100")),
    }
    Ok(chosen)
}

/// A plan under construction.
#[derive(Debug, Default)]
struct Builder {
    engines: Vec<EnginePlan>,
    volumes: Vec<VolumePlan>,
    plain: Vec<PlainPlan>,
    failures: Vec<Failure>,
    /// Whether there is one volume, whose key its description names.
    is_of_one: bool,
}

impl Builder {
    /// The index of an engine that is the same but for its name, which is added if there is none.
    fn engine(&mut self, engine: EnginePlan) -> usize {
        let same = |other: &EnginePlan| {
            (&other.spec, &other.root, other.key_type, other.policy)
                == (&engine.spec, &engine.root, engine.key_type, engine.policy)
        };
        self.engines.iter().position(same).unwrap_or_else(|| {
            let mut engine = engine;
            if self.engines.iter().any(|other| other.name == engine.name) {
                engine.name = format!("{}-{}", engine.name, self.engines.len() + 1);
            }
            self.engines.push(engine);
            self.engines.len() - 1
        })
    }

    /// Adds a volume with what is asked for and what its description says.
    fn volume(&mut self, label: String, path: &Path, asked: Settings, engine: Option<usize>) {
        let found = Description::find(path).and_then(|found| match found {
            Some(found) => found.check_itself(path).map(|()| Some(found)),
            None => Ok(None),
        });
        let description = match found {
            Ok(description) => description,
            Err(failures) => {
                self.failures.extend(failures.into_iter().map(|failure| failure.within(&label)));
                return;
            }
        };
        let is_described = description.as_ref().is_some_and(|description| description.settings.is_plain());
        if asked.is_plain() && !is_described {
            match plain::refuse_encrypted(path, &asked, description.as_ref(), &label) {
                Ok(()) => self.plain.push(PlainPlan::new(label, path, &asked, "the config".to_owned())),
                Err(failure) => self.failures.push(failure),
            }
            return;
        }
        let is_named_twice = description.is_some() && asked.names_key_or_layout();
        // Where both say something, they say the same.
        let said_by = match &description {
            Some(description) => description.path.display().to_string(),
            None => "the config".to_owned(),
        };
        let mut settings = match &description {
            None => asked,
            Some(description) => match asked.over(&description.settings) {
                Ok(settings) => settings,
                Err(conflict) => {
                    self.failures.push(Failure::new(
                        Code::Wrong,
                        format!("{label}: its description {} says {conflict}", description.path.display()),
                        "Leave that option out. If the description is wrong, correct it; with wrong values reads give \
                         noise and writes destroy data.",
                    ));
                    return;
                }
            },
        };
        if settings.is_plain() {
            match settings.of_encryption().next() {
                None => self.plain.push(PlainPlan::new(label, path, &settings, said_by)),
                Some(name) => self.failures.push(Failure::new(
                    Code::Wrong,
                    format!("{label}: {}", plain::contradiction(name)),
                    format!("Leave that option out, or correct {said_by}."),
                )),
            }
            return;
        }
        let luks = match find_luks(path, &settings, description.is_some(), &label) {
            Ok(luks) => luks,
            Err(failure) => return self.failures.push(failure),
        };
        let engine = match (engine, description.as_ref().and_then(|description| description.engine.clone())) {
            (Some(engine), _) => engine,
            (None, Some(described)) => self.engine(described),
            (None, None) => match engine_from(&EngineArgs::default()) {
                Ok(default) => self.engine(default),
                Err(failure) => return self.failures.push(failure),
            },
        };
        if let Some(wrapped) = luks.as_ref().and_then(|luks| luks.wrapped.as_ref())
            && !settings.luks.recover
            && let Err(failure) = wrapped.check_engine(&self.engines[engine].spec)
        {
            return self.failures.push(failure.within(&label));
        }
        let sibling = beside(path, ".key");
        let key = match &settings.key {
            _ if luks.is_some() => {
                let Luks { header, wrapped, which, .. } = luks.as_ref().expect("it is one");
                match wrapped {
                    Some(wrapped) if !settings.luks.recover => KeySource::token(header.clone(), wrapped),
                    _ => KeySource::luks(LuksKey {
                        header: header.clone(),
                        passphrase: Passphrase::NotAsked(settings.luks.passphrase.clone()),
                        which: which.clone(),
                    }),
                }
            }
            Some(key) => key.clone(),
            None if files::exists(&sibling) => KeySource::wrapped(sibling),
            // That the volume itself is missing is the more useful message.
            None if !files::exists(path) => KeySource::wrapped(sibling),
            None => {
                // What is no volume needs no key.
                let looked = Medium::look(path)
                    .map_err(|failure| host::relabel(failure, path, &label))
                    .and_then(|medium| {
                        host::check_size(settings.size, &said_by, &medium, &label)?;
                        host::layout(&settings.layout(), medium.len_bytes, &label)
                    });
                if let Err(failure) = looked {
                    return self.failures.push(failure);
                }
                self.failures.push(Failure::new(
                    Code::File,
                    format!("{label} has no key: none is named, and {} does not exist", sibling.display()),
                    match self.is_of_one {
                        true => {
                            "Write a description that names it; if this is the data of a LUKS container, name its header with \
                             --header."
                        }
                        false => "Name it with --key FILE (wrapped) or --key raw:FILE.",
                    },
                ));
                return;
            }
        };
        if let Err(failure) = settings.settle_mode(&key) {
            return self.failures.push(failure.within(&label));
        }
        if let Some(failure) = settings.table.as_ref().and_then(|terms| terms.refuse_key(&key)) {
            return self.failures.push(failure.within(&label));
        }
        if luks.is_none()
            && key.wanted == Wanted::Wrapped
            && let Some(description) = &description
            && let Err(failure) = description.check_kdf(&self.engines[engine].spec)
        {
            return self.failures.push(failure.within(&label));
        }
        // A header says what a description would.
        let (said_by, layout, key_id) = match &luks {
            Some(Luks { header, layout, wrapped, .. }) => {
                let wrapped = wrapped.as_ref().filter(|_| !settings.luks.recover);
                let block = settings.block.or(layout.block);
                let key_id = wrapped.map(|wrapped| wrapped.key_id).or(settings.key_id);
                (header.display().to_string(), LayoutPlan { block, ..*layout }, key_id)
            }
            None => (said_by, settings.layout(), settings.key_id),
        };
        let next = match reencrypt::next_plan(path, settings.reencrypt.as_deref(), luks.as_ref(), &label) {
            Ok(None) => None,
            Ok(Some((mut next, described))) => {
                next.engine = described.map_or(engine, |described| self.engine(described));
                Some(Box::new(next))
            }
            Err(failures) => return self.failures.extend(failures),
        };
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        self.volumes.push(VolumePlan {
            name: settings.name.clone().unwrap_or(stem),
            path: path.to_owned(),
            key,
            key_id,
            size: settings.size,
            said_by,
            engine,
            layout,
            luks,
            access: settings.access(),
            fallback: settings.fallback.unwrap_or(FallbackArg::Off),
            slots: settings.slots(),
            discard: settings.discard(),
            caching: settings.caching(),
            next,
            is_named_twice,
            label,
        });
    }

    /// Exports whose names no client could ask for.
    fn check_names(&mut self) {
        let wrong: Vec<Failure> =
            self.all().filter_map(|Named { label, name, .. }| check_name(name, label)).collect();
        self.failures.extend(wrong);
    }

    /// All that is to be served, encrypted or not.
    fn all(&self) -> impl Iterator<Item = Named<'_>> {
        let encrypted =
            self.volumes.iter().map(|VolumePlan { label, name, path, .. }| Named { label, name, path });
        let plain = self.plain.iter().map(|PlainPlan { label, name, path, .. }| Named { label, name, path });
        encrypted.chain(plain)
    }

    /// What cannot be seen in one volume alone.
    fn compare_volumes(&mut self) {
        let mut failures = Vec::new();
        let all: Vec<Named<'_>> = self.all().collect();
        for (i, volume) in all.iter().enumerate() {
            let earlier = &all[..i];
            if let Some(other) = earlier.iter().find(|other| other.name == volume.name) {
                failures.push(Failure::new(
                    Code::Wrong,
                    format!("{} and {} would both be export {:?}", other.label, volume.label, volume.name),
                    "Give them names in a config: [[volume]] name = \"...\"",
                ));
            }
            let identity = |volume: &Named<'_>| Medium::look(volume.path).ok().map(|medium| medium.identity);
            let Some(this) = identity(volume) else { continue };
            if let Some(other) = earlier.iter().find(|other| identity(other) == Some(this)) {
                failures.push(Failure::new(
                    Code::Wrong,
                    format!("{} and {} are one file", other.label, volume.label),
                    "Serve it once; any number of clients may connect to one export.",
                ));
            }
        }
        self.failures.extend(failures);
    }
}

/// What volumes of every kind have.
struct Named<'b> {
    label: &'b str,
    name: &'b str,
    path: &'b Path,
}

/// The LUKS container at `path`, if it is one.
fn find_luks(
    path: &Path,
    settings: &Settings,
    is_described: bool,
    label: &str,
) -> Result<Option<Luks>, Failure> {
    if settings.table.is_some() || settings.offset.is_some_and(|offset| offset > 0) {
        // Somebody says where in it the data lies, as for a container that dm-crypt has open.
        return Ok(None);
    }
    // What has lost its first header is not taken for LUKS where somebody says that it is something else.
    let surely = !is_described && settings.key.is_none();
    let detached = settings.luks.header.as_deref();
    let found = Luks::look(path, detached, surely, is_described)
        .map_err(|failure| host::relabel(failure, path, label))?;
    let Some(luks) = found else {
        if settings.luks.recover || settings.luks.passphrase.is_some() {
            return Err(Failure::new(
                Code::Wrong,
                format!("{label} is no LUKS container, and what is said about it is for these"),
                "Leave out recover, passphrase_file and key_file, or name the right file.",
            ));
        }
        return Ok(None);
    };
    let said = [
        ("key", settings.key.is_some()),
        ("mode", settings.mode.is_some_and(|mode| mode != luks.layout.mode)),
        ("data unit", settings.data_unit.is_some_and(|unit| unit != luks.layout.data_unit)),
        ("IV offset", settings.iv_offset.is_some_and(|offset| offset != luks.layout.iv_offset)),
        ("IV layout", settings.iv.is_some_and(|iv| iv != luks.layout.iv)),
        ("length", settings.length.is_some() && settings.length != luks.layout.length),
    ];
    if let Some((what, _)) = said.iter().find(|(_, said)| *said) {
        return Err(Failure::new(
            Code::Wrong,
            format!("{label} is a LUKS{} container, whose header says what its {what} is", luks.version),
            "Leave that option out.",
        ));
    }
    Ok(Some(luks))
}

/// Longest string of the NBD protocol in bytes, and so the longest name of an export.
const EXPORT_NAME_BYTES_MAX: usize = 4096;

/// Why no client could ask for the export `name`.
pub(crate) fn check_name(name: &str, label: &str) -> Option<Failure> {
    let why = if name.len() > EXPORT_NAME_BYTES_MAX {
        format!("is {} bytes long, and the protocol takes {EXPORT_NAME_BYTES_MAX} at most", name.len())
    } else if name.contains('\0') {
        "has a NUL in it, and the protocol takes none".to_owned()
    } else {
        return None;
    };
    Some(Failure::new(
        Code::Wrong,
        format!("{label}: the name of its export {why}"),
        "Choose another with --name, or name = \"...\" in the config.",
    ))
}

/// Longest path of a Unix socket in bytes: `sun_path` of `unix(7)`, without the closing NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why nothing can listen there, as far as can be seen without trying.
pub(crate) fn check_place(place: &Listen) -> Option<Failure> {
    let Listen::Unix(path) = place else { return None };
    let refused = |why: String, advice: String| {
        Some(Failure::new(Code::File, format!("cannot listen on {place}: {why}"), advice))
    };
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_BYTES_MAX {
        return refused(
            format!("the path is {len} bytes long, and the system takes {SOCKET_PATH_BYTES_MAX} at most"),
            "Name a shorter one: --nbd unix:/short/path (nbd = [\"unix:/short/path\"] in a config)."
                .to_owned(),
        );
    }
    if let Ok(found) = path.symlink_metadata()
        && !found.file_type().is_socket()
    {
        return refused(
            "something else has that name, which is no socket".to_owned(),
            "It was left alone. Name another place with --nbd, or move it away.".to_owned(),
        );
    }
    let directory = match directory_of(path) {
        none if none.as_os_str().is_empty() => Path::new("."),
        directory => directory,
    };
    if !directory.is_dir() {
        return refused(
            format!("{} is not a directory", directory.display()),
            format!("Make it first: mkdir -p {}", files::shell_word(directory)),
        );
    }
    None
}

impl Plan {
    /// What `serve` is asked for.
    pub(crate) fn for_serve(args: &Serve) -> Result<Self, Vec<Failure>> {
        let mut plan = match &args.config {
            Some(path) => Self::for_config(path)?,
            None => Self::for_volumes(args)?,
        };
        let mut failures = Vec::new();
        if let Some(sample) = args.verify {
            failures.extend(plan.verify(sample).err());
        }
        if !args.nbd.is_empty() {
            plan.listen.places = args.nbd.clone();
            plan.listen.asked_for = true;
        }
        plan.listen.tls = plan.listen.tls.with(&args.tls);
        if let Some(control) = &args.control {
            plan.server.control = ControlPlan::parse(control.clone());
        }
        plan.server.workers = args.workers.or(plan.server.workers);
        plan.server.zero_copy |= args.zero_copy;
        for engine in &mut plan.engines {
            args.isolation.apply(engine);
            engine.realtime |= args.engine_realtime;
            failures.extend(check_realtime(engine).err());
        }
        plan.listen.check(&mut failures);
        if failures.is_empty() { Ok(plan) } else { Err(failures) }
    }

    /// Has every engine that is not software compared with it.
    fn verify(&mut self, sample: Sample) -> Result<(), Failure> {
        let mut verified = 0;
        for engine in &mut self.engines {
            if let Some(spec) = engine.spec.verified(sample) {
                engine.spec = spec;
                verified += 1;
            }
        }
        if verified > 0 {
            return Ok(());
        }
        Err(Failure::new(
            Code::Wrong,
            "--verify compares what an engine does with software, and every engine here is software",
            "Leave it out, or choose another engine: --engine ice:next",
        ))
    }

    fn for_volumes(args: &Serve) -> Result<Self, Vec<Failure>> {
        let Serve {
            volumes,
            key,
            name,
            layout,
            engine,
            fallback,
            priority,
            pin,
            discard,
            read_only,
            direct,
            plain,
            header,
            recover,
            ..
        } = args;
        let named = match table::for_serve(args).map_err(|failure| vec![failure])? {
            Some(found) => vec![(found.path, found.settings)],
            None => volumes.iter().map(|path| (path.clone(), Settings::default())).collect(),
        };
        let Some((first, _)) = named.first().cloned() else {
            return Err(vec![Failure::new(
                Code::Wrong,
                "nothing to serve: neither VOLUME nor --config nor --dm-table is given",
                "Name a volume, or make one: inlinecrypt serve --create 1GiB demo.img",
            )]);
        };
        for (what, given) in
            [("--key", key.is_some()), ("--name", name.is_some()), ("--header", header.is_some())]
        {
            if given && volumes.len() > 1 {
                return Err(vec![Failure::new(
                    Code::Wrong,
                    format!("{what} is for one volume, and {} are named", volumes.len()),
                    "Say it for each in a config (--config FILE), or in the descriptions beside the volumes.",
                )]);
            }
        }
        let mut builder = Builder::default();
        let has_engine = engine.engine.is_some() || engine.root.is_some() || engine.key_type.is_some();
        let chosen = if has_engine {
            Some(builder.engine(engine_from(engine).map_err(|failure| vec![failure])?))
        } else {
            None
        };
        for (path, found) in named {
            let asked = Settings {
                name: name.clone(),
                key: key.clone(),
                read_only: read_only.then_some(true),
                fallback: *fallback,
                discard: *discard,
                direct: direct.then_some(true),
                plain: plain.then_some(true),
                priority: *priority,
                pin: pin.then_some(true),
                luks: LuksSettings { header: header.clone(), passphrase: None, recover: *recover },
                ..Settings::with_layout(layout)
            };
            let label = path.display().to_string();
            match asked.over(&found) {
                Ok(asked) => builder.volume(label, &path, asked, chosen),
                Err(conflict) => builder.failures.push(Failure::new(
                    Code::Wrong,
                    format!("{label}: the line of the table says {conflict}"),
                    "Leave that option out, or correct the line.",
                )),
            }
        }
        let listen = ListenPlan::new(&ListenTable::default(), &first, Path::new(""), &mut builder.failures);
        Self::finish(builder, listen, ServerPlan::default())
    }

    /// One volume, as its description says, or the LUKS header `header`; with `engine`, where that says nothing.
    pub(crate) fn for_one(
        path: &Path,
        header: Option<&Path>,
        engine: &EngineArgs,
    ) -> Result<Self, Vec<Failure>> {
        let mut builder = Builder { is_of_one: true, ..Builder::default() };
        let named = engine.engine.is_some() || engine.root.is_some() || engine.key_type.is_some();
        let chosen = if named {
            Some(builder.engine(engine_from(engine).map_err(|failure| vec![failure])?))
        } else {
            None
        };
        let mut asked = Settings::default();
        asked.luks.header = header.map(Path::to_owned);
        builder.volume(path.display().to_string(), path, asked, chosen);
        let listen = ListenPlan::new(&ListenTable::default(), path, Path::new(""), &mut builder.failures);
        Self::finish(builder, listen, ServerPlan::default())
    }

    /// What a config asks for.
    pub(crate) fn for_config(path: &Path) -> Result<Self, Vec<Failure>> {
        let (plan, failures) = Self::for_what_can_be(path)?;
        if failures.is_empty() { Ok(plan) } else { Err(failures) }
    }

    /// What can be of what a config asks for, and why the rest cannot, for whoever looks for all that is wrong.
    pub(crate) fn for_what_can_be(path: &Path) -> Result<(Self, Vec<Failure>), Vec<Failure>> {
        let file = ConfigFile::read(path)?;
        let base = directory_of(path).to_owned();
        let mut builder = Builder::default();
        // By their names, with the index of each that can be.
        let mut named: Vec<(&str, Option<usize>)> = Vec::new();
        for table in &file.config.engine {
            let name = table.get_ref().name.as_str();
            if named.iter().any(|(other, _)| *other == name) {
                let why = format!("there is an engine {name:?} already");
                builder.failures.push(wrong(&file.place(table), &why));
                continue;
            }
            let engine = engine_plan(&file, table, &base, &mut builder.failures);
            named.push((name, engine.is_some().then_some(builder.engines.len())));
            builder.engines.extend(engine);
        }
        let mut first = None;
        for table in &file.config.volume {
            let place = file.place(table);
            let table = table.get_ref();
            let path = match volume_path(table, &base) {
                Ok(path) => path,
                Err(why) => {
                    builder.failures.push(wrong(&place, &why));
                    continue;
                }
            };
            first.get_or_insert_with(|| path.clone());
            let meant = match &table.engine {
                None => named.first(),
                Some(name) => match named.iter().find(|(known, _)| known == name) {
                    Some(engine) => Some(engine),
                    None => {
                        let known: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
                        let why = format!("no engine {name:?}; the engines are: {}", known.join(", "));
                        builder.failures.push(wrong(&place, &why));
                        continue;
                    }
                },
            };
            let label = format!("{place}: {}", path.display());
            match (Settings::from_table(table, &base), meant) {
                (Err(whys), _) => builder.failures.extend(whys.iter().map(|why| wrong(&place, why))),
                // An engine that is there but wrong has its own message, and the volume is not tried with another.
                (Ok(_), Some((_, None))) => {
                    let looked = Medium::look(&path).map_err(|failure| host::relabel(failure, &path, &label));
                    builder.failures.extend(looked.err().map(|failure| match files::exists(&path) {
                        true => failure,
                        false => failure.advise("Correct its name, or make it once its engine is right."),
                    }));
                }
                (Ok(asked), Some((_, engine))) => builder.volume(label, &path, asked, *engine),
                (Ok(asked), None) => builder.volume(label, &path, asked, None),
            }
        }
        let Some(first) = first else {
            builder.failures.push(wrong(&path.display().to_string(), "there is no [[volume]] in it"));
            return Err(builder.failures);
        };
        let listen = ListenPlan::new(&file.config.listen, &first, &base, &mut builder.failures);
        let server = ServerPlan::new(&file, &base, &mut builder.failures);
        Ok(Self::in_part(builder, listen, server))
    }

    fn finish(builder: Builder, listen: ListenPlan, server: ServerPlan) -> Result<Self, Vec<Failure>> {
        let (plan, failures) = Self::in_part(builder, listen, server);
        if failures.is_empty() { Ok(plan) } else { Err(failures) }
    }

    fn in_part(mut builder: Builder, listen: ListenPlan, server: ServerPlan) -> (Self, Vec<Failure>) {
        builder.check_names();
        builder.compare_volumes();
        let Builder { engines, volumes, plain, failures, is_of_one: _ } = builder;
        (Self { engines, volumes, plain, listen, server }, failures)
    }
}

impl ListenPlan {
    fn new(table: &ListenTable, first: &Path, base: &Path, failures: &mut Vec<Failure>) -> Self {
        let ListenTable { nbd, tls, tls_cert, tls_key, tls_client_ca, tls_verify_client } = table;
        let mut places = Vec::new();
        for text in nbd.iter().flatten() {
            match text.parse() {
                Ok(Listen::Unix(path)) => places.push(Listen::Unix(relative_to(base, &path))),
                Ok(place) => places.push(place),
                Err(error) => failures.push(Failure::of("[listen] nbd", &error)),
            }
        }
        let asked_for = nbd.is_some();
        if !asked_for {
            places.push(Listen::Unix(beside(first, ".sock")));
        }
        let file = |path: &Option<String>| path.as_ref().map(|path| relative_to(base, Path::new(path)));
        let mut plan = TlsPlan {
            when: if tls_cert.is_some() { TlsArg::Required } else { TlsArg::Off },
            cert: file(tls_cert),
            key: file(tls_key),
            client_ca: file(tls_client_ca),
            verify_client: *tls_verify_client == Some(true),
        };
        match tls.as_deref() {
            None => {}
            Some("required") => plan.when = TlsArg::Required,
            Some("allowed") => plan.when = TlsArg::Allowed,
            Some("off") => plan.when = TlsArg::Off,
            Some(other) => {
                failures
                    .push(wrong("[listen] tls", &format!("{other:?} is none of: required, allowed, off")));
            }
        }
        Self { places, asked_for, tls: plan }
    }

    /// Finds listeners that get in each other's way, and TLS that lacks a file.
    pub(crate) fn check(&self, failures: &mut Vec<Failure>) {
        let absolute = |place: &Listen| match place {
            Listen::Unix(path) => Listen::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            Listen::Tcp { host, port } => Listen::Tcp { host: host.clone(), port: *port },
        };
        let places: Vec<Listen> = self.places.iter().map(absolute).collect();
        for (i, place) in places.iter().enumerate() {
            let any_port = matches!(place, Listen::Tcp { port: 0, .. });
            if !any_port && places[..i].contains(place) {
                failures.push(Failure::new(
                    Code::Wrong,
                    format!("two listeners on {place}"),
                    "Name each place once; all exports are served on every one.",
                ));
            }
        }
        let TlsPlan { when, cert, key, client_ca, verify_client } = &self.tls;
        let lacks = |what: &str, which: &str| {
            Failure::new(
                Code::Wrong,
                format!("TLS lacks {what}"),
                format!("Name it with {which}, or use --tls off."),
            )
        };
        if *when != TlsArg::Off {
            if cert.is_none() {
                failures.push(lacks("a certificate", "--tls-cert FILE"));
            }
            if key.is_none() {
                failures.push(lacks("the certificate's key", "--tls-key FILE"));
            }
        }
        if *verify_client && client_ca.is_none() {
            failures.push(lacks("the authority that signs clients' certificates", "--tls-client-ca FILE"));
        }
    }
}

impl TlsPlan {
    /// The same, where the command line says nothing else.
    fn with(&self, args: &TlsArgs) -> Self {
        let TlsArgs { tls, tls_cert, tls_key, tls_client_ca, tls_verify_client } = args;
        let when = match (tls, tls_cert) {
            (Some(when), _) => *when,
            (None, Some(_)) => TlsArg::Required,
            (None, None) => self.when,
        };
        Self {
            when,
            cert: tls_cert.clone().or_else(|| self.cert.clone()),
            key: tls_key.clone().or_else(|| self.key.clone()),
            client_ca: tls_client_ca.clone().or_else(|| self.client_ca.clone()),
            verify_client: *tls_verify_client || self.verify_client,
        }
    }
}

impl Default for ServerPlan {
    fn default() -> Self {
        Self {
            control: ControlPlan::Default,
            workers: None,
            connections_max: None,
            stop_time_max: STOP_TIME_MAX,
            zero_copy: false,
        }
    }
}

impl ServerPlan {
    fn new(file: &ConfigFile, base: &Path, failures: &mut Vec<Failure>) -> Self {
        let ServerTable { control, workers, connections_max, stop_seconds, zero_copy } = &file.config.server;
        if let Some(workers) = workers.filter(|&workers| workers > WORKERS_MAX) {
            let why = format!("[server] workers = {workers}: a number from 0 to {WORKERS_MAX}");
            failures.push(wrong(&file.path.display().to_string(), &why));
        }
        if *connections_max == Some(0) {
            failures.push(wrong(
                &file.path.display().to_string(),
                "[server] connections_max = 0: nobody could connect",
            ));
        }
        let control = match control.as_deref() {
            None => ControlPlan::Default,
            Some("none") => ControlPlan::None,
            Some(path) => ControlPlan::At(relative_to(base, Path::new(path))),
        };
        Self {
            control,
            workers: *workers,
            connections_max: *connections_max,
            stop_time_max: stop_seconds.map_or(STOP_TIME_MAX, Duration::from_secs),
            zero_copy: zero_copy.unwrap_or(false),
        }
    }
}
