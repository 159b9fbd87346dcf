//! `volume create | info`; `volume reencrypt` has a file of its own

use crate::ask::Asker;
use crate::cli::{DiscardArg, FallbackArg, VolumeCommand, VolumeCreate, VolumeInfo};
use crate::create::NewVolume;
use crate::files::{self, Medium, Secrecy, shell_word};
use crate::host;
use crate::keyfile::{KeySource, LoadedKey, Wanted};
use crate::luks::look::Luks;
use crate::places::beside;
use crate::plain::PlainPlan;
use crate::plan::{self, Description, Settings};
use crate::report::{Code, Failure, Failures, note, print, print_json};
use crate::size::Size;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::dm::{Table, TableKey};
use inlinecrypt_core::volume::{IvLayout, Layout};
use inlinecrypt_engine::inspect;
use serde::Serialize;
use std::path::Path;
use zeroize::Zeroizing;

pub(super) fn run(command: VolumeCommand) -> Result<(), Failures> {
    match command {
        VolumeCommand::Create(args) => create(*args),
        VolumeCommand::Info(args) => info(&args),
        VolumeCommand::Reencrypt(args) => super::reencrypt::run(*args),
    }
}

fn create(args: VolumeCreate) -> Result<(), Failures> {
    let VolumeCreate { volume, size, mut key, layout, engine } = args;
    if let Some(key) = &mut key {
        key.take_stdin()?;
    }
    let new = NewVolume {
        path: &volume,
        size,
        settings: Settings { key, ..Settings::with_layout(&layout) },
        fallback: FallbackArg::Off,
        engine: plan::engine_from(&engine)?,
        name_engine: engine.engine.is_some() || engine.root.is_some(),
    };
    let made = new.make(&mut Asker::new(&engine.passphrase))?;
    print(&format!(
        "made {}: {}, {}, data unit {}\n  key          {} ({})\n  description  {}\nTo serve it: inlinecrypt serve {}\n",
        volume.display(),
        Size(made.layout.size_bytes()),
        made.layout.mode(),
        made.layout.data_unit_size(),
        made.identifier,
        made.key,
        made.description.display(),
        shell_word(&volume),
    ))?;
    Ok(())
}

#[derive(Serialize)]
struct Info {
    version: u32,
    path: String,
    len_bytes: u64,
    /// `null` where it cannot be told, as for block devices.
    allocated_bytes: Option<u64>,
    /// Whether there is a description; without, all that follows is `null`.
    described: bool,
    description: Option<String>,
    /// Whether the description says that it is not encrypted; then of what follows only `volume_bytes`, `unused_bytes` and
    /// `offset_bytes` are known.
    plain: bool,
    /// 1 or 2 for a LUKS container, whose header says what a description would.
    luks: Option<u8>,
    volume_bytes: Option<u64>,
    unused_bytes: Option<u64>,
    mode: Option<&'static str>,
    data_unit_bytes: Option<u32>,
    block_bytes: Option<u32>,
    iv_offset_sectors: Option<u64>,
    /// The IV layout, as --iv names it.
    iv: Option<&'static str>,
    /// Where it begins in its file.
    offset_bytes: Option<u64>,
    key_id: Option<String>,
    key_type: Option<&'static str>,
    key_file: Option<String>,
    /// Which root opens the key.
    root_id: Option<String>,
    /// What it is being re-encrypted to, if it is.
    reencrypt: Option<ReencryptInfo>,
}

#[derive(Serialize)]
struct ReencryptInfo {
    state: String,
    done_bytes: u64,
    size_bytes: u64,
    zone_bytes: u64,
    /// Whether a zone was being written: it is completed at the next start.
    interrupted: bool,
    mode: &'static str,
    data_unit_bytes: u32,
    iv_offset_sectors: u64,
    key_id: Option<String>,
    key_file: Option<String>,
}

/// How far the re-encryption with this state is. A server at work may be further in a moment.
fn reencrypt_info(volume: &Path, state: &Path) -> Result<ReencryptInfo, Failures> {
    let (facts, intent) = crate::reencrypt::look(state)?;
    let next = match Description::of_text(intent.description, volume) {
        Ok(next) => next.settings,
        Err(failures) => return Err(Failures::check(failures).expect_err("there are some")),
    };
    let layout = next.layout();
    Ok(ReencryptInfo {
        state: state.display().to_string(),
        done_bytes: facts.boundary,
        size_bytes: facts.size_bytes,
        zone_bytes: facts.zone_bytes,
        interrupted: facts.is_interrupted,
        mode: layout.mode.info().name,
        data_unit_bytes: layout.data_unit.bytes(),
        iv_offset_sectors: layout.iv_offset,
        key_id: next.key_id.map(|id| id.to_string()),
        key_file: next.key.and_then(|key| Some(key.path()?.display().to_string())),
    })
}

