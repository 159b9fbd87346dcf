//! Real files, real filesystems, real devices. What this machine cannot do is skipped, and says so.

use super::stable::Failed;
use super::testing::{MemBacking, PowerCutBacking, StrictBacking, conformance};
use super::*;
use inlinecrypt_core::backing::{BackingFacts, Durability, Extent, Part};
use inlinecrypt_core::error::{ErrorKind, Op};
use inlinecrypt_core::memory::{HeapSource, MemoryPool};
use rustix::io::Errno;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn options(access: Access, caching: Caching) -> OpenOptions {
    OpenOptions { access, caching, ..OpenOptions::default() }
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory for temporary files")
}

/// A file of `len_bytes` zeroes that takes no room.
fn sparse(directory: &Path, name: &str, len_bytes: u64) -> PathBuf {
    let path = directory.join(name);
    create_file(&path, len_bytes).unwrap_or_else(|error| panic!("{}", error.chain()));
    path
}

fn open_default(path: &Path) -> Result<FileBacking, Error> {
    FileBacking::open(path, OpenOptions::default())
}

/// Runs a program; says whether it succeeded, and prints what it complained of.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    if !output.status.success() {
        println!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn skip(why: &str) {
    println!("SKIPPED: {why}");
}

/// A small filesystem in memory. Unmounted when dropped, also by a failing test.
struct Tmpfs {
    directory: TempDir,
}

impl Tmpfs {
    fn mount(size: &str) -> Option<Self> {
        let directory = directory();
        let path = directory.path().to_str()?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", path])?;
        Some(Self { directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let path = self.directory.path().to_string_lossy().into_owned();
        if run("umount", &[&path]).is_none() {
            run("umount", &["--lazy", &path]);
        }
    }
}

/// A block device made of a file. Undone when dropped, also by a failing test.
struct Loop {
    device: String,
}

impl Loop {
    fn attach(file: &Path, more: &[&str]) -> Option<Self> {
        let mut arguments = vec!["--find", "--show"];
        arguments.extend(more);
        arguments.push(file.to_str()?);
        Some(Self { device: run("losetup", &arguments)? })
    }

    fn path(&self) -> &Path {
        Path::new(&self.device)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.device]);
    }
}

/// Opens a new file for each part of the conformance suite.
fn conform(directory: &Path, caching: Caching) {
    let count = Cell::new(0);
    conformance::run(|| {
        count.set(count.get() + 1);
        let path = sparse(directory, &format!("volume-{}", count.get()), 4 * MIB);
        let opened = FileBacking::open(path, options(Access::ReadWrite, caching));
        Arc::new(StrictBacking::new(opened.unwrap_or_else(|error| panic!("{}", error.chain()))))
    });
}

#[test]
fn a_file_keeps_the_bargain() {
    conform(directory().path(), Caching::PageCache);
}

#[test]
fn a_file_under_direct_io_keeps_the_bargain() {
    let directory = directory();
    let probe = sparse(directory.path(), "probe", 4 * MIB);
    match FileBacking::open(&probe, options(Access::ReadWrite, Caching::Direct)) {
        Err(error) if error.kind() == ErrorKind::Unsupported => skip(&error.chain()),
        Err(error) => panic!("{}", error.chain()),
        Ok(backing) => {
            assert!(backing.facts().align_bytes >= 512, "{:?}", backing.facts());
            conform(directory.path(), Caching::Direct);
        }
    }
}

#[test]
fn a_file_in_memory_keeps_the_bargain() {
    let Some(mount) = Tmpfs::mount("64m") else { return skip("no tmpfs") };
    conform(mount.path(), Caching::PageCache);
    // Newer systems can do direct I/O there, older ones refuse; either way there is no third.
    let path = sparse(mount.path(), "direct", 4 * MIB);
    match FileBacking::open(&path, options(Access::ReadWrite, Caching::Direct)) {
        Ok(_) => {
            let below = mount.path().join("below");
            fs::create_dir(&below).expect("our own mount");
            conform(&below, Caching::Direct);
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", error.chain());
            assert!(error.to_string().contains("without --direct"), "{error}");
        }
    }
}

