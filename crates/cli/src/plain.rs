//! Volumes without encryption: `--plain`, and `plain = true` of a `[[volume]]`.
//!
//! They are for comparison, and for images that are still to be moved in or out. Nothing is served so by mistake: whoever asks
//! says so, what has a key or a layout is refused, and the server, `status` and `volume info` tell.

use crate::cli::Serve;
use crate::control::VolumeReport;
use crate::files::{self, Medium, shell_word};
use crate::host;
use crate::luks::look;
use crate::places::beside;
use crate::plan::{Description, Settings};
use crate::report::{Code, Failure, note};
use crate::size::Size;
use crate::take_over::VolumeFacts;
use crate::watch::Watched;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::disk::{Disk as _, LARGE_BUFFER_BYTES};
use inlinecrypt_core::memory::MemoryPool;
use inlinecrypt_core::plain::PlainVolume;
use inlinecrypt_core::volume::{Discard, SECTOR_BYTES};
use inlinecrypt_io::backing::{Caching, DiscardPolicy, FileBacking, OpenOptions, Window};
use inlinecrypt_io::export::nbd::ExportStatus;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How `status` and `volume info` call what others have a mode for.
pub(crate) const PLAIN: &str = "plain";

/// A volume to serve without encryption.
#[derive(Clone, Debug)]
pub(crate) struct PlainPlan {
    /// How messages call it: its path, and where it was asked for.
    pub(crate) label: String,
    /// The name of its export.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// How long its file was, if anything says so, and what does.
    pub(crate) size: Option<u64>,
    pub(crate) said_by: String,
    /// Where it begins, in bytes.
    pub(crate) offset: u64,
    /// Its length in bytes; to the end, if nothing says it.
    pub(crate) length: Option<u64>,
    pub(crate) access: Access,
    pub(crate) discard: Discard,
    pub(crate) caching: Caching,
}

impl Settings {
    /// What is said that only an encrypted volume can have, as configs call it.
    pub(crate) fn of_encryption(&self) -> impl Iterator<Item = &'static str> {
        let luks = &self.luks;
        [
            ("key", self.key.is_some()),
            ("key_id", self.key_id.is_some()),
            ("mode", self.mode.is_some()),
            ("data_unit", self.data_unit.is_some()),
            ("block", self.block.is_some()),
            ("iv_offset", self.iv_offset.is_some()),
            ("iv", self.iv.is_some()),
            ("dm_table", self.table.is_some()),
            ("fallback", self.fallback.is_some()),
            ("priority", self.priority.is_some()),
            ("pin", self.pin.is_some()),
            ("preprogram", self.preprogram.is_some()),
            ("spill_after_us", self.spill_after_us.is_some()),
            ("header", luks.header.is_some()),
            ("passphrase_file or key_file", luks.passphrase.is_some()),
            ("recover", luks.recover),
            ("reencrypt", self.reencrypt.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, said)| said.then_some(name))
    }
}

/// Why a config cannot say both.
pub(crate) fn contradiction(name: &'static str) -> String {
    format!(
        "plain = true together with {name}: what is not encrypted has no key, no data units and no engine"
    )
}

/// What is said of keys, layouts and engines cannot be said together with --plain.
pub(crate) fn refuse_with_plain(args: &Serve) -> Result<(), Failure> {
    if !args.plain {
        return Ok(());
    }
    let Serve { layout, engine, isolation, .. } = args;
    let given = [
        ("--key", args.key.is_some()),
        ("--create", args.create.is_some()),
        ("--dm-table", args.dm_table.is_some()),
        ("--dm-table-file", args.dm_table_file.is_some()),
        ("--mode", layout.mode.is_some()),
        ("--data-unit", layout.data_unit.is_some()),
        ("--block", layout.block.is_some()),
        ("--iv-offset", layout.iv_offset.is_some()),
        ("--iv", layout.iv.is_some()),
        ("--engine", engine.engine.is_some()),
        ("--root", engine.root.is_some()),
        ("--key-type", engine.key_type.is_some()),
        ("--passphrase-file", engine.passphrase.passphrase_file.is_some()),
        ("--passphrase-fd", engine.passphrase.passphrase_fd.is_some()),
        ("--engine-process", isolation.engine_process.is_some()),
        ("--sandbox", isolation.sandbox.is_some()),
        ("--engine-realtime", args.engine_realtime),
        ("--verify", args.verify.is_some()),
        ("--fallback", args.fallback.is_some()),
        ("--priority", args.priority.is_some()),
        ("--pin", args.pin),
        ("--header", args.header.is_some()),
        ("--key-file", args.key_file.is_some()),
        ("--recover", args.recover),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some(("--create", _)) => Err(Failure::new(
            Code::Wrong,
            "--create makes an encrypted volume, and --plain asks for one without encryption",
            "Leave --plain out. To make a file that is to be served plain: truncate -s SIZE FILE",
        )),
        Some((what, _)) => Err(Failure::new(
            Code::Wrong,
            format!(
                "{what} together with --plain: what is not encrypted has no key, no data units and no engine"
            ),
            "Leave one of the two out.",
        )),
    }
}