fn info(args: &VolumeInfo) -> Result<(), Failures> {
    let VolumeInfo { volume, header, json, dm_table, show_key } = args;
    let medium = Medium::look(volume)?;
    let mut description = match Description::find(volume) {
        Ok(description) => description,
        Err(failures) => return Failures::check(failures),
    };
    let described = description.as_ref().and_then(|description| description.settings.luks.header.as_deref());
    let header = header.as_deref().or(described);
    let luks = Luks::look(volume, header, description.is_none(), description.is_some())?;
    if let Some(Description { settings, .. }) = &mut description
        && let Some(key) = settings.key.clone().filter(|key| key.path().is_some())
        && let Err(failure) = settings.settle_mode(&key)
    {
        // A key that is missing is no failure here.
        note(format_args!(
            "{}, and with it which mode the table means; the usual one is shown",
            failure.what
        ));
    }
    let mut info = Info {
        version: 1,
        path: volume.display().to_string(),
        len_bytes: medium.len_bytes,
        allocated_bytes: medium.allocated_bytes,
        described: description.is_some(),
        description: description.as_ref().map(|description| description.path.display().to_string()),
        plain: description.as_ref().is_some_and(|description| description.settings.is_plain()),
        luks: luks.as_ref().map(|luks| luks.version),
        volume_bytes: None,
        unused_bytes: None,
        mode: None,
        data_unit_bytes: None,
        block_bytes: None,
        iv_offset_sectors: None,
        iv: None,
        offset_bytes: None,
        key_id: None,
        key_type: None,
        key_file: None,
        root_id: None,
        reencrypt: None,
    };
    if let Some(description) = description.as_ref().filter(|_| info.plain) {
        return Ok(plain_info(args, info, description)?);
    }
    let sibling = beside(volume, ".key");
    let mut key = (luks.is_none() && files::exists(&sibling)).then(|| KeySource::wrapped(sibling));
    let mut found = None;
    let said = match (&luks, description) {
        (Some(luks), _) => Some((luks.header.clone(), luks.settings())),
        (None, Some(Description { path, settings, .. })) => Some((path, settings)),
        (None, None) => None,
    };
    if let Some((path, settings)) = &said {
        host::check_size(settings.size, &path.display().to_string(), &medium, &volume.display().to_string())?;
        let layout = host::layout(&settings.layout(), medium.len_bytes, &volume.display().to_string());
        let layout = layout.map_err(|failure| match &luks {
            Some(luks) => luks.cut_short(failure),
            None => failure,
        })?;
        info.volume_bytes = Some(layout.size_bytes());
        info.unused_bytes = Some(settings.layout().unused(&layout, medium.len_bytes));
        info.iv = Some(layout.iv().name());
        info.offset_bytes = Some(settings.layout().offset);
        info.mode = Some(layout.mode().info().name);
        info.data_unit_bytes = Some(layout.data_unit_size().bytes());
        info.block_bytes = Some(layout.logical_block_bytes());
        info.iv_offset_sectors = Some(layout.iv_offset_sectors());
        info.key_id = settings.key_id.map(|id| id.to_string());
        key = settings.key.clone().or(key);
        if let Some(state) = &settings.reencrypt {
            info.reencrypt = Some(reencrypt_info(volume, state)?);
        }
        if let Some(Luks { header, next: Some(next), .. }) = &luks {
            info.reencrypt = Some(ReencryptInfo {
                state: header.display().to_string(),
                done_bytes: next.done_of(layout.size_bytes()),
                size_bytes: layout.size_bytes(),
                zone_bytes: next.hot_bytes.unwrap_or(0),
                interrupted: next.hot_bytes.is_some(),
                mode: next.layout.mode.info().name,
                data_unit_bytes: next.layout.data_unit.bytes(),
                iv_offset_sectors: next.layout.iv_offset,
                key_id: None,
                key_file: None,
            });
        }
        found = Some((layout, settings));
    }
    if *dm_table {
        if info.reencrypt.is_some() {
            return Err(Failure::new(
                Code::Refused,
                format!("{} is half re-encrypted, and a table names one key only", volume.display()),
                format!("Complete it first: inlinecrypt volume reencrypt --resume {}", shell_word(volume)),
            )
            .into());
        }
        return Ok(print_table(volume, found, key.as_ref(), *show_key)?);
    }
    if let Some(key) = &key {
        info.key_file = key.path().map(|path| path.display().to_string());
        info.key_type = Some(match key.wanted {
            Wanted::Wrapped => "hardware-wrapped",
            Wanted::Raw => "raw",
        });
        if let (Wanted::Wrapped, Some(path)) = (key.wanted, key.path()) {
            // Only the header is looked at, and a key that is missing is no failure here.
            let blob = files::read(path, "key file", Secrecy::Public, 4096).ok();
            info.root_id = blob.and_then(|blob| inspect(&blob).ok()).map(|info| info.wrapped_by.to_string());
        }
        if let Some(wrapped) = luks.as_ref().and_then(|luks| luks.wrapped.as_ref()) {
            info.root_id = inspect(&wrapped.blob).ok().map(|info| info.wrapped_by.to_string());
        }
    }
    if *json {
        print_json(&info)?;
        return Ok(());
    }
    print(&describe(&info))?;
    Ok(())
}

