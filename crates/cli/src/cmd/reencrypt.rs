//! `volume reencrypt`: by the server that serves the volume, or, if nobody does, here.

use super::serve;
use super::status;
use crate::ask::Asker;
use crate::cli::{LayoutArgs, PassphraseArgs, VolumeReencrypt};
use crate::control::{self, ReencryptAction, ReencryptRequest};
use crate::files::{self, Medium, shell_word};
use crate::host::{Host, HostEngine, Ready};
use crate::keyfile::{KeySource, Wanted};
use crate::luks::keep::{self, OtherKeyslots};
use crate::luks::look;
use crate::plain;
use crate::plan::{EnginePlan, Plan};
use crate::reencrypt::{self, Backings, Job, LuksTerms, Old, Progress, Show, Terms, Wish, ZONE_BYTES};
use crate::report::{Code, Failure, Failures, note, print};
use crate::size::Size;
use crate::watch::Watched;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::volume::Volume;
use inlinecrypt_engine::Root;
use inlinecrypt_io::backing::{DiscardPolicy, FileBacking, OpenOptions, Window};
use serde_json::Value;
use signal_hook::consts::SIGTERM;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How often one looks whether anything has changed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(super) fn run(args: VolumeReencrypt) -> Result<(), Failures> {
    let volume = std::path::absolute(&args.volume).unwrap_or_else(|_| args.volume.clone());
    let show = if args.progress_json { Show::Json } else { Show::Bar };
    let progress = Progress::new(show, args.volume.display().to_string());
    if args.key.as_ref().is_some_and(|key| key.path().is_none()) {
        return Err(Failure::new(
            Code::Wrong,
            "the new key is on standard input, and the volume's description has to name a file",
            "Name it: --key FILE for a wrapped key, --key raw:FILE for a raw one.",
        )
        .into());
    }
    let holes = (!args.resume && !args.pause && !args.keep_holes).then(|| holes(&volume, &args)).flatten();
    let server = match (&args.control, args.offline) {
        (_, true) => None,
        (Some(control), _) => Some(control.clone()),
        (None, _) => find_server(&volume),
    };
    match server {
        Some(control) => Ok(online(&args, &volume, &control, holes, progress)?),
        None if args.pause => Err(Failure::new(
            Code::File,
            format!("no server of this user serves {}", args.volume.display()),
            "Nobody works on it then; if the server has a control socket elsewhere, name it with --control.",
        )
        .into()),
        None => offline(&args, holes, progress),
    }
}

/// How much storage a sparse volume gets, and whether there is so much: to be told once it begins.
fn holes(volume: &Path, args: &VolumeReencrypt) -> Option<String> {
    let Medium { len_bytes, allocated_bytes, .. } = Medium::look(volume).ok()?;
    let holes = len_bytes.saturating_sub(allocated_bytes?);
    let free = rustix::fs::statvfs(volume).ok().map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))?;
    if holes == 0 {
        return None;
    }
    let lack = if holes > free {
        format!(", and only {} are free: it will stop there until there is room", Size(free))
    } else {
        String::new()
    };
    let is_luks = args.header.is_some() || look::is_container(volume);
    let leaves = if is_luks { "" } else { "; --keep-holes leaves them" };
    Some(format!("{} of {} have no storage, and get it{lack}{leaves}", Size(holes), volume.display()))
}

/// The control socket of the server that serves `volume`, if one of this user does.
fn find_server(volume: &Path) -> Option<PathBuf> {
    status::sockets()
        .into_iter()
        .find(|socket| control::ask(socket).is_ok_and(|server| served(&server, volume).is_some()))
}

/// What a server says about a volume.
fn served<'s>(server: &'s Value, volume: &Path) -> Option<&'s Value> {
    let same = |path: &Value| {
        let path = path.as_str().map(Path::new)?;
        let is_same = path == volume
            || path.canonicalize().ok().is_some_and(|path| volume.canonicalize().ok() == Some(path));
        is_same.then_some(())
    };
    server["volumes"].as_array()?.iter().find(|served| same(&served["path"]).is_some())
}