#[test]
fn memory_keeps_the_bargain() {
    conformance::run(|| Arc::new(StrictBacking::new(MemBacking::new(4 * MIB))));
    conformance::run(|| {
        let disk = MemBacking::new(4 * MIB);
        let facts = BackingFacts { align_bytes: 4096, can_discard: false, ..disk.facts() };
        Arc::new(StrictBacking::new(disk.with_facts(facts)))
    });
}

#[test]
fn a_disk_whose_power_can_be_cut_keeps_the_bargain() {
    conformance::run(|| Arc::new(StrictBacking::new(PowerCutBacking::new(4 * MIB).with_align(512))));
}

#[test]
fn a_faultless_faulty_disk_keeps_the_bargain() {
    conformance::run(|| {
        let disk = testing::FaultyBacking::new(MemBacking::new(4 * MIB)).with_align(1024);
        Arc::new(StrictBacking::new(disk))
    });
}

#[test]
fn a_part_of_a_disk_keeps_the_bargain_and_touches_nothing_else() {
    const START: u64 = 1 << 20;
    let disks = std::cell::RefCell::new(Vec::new());
    conformance::run(|| {
        let disk = Arc::new(MemBacking::new(4 * MIB));
        disk.write(0, &[0x77; 1 << 20], Durability::Cached).unwrap();
        disks.borrow_mut().push(disk.clone());
        Arc::new(StrictBacking::new(Window::new(disk, START).unwrap()))
    });
    for disk in disks.into_inner() {
        let mut before = vec![0; 1 << 20];
        disk.read(0, &mut before).unwrap();
        assert!(before.iter().all(|&byte| byte == 0x77));
    }
    // Places of the whole are another's places here.
    let disk = Arc::new(MemBacking::new(4 * MIB));
    let window = Window::new(disk.clone(), START).unwrap();
    assert_eq!(window.facts().len_bytes, 3 * MIB);
    window.write(512, b"here", Durability::Cached).unwrap();
    let mut found = [0; 4];
    disk.read(START + 512, &mut found).unwrap();
    assert_eq!(&found, b"here");
    for start in [4 * MIB + 1, u64::MAX] {
        let error = Window::new(disk.clone(), start).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let coarse = MemBacking::new(4 * MIB);
    let facts = BackingFacts { align_bytes: 4096, ..coarse.facts() };
    let error = Window::new(Arc::new(coarse.with_facts(facts)), 512).unwrap_err();
    assert!(error.to_string().contains("blocks of 4096"), "{error}");
}

#[test]
fn a_block_device_keeps_the_bargain() {
    let directory = directory();
    for (caching, sector_bytes) in [(Caching::PageCache, "512"), (Caching::Direct, "4096")] {
        let count = Cell::new(0);
        let devices = std::cell::RefCell::new(Vec::new());
        let attach = || {
            count.set(count.get() + 1);
            let file = sparse(directory.path(), &format!("disk-{sector_bytes}-{}", count.get()), 4 * MIB);
            Loop::attach(&file, &["--sector-size", sector_bytes])
        };
        let Some(first) = attach() else { return skip("no loop devices") };
        let first = Cell::new(Some(first));
        conformance::run(|| {
            let device = first.take().or_else(attach).expect("one worked, so others do");
            let opened = FileBacking::open(device.path(), options(Access::ReadWrite, caching));
            let backing = opened.unwrap_or_else(|error| panic!("{}", error.chain()));
            assert_eq!(backing.facts().len_bytes, 4 * MIB);
            if caching == Caching::Direct {
                assert_eq!(backing.facts().align_bytes.to_string(), sector_bytes);
            }
            devices.borrow_mut().push(device);
            Arc::new(StrictBacking::new(backing))
        });
    }
}

#[test]
fn a_block_device_has_one_writer_and_says_who() {
    let directory = directory();
    let file = sparse(directory.path(), "disk", 4 * MIB);
    let Some(device) = Loop::attach(&file, &[]) else { return skip("no loop devices") };
    let writer = open_default(device.path()).unwrap_or_else(|error| panic!("{}", error.chain()));
    let error = open_default(device.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    drop(writer);
    // Programs that other tests start have copies of our descriptors for a moment, and with them the claim.
    let free = (0..100).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        open_default(device.path()).is_ok()
    });
    assert!(free, "free again");
}