/// What is known about a volume without encryption.
fn plain_info(args: &VolumeInfo, mut info: Info, description: &Description) -> Result<(), Failure> {
    let VolumeInfo { volume, json, dm_table, .. } = args;
    let label = volume.display().to_string();
    if *dm_table {
        return Err(Failure::new(
            Code::Wrong,
            format!("{label} is plain: it is not encrypted, so dm-crypt has nothing to open"),
            "Use the file as it is.",
        ));
    }
    let Description { path, settings, .. } = description;
    let said_by = path.display().to_string();
    // Nothing is written, so it need not be writable.
    let plan = PlainPlan::new(label, volume, settings, said_by);
    let ready = PlainPlan { access: Access::ReadOnly, ..plan }.prepare()?;
    info.volume_bytes = Some(ready.len_bytes - ready.unused_bytes);
    info.unused_bytes = Some(ready.unused_bytes);
    info.offset_bytes = Some(ready.plan.offset);
    if *json {
        return print_json(&info);
    }
    print(&describe(&info))
}

/// The line of a table with which Linux opens the volume.
fn print_table(
    volume: &Path,
    described: Option<(Layout, &Settings)>,
    key: Option<&KeySource>,
    show_key: bool,
) -> Result<(), Failure> {
    let name = volume.display();
    let Some((layout, settings)) = described else {
        return Err(Failure::new(
            Code::File,
            format!("{name} has no description, and the format has no header: its layout cannot be known"),
            "Write it down beside it, in the form that `inlinecrypt serve --help` shows.",
        ));
    };
    let path = std::path::absolute(volume).unwrap_or_else(|_| volume.to_owned());
    let Some(device) = path.to_str() else {
        return Err(Failure::new(Code::Wrong, format!("{name} is no UTF-8"), "Give it another name."));
    };
    let mut table = Table::of(&layout, device, settings.layout().offset).map_err(|why| {
        Failure::new(
            Code::Wrong,
            format!("Linux cannot open {name}: it has {why}"),
            "It can be read through us: inlinecrypt serve, and a copy from there to a volume of another layout.",
        )
    })?;
    // As it is served.
    table.allow_discards = settings.discard != Some(DiscardArg::Off);
    let wanted = key.map(|key| key.wanted);
    match (show_key, key, wanted) {
        (true, Some(source), Some(Wanted::Raw)) => {
            let key = source.load()?;
            key.check_length(layout.mode(), source)?;
            if let LoadedKey::Raw(key) = key {
                table.key = TableKey::Bytes(Zeroizing::new(key.expose().to_vec()));
            }
        }
        (true, ..) => {
            return Err(Failure::new(
                Code::Refused,
                match wanted {
                    Some(_) => {
                        format!("{name} has a hardware-wrapped key: what encrypts never leaves the engine")
                    }
                    None => format!("{name} has no key that is known here"),
                },
                "Leave --show-key out. Volumes that dm-crypt is to open, too, are made with --key raw:FILE.",
            ));
        }
        (false, _, Some(Wanted::Wrapped)) => note(
            "the key is hardware-wrapped and never leaves its engine: with this line alone dm-crypt cannot open the volume",
        ),
        (false, ..) => note("- stands for the key; --show-key prints a raw one"),
    }
    if path.is_file() {
        note("device-mapper needs a block device: give the file one (losetup) and write that into the line");
    }
    // Linux 6.1 to 7.3: "start=1 not aligned to h/w logical block size 4096".
    let offset = settings.layout().offset;
    if !offset.is_multiple_of(u64::from(layout.data_unit_size().bytes())) {
        note(format!(
            "device-mapper refuses a start that is no multiple of the data unit: give the volume a loop device of its own \
             (losetup --offset {offset}), and write that and a start of 0 into the line"
        ));
    }
    let mut line = table.with_key();
    line.push('\n');
    print(&line)
}