fn online(
    args: &VolumeReencrypt,
    volume: &Path,
    socket: &Path,
    holes: Option<String>,
    mut progress: Progress,
) -> Result<(), Failure> {
    if args.new_engine.is_some() || args.new_root.is_some() || args.new_passphrase_file.is_some() {
        return Err(Failure::new(
            Code::Wrong,
            "a server cannot start another engine while it serves",
            "Stop it, begin with --offline, and serve the volume again: it is then served by both engines.",
        ));
    }
    let gone = |error: &std::io::Error| {
        let what = format!("no server answers at {}", socket.display());
        Failure::of_io(
            what,
            error,
            "Look with `inlinecrypt status`. What was begun goes on when the volume is served again.",
        )
    };
    let report = control::ask(socket).map_err(|error| gone(&error))?;
    let Some(volume) = served(&report, volume).and_then(|served| served["path"].as_str()) else {
        return Err(Failure::new(
            Code::File,
            format!("{} is not served by the server at {}", args.volume.display(), socket.display()),
            "`inlinecrypt status` shows which server serves what.",
        ));
    };
    let mut others = OtherKeyslots::of(&args.others)?;
    let begins = !args.pause && !args.resume;
    if begins && others.is_unsaid() && keep::has_terminal() {
        let missing = control::ask_for_missing_keyslots(socket, volume).map_err(|error| gone(&error))?;
        others.ask(Path::new(volume), &missing)?;
    }
    others.check_for_server()?;
    let LayoutArgs { mode, data_unit, block, iv_offset, iv, offset: _ } = args.layout;
    let throttle_bytes = args.throttle.map(|size| size.0);
    let action = match (args.pause, args.resume) {
        (true, _) => ReencryptAction::Pause,
        (_, true) => ReencryptAction::Resume { throttle_bytes },
        _ => ReencryptAction::Begin {
            key: args.key.as_ref().map(absolute_key).transpose()?,
            mode: mode.map(|mode| mode.info().name.to_owned()),
            data_unit_bytes: data_unit.map(|unit| unit.bytes()),
            block_bytes: block,
            iv_offset_sectors: iv_offset,
            iv: iv.map(|iv| iv.name().to_owned()),
            zone_bytes: args.zone.unwrap_or(ZONE_BYTES),
            throttle_bytes: throttle_bytes.unwrap_or(0),
            keep_holes: args.keep_holes,
            remove_old_key: args.remove_old_key,
            others,
        },
    };
    let request = ReencryptRequest { volume: volume.to_owned(), action };
    let answer = control::ask_to_reencrypt(socket, request).map_err(|error| gone(&error))?;
    if let Some(what) = answer["error"].as_str() {
        return Err(Failure::new(
            code_of(&answer["code"]),
            what,
            answer["advice"].as_str().unwrap_or("Use a server of this version."),
        ));
    }
    if let Some(holes) = holes {
        note(holes);
    }
    if let Some(text) = answer["note"].as_str() {
        note(text);
    }
    if args.pause || args.detach {
        return Ok(());
    }
    loop {
        let report = control::ask(socket).map_err(|error| {
            progress.end();
            gone(&error)
        })?;
        let served = served(&report, Path::new(volume)).unwrap_or(&Value::Null);
        let (state, done, size) = (
            served["reencrypt"]["state"].as_str().unwrap_or("done"),
            served["reencrypt"]["done_bytes"].as_u64().unwrap_or(0),
            served["reencrypt"]["size_bytes"].as_u64().unwrap_or(0),
        );
        progress.tell(done, size, remark(state))?;
        if state == "done" {
            progress.end();
            return finished(args, served["key_id"].as_str().unwrap_or("?"));
        }
        thread::sleep(reencrypt::EVERY);
    }
}

fn remark(state: &str) -> &str {
    match state {
        "running" | "done" => "",
        "failing" => "failing, tried again (inlinecrypt status says why)",
        other => other,
    }
}

fn finished(args: &VolumeReencrypt, key: &str) -> Result<(), Failure> {
    if args.progress_json {
        return Ok(());
    }
    print(&format!("re-encrypted {}, to key {key}\n", args.volume.display()))
}

/// As the server is to read it, wherever that runs.
fn absolute_key(key: &KeySource) -> Result<String, Failure> {
    let written = key.described_from(Path::new("\0")).and_then(|text| text.into_string().ok());
    written.ok_or_else(|| {
        Failure::new(Code::Wrong, format!("the name of {key} is not UTF-8"), "Give it another name.")
    })
}

fn code_of(code: &Value) -> Code {
    let known = [Code::Refused, Code::Memory, Code::File, Code::Busy];
    known.into_iter().find(|known| code.as_u64() == Some(*known as u64)).unwrap_or(Code::Wrong)
}

