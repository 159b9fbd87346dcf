//! Volumes as dm-crypt's tables give them: on the command line, in files, in configs.

use crate::cli::{DiscardArg, Serve};
use crate::files::{self, Secrecy};
use crate::keyfile::{KeySource, Wanted};
use crate::places::relative_to;
use crate::plan::Settings;
use crate::report::{Code, Failure, note};
use inlinecrypt_core::config::{KeyType, Mode};
use inlinecrypt_core::dm::{Cipher, Table, TableKey};
use inlinecrypt_core::volume::SECTOR_BYTES;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longer is no line of one volume, even with a comment beside it.
const TABLE_BYTES_MAX: usize = 64 << 10;

/// What a line says of a volume.
#[derive(Debug)]
pub(crate) struct TableVolume {
    pub(crate) path: PathBuf,
    pub(crate) settings: Settings,
}

/// What a line says of the key beside its length.
#[derive(Clone, Debug)]
pub(crate) struct TableTerms {
    cipher: Cipher,
    key_type: Option<KeyType>,
}

impl TableTerms {
    /// The mode, where the length of the key decides; `None` where that is not to be seen.
    pub(crate) fn mode_by(&self, key: &KeySource) -> Result<Option<Mode>, Failure> {
        match self.cipher.modes() {
            [mode] => Ok(Some(*mode)),
            _ if key.wanted == Wanted::Wrapped => Ok(None),
            _ => Ok(key.load()?.raw_len().and_then(|len| self.cipher.mode(len))),
        }
    }

    /// Refuses a mode that the cipher cannot be.
    pub(crate) fn check_mode(&self, mode: Mode) -> Result<(), Failure> {
        if self.cipher.modes().contains(&mode) {
            return Ok(());
        }
        let known: Vec<&str> = self.cipher.modes().iter().map(|mode| mode.info().name).collect();
        Err(Failure::new(
            Code::Wrong,
            format!("the mode {mode} is asked for, and the cipher of the table is {}", known.join(" or ")),
            "Leave the mode out, or correct the line.",
        ))
    }

    /// Why the key is not what the line says, if it says so.
    pub(crate) fn refuse_key(&self, key: &KeySource) -> Option<Failure> {
        let (said, advice) = match (self.key_type?, key.wanted) {
            (KeyType::HardwareWrapped, Wanted::Raw) => {
                ("keytype:hw-wrapped", "Give the wrapped key: --key FILE")
            }
            (KeyType::Raw, Wanted::Wrapped) => ("keytype:raw", "Give the raw key: --key raw:FILE"),
            _ => return None,
        };
        Some(Failure::new(Code::Wrong, format!("the table says {said}, and {key} is not such a key"), advice))
    }
}

/// What `--dm-table` or `--dm-table-file` names, if one of them is given.
pub(crate) fn for_serve(args: &Serve) -> Result<Option<TableVolume>, Failure> {
    let Serve { dm_table, dm_table_file, key, .. } = args;
    let here = Path::new("");
    let found = match (dm_table, dm_table_file) {
        (Some(line), _) => without_key(line, here, "--dm-table")
            .map_err(|(what, advice)| Failure::new(Code::Wrong, what, advice))?,
        (None, Some(path)) if path.as_os_str() == "-" => {
            let text = files::read_stdin("table", TABLE_BYTES_MAX)?;
            let table = parse(&text, "the table on standard input")?;
            let key = match &table.key {
                TableKey::Bytes(bytes) => Some(KeySource::given_raw(bytes.clone())),
                TableKey::Absent | TableKey::Keyring { .. } => None,
            };
            volume(&table, here, key).map_err(|(what, advice)| Failure::new(Code::Wrong, what, advice))?
        }
        (None, Some(path)) => {
            let (table, again) = read(path)?;
            let key = match &table.key {
                // A pipe has given it once and for all.
                TableKey::Bytes(bytes) => {
                    Some(KeySource::in_table(path.clone(), (!again).then(|| bytes.clone())))
                }
                TableKey::Absent | TableKey::Keyring { .. } => None,
            };
            volume(&table, here, key).map_err(|(what, advice)| Failure::new(Code::Wrong, what, advice))?
        }
        (None, None) => return Ok(None),
    };
    if key.is_some() && found.settings.key.is_some() {
        return Err(Failure::new(
            Code::Wrong,
            "the line of the table has a key, and --key names another",
            "Leave --key out, or write - for the key in the line.",
        ));
    }
    Ok(Some(found))
}

/// What a line in a config says; paths in it are relative to `base`. Without a key.
pub(crate) fn in_config(line: &str, base: &Path) -> Result<TableVolume, String> {
    without_key(line, base, "dm_table").map_err(|(what, advice)| format!("{what}. {advice}"))
}

/// The key in the line of a file, for whoever needs it again.
pub(crate) fn key_in(path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    match read(path)?.0.key {
        TableKey::Bytes(bytes) => Ok(bytes),
        TableKey::Absent | TableKey::Keyring { .. } => Err(Failure::new(
            Code::File,
            format!("table {} has no key any more", path.display()),
            "Restore it from a copy.",
        )),
    }
}

