//! `luks create | add-key | change-key | remove-key | test | dump | header-backup | header-restore | repair | erase | resize`

use crate::ask::Asker;
use crate::cli::PassphraseArgs;
use crate::cli::luks::{
    KdfArg, KdfArgs, LuksAddKey, LuksBackup, LuksChangeKey, LuksCommand, LuksCreate, LuksDump, LuksErase,
    LuksRemoveKey, LuksRepair, LuksResize, LuksRestore, LuksTest, NewArgs, OpenArgs,
};
use crate::files::{self, Medium, Secrecy, Staged, shell_word};
use crate::host::HostEngine;
use crate::identifier::Identifier;
use crate::luks::file::HeaderFile;
use crate::luks::token::{self, WrappedKey};
use crate::luks::unlock::Passphrase;
use crate::luks::{failure, random};
use crate::plan;
use crate::report::{Code, Failure, note, print, print_json};
use crate::size::Size;
use inlinecrypt_cipher::kdf::inline_encryption_key;
use inlinecrypt_core::key::{KeyForm, RawKey};
use inlinecrypt_engine::Root;
use inlinecrypt_luks::kdf::{Argon2Variant, Kdf};
use inlinecrypt_luks::luks2::{Container, CopyState, Header, NewContainer};
use inlinecrypt_luks::{Error, ErrorKind, Hash, Kind, Storage, VolumeKey, detect, luks1};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Iterations of the digest that tells the right volume key: it is a long random key, so nothing is gained by many. As
/// cryptsetup, which has at least 1000.
const DIGEST_ITERATIONS: u32 = 1000;

/// Longest backup: a header of the largest size, with areas of the largest size.
const BACKUP_BYTES_MAX: usize = (8 << 20) + (128 << 20);

pub(super) fn run(command: LuksCommand) -> Result<(), Failure> {
    match command {
        LuksCommand::Create(args) => create(&args),
        LuksCommand::AddKey(args) => add_key(&args),
        LuksCommand::ChangeKey(args) => change_key(&args),
        LuksCommand::RemoveKey(args) => remove_key(&args),
        LuksCommand::Test(args) => test(&args),
        LuksCommand::Dump(args) => dump(&args),
        LuksCommand::HeaderBackup(args) => backup(&args),
        LuksCommand::HeaderRestore(args) => restore(&args),
        LuksCommand::Repair(args) => repair(&args),
        LuksCommand::Erase(args) => erase(&args),
        LuksCommand::Resize(args) => resize(&args),
    }
}

/// Says where an error of the format was met.
fn at(path: &Path) -> impl Fn(Error) -> Failure + '_ {
    move |error| failure(path.display(), &error)
}

impl OpenArgs {
    fn asker(&self) -> Asker {
        Asker::new(&self.passphrase).with_key_file(self.key_file.clone())
    }

    /// The passphrase of what lies at `path`.
    fn ask(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
        match self.asker().luks(path, None)? {
            Passphrase::File(file) => file.read(),
            Passphrase::Given(given) => Ok(Zeroizing::new(given.to_vec())),
            Passphrase::NotAsked(_) => unreachable!("it was asked for"),
        }
    }
}

impl NewArgs {
    fn ask(&self, path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let Self { new_passphrase_file, new_passphrase_fd, new_key_file } = self;
        let args = PassphraseArgs {
            passphrase_file: new_passphrase_file.clone(),
            passphrase_fd: *new_passphrase_fd,
        };
        Asker::new(&args).with_key_file(new_key_file.clone()).new_luks(path)
    }
}