fn describe(info: &Info) -> String {
    let mut rows = vec![("volume", info.path.clone()), ("file", Size(info.len_bytes).to_string())];
    if let Some(bytes) = info.allocated_bytes {
        rows.push(("allocated", Size(bytes).to_string()));
    }
    if let Some(version) = info.luks {
        rows.push(("format", format!("LUKS{version}; inlinecrypt luks dump shows its header")));
    }
    match info.mode {
        _ if info.plain => {
            rows.push((
                "encryption",
                "NONE: it is plain, what clients write lies in the file as it is".to_owned(),
            ));
            rows.push(("size", Size(info.volume_bytes.unwrap_or(0)).to_string()));
            rows.push(("unused tail", Size(info.unused_bytes.unwrap_or(0)).to_string()));
            if let Some(offset) = info.offset_bytes.filter(|&offset| offset != 0) {
                rows.push(("begins at", Size(offset).to_string()));
            }
            rows.extend(info.description.clone().map(|description| ("description", description)));
        }
        Some(mode) => {
            rows.push(("size", Size(info.volume_bytes.unwrap_or(0)).to_string()));
            rows.push(("unused tail", Size(info.unused_bytes.unwrap_or(0)).to_string()));
            rows.push(("mode", mode.to_owned()));
            rows.push(("data unit", format!("{} bytes", info.data_unit_bytes.unwrap_or(0))));
            rows.push(("logical block", format!("{} bytes", info.block_bytes.unwrap_or(0))));
            rows.push(("IV offset", format!("{} sectors", info.iv_offset_sectors.unwrap_or(0))));
            if let Some(iv) = info.iv.filter(|iv| *iv != IvLayout::default().name()) {
                rows.push(("IV layout", iv.to_owned()));
            }
            if let Some(offset) = info.offset_bytes.filter(|&offset| offset != 0) {
                rows.push(("begins at", Size(offset).to_string()));
            }
            let unknown = || match info.luks {
                Some(_) => "its LUKS keyslots hold it".to_owned(),
                None => "not described".to_owned(),
            };
            rows.push(("key", info.key_id.clone().unwrap_or_else(unknown)));
            rows.extend(info.description.clone().map(|description| ("description", description)));
        }
        _ => rows.push((
            "description",
            "none. The format has no header: size of data units, mode, IV offset and key cannot be known"
                .to_owned(),
        )),
    }
    if let (Some(form), Some(file)) = (info.key_type, &info.key_file) {
        rows.push(("key file", format!("{file} ({form})")));
    }
    if info.key_type == Some("hardware-wrapped") {
        let root = match &info.root_id {
            Some(id) => format!("one with root {id}, for hardware-wrapped keys"),
            None => "one for hardware-wrapped keys; its root is not known, as the key file cannot be read"
                .to_owned(),
        };
        rows.push(("engine", root));
    } else if info.key_type == Some("raw") {
        rows.push(("engine", "any for raw keys; no root".to_owned()));
    }
    if let Some(next) = &info.reencrypt {
        let percent = u128::from(next.done_bytes) * 100 / u128::from(next.size_bytes.max(1));
        let key = next.key_id.as_deref().map_or_else(|| "the new key".to_owned(), |id| format!("key {id}"));
        rows.push((
            "re-encryption",
            format!(
                "{percent} %: {} of {} are under {key}, {}, data unit {} bytes",
                Size(next.done_bytes),
                Size(next.size_bytes),
                next.mode,
                next.data_unit_bytes
            ),
        ));
        rows.extend(next.key_file.clone().map(|file| ("new key file", file)));
        rows.push(("state", next.state.clone()));
    }
    rows.into_iter().map(|(name, value)| format!("{name:<15}  {value}\n")).collect()
}
