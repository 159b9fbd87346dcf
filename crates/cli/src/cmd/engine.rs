//! `engine info`: what an engine can do, as sysfs shows it under `queue/crypto`. `engine reset`: what a controller goes
//! through, on a running server. `engine serve` has a file of its own.

use super::engine_serve;
use crate::ask::Asker;
use crate::cli::{EngineCommand, EngineInfo, EngineReset};
use crate::control;
use crate::host::HostEngine;
use crate::plan;
use crate::report::{Code, Failure, print, print_json, printable};
use inlinecrypt_core::config::{KeyType, Mode};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_engine::Root;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

#[derive(Serialize)]
struct Info {
    version: u32,
    spec: String,
    raw_keys: bool,
    hw_wrapped_keys: bool,
    max_dun_bits: u32,
    num_keyslots: u32,
    /// Data unit sizes: a set bit's value is the size in bytes.
    modes: BTreeMap<&'static str, u32>,
    root: String,
    root_id: Option<String>,
}

pub(super) fn run(command: EngineCommand) -> Result<(), Failure> {
    match command {
        EngineCommand::Info(args) => info(args),
        EngineCommand::Reset(args) => reset(args),
        EngineCommand::Serve(args) => engine_serve::run(args),
    }
}

fn reset(EngineReset { control, engine }: EngineReset) -> Result<(), Failure> {
    let advice = "Check the path; `inlinecrypt status` finds the servers of this user.";
    let answer = control::ask_to_reset(&control, engine).map_err(|error| {
        let what = format!("no server answers at {}", control.display());
        Failure { code: Code::File, ..Failure::of_io(what, &error, advice) }
    })?;
    if let Some(why) = answer["error"].as_str() {
        let what = format!("the server at {} did not reset: {}", control.display(), printable(why));
        return Err(Failure::new(
            Code::Wrong,
            what,
            "`inlinecrypt status` names its engines and their state.",
        ));
    }
    let names = answer["reset"].as_array().map_or(&[][..], Vec::as_slice);
    let names: Vec<_> = names.iter().filter_map(|name| name.as_str()).map(printable).collect();
    print(&format!("reset {}\n", names.join(", ")))
}

fn info(EngineInfo { engine, json }: EngineInfo) -> Result<(), Failure> {
    let plan = plan::engine_from(&engine)?;
    let root = match Root::open_with(&plan.root, &mut Asker::new(&engine.passphrase)) {
        Ok(root) => Some(root),
        // Not made for a look.
        Err(error) if error.kind() == ErrorKind::NotFound && engine.root.is_none() => None,
        Err(error) => return Err(Failure::of_file("cannot open the root", &error)),
    };
    let host = HostEngine::start(&plan, root.as_ref())
        .map_err(|error| Failure::of("cannot start the engine", &error))?;
    let capabilities = host.profile.capabilities();
    let info = Info {
        version: 1,
        spec: plan.spec.to_string(),
        raw_keys: capabilities.key_types.contains(KeyType::Raw),
        hw_wrapped_keys: capabilities.key_types.contains(KeyType::HardwareWrapped),
        max_dun_bits: u32::from(capabilities.dun_bytes_max) * 8,
        num_keyslots: capabilities.keyslots,
        modes: Mode::ALL
            .into_iter()
            .map(|mode| (mode.info().name, capabilities.units[mode.index()].bits()))
            .filter(|(_, units)| *units != 0)
            .collect(),
        root: plan.root.to_string(),
        root_id: host.root.map(|id| id.to_string()),
    };
    if json {
        return print_json(&info);
    }
    let yes = |is: bool| if is { "yes" } else { "no" };
    let mut text = format!(
        "engine           {}\nraw keys         {}\nwrapped keys     {}\nDUN bits         {}\nkeyslots         {}\n",
        info.spec,
        yes(info.raw_keys),
        match &info.root_id {
            Some(id) => format!("{}, under root {id} ({})", yes(info.hw_wrapped_keys), info.root),
            None => format!("with a root; {} does not exist yet, and is made with the first key", info.root),
        },
        info.max_dun_bits,
        match info.num_keyslots {
            0 => "none: the key comes with every request".to_owned(),
            count => count.to_string(),
        },
    );
    let _ = writeln!(text, "modes            data unit sizes in bytes");
    for (mode, units) in &info.modes {
        let sizes: Vec<String> =
            (0..32).filter(|bit| units & (1 << bit) != 0).map(|bit| (1u64 << bit).to_string()).collect();
        let _ = writeln!(text, "  {mode:<18} {units:#x}: {}", sizes.join(", "));
    }
    print(&text)
}
