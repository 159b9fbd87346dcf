//! `fscrypt ls | cat | verify | info`: encrypted files on ext4, read without the kernel.
//!
//! Raw master keys are used here. Hardware-wrapped ones are prepared by the engine, which keeps the key for contents to itself:
//! what reaches this process is the software secret, as in Linux, and data that the engine decrypted.

use crate::ask::Asker;
use crate::cli::{FscryptCat, FscryptCommand, FscryptImage, FscryptInfo, FscryptLs, FscryptVerify};
use crate::files::shell_word;
use crate::host::HostEngine;
use crate::identifier::Identifier;
use crate::keyfile::{KeySource, LoadedKey, Wanted};
use crate::plan;
use crate::report::{Code, Failure, note, print, print_bytes, print_json, printable};
use inlinecrypt_core::Dun;
use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::engine::Direction;
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_core::key::{EphemeralWrappedKey, Key, KeyForm};
use inlinecrypt_core::profile::{Admission, CryptoProfile};
use inlinecrypt_fscrypt::ext4::{Ext4Error, FileKind};
use inlinecrypt_fscrypt::image::{Image, ImageError, Keyring, Listed, Node};
use inlinecrypt_fscrypt::master::{EngineFailure, InlineEngine, MasterKey, Way};
use inlinecrypt_fscrypt::policy::{KeyRef, Policy};
use inlinecrypt_fscrypt::verify::{Counts, KeyState, Problem, Report, verify};
use rustix::fs::{FileType, OFlags};
use serde::{Serialize, Serializer};
use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) fn run(command: FscryptCommand) -> Result<(), Failure> {
    match command {
        FscryptCommand::Ls(args) => ls(&args),
        FscryptCommand::Cat(args) => cat(&args),
        FscryptCommand::Verify(args) => run_verify(&args),
        FscryptCommand::Info(args) => info(&args),
    }
}

/// An image that is open, and what to call it.
struct Opened {
    image: Image<File>,
    name: String,
    /// By identifier, what the keys were called on the command line.
    keys: Vec<(Identifier, KeySource)>,
}

fn open(args: &FscryptImage) -> Result<Opened, Failure> {
    let FscryptImage { image, keys, .. } = args;
    let name = image.display().to_string();
    // Before anything of keys is asked for.
    let file = open_file(image)?;
    let (keyring, keys) = load_keys(args, keys.iter().any(|key| key.source.wanted == Wanted::Wrapped))?;
    let image = Image::open(file, keyring).map_err(|error| unreadable(&name, &error))?;
    Ok(Opened { image, name, keys })
}

/// Opens a regular file or block device for reading.
fn open_file(path: &Path) -> Result<File, Failure> {
    let refused = |errno: rustix::io::Errno| {
        Failure::of_io(path.display(), &errno.into(), "Check the name, and who may read it.")
    };
    // Not blocking: opening a fifo would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(refused)?;
    match FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(refused)?.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => Ok(File::from(file)),
        _ => Err(Failure::new(
            Code::File,
            format!("{} is neither a regular file nor a block device", path.display()),
            "Name an image of an ext4 filesystem, or the device that it is on.",
        )),
    }
}

fn unreadable(name: &str, error: &Ext4Error) -> Failure {
    let advice = match error {
        Ext4Error::Io(error) => {
            return Failure::of_io(format!("{name} cannot be read"), error, "Check the medium.");
        }
        Ext4Error::NotExt4 => {
            "Name an image of the filesystem itself; of a whole disk, the partition.".to_owned()
        }
        Ext4Error::Unsupported(_) => {
            "Mount it with Linux; `dumpe2fs -h` says more about its features.".to_owned()
        }
        Ext4Error::NeedsRecovery => format!(
            "Unmount it, or repair a copy: e2fsck -fy COPY; the journal of {} is left alone here",
            shell_word(Path::new(name))
        ),
        Ext4Error::Damaged(_) => {
            "Repair a copy (e2fsck -fy COPY), or bring it back from another one.".to_owned()
        }
    };
    Failure::new(Code::File, format!("{name} {error}"), advice)
}