/// Refuses to have plaintext written over what is encrypted: over what is described otherwise, or has a key beside it. To be
/// read, its ciphertext can be had.
pub(crate) fn refuse_encrypted(
    path: &Path,
    asked: &Settings,
    description: Option<&Description>,
    label: &str,
) -> Result<(), Failure> {
    let described =
        description.map(|description| (description.path.clone(), "describes an encrypted volume"));
    // What a link is called says nothing of what it leads to.
    let real = path.canonicalize().ok();
    let elsewhere = real.iter().map(|real| (beside(real, ".toml"), "describes what this is a link to"));
    let besides = [Some(path), real.as_deref()].into_iter().flatten().flat_map(|path| {
        [
            (beside(path, ".key"), "is the key of an encrypted volume"),
            (beside(path, ".reencrypt"), "is the state of its re-encryption"),
        ]
    });
    let found = elsewhere.chain(besides).find(|(evidence, _)| files::exists(evidence));
    let container = look::is_container(path).then(|| (path.to_owned(), "is a LUKS container"));
    let is_container = container.is_some();
    let Some((evidence, is)) = described.or(found).or(container) else { return Ok(()) };
    if asked.read_only == Some(true) {
        // Of a container it is said as well when it is served.
        if evidence != path {
            note(format_args!("{label}: {} {is}; plain, clients read its ciphertext", evidence.display()));
        }
        return Ok(());
    }
    if is_container && evidence == path {
        return Err(Failure::new(
            Code::Wrong,
            format!("{label} is not to be served plain: it {is}, and what is written plain may destroy it"),
            format!(
                "Serve it as it is: inlinecrypt serve {}. To copy it, add --read-only (read_only = true). If clients open it \
                 themselves, say so beside it: plain = true in {}.",
                shell_word(path),
                beside(path, ".toml").display()
            ),
        ));
    }
    Err(Failure::new(
        Code::Wrong,
        format!(
            "{label} is not to be served plain: {} {is}, and what is written plain destroys it",
            evidence.display()
        ),
        format!(
            "Serve it as it is: inlinecrypt serve {}. To copy its ciphertext, add --read-only (read_only = true). If it is \
             no encrypted volume any more, move that file away.",
            shell_word(path)
        ),
    ))
}

/// Nothing of a plain volume has a key.
pub(crate) fn has_no_key(label: &str) -> Failure {
    Failure::new(
        Code::Wrong,
        format!("{label} is plain: it is not encrypted, so it has no key that could be changed"),
        "To encrypt it, make a volume of its size (inlinecrypt volume create), serve both, and copy it with nbdcopy.",
    )
}

impl PlainPlan {
    /// A plain volume of `settings`, which say nothing of encryption.
    pub(crate) fn new(label: String, path: &Path, settings: &Settings, said_by: String) -> Self {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            name: settings.name.clone().unwrap_or(stem),
            path: path.to_owned(),
            size: settings.size,
            said_by,
            offset: settings.offset.unwrap_or(0),
            length: settings.length,
            access: settings.access(),
            discard: settings.discard(),
            caching: settings.caching(),
            label,
        }
    }

    /// Looks whether it can be served. Opens nothing for writing.
    pub(crate) fn prepare(&self) -> Result<ReadyPlain, Failure> {
        let Self { label, path, size, said_by, offset, length, .. } = self;
        let medium = Medium::look(path).map_err(|failure| {
            let failure = host::relabel(failure, path, label);
            if files::exists(path) {
                failure
            } else {
                failure.advise(format!("To make it: truncate -s SIZE {}", shell_word(path)))
            }
        })?;
        host::check_writable(path, self.access, label)?;
        host::check_size(*size, said_by, &medium, label)?;
        let room = medium.len_bytes.saturating_sub(*offset);
        let len_bytes = length.unwrap_or(room);
        if len_bytes > room || len_bytes < u64::from(SECTOR_BYTES) {
            return Err(Failure::new(
                Code::File,
                match length {
                    Some(length) if length > &room => format!(
                        "{label} has {}, and the volume is to have {} from {} on",
                        Size(medium.len_bytes),
                        Size(*length),
                        Size(*offset)
                    ),
                    _ => format!(
                        "{label} has {}, which from {} on is not even a sector of {SECTOR_BYTES}",
                        Size(medium.len_bytes),
                        Size(*offset)
                    ),
                },
                "Check that it is the right file and that nothing of it is missing, and the volume's offset and length.",
            ));
        }
        let unused_bytes = len_bytes % u64::from(SECTOR_BYTES);
        let is_luks = look::is_container(path);
        Ok(ReadyPlain { plan: self.clone(), len_bytes, unused_bytes, is_luks })
    }
}

