//! TOML files: configs, and the descriptions that lie beside volumes.
//!
//! A description is a config with one `[[volume]]`, so everything is read by the same code, and a description can be
//! served as a config.

use crate::files;
use crate::report::{Code, Failure};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A whole file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    #[serde(default)]
    pub(crate) engine: Vec<Spanned<EngineTable>>,
    #[serde(default)]
    pub(crate) volume: Vec<Spanned<VolumeTable>>,
    #[serde(default)]
    pub(crate) listen: ListenTable,
    #[serde(default)]
    pub(crate) server: ServerTable,
}

/// `[[engine]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EngineTable {
    pub(crate) name: String,
    pub(crate) spec: Option<String>,
    pub(crate) root: Option<String>,
    pub(crate) passphrase_file: Option<String>,
    pub(crate) key_type: Option<String>,
    pub(crate) policy: Option<String>,
    pub(crate) program_share: Option<u8>,
    pub(crate) process: Option<String>,
    pub(crate) sandbox: Option<String>,
    pub(crate) realtime: Option<bool>,
    pub(crate) deaths_max: Option<u32>,
}

/// `[[volume]]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VolumeTable {
    pub(crate) name: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) key_id: Option<String>,
    pub(crate) engine: Option<String>,
    pub(crate) mode: Option<String>,
    pub(crate) data_unit: Option<u32>,
    pub(crate) size: Option<u64>,
    pub(crate) block: Option<u32>,
    pub(crate) iv_offset: Option<u64>,
    pub(crate) iv: Option<String>,
    pub(crate) offset: Option<u64>,
    pub(crate) length: Option<u64>,
    pub(crate) dm_table: Option<String>,
    pub(crate) read_only: Option<bool>,
    pub(crate) fallback: Option<String>,
    pub(crate) discard: Option<String>,
    pub(crate) direct: Option<bool>,
    pub(crate) priority: Option<String>,
    pub(crate) pin: Option<bool>,
    pub(crate) preprogram: Option<bool>,
    pub(crate) spill_after_us: Option<u64>,
    pub(crate) header: Option<String>,
    pub(crate) passphrase_file: Option<String>,
    pub(crate) key_file: Option<String>,
    pub(crate) recover: Option<bool>,
    pub(crate) reencrypt: Option<String>,
    pub(crate) plain: Option<bool>,
}

/// `[listen]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListenTable {
    pub(crate) nbd: Option<Vec<String>>,
    pub(crate) tls: Option<String>,
    pub(crate) tls_cert: Option<String>,
    pub(crate) tls_key: Option<String>,
    pub(crate) tls_client_ca: Option<String>,
    pub(crate) tls_verify_client: Option<bool>,
}

/// `[server]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServerTable {
    pub(crate) control: Option<String>,
    pub(crate) workers: Option<usize>,
    pub(crate) connections_max: Option<usize>,
    pub(crate) stop_seconds: Option<u64>,
    pub(crate) zero_copy: Option<bool>,
}

/// Which keys each table may have. A test compares it with the types above.
const KEYS: &[(&str, &[&str])] = &[
    ("", &["engine", "volume", "listen", "server"]),
    (
        "engine",
        &[
            "name",
            "spec",
            "root",
            "passphrase_file",
            "key_type",
            "policy",
            "program_share",
            "process",
            "sandbox",
            "realtime",
            "deaths_max",
        ],
    ),
    (
        "volume",
        &[
            "name",
            "path",
            "key",
            "key_id",
            "engine",
            "mode",
            "data_unit",
            "size",
            "block",
            "iv_offset",
            "iv",
            "offset",
            "length",
            "dm_table",
            "read_only",
            "fallback",
            "discard",
            "direct",
            "priority",
            "pin",
            "preprogram",
            "spill_after_us",
            "header",
            "passphrase_file",
            "key_file",
            "recover",
            "reencrypt",
            "plain",
        ],
    ),
    ("listen", &["nbd", "tls", "tls_cert", "tls_key", "tls_client_ca", "tls_verify_client"]),
    ("server", &["control", "workers", "connections_max", "stop_seconds", "zero_copy"]),
];

/// A config and where it is, for messages and for the paths in it.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    pub(crate) config: Config,
    text: String,
}

impl ConfigFile {
    /// Reads a file and reports every key in it that is not known.
    pub(crate) fn read(path: &Path) -> Result<Self, Vec<Failure>> {
        let text = files::read_text(path, "config").map_err(|failure| vec![failure])?;
        Self::of_text(text, path)
    }

    /// The same of a text that is to be a file at `path`.
    pub(crate) fn of_text(text: String, path: &Path) -> Result<Self, Vec<Failure>> {
        let config = parse(&text, path)?;
        Ok(Self { path: path.to_owned(), config, text })
    }