impl KdfArgs {
    /// What it says, measured on this machine unless told.
    fn choose(&self) -> Result<Kdf, Failure> {
        let Self { pbkdf, hash, iter_time, pbkdf_memory, pbkdf_parallel, pbkdf_force_iterations } = self;
        let wrong = |error: Error| {
            let failure = failure("the cost of the passphrase", &error);
            match error.kind() {
                ErrorKind::Cost => Failure { code: Code::Wrong, ..failure }.advise("Ask for less."),
                _ => failure,
            }
        };
        let memory_kib = pbkdf_memory.unwrap_or_else(memory_kib_default);
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
        let lanes = pbkdf_parallel.unwrap_or_else(|| u32::try_from(cpus).unwrap_or(1));
        let argon2 =
            |variant| Kdf::Argon2 { variant, passes: pbkdf_force_iterations.unwrap_or(4), memory_kib, lanes };
        let kdf = match pbkdf {
            KdfArg::Argon2id => argon2(Argon2Variant::Id),
            KdfArg::Argon2i => argon2(Argon2Variant::I),
            KdfArg::Pbkdf2 => Kdf::Pbkdf2 {
                hash: Hash::parse(hash).map_err(wrong)?,
                iterations: pbkdf_force_iterations.unwrap_or(1000),
            },
        };
        kdf.check().map_err(wrong)?;
        if pbkdf_force_iterations.is_some() {
            return Ok(kdf);
        }
        let mut time = |run: &mut dyn FnMut()| {
            let began = Instant::now();
            run();
            began.elapsed()
        };
        kdf.calibrate(Duration::from_millis(*iter_time), memory_kib, &mut time).map_err(wrong)
    }
}

/// As cryptsetup: 1 GiB, and never more than half of what there is.
fn memory_kib_default() -> u32 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available_kib: Option<u32> =
        available.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.trim().parse().ok());
    (available_kib.unwrap_or(128 << 10) / 2).clamp(64 << 10, 1 << 20)
}

