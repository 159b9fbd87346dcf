//! Keys that the serving process never holds: its memory as a forensic tool sees it, and the cage of the process that has them.

use crate::clients::{fio, fio_program};
use crate::rig::{MIB, PATIENCE, Place, Server, eventually, run, run_luks_create, said, skip};
use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key, software_secret};
use inlinecrypt_testkit::memory::{self, Scan, Search};
use inlinecrypt_testkit::{ServerProcess, pattern, require_tool};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const LEN: u64 = 24 * MIB;

/// The only engine of a server.
pub(crate) fn engine(server: &Server, place: &Place) -> Value {
    server.status(place)["servers"][0]["engines"][0].clone()
}

/// The process of the only engine, if it is running.
pub(crate) fn engine_pid(server: &Server, place: &Place) -> Option<u32> {
    engine(server, place)["process"]["pid"].as_u64().map(|pid| u32::try_from(pid).unwrap())
}

/// Whether we may read the memory of other processes; says so if not.
pub(crate) fn may_read_memory() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        skip("only root may read the memory of a process that forbids it");
    }
    may
}

/// A volume `v.img` whose wrapped key was made from a key that we know, and all that must not be found.
fn wrapped_volume(place: &Place) -> Search {
    let master = pattern::bytes(0x6d61_7374, 7, 32);
    place.secret("master.raw", &master);
    place.run_ok(["key", "import", "--root", "root", "--in", "master.raw", "--out", "v.key"]);
    place.sparse("v.img", LEN);
    let master: &[u8; 32] = master.as_slice().try_into().unwrap();
    let root = fs::read(place.path("root")).unwrap();
    Search::new()
        .secret("key that was wrapped", master)
        .secret("inline key", &inline_encryption_key(KdfVariant::V1, master, Mode::Aes256Xts))
        .secret("software secret", &*software_secret(KdfVariant::V1, master))
        .secret("root", &root[20..52])
}

const WRAPPED: [&str; 5] = ["--root", "root", "--key", "v.key", "v.img"];