    /// As it is written.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// `FILE:LINE` of something in it.
    pub(crate) fn place<T>(&self, of: &Spanned<T>) -> String {
        format!("{}:{}", self.path.display(), line_of(&self.text, of.span().start))
    }
}

fn parse(text: &str, path: &Path) -> Result<Config, Vec<Failure>> {
    let at = |offset: usize| format!("{}:{}", path.display(), line_of(text, offset));
    let wrong = |error: &toml::de::Error| {
        let place = error.span().map_or_else(|| path.display().to_string(), |span| at(span.start));
        Failure::new(
            Code::Wrong,
            format!("{place}: {}", error.message().trim_end().replace('\n', ", ")),
            "Correct the line. `inlinecrypt serve --help` shows a config.",
        )
    };
    let table = DeTable::parse(text).map_err(|error| vec![wrong(&error)])?;
    let mut unknown = Vec::new();
    look_for_unknown("", table.get_ref(), &mut |table, key| {
        let (known, offset) = (keys_of(table), key.span().start);
        let place = if table.is_empty() { String::new() } else { format!(" in [{table}]") };
        unknown.push(Failure::new(
            Code::Wrong,
            format!("{}: unknown key {:?}{place}", at(offset), key.get_ref()),
            match nearest(key.get_ref(), known) {
                Some(near) => format!("Did you mean {near:?}?"),
                None => format!("The keys{place} are: {}.", known.join(", ")),
            },
        ));
    });
    if !unknown.is_empty() {
        return Err(unknown);
    }
    toml::from_str(text).map_err(|error| vec![wrong(&error)])
}

fn keys_of(table: &str) -> &'static [&'static str] {
    KEYS.iter().find(|(name, _)| *name == table).map_or(&[], |(_, keys)| keys)
}

fn look_for_unknown(
    name: &str,
    table: &DeTable<'_>,
    found: &mut dyn FnMut(&str, &Spanned<std::borrow::Cow<'_, str>>),
) {
    for (key, value) in table {
        if !keys_of(name).contains(&key.get_ref().as_ref()) {
            found(name, key);
            continue;
        }
        if !name.is_empty() {
            continue;
        }
        match value.get_ref() {
            DeValue::Table(inner) => look_for_unknown(key.get_ref(), inner, found),
            DeValue::Array(inners) => {
                for inner in inners.iter() {
                    if let DeValue::Table(inner) = inner.get_ref() {
                        look_for_unknown(key.get_ref(), inner, found);
                    }
                }
            }
            _ => {}
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count()
}

/// The known word that was probably meant.
pub(crate) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = word.to_ascii_lowercase().replace('-', "_");
    known
        .iter()
        .map(|candidate| (distance(&word, candidate), *candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters have to be added, removed or changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse(text, Path::new("c.toml"))
            .expect_err("must be refused")
            .into_iter()
            .map(|failure| format!("{} | {}", failure.what, failure.advice))
            .collect()
    }

    /// The types and the list of keys say the same: each listed key is known to the type, and no type knows more.
    #[test]
    fn the_list_of_keys_is_that_of_the_types() {
        for (table, keys) in KEYS {
            let text = match *table {
                "" => "zzz = 1\n".to_owned(),
                "engine" | "volume" => format!("[[{table}]]\nzzz = 1\n"),
                _ => format!("[{table}]\nzzz = 1\n"),
            };
            let error = toml::from_str::<Config>(&text).unwrap_err();
            let listed: Vec<String> =
                error.message().split('`').skip(3).step_by(2).map(str::to_owned).collect();
            assert_eq!(&listed, keys, "{table}: {}", error.message());
        }
    }

    #[test]
    fn every_unknown_key_is_told_with_its_line_and_the_nearest_known_one() {
        let text = "[[volume]]\npath = \"a\"\ndataunit = 512\n\n[listen]\nnbdd = []\n\n[colour]\nx = 1\n";
        assert_eq!(
            problems(text),
            [
                "c.toml:8: unknown key \"colour\" | The keys are: engine, volume, listen, server.",
                "c.toml:6: unknown key \"nbdd\" in [listen] | Did you mean \"nbd\"?",
                "c.toml:3: unknown key \"dataunit\" in [volume] | Did you mean \"data_unit\"?",
            ]
        );
    }

    #[test]
    fn wrong_types_and_syntax_are_told_with_their_line() {
        assert!(problems("[[volume]]\npath = 7\n")[0].starts_with("c.toml:2: invalid type"));
        assert!(problems("[[volume]\n")[0].starts_with("c.toml:1: "));
        assert!(problems("[[engine]]\nspec = \"software\"\n")[0].contains("missing field `name`"));
    }

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        assert_eq!(nearest("readonly", keys_of("volume")), Some("read_only"));
        assert_eq!(nearest("read-only", keys_of("volume")), Some("read_only"));
        assert_eq!(nearest("modes", keys_of("volume")), Some("mode"));
        assert_eq!(nearest("passphrase", keys_of("volume")), None);
    }
}