#[test]
fn a_mounted_block_device_is_busy_and_says_where() {
    let directory = directory();
    let file = sparse(directory.path(), "disk", 16 * MIB);
    let Some(device) = Loop::attach(&file, &[]) else { return skip("no loop devices") };
    if run("mkfs.ext4", &["-q", &device.device]).is_none() {
        return skip("no mkfs.ext4");
    }
    let mount_point = directory.path().join("mounted");
    fs::create_dir(&mount_point).expect("our own directory");
    let place = mount_point.to_str().expect("plain");
    if run("mount", &[&device.device, place]).is_none() {
        return skip("cannot mount");
    }
    let result = open_default(device.path());
    let unmounted = run("umount", &[place]);
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&format!("mounted on {place}")), "{error}");
    assert!(unmounted.is_some());
}

/// A flush that really fails: a disk whose file lies on a medium that is full.
#[test]
fn a_flush_that_failed_once_fails_for_good() {
    let Some(mount) = Tmpfs::mount("1m") else { return skip("no tmpfs") };
    let file = sparse(mount.path(), "disk", 8 * MIB);
    let Some(device) = Loop::attach(&file, &[]) else { return skip("no loop devices") };
    let backing = open_default(device.path()).unwrap_or_else(|error| panic!("{}", error.chain()));
    backing.flush().expect("nothing is wrong yet");
    // Goes to the page cache, which takes it; only writing it back finds that there is no room.
    backing.write(0, &vec![1; 4 << 20], Durability::Cached).expect("taken by the cache");
    let error = backing.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FlushLost, "{}", error.chain());
    assert!(std::error::Error::source(&error).is_some_and(|source| source.is::<std::io::Error>()));
    // The system itself says that all is well now; it is not.
    let again = backing.flush().unwrap_err();
    assert_eq!(again.kind(), ErrorKind::FlushLost);
    assert_eq!(again.op(), Op::Flush);
    let durable = backing.write(0, &[1; 4096], Durability::Durable).unwrap_err();
    assert_eq!(durable.kind(), ErrorKind::FlushLost);
}

#[test]
fn a_full_filesystem_is_no_space_with_its_cause() {
    let Some(mount) = Tmpfs::mount("1m") else { return skip("no tmpfs") };
    let backing = open_default(&sparse(mount.path(), "volume", 8 * MIB)).expect("sparse, so it fits");
    let data = vec![1; 65_536];
    let error = (0..128)
        .find_map(|index| backing.write(index * 65_536, &data, Durability::Cached).err())
        .expect("eight times more than there is room");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    assert_eq!(source.and_then(std::io::Error::raw_os_error), Some(28), "{}", error.chain());
    // Only the write failed: what was there is there, and can be flushed.
    let mut first = vec![0; 65_536];
    backing.read(0, &mut first).expect("not touched by that");
    assert!(first == data);
    backing.flush().expect("nothing that was accepted is lost");

    let error = backing.write(7 * MIB, &data, Durability::Durable).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    backing.flush().expect("what was refused is not lost");
    backing.write(0, &data, Durability::Durable).expect("there is room for this already");
}