fn load_keys(
    args: &FscryptImage,
    wants_engine: bool,
) -> Result<(Keyring, Vec<(Identifier, KeySource)>), Failure> {
    let mut keyring = Keyring::default();
    let mut named = Vec::new();
    let mut engine = None;
    for key in &args.keys {
        let source = &key.source;
        let loaded = source.load()?;
        let master = match &loaded {
            LoadedKey::Raw(raw) => MasterKey::raw(raw.expose()).map_err(|why| {
                Failure::new(
                    Code::Refused,
                    format!("{source} cannot be used: {why}"),
                    "Give the master key's bytes as they are: no hexadecimal, no line feed.",
                )
            })?,
            LoadedKey::Wrapped(_) => {
                if engine.is_none() && wants_engine {
                    engine = Some(start_engine(args)?);
                }
                let Some(host) = &engine else { continue };
                open_wrapped(&loaded, source, host)?
            }
        };
        if key.descriptor.is_some() && matches!(loaded, LoadedKey::Wrapped(_)) {
            return Err(Failure::new(
                Code::Wrong,
                format!("{source} is hardware-wrapped, and was given a descriptor"),
                "Policies of version 1 have raw keys alone: give it without DESCRIPTOR=",
            ));
        }
        named.push((Identifier::from(master.name().identifier), source.clone()));
        keyring.add(master, key.descriptor);
    }
    Ok((keyring, named))
}

fn start_engine(args: &FscryptImage) -> Result<HostEngine, Failure> {
    let mut plan = plan::engine_from(&args.engine)?;
    args.isolation.apply(&mut plan);
    HostEngine::start_at_home(&plan, true, false, &mut Asker::new(&args.engine.passphrase)).map_err(|error| {
        let failure = Failure::of_file("cannot start the engine", &error);
        if error.kind() == ErrorKind::NotFound {
            failure.advise("Name the root that wrapped the key with --root SPEC; a new one cannot open it.")
        } else {
            failure
        }
    })
}

fn open_wrapped(loaded: &LoadedKey, source: &KeySource, host: &HostEngine) -> Result<MasterKey, Failure> {
    let KeyForm::Wrapped(blob) = loaded.form(&host.profile, source)? else {
        return Err(Failure::new(Code::Refused, format!("{source} is not wrapped"), "Give it as raw:FILE."));
    };
    let secret = host
        .profile
        .derive_software_secret(&blob)
        .map_err(|error| Failure::of(format!("{source} is refused"), &error))?;
    let engine = EngineContents { profile: host.profile.clone(), blob, admissions: Mutex::default() };
    Ok(MasterKey::in_engine(secret.expose(), Arc::new(engine)))
}

/// Contents, through the engine that opened the key: one admission for each size of data unit.
#[derive(Debug)]
struct EngineContents {
    profile: Arc<CryptoProfile>,
    blob: EphemeralWrappedKey,
    admissions: Mutex<HashMap<u32, Admission>>,
}

/// Bytes of a DUN with IV_INO_LBLK_64; with IV_INO_LBLK_32 the upper four are zero.
const DUN_BYTES: u8 = 8;

impl EngineContents {
    fn admit(&self, unit_bytes: u32) -> Result<Admission, EngineFailure> {
        let unit = DataUnitSize::from_bytes(unit_bytes).ok_or("no such data unit")?;
        let form = KeyForm::Wrapped(EphemeralWrappedKey::new(self.blob.as_bytes()));
        let key = Key::new(Mode::Aes256Xts, unit, DUN_BYTES, form, Hardware::Allowed)?;
        Ok(self.profile.admit(key, Fallback::Off).map_err(inlinecrypt_core::error::Error::from)?)
    }
}

impl InlineEngine for EngineContents {
    fn crypt(&self, way: Way, first: Dun, unit_bytes: u32, data: &mut [u8]) -> Result<(), EngineFailure> {
        let mut admissions = self.admissions.lock().unwrap_or_else(PoisonError::into_inner);
        let admission = match admissions.entry(unit_bytes) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(self.admit(unit_bytes)?),
        };
        let direction = match way {
            Way::Encrypt => Direction::Encrypt,
            Way::Decrypt => Direction::Decrypt,
        };
        let mut buffer = admission.private_buffer(data.len())?;
        buffer.bytes_mut()[..data.len()].copy_from_slice(data);
        admission.crypt(direction, first, buffer.memory_mut(), 0..data.len())?;
        data.copy_from_slice(&buffer.bytes()[..data.len()]);
        Ok(())
    }
}