/// A plain volume that can be served, as far as can be seen.
#[derive(Debug)]
pub(crate) struct ReadyPlain {
    pub(crate) plan: PlainPlan,
    pub(crate) len_bytes: u64,
    /// Bytes behind the last whole sector.
    pub(crate) unused_bytes: u64,
    is_luks: bool,
}

impl ReadyPlain {
    /// Says what nobody may overlook.
    pub(crate) fn tell_notes(&self) {
        let Self { plan: PlainPlan { label, .. }, unused_bytes, is_luks, .. } = self;
        note(format_args!(
            "WARNING: {label} is served plain: NOTHING of it is encrypted, and what clients write lies on the disk as it is"
        ));
        if *is_luks {
            note(format_args!(
                "{label} is a LUKS container: plain, clients get the container, its header with it, and not what is in it"
            ));
        }
        if *unused_bytes > 0 {
            note(format_args!(
                "{label}: its last {unused_bytes} bytes are not a whole sector of {SECTOR_BYTES} and stay unused"
            ));
        }
    }
}

/// Large buffers of all plain volumes together: as many as an engine has for its.
pub(crate) fn pool() -> Arc<MemoryPool> {
    Arc::new(MemoryPool::new(LARGE_BUFFER_BYTES, host::LARGE_BUFFERS))
}

/// A plain volume that is served.
#[derive(Debug)]
pub(crate) struct ServedPlain {
    pub(crate) volume: Arc<PlainVolume>,
    pub(crate) backing: Arc<Watched>,
    /// What is behind it.
    pub(crate) file: Arc<FileBacking>,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    offset: u64,
}

impl ServedPlain {
    /// Opens and locks the backing, or takes it over as `handed` by another server.
    pub(crate) fn open(
        ready: ReadyPlain,
        handed: Option<OwnedFd>,
        pool: Arc<MemoryPool>,
    ) -> Result<Self, Failure> {
        let ReadyPlain { plan, len_bytes, .. } = ready;
        let PlainPlan { label, name, path, offset, access, discard, caching, .. } = plan;
        let policy = match discard {
            Discard::Pass => DiscardPolicy::PassDown,
            Discard::Off => DiscardPolicy::Ignore,
        };
        let options = OpenOptions { access, caching, discard: policy };
        let file = match handed {
            Some(file) => FileBacking::adopt(&path, file, options),
            None => FileBacking::open(&path, options),
        };
        let file = Arc::new(file.map_err(|error| Failure::of_file(&label, &error))?);
        let backing = Arc::new(Watched::new(file.clone()));
        let lies_on = Window::over(backing.clone(), offset).map_err(|error| {
            Failure::of_file(&label, &error)
                .advise("Leave --direct (direct = true) out, or correct where the volume begins.")
        })?;
        let volume = PlainVolume::new(lies_on, len_bytes, access, discard, pool)
            .map_err(|error| Failure::of_file(&label, &error))?;
        let path = std::path::absolute(&path).unwrap_or(path);
        Ok(Self { volume: Arc::new(volume), backing, file, name, path, offset })
    }

    /// What has to be the same for another server to take it over.
    pub(crate) fn facts(&self) -> VolumeFacts {
        VolumeFacts::of_plain(&self.name, self.volume.geometry(), self.offset)
    }

    /// A line for the person who started the server.
    pub(crate) fn greeting(&self) -> String {
        let path = crate::report::printable(&self.path.display().to_string());
        let size = Size(self.volume.geometry().size_bytes);
        format!("serving {path} as {:?}: {size}, PLAIN: not encrypted\n", self.name)
    }

    /// What `status` says.
    pub(crate) fn report(&self, export: &ExportStatus) -> VolumeReport {
        let geometry = self.volume.geometry();
        let lost = self.backing.lost().map(str::to_owned);
        VolumeReport {
            name: self.name.clone(),
            path: self.path.display().to_string(),
            size_bytes: geometry.size_bytes,
            plain: true,
            mode: PLAIN,
            data_unit_bytes: 0,
            block_bytes: geometry.logical_block_bytes,
            iv_offset_sectors: 0,
            iv: "none",
            offset_bytes: self.offset,
            read_only: export.read_only,
            key_type: "none",
            key_id: String::new(),
            engine: String::new(),
            served_by: "none",
            state: if lost.is_some() { "data_lost" } else { "ok" },
            reason: lost,
            backing_failures: self.backing.failures(),
            reencrypt: None,
            counters: export.counters,
        }
    }
}