fn create(args: &LuksCreate) -> Result<(), Failure> {
    let LuksCreate {
        container, size, header, mode, sector_size, header_size, label, subsystem, uuid, ..
    } = args;
    let name = container.display().to_string();
    if args.wrapped && (args.recovery || args.recovery_passphrase_file.is_some()) {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{name}: a key that is made in the engine is known to nobody else, so no passphrase can open its data"
            ),
            "Leave the recovery passphrase out, or wrap a key of your own: --import FILE",
        ));
    }
    let data_exists = files::exists(container);
    let new_data = match (header, data_exists, size) {
        (None, true, _) => return Err(taken(container)),
        (Some(_), true, Some(_)) => {
            return Err(Failure::new(
                Code::Wrong,
                format!("{name} exists already, and has a size"),
                "Leave --size out.",
            ));
        }
        (Some(_), true, None) => None,
        (_, false, Some(size)) => Some(size.0),
        (_, false, None) => {
            return Err(Failure::new(
                Code::Wrong,
                format!("cannot make {name}: its size is not given"),
                "Give it: --size 1GiB",
            ));
        }
    };
    if let Some(header) = header.as_deref().filter(|header| files::exists(header)) {
        return Err(taken(header));
    }
    if header.as_deref().is_some_and(|header| is_same_name(header, container)) {
        return Err(Failure::new(
            Code::Wrong,
            format!("{name} would be header and data at once"),
            "Leave --header out for a header before the data, or name another file.",
        ));
    }
    let holds_passphrase =
        (!args.wrapped && args.import.is_none()) || args.recovery || args.recovery_passphrase_file.is_some();
    let limits = NewContainer::header_limits(holds_passphrase.then_some(*mode));
    if !limits.contains(&header_size.0) || !header_size.0.is_multiple_of(4096) {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{} bytes for the header; from {} to {} are possible",
                header_size.0,
                Size(*limits.start()),
                Size(*limits.end())
            ),
            "Give a multiple of 4096 between them, or leave --header-size out.",
        ));
    }
    let data_bytes = match new_data {
        Some(bytes) => bytes,
        None => Medium::look(container)?.len_bytes,
    };
    if data_bytes == 0 || data_bytes % u64::from(*sector_size) != 0 {
        return Err(Failure::new(
            Code::Wrong,
            format!("{name}: {data_bytes} bytes are not a multiple of the sector size, {sector_size} bytes"),
            "Give another size, or --sector-size 512.",
        ));
    }
    let data_offset = if header.is_some() { 0 } else { header_size.0 };
    let Some(whole) = data_offset.checked_add(data_bytes) else {
        return Err(Failure::new(
            Code::Wrong,
            format!("{name}: {data_bytes} bytes and a header before them are more than any file has"),
            "Give another size.",
        ));
    };
    let uuid = match uuid {
        Some(uuid) => check_uuid(uuid)?,
        None => random_uuid()?,
    };
    let key = NewKey::make(args, header.as_deref().unwrap_or(container))?;
    let new = NewContainer {
        mode: *mode,
        sector_bytes: *sector_size,
        data_offset,
        header_bytes: header_size.0,
        uuid: &uuid,
        label,
        subsystem,
        key: key.volume_key.as_ref().map(|key| (&key[..], DIGEST_ITERATIONS)),
        tokens: key.wrapped.iter().map(WrappedKey::to_token).collect(),
    };
    let place = header.as_deref().unwrap_or(container);
    let staged = Staged::beside(place);
    let whole = if header.is_some() { header_size.0 } else { whole };
    inlinecrypt_io::backing::create_file(staged.temporary(), whole)
        .map_err(|error| Failure::of_file(format!("cannot make {}", place.display()), &error))?;
    let file = HeaderFile::locked(staged.temporary())?;
    let mut made = new.write(file, &mut random).map_err(at(place))?;
    if let (Some(volume_key), Some((passphrase, kdf))) = (&key.volume_key, &key.passphrase) {
        made.add_keyslot(volume_key, 0, passphrase, *kdf, None, &mut random).map_err(at(place))?;
    }
    drop(made);
    if header.is_some()
        && let Some(bytes) = new_data
    {
        // The data comes first: a header alone would be a container without data.
        let data = Staged::beside(container);
        inlinecrypt_io::backing::create_file(data.temporary(), bytes)
            .map_err(|error| Failure::of_file(format!("cannot make {name}"), &error))?;
        data.publish("data")?;
    }
    staged.publish("container")?;
    let mut text = format!(
        "made {name}: LUKS2, {}, {mode}, sectors of {sector_size}\n  UUID  {uuid}\n",
        Size(data_bytes)
    );
    if let Some(WrappedKey { key_id, .. }) = &key.wrapped {
        let _ = writeln!(text, "  key   {key_id}, wrapped, in its header");
    }
    let mut option = String::new();
    if let Some(header) = header {
        let _ = write!(option, "--header {} ", shell_word(header));
    }
    // What the header does not say, and serve has to be told as well.
    if let (Some(engine), true) = (&args.engine.engine, key.wrapped.is_some()) {
        let _ = write!(option, "--engine {} ", files::quoted(&engine.to_string()));
    }
    if let (Some(root), true) = (&args.engine.root, key.wrapped.is_some()) {
        let _ = write!(option, "--root {} ", files::quoted(&root.to_string()));
    }
    let _ = writeln!(text, "To serve it: inlinecrypt serve {option}{}", shell_word(container));
    print(&text)
}

/// Whether two names are one file's, which need not be there yet.
fn is_same_name(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let directory = path.parent().and_then(|parent| parent.canonicalize().ok());
        (directory, path.file_name().map(std::ffi::OsStr::to_owned))
    };
    place(one) == place(other)
}

fn taken(path: &Path) -> Failure {
    Failure::new(
        Code::Busy,
        format!("{} exists already and was not touched", path.display()),
        "Choose another name, or move it away first.",
    )
}

/// The key of a new container, and what opens it.
struct NewKey {
    /// What encrypts the data, if anybody but the engine knows it.
    volume_key: Option<VolumeKey>,
    passphrase: Option<(Zeroizing<Vec<u8>>, Kdf)>,
    wrapped: Option<WrappedKey>,
}

