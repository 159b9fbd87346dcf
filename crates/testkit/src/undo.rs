//! Mounts, loop devices and FUSE mounts that are gone with the test, also when it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

/// How often undoing is tried again while something still uses it.
const ATTEMPTS_MAX: u32 = 50;

const PAUSE: Duration = Duration::from_millis(100);

/// Runs a program to its end.
///
/// # Errors
///
/// What it said, if it fails.
pub fn run(command: &mut Command) -> io::Result<String> {
    let Output { status, stdout, stderr } = command.output()?;
    let (out, error) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    if status.success() {
        Ok(out.into_owned())
    } else {
        Err(io::Error::other(format!("{command:?}: {status}: {out}{error}")))
    }
}

/// Tries for a while: what was used a moment ago may be busy still.
fn undo(command: &mut Command) -> io::Result<()> {
    let mut attempt = 0;
    loop {
        match run(command) {
            Ok(_) => return Ok(()),
            Err(error) => {
                attempt += 1;
                if attempt == ATTEMPTS_MAX {
                    return Err(error);
                }
                thread::sleep(PAUSE);
            }
        }
    }
}

/// A mounted filesystem.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    /// The program that unmounts it, and its arguments before the path.
    undo: Option<(&'static str, &'static [&'static str])>,
}

impl Mount {
    /// Mounts with `mount ARGUMENTS PATH`.
    ///
    /// # Errors
    ///
    /// The system's, and what mount said.
    pub fn new(path: &Path, arguments: &[&str]) -> io::Result<Self> {
        run(Command::new("mount").args(arguments).arg(path))?;
        Ok(Self { path: path.to_owned(), undo: Some(("umount", &[])) })
    }

    /// Takes care of a FUSE filesystem that another process has mounted, or will.
    #[must_use]
    pub fn fuse(path: &Path) -> Self {
        Self { path: path.to_owned(), undo: Some(("fusermount3", &["-u", "-q"])) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts it now.
    ///
    /// # Errors
    ///
    /// What umount said.
    pub fn unmount(mut self) -> io::Result<()> {
        let (program, arguments) = self.undo.take().expect("taken only here and when dropped");
        undo(Command::new(program).args(arguments).arg(&self.path))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let Some((program, arguments)) = self.undo.take() else { return };
        if let Err(error) = undo(Command::new(program).args(arguments).arg(&self.path)) {
            // Lazily, so that at least nothing new reaches it.
            eprintln!("{error}");
            let lazily = if program == "umount" { "-l" } else { "-z" };
            let _ = run(Command::new(program).args(arguments).arg(lazily).arg(&self.path));
        }
    }
}

/// A loop device.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    is_detached: bool,
}

impl LoopDevice {
    /// Puts a loop device over `file`, with more options for `losetup`.
    ///
    /// # Errors
    ///
    /// The system's, and what losetup said.
    pub fn new(file: &Path, options: &[&str]) -> io::Result<Self> {
        let path = run(Command::new("losetup").args(["--find", "--show"]).args(options).arg(file))?;
        Ok(Self { path: PathBuf::from(path.trim_end()), is_detached: false })
    }

    /// Its device node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Detaches it now.
    ///
    /// # Errors
    ///
    /// What losetup said.
    pub fn detach(mut self) -> io::Result<()> {
        self.is_detached = true;
        undo(Command::new("losetup").arg("--detach").arg(&self.path))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.is_detached {
            return;
        }
        if let Err(error) = undo(Command::new("losetup").arg("--detach").arg(&self.path)) {
            eprintln!("{error}");
        }
    }
}
