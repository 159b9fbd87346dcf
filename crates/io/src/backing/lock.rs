//! One writer at a time, and who it is.

use inlinecrypt_core::backing::Access;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::fs::{FlockOperation, Stat};
use rustix::io::Errno;
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many holders of a lock an error message names.
const NAMED_MAX: usize = 3;

/// An open file that is locked. Unlocked when dropped, and not only when the last descriptor of it is closed: a process
/// that is being started has copies of ours for a moment.
#[derive(Debug)]
pub(super) struct LockedFile {
    file: OwnedFd,
    /// Whether the lock is ours to give back, and not another server's that may hand it over.
    is_ours: AtomicBool,
}

impl LockedFile {
    /// The lock belongs to another server, until it is claimed.
    pub(super) fn disclaim(&self) {
        self.is_ours.store(false, Ordering::Release);
    }

    /// The lock is ours now.
    pub(super) fn claim(&self) {
        self.is_ours.store(true, Ordering::Release);
    }
}

impl AsFd for LockedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        if self.is_ours.load(Ordering::Acquire) {
            // Closing it does the same, a little later at worst.
            let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        }
    }
}

/// Locks an open file: alone for writing, together with other readers for reading.
pub(super) fn lock(file: OwnedFd, stat: &Stat, access: Access, path: &Path) -> Result<LockedFile, Error> {
    let operation = match access {
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation)) {
        Ok(()) => Ok(LockedFile { file, is_ours: AtomicBool::new(true) }),
        Err(Errno::WOULDBLOCK) => {
            Err(Error::new(ErrorKind::Busy, Op::Open).detail(busy_text(path, &lock_holders(stat))))
        }
        Err(errno) => Err(Error::new(ErrorKind::Backing, Op::Open)
            .detail(format!("{} cannot be locked", path.display()))
            .because(io::Error::from(errno))),
    }
}

/// Says that `path` is served, by whom, and what to do.
fn busy_text(path: &Path, holders: &[Process]) -> String {
    let mut text = format!("{} is served by ", path.display());
    match holders {
        [] => text.push_str("another process that cannot be seen from here"),
        [first, others @ ..] => {
            let _ = write!(text, "{first}");
            for other in others.iter().take(NAMED_MAX - 1) {
                let _ = write!(text, ", {other}");
            }
            if others.len() >= NAMED_MAX {
                let _ = write!(text, " and {} more", others.len() + 1 - NAMED_MAX);
            }
        }
    }
    text.push_str("; stop it first, or have all serve read-only");
    text
}

/// A process, as messages name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pid: u32,
    /// The command name, if it could be read.
    command: Option<String>,
}

impl Process {
    /// The process with this id.
    pub(crate) fn of(pid: u32) -> Self {
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        Self { pid, command: command.map(|name| name.trim_end().to_owned()) }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)?;
        match &self.command {
            // Chosen by that process, and on its way to a terminal.
            Some(command) => write!(f, " ({})", command.escape_default()),
            None => Ok(()),
        }
    }
}

/// Who holds a `flock` on the file, as far as `/proc` tells.
pub(super) fn lock_holders(stat: &Stat) -> Vec<Process> {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut pids: Vec<u32> = locks
        .lines()
        .filter_map(LockLine::parse)
        .filter(|line| line.inode == stat.st_ino)
        // The device is the one of the filesystem. For some (btrfs, overlays) `stat` tells another; then the process
        // itself is asked whether it has our file open.
        .filter(|line| line.device == device(stat.st_dev) || has_open(line.pid, stat))
        .map(|line| line.pid)
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().map(Process::of).collect()
}

fn device(number: u64) -> (u32, u32) {
    (rustix::fs::major(number), rustix::fs::minor(number))
}

fn has_open(pid: u32, stat: &Stat) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
        .any(|open| (open.dev(), open.ino()) == (stat.st_dev, stat.st_ino))
}

/// A held `flock` in `/proc/locks` (`proc_locks(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LockLine {
    pid: u32,
    device: (u32, u32),
    inode: u64,
}

impl LockLine {
    /// `NUMBER: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END`, device numbers in hexadecimal. Those who wait
    /// have `->` in the second place, and are not holders.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let mut words = words.skip(2);
        let pid = words.next()?.parse().ok()?;
        let mut place = words.next()?.split(':');
        let major = u32::from_str_radix(place.next()?, 16).ok()?;
        let minor = u32::from_str_radix(place.next()?, 16).ok()?;
        let inode = place.next()?.parse().ok()?;
        Some(Self { pid, device: (major, minor), inode })
    }
}

/// Says who keeps a block device from being opened for writing: mounts, devices on top, other servers.
pub(super) fn device_users(node: &Stat) -> String {
    let (major, minor) = device(node.st_rdev);
    let mut users = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        // `ID PARENT MAJOR:MINOR ROOT MOUNT-POINT ...` (`proc_pid_mountinfo(5)`), device numbers in decimal.
        let mut words = line.split(' ').skip(2);
        if words.next() == Some(&format!("{major}:{minor}"))
            && let Some(place) = words.nth(1)
        {
            users.push(format!("it is mounted on {place}"));
        }
    }
    if let Ok(above) = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders")) {
        let names = above.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        users.extend(names.map(|name| format!("{name} is built on it")));
    }
    users.extend(lock_holders(node).iter().map(|process| format!("{process} serves it")));
    if users.is_empty() {
        return "another process or the kernel has it".to_owned();
    }
    users.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_are_read_as_the_kernel_writes_them() {
        assert_eq!(
            LockLine::parse("3: FLOCK  ADVISORY  WRITE 812 fe:0a:131102 0 EOF"),
            Some(LockLine { pid: 812, device: (0xfe, 0x0a), inode: 131_102 })
        );
        // A waiter, another kind of lock, a holder in an unseen process namespace, rubbish.
        for line in [
            "3: -> FLOCK  ADVISORY  WRITE 813 fe:0a:131102 0 EOF",
            "4: POSIX  ADVISORY  READ 9 fe:0a:7 0 EOF",
            "5: FLOCK  ADVISORY  WRITE -1 fe:0a:131102 0 EOF",
            "5: FLOCK  ADVISORY",
            "",
        ] {
            assert_eq!(LockLine::parse(line), None, "{line}");
        }
    }

    #[test]
    fn messages_name_a_few_holders_and_count_the_rest() {
        let process = |pid| Process { pid, command: Some("inlinecrypt".to_owned()) };
        let text = |count| busy_text(Path::new("v"), &(1..=count).map(process).collect::<Vec<_>>());
        assert!(text(0).contains("cannot be seen"));
        assert!(text(1).starts_with("v is served by process 1 (inlinecrypt); "), "{}", text(1));
        assert!(text(3).contains("process 3 (inlinecrypt); "), "{}", text(3));
        assert!(text(5).contains("process 3 (inlinecrypt) and 2 more; "), "{}", text(5));
    }

    #[test]
    fn command_names_cannot_play_with_the_terminal() {
        let process = Process { pid: 7, command: Some("\u{1b}[2Jhi".to_owned()) };
        assert_eq!(process.to_string(), "process 7 (\\u{1b}[2Jhi)");
    }
}