impl NewKey {
    fn make(args: &LuksCreate, place: &Path) -> Result<Self, Failure> {
        let LuksCreate {
            mode,
            key_file,
            kdf,
            wrapped,
            import,
            recovery,
            recovery_passphrase_file,
            engine,
            ..
        } = args;
        if !wrapped && import.is_none() {
            let passphrase =
                Asker::new(&engine.passphrase).with_key_file(key_file.clone()).new_luks(place)?;
            let mut volume_key = Zeroizing::new(vec![0; mode.info().key_bytes]);
            random(&mut volume_key).map_err(no_randomness)?;
            let passphrase = Some((passphrase, kdf.choose()?));
            return Ok(Self { volume_key: Some(volume_key), passphrase, wrapped: None });
        }
        let plan = plan::engine_from(engine)?;
        let master = import.as_deref().map(read_master).transpose()?;
        let passphrase = if *recovery || recovery_passphrase_file.is_some() {
            let file =
                PassphraseArgs { passphrase_file: recovery_passphrase_file.clone(), passphrase_fd: None };
            Some((Asker::new(&file).new_luks(place)?, kdf.choose()?))
        } else {
            None
        };
        let root = Root::open_or_create(&plan.root, &mut Asker::new(&engine.passphrase))
            .map_err(|error| Failure::of_file("cannot open the root", &error))?;
        let host = HostEngine::start(&plan, Some(&root))
            .map_err(|error| Failure::of("cannot start the engine", &error))?;
        let blob = match &master {
            Some(master) => host.profile.import(&RawKey::new(&master[..])),
            None => host.profile.generate(),
        }
        .map_err(|error| Failure::of("cannot make a wrapped key", &error))?;
        // Proves that it opens before anybody relies on it.
        let key_id = host
            .profile
            .prepare(&blob)
            .and_then(|key| Identifier::of(&KeyForm::Wrapped(key), &host.profile))
            .map_err(|error| Failure::of("the new key does not open", &error))?;
        let derivation = token::derivation(&plan.spec);
        // The data is encrypted with what the engine derives, so this is the volume key for everybody else.
        let volume_key = master.map(|master| inline_encryption_key(derivation, &master, *mode));
        let wrapped =
            Some(WrappedKey { blob: blob.as_bytes().to_vec(), mode: *mode, key_id, kdf: Some(derivation) });
        Ok(Self { volume_key, passphrase, wrapped })
    }
}

fn read_master(path: &Path) -> Result<Zeroizing<[u8; 32]>, Failure> {
    let bytes = if path.as_os_str() == "-" {
        files::read_stdin("raw key", 4096)?
    } else {
        files::read(path, "raw key", Secrecy::Secret, 4096)?
    };
    let mut master = Zeroizing::new([0; 32]);
    if bytes.len() != master.len() {
        return Err(Failure::new(
            Code::Refused,
            format!("the raw key has {} bytes, and engines wrap keys of 32", bytes.len()),
            "Give 32 bytes as they are: no hexadecimal, and no line feed at the end.",
        ));
    }
    master.copy_from_slice(&bytes);
    Ok(master)
}

fn no_randomness(error: std::io::Error) -> Failure {
    Failure::of_io("cannot make a key", &error, "Start again; if it stays, the system has no randomness.")
}

fn check_uuid(text: &str) -> Result<String, Failure> {
    let lower = text.to_ascii_lowercase();
    let lens: Vec<usize> = lower.split('-').map(str::len).collect();
    let digits = lower.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    if lens == [8, 4, 4, 4, 12] && digits {
        return Ok(lower);
    }
    Err(Failure::new(
        Code::Wrong,
        format!("{text:?} is no UUID"),
        "Write it as 01234567-89ab-cdef-0123-456789abcdef, or leave it out for a random one.",
    ))
}

/// Version 4 of RFC 9562.
fn random_uuid() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    random(&mut bytes).map_err(no_randomness)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = |range: std::ops::Range<usize>| {
        bytes[range].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    };
    Ok([0..4, 4..6, 6..8, 8..10, 10..16].map(digits).join("-"))
}

/// The container at `path`, for changing it.
fn open_locked(path: &Path) -> Result<Container<HeaderFile>, Failure> {
    let mut file = HeaderFile::locked(path)?;
    if detect(&mut file).map_err(at(path))? == Some(Kind::Luks1) {
        return Err(Failure::new(
            Code::Wrong,
            format!("{} is a LUKS1 container, and these are served here but not changed", path.display()),
            "Change it with cryptsetup; `cryptsetup convert --type luks2` makes LUKS2 of it.",
        ));
    }
    Container::read(file).map_err(at(path))
}

