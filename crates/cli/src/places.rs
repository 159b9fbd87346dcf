//! Where things are kept when nobody says where.

use crate::report::{Code, Failure};
use inlinecrypt_engine::RootSpec;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where roots are kept: `$INLINECRYPT_HOME`, else `$XDG_DATA_HOME/inlinecrypt`, else `~/.local/share/inlinecrypt`.
pub(crate) fn home() -> Result<PathBuf, Failure> {
    if let Some(home) = variable("INLINECRYPT_HOME") {
        return Ok(home);
    }
    // The XDG specification: a path that is not absolute is to be ignored.
    if let Some(data) = variable("XDG_DATA_HOME").filter(|path| path.is_absolute()) {
        return Ok(data.join("inlinecrypt"));
    }
    match variable("HOME") {
        Some(home) => Ok(home.join(".local/share/inlinecrypt")),
        None => Err(Failure::new(
            Code::Wrong,
            "there is no place for the root: INLINECRYPT_HOME, XDG_DATA_HOME and HOME are all unset",
            "Name it with --root PATH, or set INLINECRYPT_HOME.",
        )),
    }
}

/// The root that is used when none is named.
pub(crate) fn default_root() -> Result<RootSpec, Failure> {
    Ok(RootSpec::File(home()?.join("root.key")))
}

/// The directories where control sockets of this user may be; a server makes its own in the first.
pub(crate) fn control_directories() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(runtime) = variable("XDG_RUNTIME_DIR").filter(|path| path.is_absolute()) {
        places.push(runtime.join("inlinecrypt"));
    }
    let uid = rustix::process::geteuid().as_raw();
    let runtime = PathBuf::from(format!("/run/user/{uid}"));
    if places.is_empty() && std::fs::metadata(&runtime).is_ok_and(|directory| directory.uid() == uid) {
        places.push(runtime.join("inlinecrypt"));
    }
    if let Ok(home) = home() {
        places.push(home.join("run"));
    }
    places
}

/// A file that belongs to `volume` and lies beside it: its name with `suffix` behind.
pub(crate) fn beside(volume: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(volume.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

/// `path` from `base` on, unless it is absolute.
pub(crate) fn relative_to(base: &Path, path: &Path) -> PathBuf {
    if path.is_absolute() || base.as_os_str().is_empty() { path.to_owned() } else { base.join(path) }
}

/// The directory in which `path` lies. Empty for the current one.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
