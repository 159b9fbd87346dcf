//! `key generate | import | prepare | info`: the ladder, with keys on files and standard input and output only.

use super::key_device;
use crate::ask::Asker;
use crate::cli::{EngineArgs, KeyCommand, KeyInfo, KeyTransform};
use crate::files::{self, Secrecy};
use crate::host::HostEngine;
use crate::identifier::Identifier;
use crate::plan;
use crate::report::{Code, Failure, print, print_bytes, print_json};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_core::key::{KeyForm, LongTermWrappedKey, RawKey};
use inlinecrypt_engine::{BlobError, Form, Root, inspect, looks_like_wrapped_key};
use serde::Serialize;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use zeroize::Zeroizing;

/// More is no key of any form.
const KEY_BYTES_MAX: usize = 4096;

pub(super) fn run(command: KeyCommand) -> Result<(), Failure> {
    match command {
        KeyCommand::Generate(args) => {
            check_out(args.out.as_deref())?;
            if let Some(device) = &args.device {
                return key_device::generate(device, args.out.as_deref());
            }
            let engine = open(&args.engine, Roots::MakeIfMissing)?;
            let blob = engine.profile.generate().map_err(|error| Failure::of("cannot make a key", &error))?;
            finish_long_term(&blob, &engine, args.out.as_deref())
        }
        KeyCommand::Import(args) => import(&args),
        KeyCommand::Prepare(args) => prepare(&args),
        KeyCommand::Info(args) => info(&args),
    }
}