/// A medium that only finds when written back to that it is full says so to whoever asks next, which may be a durable
/// write: that is a loss of what was accepted before, not a refusal.
#[test]
fn lack_of_space_that_a_durable_write_collects_is_a_loss() {
    let Some(mount) = Tmpfs::mount("1m") else { return skip("no tmpfs") };
    let file = sparse(mount.path(), "disk", 8 * MIB);
    let Some(device) = Loop::attach(&file, &[]) else { return skip("no loop devices") };
    let backing = open_default(device.path()).unwrap_or_else(|error| panic!("{}", error.chain()));
    backing.write(0, &vec![1; 4 << 20], Durability::Cached).expect("taken by the cache");
    // Written back by the system, which tells nobody.
    rustix::fs::sync();
    let error = backing.write(6 * MIB, &[2; 4096], Durability::Durable).unwrap_err();
    assert_eq!(backing.flush().unwrap_err().kind(), ErrorKind::FlushLost, "{}", error.chain());
    // This medium says EIO, which is a loss anyway. Where it is lack of space, what the write collected is still found.
    let judged = backing.judge(Errno::NOSPC);
    assert!(matches!(judged, Failed::Lost(_)), "{judged:?}");
    let judged = backing.judge(Errno::NOSPC);
    assert!(matches!(judged, Failed::Refused(_)), "once: {judged:?}");
}

#[test]
fn a_file_that_became_shorter_fails_reads_and_keeps_extents_whole() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", 4 * MIB);
    for caching in [Caching::PageCache, Caching::Direct] {
        let backing = match FileBacking::open(&path, options(Access::ReadWrite, caching)) {
            Ok(backing) => backing,
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                skip(&error.chain());
                continue;
            }
            Err(error) => panic!("{}", error.chain()),
        };
        let mut buffer = MemoryPool::private(&HeapSource, 65_536).expect("memory");
        backing.write(0, buffer.bytes(), Durability::Cached).expect("room");
        let shorter = File::options().write(true).open(&path).expect("our own");
        shorter.set_len(MIB + 4096).expect("shorter");

        for offset in [MIB, 2 * MIB] {
            let error = backing.read(offset, buffer.bytes_mut()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Backing);
            assert!(error.to_string().contains("the file has become shorter"), "{error}");
        }
        backing.read(MIB, &mut buffer.bytes_mut()[..4096]).expect("still there");
        let part = |offset: u64, at: usize| Part { offset, range: at..at + 4096, result: Ok(()) };
        let mut parts = [part(2 * MIB, 0), part(MIB, 4096), part(MIB + 4096, 8192)];
        backing.read_parts(buffer.bytes_mut(), &mut parts);
        assert_eq!(parts.each_ref().map(|part| part.result.is_ok()), [false, true, false]);
        assert!(parts[2].result.as_ref().is_err_and(|error| error.to_string().contains("shorter")));
        backing.write_parts(buffer.bytes(), &mut parts);
        assert!(parts.iter().all(|part| part.result.is_err()), "nothing makes it longer again");
        assert_eq!(fs::metadata(&path).expect("our own").len(), MIB + 4096);

        let runs = backing.extents(0, 4 * MIB, usize::MAX).expect("no error by itself");
        assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), 4 * MIB);
        let last = runs.last().expect("not empty");
        assert!(last.allocated, "what is missing must be read, and so be noticed: {runs:?}");
        assert_eq!(last.offset, MIB + 4096);
        assert!(backing.extents(3 * MIB, MIB, 8).expect("no error").iter().all(|run| run.allocated));
        shorter.set_len(4 * MIB).expect("as it was");
    }
}

#[test]
fn what_the_page_cache_has_and_what_it_has_not_are_read_alike() {
    let directory = directory();
    let path = directory.path().join("image");
    let content: Vec<u8> = (0..256u32).flat_map(|page| [page.to_le_bytes(); 1024].concat()).collect();
    fs::write(&path, &content).expect("room");
    let backing = open_default(&path).expect("our own");
    let file = File::open(&path).expect("our own");
    file.sync_all().expect("a sound disk");
    if rustix::fs::fstatfs(&file).is_ok_and(|about| about.f_type == 0x0102_1994) {
        skip("temporary files are in memory, from which nothing is dropped");
    }
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a regular file");
    // Only these are there again, and not what follows them. One part lies across what is there and what is not.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("a regular file");
    let pages: Vec<u64> = (0..70).map(|index| index * 3).collect();
    for page in pages.iter().copied().step_by(2).chain([249]) {
        file.read_exact_at(&mut [0; 4096], page * 4096).expect("it was written");
    }
    let mut buffer = vec![0; 72 * 8192];
    let mut parts: Vec<_> = pages
        .iter()
        .zip(0..)
        .map(|(page, at)| Part { offset: page * 4096, range: at * 8192..at * 8192 + 4096, result: Ok(()) })
        .collect();
    parts.push(Part { offset: 249 * 4096, range: 71 * 8192..72 * 8192, result: Ok(()) });
    backing.read_parts(&mut buffer, &mut parts);
    for Part { offset, range, result } in parts {
        assert!(result.is_ok(), "{result:?}");
        let at = usize::try_from(offset).expect("small");
        assert!(buffer[range.clone()] == content[at..at + range.len()], "at {offset}");
    }
    file.read_exact_at(&mut [0; 4096], 230 * 4096).expect("it was written");
    let mut two = [0; 8192];
    backing.read(230 * 4096, &mut two).expect("all there");
    assert!(two == content[230 * 4096..232 * 4096]);
}

