//! `status`: what running servers do.

use crate::cli::Status;
use crate::control;
use crate::places;
use crate::report::{Code, Failure, Failures, note, plain, print, print_json, printable};
use crate::size::Size;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

pub(super) fn run(args: &Status) -> Result<(), Failures> {
    let servers = match &args.control {
        Some(path) => vec![ask(path)?],
        None => find_all(),
    };
    if args.json {
        print_json(&json!({ "version": control::VERSION, "servers": servers }))?;
        return Ok(());
    }
    if servers.is_empty() {
        let places: Vec<String> =
            places::control_directories().iter().map(|place| place.display().to_string()).collect();
        print(&format!(
            "no server with a control socket in {}; for another: inlinecrypt status --control PATH\n",
            printable(&places.join(" or "))
        ))?;
        return Ok(());
    }
    let texts: Vec<String> = servers.iter().map(describe).collect();
    print(&texts.join("\n"))?;
    Ok(())
}

fn ask(path: &Path) -> Result<Value, Failure> {
    control::ask(path).map_err(|error| {
        let what = format!("no server answers at {}", path.display());
        let advice = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "It may be busy or stopped (SIGSTOP); ask again."
            }
            _ => "Check the path; `inlinecrypt status` without --control finds the servers of this user.",
        };
        let failure = Failure::of_io(what, &error, advice);
        if failure.code == Code::Refused { failure } else { Failure { code: Code::File, ..failure } }
    })
}

/// The control sockets of this user that are where they usually are. Those that killed servers left are removed.
pub(super) fn sockets() -> BTreeSet<PathBuf> {
    let mut paths = BTreeSet::new();
    for directory in places::control_directories() {
        control::remove_stale(&directory);
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        paths.extend(
            entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "sock")),
        );
    }
    paths
}

/// All servers of this user whose sockets are where they usually are.
fn find_all() -> Vec<Value> {
    let mut servers = Vec::new();
    for path in sockets() {
        match control::ask(&path) {
            Ok(server) => servers.push(server),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => note(format_args!("{}: {}", path.display(), plain(&error))),
        }
    }
    servers
}