fn offline(args: &VolumeReencrypt, holes: Option<String>, mut progress: Progress) -> Result<(), Failures> {
    let mut signals = serve::catch_signals()?;
    let mut plan = match Plan::for_one(&args.volume, args.header.as_deref(), &args.engine) {
        Ok(plan) => plan,
        Err(failures) => return Failures::check(failures),
    };
    plan.engines.iter_mut().for_each(|engine| engine.home = Some(Default::default()));
    let [volume] = &plan.volumes[..] else {
        return Err(plain::has_no_key(&args.volume.display().to_string()).into());
    };
    match (&volume.next, args.resume) {
        (Some(_), false) => return Err(reencrypt::under_way(&volume.label).into()),
        (None, true) if volume.luks.as_ref().is_some_and(|luks| luks.is_unsettled) => {
            let luks = volume.luks.as_ref().expect("it is one");
            let file = FileBacking::open(&volume.path, OpenOptions::default())
                .map_err(|error| Failure::of_file(&volume.label, &error))?;
            reencrypt::settle_container(luks, &volume.path, Arc::new(file), &volume.label)?;
            return Ok(finished(args, "that the header names")?);
        }
        (None, true) if reencrypt::has_remains(&args.volume) => {
            let path = std::path::absolute(&args.volume).unwrap_or_else(|_| args.volume.clone());
            let _locked = FileBacking::open(&path, OpenOptions::default())
                .map_err(|error| Failure::of_file(&volume.label, &error))?;
            reencrypt::settle_remains(&path)?;
            let key = volume.key_id.map_or_else(|| "?".to_owned(), |id| id.to_string());
            return Ok(finished(args, &key)?);
        }
        (None, true) => {
            return Err(Failure::new(
                Code::Wrong,
                format!("{} is not being re-encrypted", volume.label),
                format!("To begin: inlinecrypt volume reencrypt {}", shell_word(&args.volume)),
            )
            .into());
        }
        _ => {}
    }
    match &volume.next {
        Some(next) if next.engine != volume.engine && args.new_passphrase_file.is_some() => {
            plan.engines[next.engine].passphrase_file.clone_from(&args.new_passphrase_file);
        }
        None if args.new_root.is_some() => {}
        _ if args.new_passphrase_file.is_some() => {
            return Err(Failure::new(
                Code::Wrong,
                format!("--new-passphrase-file is for a new root, and {} keeps its root", volume.label),
                "Leave it out, or name the root with --new-root; the present one's is --passphrase-file.",
            )
            .into());
        }
        _ => {}
    }
    let other = other_engine(args, &plan.engines[volume.engine]);
    let mut asker = Asker::new(&args.engine.passphrase).with_key_file(args.key_file.clone());
    let becomes_wrapped =
        other.is_none() && volume.next.is_none() && volume.luks.is_none() && wants_root(args);
    let own = volume.engine;
    if becomes_wrapped {
        let engine = &mut plan.engines[own];
        engine.wants_root = true;
        if !files::exists(engine.root.path()) {
            let made = Root::open_or_create(&engine.root, asker.of(engine));
            drop(made.map_err(|error| Failure::of_file("cannot open the root", &error))?);
        }
    }
    let (host, failures) = Host::prepare(&plan, &mut asker);
    Failures::check(failures)?;
    let Host { engines, volumes, plain: _ } = host;
    let Some(ready) = volumes.into_iter().next() else { unreachable!("it failed, or is there") };
    let other_host = match &other {
        Some(engine) => Some(
            HostEngine::start_at_home(engine, wants_root(args), false, &mut asker)
                .map_err(|error| Failure::of_file("the new engine", &error))?,
        ),
        None => None,
    };
    let own = engines[ready.plan.engine].as_ref().expect("it admitted the key");
    let profile = &other_host.as_ref().unwrap_or(own).profile;
    let job = begin(args, ready, profile, other)?;
    drop(asker);
    if let Some(holes) = holes {
        note(holes);
    }
    job.resume(args.throttle.map(|size| size.0));
    let mut told: Option<std::time::Instant> = None;
    loop {
        let report = job.report();
        let is_done = report.state == "done";
        if is_done || told.is_none_or(|told| told.elapsed() >= reencrypt::EVERY) {
            told = Some(std::time::Instant::now());
            let (done, size) = (report.progress.done_bytes, report.progress.size_bytes);
            progress.tell(done, size, remark(report.state))?;
        }
        if is_done {
            progress.end();
            return Ok(finished(args, &job.identifier.to_string())?);
        }
        // Nobody is served meanwhile, so it is better told than tried for ever.
        if let Some(failure) = report.failure {
            progress.end();
            job.stop();
            let more = format!(
                "{} Then go on: inlinecrypt volume reencrypt --resume {}",
                failure.advice,
                words(args)
            );
            return Err(failure.advise(more).into());
        }
        if let Some(signal) = signals.pending().next() {
            progress.end();
            job.stop();
            note(format_args!(
                "{} rests half re-encrypted; to go on: inlinecrypt volume reencrypt --resume {}",
                args.volume.display(),
                words(args)
            ));
            return Err(Failure::new(
                if signal == SIGTERM { Code::Terminated } else { Code::Interrupted },
                "interrupted",
                "Nothing is lost: it can also be served as it is, and goes on then.",
            )
            .into());
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The engine for the new key, if it is to be another than `present`.
fn other_engine(args: &VolumeReencrypt, present: &EnginePlan) -> Option<EnginePlan> {
    if args.new_engine.is_none() && args.new_root.is_none() {
        return None;
    }
    Some(EnginePlan {
        name: "new".to_owned(),
        spec: args.new_engine.unwrap_or(present.spec),
        root: args.new_root.clone().unwrap_or_else(|| present.root.clone()),
        passphrase_file: args.new_passphrase_file.clone(),
        ..present.clone()
    })
}

fn wants_root(args: &VolumeReencrypt) -> bool {
    args.key.as_ref().is_none_or(|key| key.wanted == Wanted::Wrapped)
}

/// Opens the volume, and goes on with its re-encryption, or begins one. It rests at first.
fn begin(
    args: &VolumeReencrypt,
    ready: Ready,
    profile: &Arc<CryptoProfile>,
    other: Option<EnginePlan>,
) -> Result<Job, Failure> {
    let Ready { plan: volume, layout, admission, identifier, unused_bytes: _, next } = ready;
    let luks = LuksTerms::of(&volume, true);
    let label = volume.label.clone();
    let mut others = OtherKeyslots::of(&args.others)?;
    let PassphraseArgs { passphrase_file, passphrase_fd } = &args.engine.passphrase;
    let is_named = passphrase_file.is_some() || passphrase_fd.is_some() || args.key_file.is_some();
    if let (None, true, Some(luks), Some(key)) = (&next, others.is_unsaid(), &luks, volume.key.luks_key())
        && keep::was_typed(key, is_named)
    {
        others.ask(&volume.path, &luks.missing()?)?;
    }
    let failed = |error: Error| Failure::of(&label, &error);
    let options =
        OpenOptions { access: Access::ReadWrite, caching: volume.caching, discard: DiscardPolicy::PassDown };
    let file = FileBacking::open(&volume.path, options).map_err(|error| {
        let failure = Failure::of_file(&label, &error);
        match failure.code {
            Code::Busy => failure.advise(
                "If that is a server with a control socket elsewhere, name it with --control; else stop it first.",
            ),
            _ => failure,
        }
    })?;
    let backing = Arc::new(Watched::new(Arc::new(file)));
    let path = std::path::absolute(&volume.path).unwrap_or_else(|_| volume.path.clone());
    let (access, discard) = (Access::ReadWrite, volume.discard);
    let lies_on = Window::over(backing.clone(), volume.layout.offset).map_err(failed)?;
    let old = Volume::new(layout, admission, lies_on.clone(), access, discard).map_err(failed)?;
    let terms = Terms {
        label,
        access,
        discard,
        fallback: volume.fallback,
        slots: volume.slots,
        is_named_twice: false,
        luks,
    };
    let backings = Backings { whole: backing, data: lies_on };
    if let Some(next) = next {
        return Ok(reencrypt::go_on(old, &path, backings, &terms, next)?.1);
    }
    let wish = Wish {
        layout: args.layout.clone(),
        key: args.key.clone(),
        zone_bytes: args.zone.unwrap_or(ZONE_BYTES),
        throttle_bytes: args.throttle.map_or(0, |size| size.0),
        keep_holes: args.keep_holes,
        remove_old_key: args.remove_old_key,
        others,
        engine: other,
    };
    Ok(reencrypt::begin(Old::Idle(old), &path, identifier, backings, &terms, &wish, profile)?.0)
}

/// The volume, and its header if that is elsewhere, as they stand on a command line.
fn words(args: &VolumeReencrypt) -> String {
    let header = args.header.iter().map(|header| format!("--header {} ", shell_word(header)));
    header.chain([shell_word(&args.volume)]).collect()
}