/// A failure at a path of the image.
fn at_path(opened: &Opened, path: &[u8], error: &ImageError) -> Failure {
    let place = format!("{}: {}", opened.name, shown(path));
    let new = |code, advice: &str| Failure::new(code, format!("{place} {error}"), advice);
    match error {
        ImageError::Ext4(error) => unreadable(&place, error),
        ImageError::Damaged(_) => new(Code::File, "`inlinecrypt fscrypt verify` tells what else is wrong."),
        ImageError::NoKey(_) => {
            new(Code::Refused, "Give its master key with --key raw:FILE (wrapped: --key FILE).")
        }
        ImageError::WrongKey(_) => new(Code::Refused, "Give the key that the policy was made for."),
        ImageError::Engine(source) => Failure::new(
            Code::File,
            format!("{place} {error}: {source}"),
            "`inlinecrypt engine info` shows what the engine can do: AES-256-XTS with this data unit is needed.",
        ),
        ImageError::NotFound => new(Code::File, "`inlinecrypt fscrypt ls -R IMAGE` lists what there is."),
        ImageError::Kind(_) => new(Code::Wrong, "`inlinecrypt fscrypt ls -l` shows what it is."),
        ImageError::Sink(source) => {
            Failure::of_io(format!("{place} {error}"), source, "Make room, or send it elsewhere.")
        }
    }
}

/// A path for messages, from the top of the image on.
fn shown(path: &[u8]) -> String {
    let start = path.iter().take_while(|&&byte| byte == b'/').count();
    format!("/{}", printable(&String::from_utf8_lossy(&path[start..])))
}

/// What lies at `below` from `path` on.
fn joined(path: &[u8], below: &[u8]) -> Vec<u8> {
    [path.strip_suffix(b"/").unwrap_or(path), below].join(&b'/')
}

fn key_failure(opened: &Opened, missing: KeyRef) -> Failure {
    let what = if opened.keys.is_empty() {
        format!("{}: key {missing} is needed, and none was given", opened.name)
    } else {
        let keys: Vec<String> = opened.keys.iter().map(|(id, source)| format!("{source} is {id}")).collect();
        format!("{}: wrong key: {missing} is needed, and {}", opened.name, keys.join(", "))
    };
    let advice = match missing {
        KeyRef::Identifier(_) => {
            "Give the master key with that identifier: --key raw:FILE (wrapped: --key FILE)."
        }
        KeyRef::Descriptor(_) => {
            "Give the master key that was added by that descriptor: --key DESCRIPTOR=raw:FILE"
        }
    };
    Failure::new(Code::Refused, what, advice)
}

/// A name that is listed, and what it leads to. What an inode that cannot be read would say is `None`.
#[derive(Serialize)]
struct Row {
    #[serde(serialize_with = "as_text")]
    path: Vec<u8>,
    /// Its bytes in hexadecimal, if they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    inode: u32,
    kind: Option<&'static str>,
    size: Option<u64>,
    encrypted: Option<bool>,
    /// Whether the name is decrypted, or needs no decryption.
    named: bool,
    #[serde(serialize_with = "as_optional_text")]
    target: Option<Vec<u8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_hex: Option<String>,
    policy: Option<String>,
    problem: Option<String>,
}

fn as_text<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&String::from_utf8_lossy(bytes))
}

fn as_optional_text<S: Serializer>(bytes: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
    bytes.as_deref().map(String::from_utf8_lossy).serialize(to)
}

/// What text cannot say of a name.
fn hex_unless_text(bytes: &[u8]) -> Option<String> {
    str::from_utf8(bytes).is_err().then(|| hex(bytes))
}

