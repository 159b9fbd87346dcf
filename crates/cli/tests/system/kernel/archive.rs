//! Archives as the kernel unpacks them into its first filesystem: cpio, format `newc`
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;

/// An archive that grows.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    /// What is there already.
    paths: BTreeSet<String>,
}

impl Archive {
    /// Adds a file, and the directories above it. Whatever is at `path` already stays as it is.
    pub(crate) fn file(&mut self, path: &Path, permissions: u32, content: &[u8]) {
        let path = plain(path);
        if self.paths.contains(&path) {
            return;
        }
        if let Some(parent) = Path::new(&path).parent() {
            self.directory(parent);
        }
        self.entry(&path, FILE | permissions, content);
    }

    /// Adds a directory, and those above it.
    pub(crate) fn directory(&mut self, path: &Path) {
        let mut above = String::new();
        for name in plain(path).split('/').filter(|name| !name.is_empty()) {
            let _ = write!(above, "{}{name}", if above.is_empty() { "" } else { "/" });
            if !self.paths.contains(&above) {
                self.entry(&above, DIRECTORY, &[]);
            }
        }
    }

    /// All of it.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(content.len()).expect("files of less than 4 GiB");
        let name_len = u32::try_from(path.len() + 1).expect("a short name");
        // inode, mode, owner, group, links, time, length, device (2), special device (2), length of the name, checksum
        let numbers = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
        let mut header = String::from("070701");
        for number in numbers {
            let _ = write!(header, "{number:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self.paths.insert(path.to_owned());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Without what is no name in it: `/a/./b/../c` is `a/c`.
fn plain(path: &Path) -> String {
    let mut names: Vec<&str> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_str().expect("a name in UTF-8")),
            Component::ParentDir => {
                names.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    names.join("/")
}