/// Written again, a file that was cut short would be as long as before, and what was cut off would read as noise.
#[test]
fn a_file_that_became_shorter_is_never_made_longer_again() {
    let directory = directory();
    // Whoever notices first: a read, a write of either durability, a discard or a flush.
    for first in ["read", "write", "durable write", "discard", "flush"] {
        let path = sparse(directory.path(), &first.replace(' ', "-"), 4 * MIB);
        let backing = open_default(&path).expect("our own");
        backing.write(3 * MIB, &[1; 4096], Durability::Durable).expect("room");
        backing.write(0, &[2; 4096], Durability::Cached).expect("room");
        File::options().write(true).open(&path).expect("our own").set_len(MIB).expect("shorter");

        let is_told = |result: Result<(), Error>| {
            let error = result.expect_err(first);
            assert_eq!(error.kind(), ErrorKind::Backing, "{first}: {}", error.chain());
            assert!(error.to_string().contains("the file has become shorter"), "{first}: {error}");
        };
        match first {
            "read" => is_told(backing.read(3 * MIB, &mut [0; 4096])),
            "write" => is_told(backing.write(3 * MIB + 4096, &[3; 4096], Durability::Cached)),
            "durable write" => is_told(backing.write(3 * MIB + 4096, &[3; 4096], Durability::Durable)),
            "discard" if backing.facts().can_discard => is_told(backing.discard(0, 4096)),
            "discard" => skip("this filesystem punches no holes"),
            _ => assert_eq!(backing.flush().expect_err(first).kind(), ErrorKind::FlushLost),
        }
        // Even if somebody makes it as long as it was: what was cut off stays lost.
        assert_eq!(fs::metadata(&path).expect("our own").len(), MIB, "{first}: not made longer");
        File::options().write(true).open(&path).expect("our own").set_len(4 * MIB).expect("as it was");
        if first == "discard" && !backing.facts().can_discard {
            continue;
        }
        for durability in [Durability::Cached, Durability::Durable] {
            is_told(backing.write(0, &[3; 4096], durability));
        }
        let flush = backing.flush().expect_err(first);
        assert_eq!(flush.kind(), ErrorKind::FlushLost, "{}", flush.chain());
        assert!(flush.chain().contains("the file has become shorter"), "{}", flush.chain());
        let mut kept = [0; 4096];
        backing.read(0, &mut kept).expect("what is there can be saved");
        assert_eq!(kept, [2; 4096]);
    }
}