/// The same, if its LUKS keyslots may be changed here: cryptsetup would lose its way in what it is re-encrypting.
fn open_to_change(path: &Path) -> Result<Container<HeaderFile>, Failure> {
    let container = open_locked(path)?;
    container.header().metadata.check_requirements().map_err(|error| {
        at(path)(error).advise("Let cryptsetup finish first, or change it with cryptsetup.")
    })?;
    Ok(container)
}

/// Says what an operation that writes finds damaged, as it mends it.
fn tell_repair(path: &Path, container: &Container<HeaderFile>) {
    if !container.header().is_whole() {
        note(format_args!("{}: one copy of its header was damaged or old, and is made anew", path.display()));
    }
}

/// Standard input gives one passphrase: the second would be empty.
fn check_stdin(open: &OpenArgs, new: &NewArgs) -> Result<(), Failure> {
    let is_stdin = |file: &Option<PathBuf>| file.as_deref() == Some(Path::new("-"));
    if is_stdin(&open.key_file) && is_stdin(&new.new_key_file) {
        return Err(Failure::new(
            Code::Wrong,
            "both passphrases are to come from standard input",
            "Name a file for one of them.",
        ));
    }
    Ok(())
}

fn add_key(args: &LuksAddKey) -> Result<(), Failure> {
    let LuksAddKey { container: path, slot, open, new, kdf } = args;
    check_stdin(open, new)?;
    let mut container = open_to_change(path)?;
    let opened = container.open(&open.ask(path)?, None).map_err(at(path))?;
    let passphrase = new.ask(path)?;
    let kdf = kdf.choose()?;
    tell_repair(path, &container);
    let number = container
        .add_keyslot(&opened.key, opened.digest, &passphrase, kdf, *slot, &mut random)
        .map_err(at(path))?;
    print(&format!("{}: LUKS keyslot {number} has the new passphrase\n", path.display()))
}

fn change_key(args: &LuksChangeKey) -> Result<(), Failure> {
    let LuksChangeKey { container: path, slot, open, new, kdf } = args;
    check_stdin(open, new)?;
    let mut container = open_to_change(path)?;
    let opened = container.open(&open.ask(path)?, *slot).map_err(at(path))?;
    let passphrase = new.ask(path)?;
    let kdf = kdf.choose()?;
    tell_repair(path, &container);
    container.change_keyslot(opened.keyslot, &opened.key, &passphrase, kdf, &mut random).map_err(at(path))?;
    print(&format!("{}: LUKS keyslot {} has the new passphrase\n", path.display(), opened.keyslot))
}

fn remove_key(args: &LuksRemoveKey) -> Result<(), Failure> {
    let LuksRemoveKey { container: path, slot, open, force } = args;
    let mut container = open_to_change(path)?;
    let number = match slot {
        Some(number) => *number,
        None => container.open(&open.ask(path)?, None).map_err(at(path))?.keyslot,
    };
    let metadata = &container.header().metadata;
    // Those that hold another key open nothing.
    let others = metadata.bound_keyslots().any(|other| other != number);
    if !others && metadata.digest_of_keyslot(number).is_some() && !force {
        let wrapped = WrappedKey::find(metadata)?.is_some();
        return Err(Failure::new(
            Code::Wrong,
            match wrapped {
                true => format!(
                    "{}: that is its only passphrase; its wrapped key alone would open it",
                    path.display()
                ),
                false => {
                    format!("{}: that is its only passphrase; nothing would open it any more", path.display())
                }
            },
            "Add another first (inlinecrypt luks add-key), or say --force.",
        ));
    }
    tell_repair(path, &container);
    container.remove_keyslots(&[number], &mut random).map_err(at(path))?;
    print(&format!("{}: LUKS keyslot {number} is removed\n", path.display()))
}

