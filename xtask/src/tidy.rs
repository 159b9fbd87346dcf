//! What no compiler checks: that the picture in ARCHITECTURE.md is true, that `unsafe` stays where it may, that words mean
//! one thing, that links lead somewhere.

use std::fs;
use std::path::{Path, PathBuf};

/// The only dependency edges our crates may have. Mirrors the picture in ARCHITECTURE.md.
const EDGES: &[(&str, &[&str])] = &[
    ("inlinecrypt-cipher", &[]),
    ("inlinecrypt-core", &["inlinecrypt-cipher"]),
    ("inlinecrypt-engine", &["inlinecrypt-cipher", "inlinecrypt-core"]),
    ("inlinecrypt-fscrypt", &["inlinecrypt-cipher"]),
    ("inlinecrypt-io", &["inlinecrypt-core"]),
    ("inlinecrypt-luks", &["inlinecrypt-cipher"]),
    ("inlinecrypt-roots", &["inlinecrypt-core", "inlinecrypt-engine"]),
    (
        "inlinecrypt",
        &[
            "inlinecrypt-cipher",
            "inlinecrypt-core",
            "inlinecrypt-engine",
            "inlinecrypt-fscrypt",
            "inlinecrypt-io",
            "inlinecrypt-luks",
            "inlinecrypt-roots",
        ],
    ),
    ("inlinecrypt-sim", &["inlinecrypt-core", "inlinecrypt-engine"]),
    ("inlinecrypt-testkit", &[]),
    ("xtask", &[]),
];

/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &["crates/cipher/src/simd/", "crates/engine/src/sys/", "crates/io/src/sys/"];

/// Words that have a better one here (TARGET's list of words), as people write them in prose.
const WORDS: &[(&str, &str)] = &[
    ("key slot", "keyslot"),
    ("sector number tweak", "DUN"),
    ("whitelist", "allow-list"),
    ("plain key", "raw key"),
];

/// Runs every check.
///
/// # Errors
///
/// All findings, one a line.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let mut findings = Vec::new();
    let mut files = Vec::new();
    walk(root, &mut files);
    edges(root, &mut findings);
    for file in &files {
        let Ok(text) = fs::read_to_string(file) else { continue };
        let name = file.strip_prefix(root).unwrap_or(file).display().to_string();
        match file.extension().and_then(|ending| ending.to_str()) {
            Some("rs") => source(&name, &text, &mut findings),
            Some("md") => {
                words(&name, &text, &mut findings);
                links(file, &name, &text, &mut findings);
            }
            _ => {}
        }
    }
    if findings.is_empty() { Ok(()) } else { Err(format!("\n{}", findings.join("\n"))) }
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !matches!(name.as_str(), "target" | ".git" | "results" | "corpus" | "artifacts") {
                walk(&path, files);
            }
        } else {
            files.push(path);
        }
    }
}

fn edges(root: &Path, findings: &mut Vec<String>) {
    let crates = fs::read_dir(root.join("crates")).into_iter().flatten().flatten().map(|entry| entry.path());
    for folder in crates.chain([root.join("xtask")]) {
        let Ok(text) = fs::read_to_string(folder.join("Cargo.toml")) else { continue };
        let Ok(manifest) = text.parse::<toml::Table>() else {
            findings.push(format!("{}: cannot be parsed", folder.display()));
            continue;
        };
        let name =
            manifest.get("package").and_then(|package| package.get("name")).and_then(|name| name.as_str());
        let name = name.unwrap_or_default();
        let Some((_, allowed)) = EDGES.iter().find(|(known, _)| *known == name) else {
            findings.push(format!("{name}: a crate that tidy's table of edges does not know"));
            continue;
        };
        let dependencies =
            manifest.get("dependencies").and_then(|table| table.as_table()).into_iter().flatten();
        for (dependency, _) in dependencies.filter(|(name, _)| name.starts_with("inlinecrypt")) {
            if !allowed.contains(&dependency.as_str()) {
                findings.push(format!("{name} may not depend on {dependency}: see ARCHITECTURE.md"));
            }
        }
    }
}

fn source(name: &str, text: &str, findings: &mut Vec<String>) {
    if name.starts_with("xtask/") {
        return;
    }
    let may = UNSAFE.iter().any(|place| name.starts_with(place));
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default();
        let says =
            |word: &str| code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|token| token == word);
        if says("unsafe") && !may {
            findings.push(format!("{name}:{number}: unsafe may only stand in {}", UNSAFE.join(", ")));
        }
        if line.contains("SAFETY: parameters are valid") {
            findings.push(format!("{name}:{number}: say which fact makes it safe"));
        }
        if ["todo!(", "unimplemented!(", "#[ignore"].iter().any(|stub| code.contains(stub)) {
            findings.push(format!("{name}:{number}: a stub or an ignored test"));
        }
    }
}

fn words(name: &str, text: &str, findings: &mut Vec<String>) {
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.to_lowercase();
        for (word, better) in WORDS {
            if line.contains(word) {
                findings.push(format!("{name}:{number}: say {better}, not {word}"));
            }
        }
    }
}

/// Links to files of ours must lead somewhere.
fn links(file: &Path, name: &str, text: &str, findings: &mut Vec<String>) {
    for (number, line) in (1..).zip(text.lines()) {
        for part in line.split("](").skip(1) {
            let target = part.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !file.parent().unwrap_or(file).join(target).exists() {
                findings.push(format!("{name}:{number}: a link to {target}, which is not there"));
            }
        }
    }
}