/// A server's report for people. Made from JSON: the server may be of another version.
fn describe(server: &Value) -> String {
    if let Some(error) = server["error"].as_str() {
        return format!("a server answers: {}\n", printable(error));
    }
    let mut text = format!(
        "server {}, version {}, {} connections{}\n",
        number(&server["pid"]),
        word(&server["program_version"]),
        number(&server["connections"]["now"]),
        if server["stopping"] == true { ", stopping" } else { "" },
    );
    for uri in list(&server["uris"]) {
        let _ = writeln!(text, "  {}", word(uri));
    }
    text.push_str("volumes\n");
    for volume in list(&server["volumes"]) {
        let state = match volume["state"].as_str() {
            Some("ok") | None => String::new(),
            Some(state) => format!(", {}: {}", printable(state), word(&volume["reason"])),
        };
        let counters = &volume["counters"];
        let how = if volume["plain"] == true {
            "PLAIN: not encrypted".to_owned()
        } else {
            format!(
                "{}, data unit {}, key {}, by {} {}",
                word(&volume["mode"]),
                number(&volume["data_unit_bytes"]),
                word(&volume["key_id"]),
                word(&volume["served_by"]),
                word(&volume["engine"]),
            )
        };
        let _ = writeln!(
            text,
            "  {:<16} {}{}, {how}{state}",
            word(&volume["name"]),
            Size(number(&volume["size_bytes"])),
            if volume["read_only"] == true { " read-only" } else { "" },
        );
        let _ = writeln!(
            text,
            "    {} clients; reads {} ({}), writes {} ({}), flushes {}, trims {}, errors {}",
            number(&counters["connections_now"]),
            number(&counters["read"]["requests"]),
            Size(number(&counters["read"]["bytes"])),
            number(&counters["write"]["requests"]),
            Size(number(&counters["write"]["bytes"])),
            number(&counters["flush"]["requests"]),
            number(&counters["trim"]["requests"]),
            number(&counters["errors"]),
        );
        text.push_str(&describe_reencryption(&volume["reencrypt"]));
    }
    for engine in list(&server["engines"]) {
        let keyslots = &engine["keyslots"];
        let _ = writeln!(
            text,
            "{} {} ({}), {}{} keys{}{}",
            word(&engine["role"]),
            word(&engine["name"]),
            word(&engine["spec"]),
            match engine["key_type"].as_str() {
                Some("any") | None => String::new(),
                Some("undecided") => "raw or wrapped keys, undecided, ".to_owned(),
                Some("poisoned") => "no keys, ".to_owned(),
                Some(decided) =>
                    format!("{} keys only, by {}, ", printable(decided), word(&engine["decided_by"])),
            },
            number(&engine["keys_admitted"]),
            match (number(&engine["keys_pinned"]), number(&engine["spills"])) {
                (0, 0) => String::new(),
                (pinned, spills) => format!(" ({pinned} pinned, {spills} requests spilt to software)"),
            },
            if keyslots.is_null() {
                ", no keyslots".to_owned()
            } else {
                format!(
                    ", {} waits (longest {} us), {} waiting",
                    number(&keyslots["waits"]),
                    number(&keyslots["longest_wait_us"]),
                    number(&keyslots["waiting"])
                )
            },
        );
        text.push_str(&describe_process(&engine["process"]));
        if engine["state"] == "stopped" {
            let _ = writeln!(text, "  stopped: {}", word(&engine["reason"]));
        }
        let used: Vec<&Value> =
            list(&keyslots["slots"]).iter().filter(|slot| number(&slot["programs"]) > 0).collect();
        if !used.is_empty() {
            let _ = writeln!(
                text,
                "  slot  key                               users      hits  programs  evictions     waits"
            );
        }
        for slot in &used {
            let _ = writeln!(
                text,
                "  {:>4}  {:<32}  {:>5}  {:>8}  {:>8}  {:>9}  {:>8}",
                number(&slot["slot"]),
                slot["key_id"].as_str().map_or_else(|| "-".to_owned(), printable),
                number(&slot["users"]),
                number(&slot["hits"]),
                number(&slot["programs"]),
                number(&slot["evictions"]),
                number(&slot["waits"]),
            );
        }
        let unused = list(&keyslots["slots"]).len() - used.len();
        if unused > 0 {
            let _ = writeln!(text, "  {unused} keyslots never used");
        }
    }
    text
}

/// How far a re-encryption is.
fn describe_reencryption(report: &Value) -> String {
    let (done, size) = (number(&report["done_bytes"]), number(&report["size_bytes"]));
    match report["state"].as_str() {
        None => String::new(),
        Some("done") => format!("    re-encrypted, to key {}\n", word(&report["key_id"])),
        Some(state) => {
            let percent = u128::from(done) * 100 / u128::from(size.max(1));
            let why = report["reason"].as_str().map(|why| format!(": {}", printable(why)));
            format!(
                "    re-encryption {}{}, {percent} %: {} of {}, to key {}\n",
                printable(state),
                why.unwrap_or_default(),
                Size(done),
                Size(size),
                word(&report["key_id"]),
            )
        }
    }
}

/// The engine's process, and what keeps it to itself.
fn describe_process(process: &Value) -> String {
    let mut text = String::new();
    if process.is_null() {
        text.push_str("  in the serving process, which holds its keys\n");
        return text;
    }
    let _ = match (process["stopped"].as_str(), process["pid"].as_u64()) {
        (Some(why), _) => writeln!(text, "  STOPPED: {}", printable(why)),
        (None, Some(pid)) => write!(text, "  in process {pid}"),
        (None, None) => write!(text, "  its process is being started"),
    };
    if process["stopped"].is_null() {
        let restarts = number(&process["restarts"]);
        let _ = match restarts {
            0 => writeln!(text),
            _ => writeln!(
                text,
                ", started again {restarts} times, last pause {} us",
                number(&process["last_pause_us"])
            ),
        };
    }
    let missing = list(&process["sandbox"]).iter().filter_map(Value::as_str);
    for line in missing.filter(|line| line.starts_with("MISSING")) {
        let _ = writeln!(text, "  {}", printable(line));
    }
    text
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn word(value: &Value) -> String {
    printable(value.as_str().unwrap_or("?"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