fn test(args: &LuksTest) -> Result<(), Failure> {
    let LuksTest { container: path, slot, open } = args;
    let mut file = HeaderFile::read_only(path)?;
    let passphrase = open.ask(path)?;
    let number = if detect(&mut file).map_err(at(path))? == Some(Kind::Luks1) {
        let header = luks1::Header::read(&mut file).map_err(at(path))?;
        header.open_with(&mut file, &passphrase, *slot).map_err(at(path))?.0
    } else {
        let mut container = Container::read(file).map_err(at(path))?;
        container.open(&passphrase, *slot).map_err(at(path))?.keyslot
    };
    print(&format!("{}: LUKS keyslot {number} opens\n", path.display()))
}

fn dump(args: &LuksDump) -> Result<(), Failure> {
    let LuksDump { container: path, json } = args;
    let mut file = HeaderFile::read_only(path)?;
    if detect(&mut file).map_err(at(path))? == Some(Kind::Luks1) {
        return dump_luks1(&luks1::Header::read(&mut file).map_err(at(path))?, *json);
    }
    let header = Header::read(&mut file).map_err(at(path))?;
    if *json { print_json(&to_json(&header)) } else { print(&to_text(&header)) }
}

fn dump_luks1(header: &luks1::Header, json: bool) -> Result<(), Failure> {
    let luks1::Header { cipher, hash, data_offset, key_bytes, uuid, .. } = header;
    if json {
        let keyslots = header.keyslots().iter().map(|slot| {
            let value = json!({ "iterations": slot.iterations, "stripes": slot.stripes });
            (slot.number.to_string(), value)
        });
        return print_json(&json!({
            "version": 1,
            "luks": 1,
            "uuid": uuid,
            "cipher": cipher,
            "hash": hash.name(),
            "key_bytes": key_bytes,
            "data_offset": data_offset,
            "keyslots": keyslots.collect::<serde_json::Map<_, _>>(),
        }));
    }
    let mut text = format!(
        "LUKS             1\nUUID             {uuid}\ncipher           {cipher}, key of {key_bytes} bytes\nhash             {hash}\ndata             from byte {data_offset} on\n"
    );
    for slot in header.keyslots() {
        let _ = writeln!(text, "LUKS keyslot {}   pbkdf2, {} iterations", slot.number, slot.iterations);
    }
    print(&text)
}

fn to_json(header: &Header) -> Value {
    let copy = |state: &CopyState| match state {
        CopyState::Good => json!({ "state": "good", "reason": null }),
        CopyState::Older => json!({ "state": "older", "reason": null }),
        CopyState::Bad(why) => json!({ "state": "bad", "reason": why }),
    };
    json!({
        "version": 1,
        "luks": 2,
        "uuid": header.uuid,
        "label": header.label,
        "subsystem": header.subsystem,
        "sequence_id": header.sequence_id,
        "header_bytes": header.size,
        "checksum": header.checksum.name(),
        "copies": header.copies.iter().map(copy).collect::<Vec<_>>(),
        "metadata": header.metadata.json(),
    })
}