fn import(args: &KeyTransform) -> Result<(), Failure> {
    let KeyTransform { r#in, out, device, engine } = args;
    check_out(out.as_deref())?;
    let bytes = read(r#in.as_deref(), "raw key", Secrecy::Secret)?;
    if let Some(device) = device {
        return key_device::import(device, &bytes, out.as_deref());
    }
    if let Some(form) = looks_like_wrapped_key(&bytes) {
        return Err(Failure::new(
            Code::Refused,
            format!("cannot import: this is a {form} wrapped key already"),
            "Use it as it is: inlinecrypt serve --key FILE",
        ));
    }
    let engine = open(engine, Roots::MakeIfMissing)?;
    let blob = engine.profile.import(&RawKey::new(&bytes)).map_err(|error| {
        let failure = Failure::of("cannot import", &error);
        if error.kind() != ErrorKind::Invalid {
            return failure;
        }
        // What is wrong is the key, and mostly how it was written.
        let hint = if bytes.ends_with(b"\n") {
            "It ends in a line feed, which is not part of a key: write it without."
        } else if !bytes.is_empty() && bytes.iter().all(u8::is_ascii_hexdigit) {
            "It looks like hexadecimal: write the bytes themselves (xxd -r -p)."
        } else {
            "Give a raw key of that length. Keys for the cipher itself are used with: serve --key raw:FILE"
        };
        Failure { code: Code::Refused, ..failure.advise(hint) }
    })?;
    finish_long_term(&blob, &engine, out.as_deref())
}

fn prepare(args: &KeyTransform) -> Result<(), Failure> {
    let KeyTransform { r#in, out, device, engine } = args;
    check_out(out.as_deref())?;
    let bytes = read(r#in.as_deref(), "wrapped key", Secrecy::Public)?;
    if let Some(device) = device {
        return key_device::prepare(device, &bytes, out.as_deref());
    }
    let engine = open(engine, Roots::Existing)?;
    let blob = engine
        .profile
        .prepare(&LongTermWrappedKey::new(&bytes))
        .map_err(|error| Failure::of("cannot prepare", &error))?;
    write(blob.as_bytes(), out.as_deref())?;
    let _ = writeln!(
        io::stderr(),
        "note: this key ends with this command: the software engine that prepared it stops here"
    );
    Ok(())
}

#[derive(Serialize)]
struct Info {
    version: u32,
    form: String,
    /// `null` for blobs without a header.
    format_version: Option<u8>,
    wrapped_by: Option<String>,
    len_bytes: usize,
    /// `yes`, `no`, or why not known.
    opens: &'static str,
    reason: Option<String>,
    root: String,
    root_id: Option<String>,
    key_id: Option<String>,
}

fn info(args: &KeyInfo) -> Result<(), Failure> {
    let KeyInfo { file, json, engine } = args;
    let bytes = read(file.as_deref(), "wrapped key", Secrecy::Public)?;
    let (form, header) = match (inspect(&bytes), looks_like_wrapped_key(&bytes)) {
        (Ok(header), _) => (header.form, Some(header)),
        // Some hardware's blobs have no header to look at.
        (Err(BlobError::NotWrapped { .. }), Some(form)) => (form, None),
        (Err(why), _) => {
            return Err(Failure::new(
                Code::Refused,
                format!("not a wrapped key that can be used: {why}"),
                "Check that it is the right file, or restore it from a copy. Raw keys have nothing to show.",
            ));
        }
    };
    let plan = plan::engine_from(engine)?;
    let mut info = Info {
        version: 1,
        form: form.to_string(),
        format_version: header.map(|header| header.version),
        wrapped_by: header.map(|header| header.wrapped_by.to_string()),
        len_bytes: bytes.len(),
        opens: "no",
        reason: None,
        root: plan.root.to_string(),
        root_id: None,
        key_id: None,
    };
    match (form, Root::open_with(&plan.root, &mut Asker::new(&engine.passphrase))) {
        (Form::Ephemeral, _) => {
            info.reason = Some("only the start of the engine that prepared it does".to_owned());
        }
        (Form::LongTerm, Err(error)) if error.kind() == ErrorKind::NotFound && engine.root.is_none() => {
            info.opens = "unknown";
            info.reason = Some(format!("there is no root {}", plan.root));
        }
        (Form::LongTerm, Err(error)) => return Err(Failure::of_file("cannot open the root", &error)),
        (Form::LongTerm, Ok(root)) => {
            let host = HostEngine::start(&plan, Some(&root))
                .map_err(|error| Failure::of("cannot start the engine", &error))?;
            info.root_id = Some(root.id().to_string());
            let opened = host
                .profile
                .prepare(&LongTermWrappedKey::new(&bytes))
                .and_then(|blob| Identifier::of(&KeyForm::Wrapped(blob), &host.profile));
            match opened {
                Ok(identifier) => {
                    info.opens = "yes";
                    info.key_id = Some(identifier.to_string());
                }
                Err(error) => info.reason = Some(error.chain()),
            }
        }
    }
    if *json {
        return print_json(&info);
    }
    let none = || "-".to_owned();
    print(&format!(
        "form             {}\nversion          {}\nwrapped by       {}\nroot             {} ({})\nopens            {}{}\nkey identifier   {}\n",
        info.form,
        info.format_version.map_or_else(none, |version| version.to_string()),
        info.wrapped_by.unwrap_or_else(none),
        info.root,
        info.root_id.unwrap_or_else(none),
        info.opens,
        info.reason.map(|why| format!(": {why}")).unwrap_or_default(),
        info.key_id.unwrap_or_else(none),
    ))
}

enum Roots {
    Existing,
    MakeIfMissing,
}

fn open(args: &EngineArgs, roots: Roots) -> Result<HostEngine, Failure> {
    let plan = plan::engine_from(args)?;
    let mut asker = Asker::new(&args.passphrase);
    let root = match roots {
        Roots::Existing => Root::open_with(&plan.root, &mut asker),
        Roots::MakeIfMissing => Root::open_or_create(&plan.root, &mut asker),
    }
    .map_err(|error| Failure::of_file("cannot open the root", &error))?;
    HostEngine::start(&plan, Some(&root)).map_err(|error| Failure::of("cannot start the engine", &error))
}

/// Before anything is made: whether the result has a place.
fn check_out(out: Option<&Path>) -> Result<(), Failure> {
    match out {
        Some(path) if files::exists(path) => Err(Failure::new(
            Code::Busy,
            format!("{} exists already and was not touched", path.display()),
            "Choose another name, or move it away first.",
        )),
        None if io::stdout().is_terminal() => Err(Failure::new(
            Code::Wrong,
            "a key is binary, and standard output is a terminal",
            "Name a file with --out FILE, or send it elsewhere: > FILE",
        )),
        _ => Ok(()),
    }
}

fn read(from: Option<&Path>, what: &str, secrecy: Secrecy) -> Result<Zeroizing<Vec<u8>>, Failure> {
    match from {
        Some(path) if path.as_os_str() != "-" => files::read(path, what, secrecy, KEY_BYTES_MAX),
        _ => files::read_stdin(what, KEY_BYTES_MAX),
    }
}

pub(super) fn write(blob: &[u8], out: Option<&Path>) -> Result<(), Failure> {
    match out {
        Some(path) => files::write_new(path, "key", blob),
        None => print_bytes(blob),
    }
}

fn finish_long_term(
    blob: &LongTermWrappedKey,
    engine: &HostEngine,
    out: Option<&Path>,
) -> Result<(), Failure> {
    // Proves that it opens before anybody relies on it.
    let identifier = engine
        .profile
        .prepare(blob)
        .and_then(|key| Identifier::of(&KeyForm::Wrapped(key), &engine.profile))
        .map_err(|error| Failure::of("the new key does not open", &error))?;
    write(blob.as_bytes(), out)?;
    let root = engine.root.map(|id| id.to_string()).unwrap_or_default();
    let _ = writeln!(io::stderr(), "key {identifier}, wrapped under root {root}");
    Ok(())
}