/// What went wrong, and what to do.
type Refusal = (String, String);

/// A line where no key may stand, since others see it.
fn without_key(line: &str, base: &Path, place: &str) -> Result<TableVolume, Refusal> {
    let table = Table::parse(line).map_err(|error| refusal(place, &error.to_string()))?;
    if let TableKey::Bytes(_) = table.key {
        let seen = match place {
            "--dm-table" => "arguments are seen by every user of the machine",
            _ => "a config is no place for secrets",
        };
        return Err((
            format!("{place}: the line has a key in it, and {seen}"),
            "Write - for the key and give it with --key raw:FILE (key = \"raw:FILE\"), or put the whole line into a file \
             for its owner alone: --dm-table-file FILE"
                .to_owned(),
        ));
    }
    volume(&table, base, None)
}

fn refusal(place: &str, error: &str) -> Refusal {
    match error.split_once("; ") {
        Some((what, advice)) => {
            let mut chars = advice.chars();
            let first = chars.next().map(|first| first.to_uppercase().chain(chars).collect::<String>());
            (format!("{place}: {what}"), first.unwrap_or_default())
        }
        None => (
            format!("{place}: {error}"),
            "Correct the line: 0 LENGTH crypt CIPHER - IV_OFFSET DEVICE START [NUMBER OPTION...]".to_owned(),
        ),
    }
}

fn parse(text: &[u8], place: &str) -> Result<Table, Failure> {
    let text = str::from_utf8(text).map_err(|_not_text| {
        Failure::new(Code::File, format!("{place} is not text"), "Check that it is the right file.")
    })?;
    Table::parse(text).map_err(|error| {
        let (what, advice) = refusal(place, &error.to_string());
        Failure::new(Code::Wrong, what, advice)
    })
}

/// A line in a file, which is its owner's alone if there is a key in it; and whether it can be read again.
fn read(path: &Path) -> Result<(Table, bool), Failure> {
    let place = format!("table {}", path.display());
    let secrecy = |text: &[u8]| match parse(text, &place) {
        Ok(Table { key: TableKey::Bytes(_), .. }) => Secrecy::Secret,
        _ => Secrecy::Public,
    };
    let (text, again) = files::read_by_content(path, "table", TABLE_BYTES_MAX, secrecy)?;
    Ok((parse(&text, &place)?, again))
}

fn volume(table: &Table, base: &Path, key: Option<KeySource>) -> Result<TableVolume, Refusal> {
    if let TableKey::Keyring { kind, description, .. } = &table.key {
        return Err((
            format!("the key is in the kernel's keyring ({kind} {description:?}), which lets nobody read it"),
            "Give the key itself: write - for it and name it with --key raw:FILE".to_owned(),
        ));
    }
    if !table.iv_fits() {
        return Err((
            format!(
                "{}: with {} sectors from {} on, the IV mode cannot count them all",
                table.cipher, table.length_sectors, table.iv_offset_sectors
            ),
            "If the volume is made with plain64, write that; IVs that begin again from 0 are not served."
                .to_owned(),
        ));
    }
    if table.key_type == Some(KeyType::HardwareWrapped) && key.is_some() {
        return Err((
            "the line has a wrapped key of this start of the kernel's, which nothing else opens".to_owned(),
            "Write - for it and name the long-term wrapped key with --key FILE".to_owned(),
        ));
    }
    if !table.indifferent.is_empty() {
        let names: Vec<&str> = table.indifferent.iter().map(|option| option.name()).collect();
        note(format_args!(
            "{} in the table: tells the kernel how to compute, and changes nothing here",
            names.join(", ")
        ));
    }
    let bytes = |sectors: u64| sectors * u64::from(SECTOR_BYTES);
    let mode = match (&table.key, table.cipher.cipher.modes()) {
        (TableKey::Bytes(bytes), _) => table.cipher.cipher.mode(bytes.len()),
        (_, [mode]) => Some(*mode),
        _ => None,
    };
    let settings = Settings {
        key,
        mode,
        data_unit: Some(table.sector_size),
        iv_offset: Some(table.iv_offset_sectors),
        iv: Some(table.iv()),
        offset: Some(bytes(table.start_sectors)),
        length: Some(bytes(table.length_sectors)),
        discard: Some(if table.allow_discards { DiscardArg::Pass } else { DiscardArg::Off }),
        table: Some(TableTerms { cipher: table.cipher.cipher, key_type: table.key_type }),
        ..Settings::default()
    };
    Ok(TableVolume { path: device(&table.device, base), settings })
}

/// The path of a device, which dmsetup prints as its number.
fn device(name: &str, base: &Path) -> PathBuf {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    match name.split_once(':') {
        Some((major, minor)) if is_number(major) && is_number(minor) => Path::new("/dev/block").join(name),
        _ => relative_to(base, Path::new(name)),
    }
}