fn to_text(header: &Header) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<16} {}", crate::report::printable(&value));
    };
    let named = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    row("LUKS", "2".to_owned());
    row("UUID", header.uuid.clone());
    row("label", named(&header.label));
    row("subsystem", named(&header.subsystem));
    row("sequence id", header.sequence_id.to_string());
    let metadata = &header.metadata;
    row("header", format!("2 copies of {} bytes, {} for areas", header.size, metadata.keyslots_bytes()));
    for (name, state) in ["first copy", "second copy"].iter().zip(&header.copies) {
        row(
            name,
            match state {
                CopyState::Good => "good".to_owned(),
                CopyState::Older => "older than the other".to_owned(),
                CopyState::Bad(why) => format!("damaged: {why}"),
            },
        );
    }
    for requirement in metadata.requirements() {
        row("requires", requirement);
    }
    for (number, segment) in metadata.segments() {
        let size = segment.size.map_or_else(|| "to the end".to_owned(), |bytes| format!("{bytes} bytes"));
        row(
            &format!("segment {number}"),
            format!(
                "{}, from byte {}, {size}, {}, sectors of {}, IV offset {}",
                segment.kind, segment.offset, segment.encryption, segment.sector_bytes, segment.iv_tweak
            ),
        );
    }
    for (number, slot) in metadata.keyslots() {
        let kdf = match &slot.kdf {
            Ok(Kdf::Pbkdf2 { hash, iterations }) => format!("pbkdf2 {hash}, {iterations} iterations"),
            Ok(Kdf::Argon2 { variant, passes, memory_kib, lanes }) => {
                let name = match variant {
                    Argon2Variant::I => "argon2i",
                    Argon2Variant::Id => "argon2id",
                };
                format!("{name}, {passes} passes, {memory_kib} KiB, {lanes} lanes")
            }
            Err(why) => why.clone(),
        };
        row(
            &format!("LUKS keyslot {number}"),
            format!(
                "{kdf}; area of {} bytes at byte {}, {}",
                slot.area_bytes, slot.area_offset, slot.encryption_name
            ),
        );
    }
    for (number, token) in metadata.tokens() {
        let kind = token.get("type").and_then(Value::as_str).unwrap_or("?");
        let more = match (kind, token.get("key_id").and_then(Value::as_str)) {
            (token::TYPE, Some(key_id)) => format!(", key {key_id}"),
            _ => String::new(),
        };
        row(&format!("token {number}"), format!("{kind}{more}"));
    }
    for (number, digest) in metadata.digests() {
        let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        row(
            &format!("digest {number}"),
            format!("of LUKS keyslots [{}], segments [{}]", list(&digest.keyslots), list(&digest.segments)),
        );
    }
    text
}

fn backup(args: &LuksBackup) -> Result<(), Failure> {
    let LuksBackup { container: path, out } = args;
    if files::exists(out) {
        return Err(taken(out));
    }
    // Locked, so that it is of one moment.
    let mut container = open_locked(path)?;
    let bytes = container.backup().map_err(at(path))?;
    files::write_new(out, "backup", &bytes)?;
    print(&format!(
        "{}: its header is in {}; keep it as safe as the passphrases\n",
        path.display(),
        out.display()
    ))
}