fn ls(args: &FscryptLs) -> Result<(), Failure> {
    let FscryptLs { on, path, recursive, long, json } = args;
    let opened = open(on)?;
    let path = path.as_bytes();
    let top = opened.image.lookup(path).map_err(|error| at_path(&opened, path, &error))?;
    let top_policy = top.context.map(|context| context.policy);
    let mut rows: Vec<Row> = Vec::new();
    let mut unknown = None;
    let mut failure = None;
    let mut seen = std::collections::HashSet::from([top.inode.number]);
    // Each with its row; the top has none.
    let mut pending = vec![(Vec::new(), None, top)];
    while let Some((prefix, at, node)) = pending.pop() {
        let mut entries = match opened.image.entries(&node) {
            Ok(entries) => entries,
            Err(error) => {
                let Some(at) = at else { return Err(at_path(&opened, path, &error)) };
                let row: &mut Row = &mut rows[at];
                row.problem.get_or_insert(error.to_string());
                failure.get_or_insert(at_path(&opened, &joined(path, &row.path), &error));
                continue;
            }
        };
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        if let Some(context) = &node.context
            && opened.image.keys().find(context.policy.key()).is_none()
        {
            unknown.get_or_insert(context.policy.key());
        }
        let mut below = Vec::new();
        for entry in entries {
            let Listed { name, inode, wrong, .. } = entry;
            let full = [&prefix[..], &name].concat();
            let named = wrong.is_none()
                && node
                    .context
                    .is_none_or(|context| opened.image.keys().find(context.policy.key()).is_some());
            let child = match opened.image.node(inode) {
                Ok(child) => child,
                Err(error) => {
                    // The others are listed all the same.
                    failure.get_or_insert(at_path(&opened, &joined(path, &full), &error));
                    rows.push(Row::damaged(full, inode, named, error.to_string()));
                    continue;
                }
            };
            if *recursive && child.inode.kind == FileKind::Directory && seen.insert(inode) {
                below.push(([&full[..], b"/"].concat(), Some(rows.len()), child.clone()));
            }
            rows.push(Row::of(&opened, full, &child, named, wrong.map(|why| why.to_string())));
        }
        pending.extend(below.into_iter().rev());
    }
    if *json {
        print_json(&rows)?;
    } else {
        // A terminal must not obey names; whatever else reads them gets their bytes.
        let names = if io::stdout().is_terminal() { escaped } else { <[u8]>::to_vec };
        print_bytes(&rows.iter().map(|row| row.line(*long, names)).collect::<Vec<_>>().concat())?;
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    match unknown {
        Some(missing)
            if !opened.keys.is_empty() && top_policy.is_none_or(|policy| policy.key() == missing) =>
        {
            Err(key_failure(&opened, missing))
        }
        Some(missing) => {
            note(format_args!(
                "key {missing} was not given: what it encrypts is shown as Linux shows it without"
            ));
            Ok(())
        }
        None => Ok(()),
    }
}

impl Row {
    fn of(opened: &Opened, path: Vec<u8>, node: &Node, named: bool, problem: Option<String>) -> Self {
        let target = (node.inode.kind == FileKind::Link).then(|| opened.image.target(node));
        let (target, problem) = match target {
            Some(Ok(target)) => (Some(target), problem),
            Some(Err(error)) => (None, problem.or(Some(error.to_string()))),
            None => (None, problem),
        };
        Self {
            path_hex: hex_unless_text(&path),
            path,
            inode: node.inode.number,
            kind: Some(kind(node.inode.kind)),
            size: Some(node.inode.size),
            encrypted: Some(node.context.is_some()),
            named,
            target_hex: target.as_deref().and_then(hex_unless_text),
            target,
            policy: node.context.map(|context| context.policy.to_string()),
            problem,
        }
    }

    /// A name whose inode cannot be read.
    fn damaged(path: Vec<u8>, inode: u32, named: bool, problem: String) -> Self {
        Self {
            path_hex: hex_unless_text(&path),
            path,
            inode,
            kind: None,
            size: None,
            encrypted: None,
            named,
            target: None,
            target_hex: None,
            policy: None,
            problem: Some(problem),
        }
    }

    /// Its line, with its names as `names` writes them.
    fn line(&self, long: bool, names: fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let Self { path, inode, kind, size, encrypted, target, problem, .. } = self;
        if !long {
            return [&names(path)[..], b"\n"].concat();
        }
        let encrypted = match encrypted {
            Some(true) => "encrypted",
            Some(false) => "-",
            None => "?",
        };
        let size = size.map_or_else(|| "?".to_owned(), |size| size.to_string());
        let start = format!("{inode:>10}  {:<9}  {encrypted:<9}  {size:>14}  ", kind.unwrap_or("?"));
        let mut line = [start.as_bytes(), &names(path)].concat();
        if let Some(target) = target {
            line.extend([&b" -> "[..], &names(target)].concat());
        }
        if let Some(problem) = problem {
            line.extend(format!("  ({})", printable(problem)).bytes());
        }
        line.push(b'\n');
        line
    }
}

/// A name as a terminal may be shown it: what would steer it or is no UTF-8 as `\xNN`, which a backslash is, too.
fn escaped(name: &[u8]) -> Vec<u8> {
    let mut text = String::new();
    let hide = |text: &mut String, bytes: &[u8]| {
        for byte in bytes {
            let _ = write!(text, "\\x{byte:02x}");
        }
    };
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                hide(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(c);
            }
        }
        hide(&mut text, chunk.invalid());
    }
    text.into_bytes()
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Link => "link",
        FileKind::Special => "special",
    }
}

