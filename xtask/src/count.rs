//! `cargo xtask count`: instructions of the hot paths, which do not depend on how busy the machine is.
//!
//! Valgrind counts them, so the widest vector instructions, which it does not know, are not used: the cipher is counted in the
//! form that it has on processors with AES-NI only. A figure that is more than [`MORE_PERCENT`] above the one that is written
//! down is a failure; so is one as far below it, since what was gained should be kept: write it down with `count --write`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Where the figures are written down, with the compiler that they are from.
const FILE: &str = "benches/instructions.toml";
/// How far a figure may be from that.
const MORE_PERCENT: u64 = 5;
/// What is counted, and how often it is done in the shorter of two runs.
const WORK: &[(&str, u64)] =
    &[("xts-512", 100), ("xts-4096", 100), ("keyslot-hit", 1000), ("nbd-reads", 100)];

pub(crate) fn run(root: &Path, write: bool) -> Result<(), String> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return match std::env::var_os("INLINECRYPT_REQUIRE_TOOLS") {
            Some(_) => Err("valgrind is not there; install it (Debian: valgrind)".to_owned()),
            None => {
                eprintln!("SKIPPED: counting instructions needs valgrind");
                Ok(())
            }
        };
    }
    super::cargo(&["build", "--quiet", "--release", "-p", "inlinecrypt-io", "--example", "count"], &[])?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let program = target.join("release/examples/count");
    let mut found = BTreeMap::new();
    for (what, times) in WORK {
        let (once, twice) = (count(&program, what, *times)?, count(&program, what, 2 * times)?);
        let one = twice.saturating_sub(once) / times;
        println!("{what:<12} {one:>9} instructions");
        found.insert(*what, one);
    }
    let compiler = compiler()?;
    let path = root.join(FILE);
    if write {
        let mut text = "# Instructions of the hot paths: `cargo xtask count --write`.\n".to_owned();
        text += &format!("compiler = {compiler:?}\n\n[instructions]\n");
        found.iter().for_each(|(what, one)| text += &format!("{what} = {one}\n"));
        return std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()));
    }
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let table: toml::Table = text.parse().map_err(|error| format!("{}: {error}", path.display()))?;
    if table.get("compiler").and_then(toml::Value::as_str) != Some(&compiler) {
        eprintln!(
            "SKIPPED: the figures in {FILE} are another compiler's; `cargo xtask count --write` writes them anew"
        );
        return Ok(());
    }
    compare(&table, &found)
}

fn compare(table: &toml::Table, found: &BTreeMap<&str, u64>) -> Result<(), String> {
    let mut wrong = Vec::new();
    for (what, one) in found {
        let known =
            table.get("instructions").and_then(|known| known.get(what)).and_then(toml::Value::as_integer);
        let Some(known) = known.and_then(|known| u64::try_from(known).ok()) else {
            wrong.push(format!("{what} is not in {FILE}"));
            continue;
        };
        if one.abs_diff(known) * 100 > known * MORE_PERCENT {
            wrong.push(format!("{what} takes {one} instructions, and took {known}"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!("{}; if that is meant: cargo xtask count --write", wrong.join("; ")))
}

fn count(program: &Path, what: &str, times: u64) -> Result<u64, String> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([what, &times.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok());
    match (output.status.success(), collected) {
        (true, Some(count)) => Ok(count),
        _ => Err(format!("valgrind did not count {what}: {said}")),
    }
}

fn compiler() -> Result<String, String> {
    let output =
        Command::new("rustc").arg("--version").output().map_err(|error| format!("rustc: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_more_or_less_than_it_took_is_told() {
        let table: toml::Table = "[instructions]\na = 100\nb = 100\nc = 100".parse().unwrap();
        assert!(compare(&table, &[("a", 105), ("b", 95)].into()).is_ok());
        let why = compare(&table, &[("a", 106), ("b", 94), ("c", 100), ("d", 1)].into()).unwrap_err();
        assert!(
            why.contains("a takes 106") && why.contains("b takes 94") && why.contains("d is not in"),
            "{why}"
        );
        assert!(!why.contains("c takes"), "{why}");
    }
}