/// fio keeps the volume busy until this is dropped.
pub(crate) fn busy(program: &Path, place: &Place, server: &Server) -> ServerProcess {
    let mut fio = fio(program, place, &server.uri("v"), "512", &["--time_based", "--runtime=600"]);
    let load = ServerProcess::start(fio.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
    let bytes =
        || server.status(place)["servers"][0]["volumes"][0]["counters"]["write"]["bytes"].as_u64().unwrap();
    eventually("fio is at work", || bytes() > MIB);
    load
}

fn tell(what: &str, scan: &Scan) {
    eprintln!(
        "{what}: {} MiB looked at, {} secrets, {} schedules, {} mappings unreadable",
        scan.bytes >> 20,
        scan.secrets.len(),
        scan.schedules.len(),
        scan.unreadable.len()
    );
}

#[track_caller]
fn is_clean(what: &str, scan: &Scan) {
    tell(what, scan);
    let found: Vec<String> = scan.secrets.iter().chain(&scan.schedules).map(ToString::to_string).collect();
    assert!(scan.bytes > MIB, "{what}: there was nothing to look at");
    assert!(found.is_empty(), "{what}: {found:#?}");
}

/// A core dump of a running process, by the debugger: all of its own memory. Memory shared with others, which may be a gibibyte
/// of holes, is left to the scan of the process.
fn dump(place: &Place, pid: u32, search: &Search) -> Option<Scan> {
    let gcore = require_tool("gcore")?;
    // core(5): private memory, private mappings of files, and huge pages.
    fs::write(format!("/proc/{pid}/coredump_filter"), "0x25").unwrap();
    run(Command::new(gcore).arg("-o").arg(place.path("core")).arg(pid.to_string()).stdin(Stdio::null()));
    let core = place.path(&format!("core.{pid}"));
    let scan = memory::scan_core(&core, search).unwrap();
    fs::remove_file(core).unwrap();
    Some(scan)
}

/// While fio is at work: everything in the memory of the serving process, and what root can get of the engine process.
fn nothing_is_found(program: &Path, place: &Place, server: &Server, search: &Search) {
    let load = busy(program, place, server);
    for round in 0..3 {
        is_clean(
            &format!("serving process, look {round}"),
            &memory::scan_process(server.process.pid(), search).unwrap(),
        );
    }
    if let Some(scan) = dump(place, server.process.pid(), search) {
        is_clean("core dump of the serving process", &scan);
    }
    let engine = engine(server, place);
    let steps = engine["process"]["sandbox"].as_array().unwrap();
    if !steps.iter().any(|step| step.as_str().unwrap().contains("memfd_secret, ")) {
        skip("this kernel has no memfd_secret: root can read the engine process");
        return;
    }
    let pid = u32::try_from(engine["process"]["pid"].as_u64().unwrap()).unwrap();
    let scan = memory::scan_process(pid, search).unwrap();
    is_clean("engine process, as far as root can read it", &scan);
    let secret: Vec<_> = memory::mappings(pid)
        .unwrap()
        .into_iter()
        .filter(|mapping| mapping.name.contains("secretmem"))
        .collect();
    assert!(!secret.is_empty(), "{scan:?}");
    for mapping in secret {
        for at in (mapping.start..mapping.end).step_by(64 << 10) {
            let mut bytes = [0; 4096];
            let by_file = memory::read_by_file(pid, at, &mut bytes);
            assert!(by_file.is_err(), "{at:#x} of {mapping}: {by_file:?}");
            let by_call = memory::read_by_call(pid, at, &mut bytes);
            assert!(by_call.is_err(), "{at:#x} of {mapping}: {by_call:?}");
        }
    }
    assert_eq!(engine_pid(server, place), Some(pid), "it has not ended meanwhile");
    drop(load);
    assert_eq!(server.status(place)["servers"][0]["volumes"][0]["counters"]["errors"], 0);
}

#[test]
fn the_serving_process_holds_no_key_of_a_wrapped_volume() {
    let Some(program) = fio_program() else { return };
    if !may_read_memory() {
        return;
    }
    let place = Place::new();
    let search = wrapped_volume(&place);
    let server = place.serve(WRAPPED);
    nothing_is_found(&program, &place, &server, &search);
    server.stop();
}

/// The same in every mode, as each has its own way to keep what it expands.
#[test]
fn the_serving_process_holds_no_key_in_any_mode() {
    let Some(program) = fio_program() else { return };
    if !may_read_memory() {
        return;
    }
    for mode in Mode::ALL {
        let info = mode.info();
        let place = Place::new();
        let key = pattern::bytes(0x6d6f_6465, 0, info.key_bytes);
        place.secret("v.raw", &key);
        place.sparse("v.img", LEN);
        let server = place.serve(["--mode", info.name, "--block", "4096", "--key", "raw:v.raw", "v.img"]);
        let mut fio = fio(&program, &place, &server.uri("v"), "4k", &["--time_based", "--runtime=600"]);
        let load = ServerProcess::start(fio.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
        thread::sleep(Duration::from_millis(500));
        let search = Search::new().secret("key", &key);
        let pid = engine_pid(&server, &place).unwrap();
        is_clean(
            &format!("serving process, {mode}"),
            &memory::scan_process(server.process.pid(), &search).unwrap(),
        );
        let is_secret =
            memory::mappings(pid).unwrap().iter().any(|mapping| mapping.name.contains("secretmem"));
        if is_secret {
            is_clean(&format!("engine process, {mode}"), &memory::scan_process(pid, &search).unwrap());
        }
        drop(load);
        server.stop();
    }
}

#[test]
fn the_serving_process_holds_no_raw_key_whether_from_a_file_or_standard_input() {
    let Some(program) = fio_program() else { return };
    if !may_read_memory() {
        return;
    }
    for source in ["raw:v.raw", "raw:-"] {
        let place = Place::new();
        let key = pattern::bytes(0x7261_7721, 3, 64);
        place.secret("v.raw", &key);
        place.sparse("v.img", LEN);
        let mut command = serve_command(&place, &["--key", source, "v.img"]);
        command.stdin(fs::File::open(place.path("v.raw")).unwrap());
        let server = place.start(command);
        nothing_is_found(&program, &place, &server, &Search::new().secret("raw key", &key));
        server.stop();
    }
}

/// What [`Place::serve`] runs, to be changed.
pub(crate) fn serve_command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command();
    command.arg("serve").args(arguments);
    command.arg("--nbd").arg(format!("unix:{}", place.path("nbd.sock").display()));
    command.arg("--control").arg(place.path("control"));
    command
}

/// The scan can find: keys and their schedules in a server that holds them itself.
#[test]
fn the_same_scan_finds_the_keys_of_an_engine_in_the_serving_process() {
    let Some(program) = fio_program() else { return };
    if !may_read_memory() {
        return;
    }
    let place = Place::new();
    let search = wrapped_volume(&place);
    let server = place.serve([&["--engine-process", "none"], &WRAPPED[..]].concat());
    let load = busy(&program, &place, &server);
    for scan in [
        memory::scan_process(server.process.pid(), &search).ok(),
        dump(&place, server.process.pid(), &search),
    ] {
        let Some(scan) = scan else { continue };
        tell("engine in the serving process", &scan);
        for found in scan.secrets.iter().chain(&scan.schedules) {
            eprintln!("  {found}");
        }
        // A schedule begins with its key, and there are two of AES-256 for each direction.
        for half in ["first half of inline key", "second half of inline key"] {
            assert!(scan.has(half), "{half}");
        }
        assert!(scan.schedules.iter().filter(|found| found.what.starts_with("AES-256")).count() >= 2);
    }
    drop(load);
    server.stop();
}

/// And of another server with another library: LUKS in qemu-nbd has two schedules, of the data key and of the tweak key.
#[test]
fn the_same_scan_finds_the_schedules_of_luks_in_qemu_nbd() {
    let (Some(qemu_img), Some(qemu_nbd), Some(qemu_io)) =
        (require_tool("qemu-img"), require_tool("qemu-nbd"), require_tool("qemu-io"))
    else {
        return;
    };
    if !may_read_memory() {
        return;
    }
    let place = Place::new();
    place.secret("word", b"correct horse");
    let object = format!("secret,id=s,file={}", place.path("word").display());
    run_luks_create(
        Command::new(qemu_img)
            .args(["create", "-f", "luks", "--object", &object])
            .args(["-o", "key-secret=s,cipher-alg=aes-256,cipher-mode=xts,iter-time=10"])
            .arg(place.path("v.luks"))
            .arg("8M"),
    );
    let socket = place.path("luks.sock");
    let mut command = Command::new(qemu_nbd);
    command
        .args(["--object", &object, "--persistent", "--shared=8", "--image-opts"])
        .arg(format!("driver=luks,key-secret=s,file.filename={}", place.path("v.luks").display()))
        .arg("--socket")
        .arg(&socket)
        .stdin(Stdio::null());
    let server = ServerProcess::start_at(&mut command, &socket, PATIENCE).unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    run(Command::new(qemu_io).args(["-f", "raw", "-c", "write -P 7 0 1M", &uri]));
    let scan = memory::scan_process(server.pid(), &Search::new()).unwrap();
    tell("qemu-nbd", &scan);
    scan.schedules.iter().for_each(|found| eprintln!("  {found}"));
    let long = scan.schedules.iter().filter(|found| found.what.starts_with("AES-256")).count();
    assert!(long >= 2, "{:?}", scan.schedules);
}

/// Which system calls the engine process makes while two volumes share one keyslot, so that orders arrive in every way.
#[test]
fn the_engine_process_makes_the_documented_system_calls_and_no_other() {
    let Some(strace) = require_tool("strace") else { return };
    if !may_read_memory() {
        return;
    }
    let place = Place::new();
    let mut config = "[[engine]]\nname = \"e\"\nspec = \"software:slots=1\"\nroot = \"root\"\n".to_owned();
    for name in ["v", "w"] {
        place.run_ok(["key", "generate", "--root", "root", "--out", &format!("{name}.img.key")]);
        place.sparse(&format!("{name}.img"), MIB);
        config += &format!("[[volume]]\npath = \"{name}.img\"\n");
    }
    let server = place.serve_config(&config);
    let pid = engine_pid(&server, &place).unwrap();
    let trace = place.path("trace");
    let mut command = Command::new(strace);
    command.args(["-f", "-qq", "-p", &pid.to_string(), "-o"]).arg(&trace).stderr(Stdio::null());
    let mut strace = ServerProcess::start(&mut command).unwrap();
    let lines = || fs::read_to_string(&trace).unwrap_or_default().lines().count();
    let work = || {
        for name in ["v", "w"] {
            let mut client = server.client(name);
            client.write(0, &[7; 65536]).unwrap();
            assert!(client.read(0, 65536).unwrap() == [7; 65536]);
        }
    };
    eventually("strace is there, and sees what the threads wait in", || lines() > 0);
    // The first use of each key is said on the control socket; from then on lanes do.
    eventually("the engine works", || {
        work();
        lines() > 3000
    });
    kill_process(Pid::from_raw(strace.pid().try_into().unwrap()).unwrap(), Signal::INT).unwrap();
    let _ = strace.wait(PATIENCE);
    work();
    let text = fs::read_to_string(&trace).unwrap();
    let seen: BTreeSet<&str> = text.lines().filter_map(system_call).collect();
    eprintln!("{} calls: {seen:?}", text.lines().count());
    let allowed: BTreeSet<&str> =
        inlinecrypt_engine::isolated::allowed_system_calls().map(|(name, _reason)| name).collect();
    assert!(seen.is_subset(&allowed), "not documented: {:?}", seen.difference(&allowed));
    for busy in ["futex", "recvmsg", "sendmsg"] {
        assert!(seen.contains(busy), "{busy}: {seen:?}");
    }
    // The one keyslot was programmed again and again, and not by messages: two keys were told of, once.
    let messages = text.lines().filter(|line| line.contains("sendmsg(")).count();
    assert!(messages < 20, "{messages} answers on the control socket");
    assert_eq!(engine_pid(&server, &place), Some(pid));
    server.stop();
}

/// The name in a line of strace's: `PID name(...` or `PID <... name resumed>...`.
fn system_call(line: &str) -> Option<&str> {
    let call = line.split_once(' ')?.1.trim_start();
    match call.strip_prefix("<... ") {
        Some(resumed) => resumed.split(' ').next(),
        // Signals and ends are told with `---` and `+++`.
        None => call.split_once('(').map(|(name, _)| name).filter(|name| !name.starts_with(['-', '+'])),
    }
}

#[test]
fn status_tells_that_what_is_forbidden_was_tried_and_refused() {
    let place = Place::new();
    let server = place.serve(["--create", "1MiB", "v.img"]);
    let engine = engine(&server, &place);
    let steps: Vec<&str> =
        engine["process"]["sandbox"].as_array().unwrap().iter().map(|step| step.as_str().unwrap()).collect();
    let tried = steps.iter().find(|step| step.starts_with("10 ")).unwrap_or_else(|| panic!("{steps:#?}"));
    for call in [
        "open",
        "socket",
        "ptrace",
        "exec",
        "fork",
        "read another process",
        "change its priority",
        "move a process by its number",
    ] {
        assert!(tried.contains(&format!("{call} refused (Operation not permitted")), "{call}: {tried}");
    }
    assert!(!steps.iter().any(|step| step.starts_with("MISSING 10")), "{steps:#?}");
    server.stop();
}

/// Where the system lets nobody lock memory: served with what there is and a list of what is not, or, if all of it is
/// required, not at all.
#[test]
fn what_is_missing_of_the_sandbox_is_told_or_is_reason_enough_not_to_serve() {
    const NOBODY: u32 = 65534;
    let (Some(setpriv), Some(prlimit)) = (require_tool("setpriv"), require_tool("prlimit")) else { return };
    if !rustix::process::geteuid().is_root() {
        skip("only root may become somebody else");
        return;
    }
    let place = Place::new();
    // Where nobody in particular may run it.
    let program = place.path("inlinecrypt");
    fs::copy(env!("CARGO_BIN_EXE_inlinecrypt"), &program).unwrap();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", MIB);
    for name in [".", "home", "run", "v.raw", "v.img"] {
        std::os::unix::fs::chown(place.path(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let serve = |more: &[&str]| {
        let mut command = Command::new(&prlimit);
        place.prepare(&mut command);
        command
            .arg("--memlock=65536")
            .arg(&setpriv)
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["serve", "--key", "raw:v.raw", "v.img"])
            .args(more)
            .arg("--nbd")
            .arg(format!("unix:{}", place.path("nbd.sock").display()))
            .arg("--control")
            .arg(place.path("control"));
        command
    };
    let refused = serve(&["--sandbox", "require"]).output().unwrap();
    let text = said(&refused);
    assert!(!refused.status.success(), "{text}");
    assert!(text.contains("sandbox is incomplete") && text.contains("RLIMIT_MEMLOCK"), "{text}");
    assert!(!place.path("nbd.sock").exists());

    let server = place.start(serve(&[]));
    let mut client = server.client("v");
    client.write(0, &[3; 4096]).unwrap();
    assert!(client.read(0, 4096).unwrap() == [3; 4096]);
    let engine = engine(&server, &place);
    let missing: Vec<&str> = engine["process"]["sandbox"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|step| step.as_str().unwrap().strip_prefix("MISSING "))
        .collect();
    eprintln!("{missing:#?}");
    assert!(missing.iter().any(|step| step.starts_with("4 ")), "{missing:#?}");
    let shown = place.run_ok([OsStr::new("status"), "--control".as_ref(), place.path("control").as_os_str()]);
    assert!(shown.contains("MISSING 4 "), "{shown}");
    server.stop();
}
