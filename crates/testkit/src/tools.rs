//! Real programs, or a loud skip; and places to put files.

use std::env;
use std::path::PathBuf;

/// Set to `1` where every tool must be there, so that nothing is skipped unnoticed.
pub const REQUIRE_TOOLS: &str = "INLINECRYPT_REQUIRE_TOOLS";

/// The path of a program. If it is not installed: `None`, after a line that starts with `SKIPPED`.
///
/// # Panics
///
/// If it is not installed and [`REQUIRE_TOOLS`] is `1`.
#[must_use]
pub fn require_tool(name: &str) -> Option<PathBuf> {
    let found = env::var_os("PATH")
        .into_iter()
        .flat_map(|path| env::split_paths(&path).collect::<Vec<_>>())
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        assert!(
            env::var_os(REQUIRE_TOOLS).is_none_or(|value| value != "1"),
            "{name} is required, and not installed"
        );
        eprintln!("SKIPPED: {name} is not installed");
    }
    found
}

/// A folder that is removed when dropped. Its path is short enough for sockets in it.
///
/// # Panics
///
/// If there is no place for one.
#[must_use]
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("ic").tempdir().expect("a folder for temporary files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_everybody_has_is_found() {
        assert!(require_tool("sh").is_some());
    }
}