fn restore(args: &LuksRestore) -> Result<(), Failure> {
    let LuksRestore { container: path, r#in, force } = args;
    let mut bytes = files::read(r#in, "backup", Secrecy::Public, BACKUP_BYTES_MAX)?;
    let backup: Header = Header::read(&mut *bytes).map_err(at(r#in))?;
    let mut file = HeaderFile::locked(path)?;
    let doubt = match detect(&mut file).map_err(at(path))? {
        Some(Kind::Luks2 | Kind::Luks2SecondOnly) => match Header::read(&mut file) {
            Ok(present) if present.uuid == backup.uuid => {
                let present = &present.metadata;
                let requires =
                    [present, &backup.metadata].into_iter().find_map(|of| of.check_requirements().err());
                let requires = requires.map(|why| format!("one of both headers is not to be changed: {why}"));
                requires.or_else(|| backup.metadata.differs_from(present))
            }
            Ok(present) => Some(format!("its UUID is {}, and the backup's is {}", present.uuid, backup.uuid)),
            Err(why) => Some(format!("its header cannot be read ({why})")),
        },
        Some(Kind::Luks1) => Some("it is a LUKS1 container".to_owned()),
        None => Some("there is no LUKS header on it".to_owned()),
    };
    if let Some(doubt) = doubt.filter(|_| !force) {
        return Err(Failure::new(
            Code::Wrong,
            format!("{}: whether the backup belongs to it cannot be told: {doubt}", path.display()),
            "If it does, say --force. A wrong header makes the data unreadable until the right one is put back.",
        ));
    }
    let restored = Container::restore(file, bytes.to_vec(), &mut random).map_err(at(path))?;
    print(&format!(
        "{}: the header of {} is back, with {} LUKS keyslots\n",
        path.display(),
        r#in.display(),
        restored.header().metadata.keyslots().len()
    ))
}

fn repair(args: &LuksRepair) -> Result<(), Failure> {
    let LuksRepair { container: path } = args;
    let mut container = open_locked(path)?;
    let mended = container.repair(&mut random).map_err(at(path))?;
    let what =
        if mended { "both copies of its header are the same again" } else { "there was nothing to repair" };
    print(&format!("{}: {what}\n", path.display()))
}

fn erase(args: &LuksErase) -> Result<(), Failure> {
    let LuksErase { container: path, force } = args;
    let mut container = open_to_change(path)?;
    let metadata = &container.header().metadata;
    let keyslots = metadata.keyslots().len();
    let wrapped = if WrappedKey::find(metadata)?.is_some() { " and its wrapped key" } else { "" };
    if !force {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{}: its {keyslots} LUKS keyslots{wrapped} would be erased, and its data with them",
                path.display()
            ),
            "Say --force to do it.",
        ));
    }
    container.erase(token::TYPE, &mut random).map_err(at(path))?;
    print(&format!("{}: {keyslots} LUKS keyslots{wrapped} are erased\n", path.display()))
}

fn resize(args: &LuksResize) -> Result<(), Failure> {
    let LuksResize { container: path, header, size: Size(size), shrink } = args;
    let header_path: PathBuf = header.clone().unwrap_or_else(|| path.clone());
    let mut container = open_locked(&header_path)?;
    let (_, segment) = container.header().metadata.data().map_err(at(&header_path))?;
    let (offset, fixed, sector) = (segment.offset, segment.size, u64::from(segment.sector_bytes));
    let wrong = |what: String, advice: &str| {
        Err(Failure::new(Code::Wrong, format!("{}: {what}", path.display()), advice))
    };
    if *size == 0 || size % sector != 0 {
        return wrong(
            format!("{size} bytes are not a multiple of the sector size, {sector} bytes"),
            "Give another size.",
        );
    }
    let Some(end) = offset.checked_add(*size) else {
        return wrong(format!("{size} bytes are more than any file has"), "Give another size.");
    };
    // The data's file, if it is another than the header's.
    let mut detached = header.is_some().then(|| HeaderFile::locked(path)).transpose()?;
    let there = detached.as_ref().map_or_else(|| container.storage().len_bytes(), Storage::len_bytes);
    let is_regular =
        detached.as_ref().map_or_else(|| container.storage().is_regular(), HeaderFile::is_regular);
    let header_end = {
        let header = container.header();
        2 * header.size + header.metadata.keyslots_bytes()
    };
    if header.is_none() && offset < header_end {
        return wrong(
            format!(
                "its data begins at byte {offset}, and its header ends at {header_end}: the data is not in this file"
            ),
            "Name the data, and give this file with --header.",
        );
    }
    let Some(room) = there.checked_sub(offset) else {
        return Err(Failure::new(
            Code::File,
            format!("{}: it ends at byte {there}, and its data begins at {offset}", path.display()),
            "Name the whole container; with a detached header name the data, and give the header with --header.",
        ));
    };
    let now = fixed.unwrap_or(room / sector * sector);
    // What lies behind the data in its file is somebody else's.
    let ends_with_data = there - there.min(offset + now) < sector;
    if *size < now && !shrink {
        return wrong(
            format!("it has {}, and would lose its end", Size(now)),
            "Make the filesystem in it smaller first, then say --shrink.",
        );
    }
    if end > there && !is_regular {
        return wrong(
            format!("{} are asked for, and the device has {} behind the header", Size(*size), Size(room)),
            "Make the device larger first.",
        );
    }
    let set_len = |container: &mut Container<HeaderFile>, detached: &mut Option<HeaderFile>| {
        let file = match detached {
            Some(file) => file,
            None => container.storage_mut(),
        };
        file.set_len(end)
            .map_err(|error| Failure::of_io(path.display(), &error, "Make room, or choose another size."))
    };
    // There is never less than the header says.
    if end > there {
        set_len(&mut container, &mut detached)?;
    }
    if fixed.is_some() || !is_regular {
        tell_repair(&header_path, &container);
        container.resize(Some(*size), &mut random).map_err(at(&header_path))?;
    }
    if end < there && is_regular && ends_with_data {
        set_len(&mut container, &mut detached)?;
    }
    print(&format!("{}: has {} now, and had {}\n", path.display(), Size(*size), Size(now)))
}
