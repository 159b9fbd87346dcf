//! `root create | info | rewrap`, and the process that talks to TPMs and tokens.

use crate::ask::Asker;
use crate::cli::{PassphraseArgs, RootCommand, RootCreate, RootInfoArgs, RootRewrap};
use crate::files;
use crate::places;
use crate::report::{Code, Failure, note, print, print_json};
use inlinecrypt_engine::root::{Cost, RootInfo};
use inlinecrypt_engine::{Root, RootSpec};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

pub(super) fn run(command: RootCommand) -> Result<(), Failure> {
    match command {
        RootCommand::Create(args) => create(&args),
        RootCommand::Info(args) => info(&args),
        RootCommand::Rewrap(args) => rewrap(&args),
    }
}

fn create(args: &RootCreate) -> Result<(), Failure> {
    let RootCreate { root, passphrase } = args;
    check_new(root)?;
    let made = Root::create(root, &mut Asker::new(passphrase))
        .map_err(|error| Failure::of_file("cannot make the root", &error))?;
    print(&format!(
        "made root {} in {root}\nKeep a copy: without it, the keys wrapped under it are lost.\n",
        made.id()
    ))
}

fn rewrap(args: &RootRewrap) -> Result<(), Failure> {
    let RootRewrap { from, to, passphrase, new_passphrase_file, new_passphrase_fd } = args;
    let from = named(from.as_ref())?;
    let same =
        matches!((fs::canonicalize(from.path()), fs::canonicalize(to.path())), (Ok(a), Ok(b)) if a == b);
    if !same {
        check_new(to)?;
    }
    let new =
        PassphraseArgs { passphrase_file: new_passphrase_file.clone(), passphrase_fd: *new_passphrase_fd };
    let root = Root::rewrap(&from, &mut Asker::new(passphrase), to, &mut Asker::new(&new))
        .map_err(|error| Failure::of_file("cannot wrap the root anew", &error))?;
    print(&format!("root {} is in {to} now, and opens the same keys\n", root.id()))?;
    if !same {
        note(format_args!(
            "{from} still opens them, too; keep it as a copy where it is safe, or remove it when {to} works"
        ));
    } else if matches!(from, RootSpec::File(_)) {
        note(format_args!(
            "the secret stood in that file as it is; what the disk keeps of replaced files may still hold it"
        ));
    }
    Ok(())
}

#[derive(Serialize)]
struct Info {
    version: u32,
    root: String,
    kind: &'static str,
    id: String,
    /// Whether opening it takes a passphrase or PIN.
    asks: bool,
    parameters: BTreeMap<&'static str, String>,
}

fn info(args: &RootInfoArgs) -> Result<(), Failure> {
    let RootInfoArgs { root, json } = args;
    let root = named(root.as_ref())?;
    let found = RootInfo::look(&root).map_err(|error| Failure::of_file("cannot look at the root", &error))?;
    let (kind, asks, parameters) = match &found {
        RootInfo::Container(container) => {
            let mut parameters: BTreeMap<_, _> = inlinecrypt_roots::describe(container).into_iter().collect();
            if let Some(Cost { memory_kib, passes, lanes }) = Cost::of(container) {
                parameters
                    .insert("argon2id", format!("{} MiB, {passes} passes, {lanes} lanes", memory_kib >> 10));
            }
            (container.keeper.name(), container.asks, parameters)
        }
        _ => ("file", false, BTreeMap::new()),
    };
    let info =
        Info { version: 1, root: root.to_string(), kind, id: found.id().to_string(), asks, parameters };
    if *json {
        return print_json(&info);
    }
    let mut text = format!(
        "root             {}\nkind             {}\nidentifier       {}\nasks             {}\n",
        info.root,
        info.kind,
        info.id,
        if info.asks { "for a passphrase or PIN" } else { "nothing" },
    );
    for (name, value) in &info.parameters {
        let _ = writeln!(text, "{name:<16} {value}");
    }
    print(&text)
}

/// The root that was named, else the usual one.
fn named(root: Option<&RootSpec>) -> Result<RootSpec, Failure> {
    root.map_or_else(places::default_root, |root| Ok(root.clone()))
}

/// Before anybody is asked: whether the result has a place.
fn check_new(root: &RootSpec) -> Result<(), Failure> {
    if files::exists(root.path()) {
        return Err(Failure::new(
            Code::Busy,
            format!("{} exists already and was not touched", root.path().display()),
            "Choose another name; to keep that root in another way: inlinecrypt root rewrap --from ... --to ...",
        ));
    }
    Ok(())
}

/// One request from standard input, which is a socket, and its answer there.
pub(super) fn helper() -> Result<(), Failure> {
    let stdin = || -> io::Result<UnixStream> { Ok(io::stdin().as_fd().try_clone_to_owned()?.into()) };
    stdin().and_then(inlinecrypt_roots::serve).map_err(|error| {
        Failure::of_io(
            "cannot answer",
            &error,
            "This command is for inlinecrypt itself; there is nothing to do by hand.",
        )
    })
}