#[test]
fn extents_show_what_is_allocated() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", 4 * MIB);
    let backing = open_default(&path).expect("our own");
    backing.write(MIB, &vec![1; 65_536], Durability::Cached).expect("room");
    backing.flush().expect("healthy");
    let hole = |offset, len| Extent { offset, len, allocated: false };
    let data = |offset, len| Extent { offset, len, allocated: true };
    let all = backing.extents(0, 4 * MIB, usize::MAX).expect("healthy");
    if all == [data(0, 4 * MIB)] {
        return skip("this filesystem does not tell holes");
    }
    let rest = 4 * MIB - MIB - 65_536;
    assert_eq!(all, [hole(0, MIB), data(MIB, 65_536), hole(MIB + 65_536, rest)]);
    assert_eq!(backing.extents(0, 4 * MIB, 2).expect("healthy"), all[..2]);
    assert_eq!(backing.extents(MIB + 1, 10, 8).expect("healthy"), [data(MIB + 1, 10)]);
    assert_eq!(backing.extents(5, 10, 8).expect("healthy"), [hole(5, 10)]);
    assert_eq!(backing.extents(5, 10, 0).expect("healthy"), []);

    if backing.facts().can_discard {
        let blocks = || fs::metadata(&path).expect("our own").blocks();
        let before = blocks();
        backing.discard(MIB, 65_536).expect("advertised");
        assert!(blocks() < before, "storage is given back");
        assert_eq!(backing.extents(0, 4 * MIB, 8).expect("healthy"), [hole(0, 4 * MIB)]);
        assert_eq!(fs::metadata(&path).expect("our own").len(), 4 * MIB, "the length stays");
    }
}

#[test]
fn discards_can_be_switched_off() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", 4 * MIB);
    let ignore = OpenOptions { discard: DiscardPolicy::Ignore, ..OpenOptions::default() };
    let backing = FileBacking::open(path, ignore).expect("our own");
    assert!(!backing.facts().can_discard);
    assert_eq!(backing.discard(0, 4096).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_writer_is_alone_and_readers_share() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", MIB);
    let read_only = options(Access::ReadOnly, Caching::PageCache);
    let me = fs::read_to_string("/proc/self/comm").expect("proc");

    let writer = open_default(&path).expect("free");
    for other in [read_only, OpenOptions::default()] {
        let error = FileBacking::open(&path, other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let text = error.to_string();
        assert!(text.contains(&format!("process {} ({})", std::process::id(), me.trim())), "{text}");
    }
    drop(writer);

    let first = FileBacking::open(&path, read_only).expect("free");
    let second = FileBacking::open(&path, read_only).expect("readers share");
    assert_eq!(open_default(&path).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(first.facts().access, Access::ReadOnly);
    assert!(!first.facts().can_discard);
    first.flush().expect("nothing to do");
    drop((first, second));
    open_default(&path).expect("free again");
}

#[test]
fn what_cannot_be_served_is_refused_by_its_kind() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    let refused = |path: &Path| {
        let error = open(&path.into(), OpenOptions::default()).unwrap_err();
        (error.kind(), error.to_string())
    };
    assert_eq!(refused(&at("missing")).0, ErrorKind::NotFound);
    assert_eq!(refused(&at("missing/below")).0, ErrorKind::NotFound);

    let (kind, text) = refused(directory.path());
    assert!(kind == ErrorKind::Invalid && text.contains("a directory"), "{text}");
    File::create(at("empty")).expect("our own");
    let (kind, text) = refused(&at("empty"));
    assert!(kind == ErrorKind::Invalid && text.contains("is empty"), "{text}");
    assert!(run("mkfifo", &[at("fifo").to_str().expect("plain")]).is_some());
    let (kind, text) = refused(&at("fifo"));
    assert!(kind == ErrorKind::Invalid && text.contains("a fifo"), "{text}");
    let (kind, text) = refused(Path::new("/dev/null"));
    assert!(kind == ErrorKind::Invalid && text.contains("a character device"), "{text}");
    std::os::unix::fs::symlink(at("loop"), at("loop")).expect("our own");
    assert_eq!(refused(&at("loop")).0, ErrorKind::Invalid);
}

#[test]
fn a_file_that_is_not_writable_can_be_served_read_only() {
    let Some(mount) = Tmpfs::mount("1m") else { return skip("no tmpfs") };
    let path = sparse(mount.path(), "volume", MIB / 2);
    let place = mount.path().to_str().expect("plain");
    // Root may write to any file, but nobody to a read-only mount.
    if run("mount", &["-o", "remount,ro", place]).is_none() {
        return skip("cannot remount");
    }
    let error = open_default(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.to_string().contains("--read-only"), "{error}");
    let backing = FileBacking::open(&path, options(Access::ReadOnly, Caching::PageCache)).expect("readable");
    backing.read(0, &mut [0; 512]).expect("zeroes");
}

#[test]
fn a_length_that_direct_io_cannot_reach_is_refused() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", 4 * MIB + 100);
    match FileBacking::open(&path, options(Access::ReadWrite, Caching::Direct)) {
        Err(error) if error.kind() == ErrorKind::Unsupported => skip(&error.chain()),
        Err(error) => assert!(error.to_string().contains("multiple of"), "{error}"),
        Ok(backing) => assert_eq!(backing.facts().align_bytes, 1),
    }
    assert_eq!(open_default(&path).expect("any length").facts().len_bytes, 4 * MIB + 100);
}