fn cat(args: &FscryptCat) -> Result<(), Failure> {
    let opened = open(&args.on)?;
    let path = args.path.as_bytes();
    let failed = |error: ImageError| at_path(&opened, path, &error);
    let node = match opened.image.lookup(path) {
        // Below an encrypted directory, a name that is not found is mostly one that was not decrypted.
        Err(ImageError::NotFound) => return Err(not_found(&opened, path)),
        other => other.map_err(failed)?,
    };
    if node.inode.kind == FileKind::Link {
        let target = opened.image.target(&node).map_err(failed)?;
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{}: {} is a symbolic link to {}",
                opened.name,
                shown(path),
                printable(&String::from_utf8_lossy(&target))
            ),
            "Links are not followed: name the file that it leads to.",
        ));
    }
    let mut out = io::stdout().lock();
    match opened.image.read(&node, &mut |piece| out.write_all(piece)) {
        // A reader that has gone is no failure of ours.
        Err(ImageError::Sink(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        read => read.and_then(|()| out.flush().map_err(ImageError::Sink)).map_err(failed),
    }
}

/// A name is not there: the longest part of the path that is there says whether a key is missing.
fn not_found(opened: &Opened, path: &[u8]) -> Failure {
    let mut end = path.len();
    while let Some(slash) = path[..end].iter().rposition(|&byte| byte == b'/').or((end > 0).then_some(0)) {
        end = slash;
        match opened.image.lookup(&path[..end]) {
            Ok(Node { context: Some(context), .. })
                if opened.image.keys().find(context.policy.key()).is_none() =>
            {
                return key_failure(opened, context.policy.key());
            }
            Ok(_) => break,
            Err(_) => {}
        }
    }
    at_path(opened, path, &ImageError::NotFound)
}

#[derive(Serialize)]
struct VerifyJson {
    version: u32,
    image: String,
    path: String,
    compared: bool,
    good: bool,
    policies: Vec<PolicyJson>,
    checked: CountsJson,
    without_key: CountsJson,
    unencrypted: CountsJson,
    problem_count: u64,
    problems: Vec<ProblemJson>,
    unused_keys: Vec<String>,
}

#[derive(Serialize)]
struct PolicyJson {
    version: u8,
    contents: String,
    names: String,
    derivation: &'static str,
    data_unit_bytes: u32,
    padding_bytes: usize,
    key: String,
    /// `given`, `missing` or `wrong`.
    key_state: &'static str,
    inodes: u64,
}

#[derive(Serialize)]
struct CountsJson {
    files: u64,
    directories: u64,
    links: u64,
    names: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct ProblemJson {
    path: String,
    inode: Option<u32>,
    problem: String,
}

impl From<Counts> for CountsJson {
    fn from(counts: Counts) -> Self {
        let Counts { files, directories, links, names, bytes } = counts;
        Self { files, directories, links, names, bytes }
    }
}

fn key_state(state: KeyState) -> &'static str {
    match state {
        KeyState::Given => "given",
        KeyState::Missing => "missing",
        KeyState::Wrong => "wrong",
    }
}

fn policy_json(policy: &Policy, state: KeyState, inodes: u64, block_bytes: u32) -> PolicyJson {
    PolicyJson {
        version: policy.version(),
        contents: policy.contents().mode().to_string(),
        names: policy.names().to_string(),
        derivation: policy.derivation().name(),
        data_unit_bytes: policy.data_unit_bytes(block_bytes),
        padding_bytes: policy.padding_bytes(),
        key: policy.key().to_string(),
        key_state: key_state(state),
        inodes,
    }
}

fn run_verify(args: &FscryptVerify) -> Result<(), Failure> {
    let FscryptVerify { on, path, against, json } = args;
    if let Some(against) = against
        && !against.is_dir()
    {
        return Err(Failure::new(
            Code::File,
            format!("--against {}: there is no such directory", against.display()),
            "Name the directory where the same files lie in plaintext.",
        ));
    }
    let opened = open(on)?;
    let path = path.as_bytes();
    let report =
        verify(&opened.image, path, against.as_deref()).map_err(|error| match (&error, against) {
            (ImageError::Sink(source), Some(against)) => Failure::of_io(
                format!("cannot read what is in {}", against.display()),
                source,
                "Check who may read it.",
            ),
            _ => at_path(&opened, path, &error),
        })?;
    let unused: Vec<String> = opened
        .keys
        .iter()
        .filter(|(identifier, source)| !is_used(&report, *identifier, source, on))
        .map(|(identifier, source)| format!("{source} ({identifier})"))
        .collect();
    if *json {
        let block_bytes = opened.image.fs().superblock().block_bytes;
        print_json(&VerifyJson {
            version: 1,
            image: opened.name.clone(),
            path: shown(path),
            compared: against.is_some(),
            good: report.is_good(),
            policies: report
                .policies
                .iter()
                .map(|of| policy_json(&of.policy, of.key, of.inodes, block_bytes))
                .collect(),
            checked: report.checked.into(),
            without_key: report.without_key.into(),
            unencrypted: report.unencrypted.into(),
            problem_count: report.problem_count,
            problems: report.problems.iter().map(problem_json).collect(),
            unused_keys: unused.clone(),
        })?;
    } else {
        print(&describe(&report, against.is_some()))?;
    }
    for key in &unused {
        note(format_args!("{key} is the key of no policy here"));
    }
    verdict(&opened, &report)
}

/// Whether a key that was given is that of a policy that was met.
fn is_used(report: &Report, identifier: Identifier, source: &KeySource, on: &FscryptImage) -> bool {
    report.policies.iter().any(|of| match of.policy.key() {
        KeyRef::Identifier(wanted) => Identifier::from(wanted) == identifier,
        KeyRef::Descriptor(_) => {
            of.key != KeyState::Missing
                && on
                    .keys
                    .iter()
                    .any(|key| key.source.written() == source.written() && key.source.wanted == Wanted::Raw)
        }
    })
}

fn problem_json(problem: &Problem) -> ProblemJson {
    let Problem { path, inode, what } = problem;
    ProblemJson { path: String::from_utf8_lossy(path).into_owned(), inode: *inode, problem: what.clone() }
}

fn verdict(opened: &Opened, report: &Report) -> Result<(), Failure> {
    let wrong = report.policies.iter().find(|policy| policy.key == KeyState::Wrong);
    if let Some(wrong) = wrong {
        return Err(Failure::new(
            Code::Refused,
            format!(
                "{}: wrong key: the one given for {} decrypts none of its names",
                opened.name,
                wrong.policy.key()
            ),
            "Give the master key that was added by that descriptor.",
        ));
    }
    if report.problem_count > 0 {
        return Err(Failure::new(
            Code::File,
            format!("{}: {} found", opened.name, plural(report.problem_count, "problem")),
            "Each is printed with its path. Work on a copy; what was never encrypted should be written again.",
        ));
    }
    match report.policies.iter().find(|policy| policy.key == KeyState::Missing) {
        Some(missing) => Err(key_failure(opened, missing.policy.key())),
        None => Ok(()),
    }
}

fn plural(count: u64, what: &str) -> String {
    let ending = match (count, what.strip_suffix('y')) {
        (1, _) => return format!("1 {what}"),
        (_, Some(stem)) => return format!("{count} {stem}ies"),
        _ => "s",
    };
    format!("{count} {what}{ending}")
}

fn counts(counts: &Counts) -> String {
    let Counts { files, directories, links, names, bytes } = *counts;
    format!(
        "{}, {}, {}, {}, {}",
        plural(files, "file"),
        plural(directories, "directory"),
        plural(links, "link"),
        plural(names, "name"),
        crate::size::Size(bytes)
    )
}

/// The report for people.
fn describe(report: &Report, compared: bool) -> String {
    let mut out = String::new();
    for of in &report.policies {
        let state = match of.key {
            KeyState::Given => "",
            KeyState::Missing => ": NOT GIVEN",
            KeyState::Wrong => ": WRONG",
        };
        let _ = writeln!(out, "policy       {}{state}; {}", of.policy, plural(of.inodes, "inode"));
    }
    if report.policies.is_empty() {
        out.push_str("nothing is encrypted here\n");
    }
    let with = if compared { "checked, and compared with the plaintext" } else { "checked" };
    let _ = writeln!(out, "{with}: {}", counts(&report.checked));
    if report.without_key != Counts::default() {
        let _ = writeln!(out, "without key: {}", counts(&report.without_key));
    }
    let Counts { files, directories, links, .. } = report.unencrypted;
    let _ = writeln!(
        out,
        "not encrypted: {}, {}, {}",
        plural(files, "file"),
        plural(directories, "directory"),
        plural(links, "link")
    );
    for Problem { path, inode, what } in &report.problems {
        let inode = inode.map(|inode| format!(" (inode {inode})")).unwrap_or_default();
        let _ = writeln!(out, "PROBLEM  {}{inode}: {}", shown(path), printable(what));
    }
    let unsaid = report.problem_count - report.problems.len() as u64;
    if unsaid > 0 {
        let _ = writeln!(out, "and {}", plural(unsaid, "other problem"));
    }
    out.push_str(match (report.problem_count, report.lacks_keys()) {
        (0, false) => "good\n",
        (0, true) => "good as far as it can be said without all keys\n",
        _ => "NOT GOOD\n",
    });
    out
}

#[derive(Serialize)]
struct InfoJson {
    version: u32,
    path: String,
    inode: u32,
    kind: &'static str,
    size: u64,
    encrypted: bool,
    policy: Option<PolicyJson>,
    context: Option<String>,
    nonce: Option<String>,
    /// The DUN of data unit 0 of contents, or of names.
    first_dun: Option<String>,
    contents_key: Option<String>,
    names_key: Option<String>,
    dirhash_key: Option<String>,
    inode_hash_key: Option<String>,
}

fn info(args: &FscryptInfo) -> Result<(), Failure> {
    let FscryptInfo { on, path, show_keys, json } = args;
    let opened = open(on)?;
    let path = path.as_bytes();
    let node = match opened.image.lookup(path) {
        Err(ImageError::NotFound) => return Err(not_found(&opened, path)),
        other => other.map_err(|error| at_path(&opened, path, &error))?,
    };
    let superblock = opened.image.fs().superblock();
    let mut shown_info = InfoJson {
        version: 1,
        path: shown(path),
        inode: node.inode.number,
        kind: kind(node.inode.kind),
        size: node.inode.size,
        encrypted: node.context.is_some(),
        policy: None,
        context: None,
        nonce: None,
        first_dun: None,
        contents_key: None,
        names_key: None,
        dirhash_key: None,
        inode_hash_key: None,
    };
    if let Some(context) = &node.context {
        let key = opened.image.keys().find(context.policy.key());
        let state = if key.is_some() { KeyState::Given } else { KeyState::Missing };
        shown_info.policy = Some(policy_json(&context.policy, state, 1, superblock.block_bytes));
        shown_info.context = Some(hex(&context.to_bytes()));
        shown_info.nonce = Some(hex(&context.nonce));
        if let Some(key) = key {
            let wrong = |why| at_path(&opened, path, &ImageError::WrongKey(why));
            let first = opened.image.first_dun(&node).map_err(|error| at_path(&opened, path, &error))?;
            shown_info.first_dun = first.map(|dun| hex(&dun.to_le_bytes()));
            if *show_keys {
                let derive = inlinecrypt_fscrypt::file::FileError::Derive;
                if node.inode.kind == FileKind::Regular {
                    let bytes = key.contents_key_bytes(context, &superblock.uuid);
                    shown_info.contents_key = bytes.map_err(|why| wrong(derive(why)))?.map(|key| hex(&key));
                } else {
                    let bytes = key.names_key(context, &superblock.uuid).map_err(|why| wrong(derive(why)))?;
                    shown_info.names_key = Some(hex(&bytes));
                }
                if context.policy.version() == 2 {
                    shown_info.dirhash_key = (node.inode.kind == FileKind::Directory)
                        .then(|| hex(&*key.dirhash_key(&context.nonce)));
                    shown_info.inode_hash_key = Some(hex(&*key.inode_hash_key()));
                }
            }
        }
    }
    if *json {
        return print_json(&shown_info);
    }
    print(&describe_info(&shown_info, node.context.map(|context| context.policy)))
}

fn describe_info(info: &InfoJson, policy: Option<Policy>) -> String {
    let mut rows = vec![
        ("path", info.path.clone()),
        ("inode", info.inode.to_string()),
        ("kind", info.kind.to_owned()),
        ("size", info.size.to_string()),
        (
            "policy",
            policy.map_or_else(|| "none: it is not encrypted".to_owned(), |policy| policy.to_string()),
        ),
    ];
    let optional = [
        ("nonce", &info.nonce),
        ("context", &info.context),
        ("DUN of unit 0", &info.first_dun),
        ("contents key", &info.contents_key),
        ("names key", &info.names_key),
        ("dirhash key", &info.dirhash_key),
        ("inode hash key", &info.inode_hash_key),
    ];
    rows.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))));
    rows.into_iter().map(|(name, value)| format!("{name:<14}  {value}\n")).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opened({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_shown_names_and_obeys_none() {
        let name = b"a\n\x1b[2J\xc3\xa9\xff\\\xc2\x9b";
        assert_eq!(String::from_utf8(escaped(name)).unwrap(), "a\\x0a\\x1b[2J\u{e9}\\xff\\x5c\\xc2\\x9b");
        let row = Row::damaged(name.to_vec(), 7, true, "is damaged".to_owned());
        for long in [false, true] {
            let line = row.line(long, escaped);
            assert!(!line[..line.len() - 1].iter().any(u8::is_ascii_control), "{line:?}");
            // Others get what there is.
            let line = row.line(long, <[u8]>::to_vec);
            assert!(line.windows(name.len()).any(|bytes| bytes == name), "{line:?}");
        }
    }

    #[test]
    fn names_that_are_no_text_are_in_json_too() {
        let json = |name: &[u8]| {
            serde_json::to_value(Row::damaged(name.to_vec(), 7, true, "is damaged".to_owned())).unwrap()
        };
        let row = json(b"a\xff");
        assert_eq!((&row["path"], &row["path_hex"]), (&"a\u{fffd}".into(), &"61ff".into()));
        assert_eq!(json("\u{e9}".as_bytes()).get("path_hex"), None);
    }

    #[test]
    fn paths_begin_at_the_top() {
        for (path, text) in [(&b""[..], "/"), (b"/", "/"), (b"a/b", "/a/b"), (b"//a", "/a")] {
            assert_eq!(shown(path), text);
        }
        assert_eq!(shown(&joined(b"", b"a")), "/a");
        assert_eq!(shown(&joined(b"d/", b"a")), "/d/a");
    }
}