#[test]
fn a_created_file_is_sparse_private_and_never_replaces_another() {
    let directory = directory();
    let path = directory.path().join("volume");
    create_file(&path, 1 << 30).unwrap_or_else(|error| panic!("{}", error.chain()));
    let metadata = fs::metadata(&path).expect("it is there");
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < MIB, "sparse");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    fs::write(&path, "precious").expect("our own");
    let error = create_file(&path, MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("without --create"), "{error}");
    assert_eq!(fs::read(&path).expect("our own"), b"precious");
}

#[test]
fn a_file_that_cannot_be_created_leaves_nothing_behind() {
    let directory = directory();
    let kind = |name: &str, len| create_file(directory.path().join(name), len).unwrap_err().kind();
    assert_eq!(kind("empty", 0), ErrorKind::Invalid);
    assert_eq!(kind("huge", u64::MAX), ErrorKind::Invalid);
    assert_eq!(kind("missing/volume", MIB), ErrorKind::NotFound);
    // More than ext4 takes with blocks of 4096 bytes (16 TiB), but not more than a file offset can say.
    match create_file(directory.path().join("large"), 1 << 62) {
        Ok(()) => skip("this filesystem takes files of any length"),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{}", error.chain());
            assert!(error.to_string().contains("more than its filesystem takes"), "{error}");
            assert_eq!(fs::read_dir(directory.path()).expect("our own").count(), 0);
        }
    }
}

#[test]
fn the_lock_ends_with_the_process_that_held_it() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", MIB);
    let script = "exec 9<>\"$0\" && flock -x -n 9 && echo locked && read -r _";
    let Ok(mut other) = Command::new("sh")
        .args(["-c", script])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
    else {
        return skip("no shell");
    };
    let mut line = String::new();
    let output = other.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).expect("piped");
    if line.trim() != "locked" {
        let _ = other.wait();
        return skip("no flock(1)");
    }
    let error = open_default(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    // flock(1) took the lock and has ended; the shell keeps it, by the descriptor that both had.
    assert!(error.to_string().contains("is served by"), "{error}");
    other.stdin.take().expect("piped").write_all(b"\n").expect("it waits for that");
    other.wait().expect("it ends");
    open_default(&path).expect("free again");
}

/// Data that appears while holes are listed: no run is ever empty, out of order or outside.
#[test]
fn extents_stay_whole_while_the_file_changes() {
    let directory = directory();
    let path = sparse(directory.path(), "volume", 4 * MIB);
    let backing = open_default(&path).expect("our own");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let rng = &mut testing::SplitMix64::new(testing::seed("extents_stay_whole"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let offset = rng.below(1024) * 4096;
                match rng.below(2) {
                    0 => drop(backing.write(offset, &[1; 4096], Durability::Cached)),
                    _ => drop(backing.discard(offset, 4096)),
                }
            }
        });
        for _ in 0..2000 {
            let runs = backing.extents(4096, 2 * MIB, 64).expect("healthy");
            let mut at = 4096;
            for run in &runs {
                assert!(run.offset == at && run.len > 0, "{runs:?}");
                at += run.len;
            }
            assert!(at <= 4096 + 2 * MIB && (runs.len() == 64 || at == 4096 + 2 * MIB), "{runs:?}");
            let alternate = runs.windows(2).all(|pair| pair[0].allocated != pair[1].allocated);
            assert!(alternate, "{runs:?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
