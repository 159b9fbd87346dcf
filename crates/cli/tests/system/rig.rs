//! Places for tests, and servers in them.

use inlinecrypt_testkit::{Client, ServerProcess, pattern, temp_dir, tools};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Long enough for a loaded machine. Nothing waits so long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const MIB: u64 = 1 << 20;

/// A folder with a home of its own, so that nothing of the user's is read or written.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { folder: temp_dir() };
        for name in ["home", "run"] {
            fs::create_dir(place.path(name)).unwrap();
            fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o700)).unwrap();
        }
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command, with nothing but our environment.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_inlinecrypt"));
        self.prepare(&mut command);
        command
    }

    /// Lets a program run here.
    pub(crate) fn prepare(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path("home"))
            .env("INLINECRYPT_HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("RUST_BACKTRACE", "1")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
    }

    /// Runs the command to its end.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// The same, where it must succeed; what it printed.
    pub(crate) fn run_ok<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A raw key of `len` bytes, in a file for its owner alone.
    pub(crate) fn raw_key(&self, name: &str, len: usize, seed: u64) -> PathBuf {
        self.secret(name, &pattern::bytes(seed ^ 0x6b65_7973, 0, len))
    }

    /// A file for its owner alone.
    pub(crate) fn secret(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        io::Write::write_all(&mut file, bytes).unwrap();
        path
    }

    /// A sparse file.
    pub(crate) fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        File::create_new(&path).unwrap().set_len(len).unwrap();
        path
    }

    /// Whether a file can be used past the page cache here.
    pub(crate) fn can_direct(&self, name: &str) -> bool {
        use rustix::fs::{Mode, OFlags};
        rustix::fs::open(self.path(name), OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_ok()
    }

    /// Serves with these arguments, on `nbd.sock`.
    pub(crate) fn serve<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Server {
        let mut command = self.command();
        command.arg("serve").args(arguments);
        command.arg("--nbd").arg(format!("unix:{}", self.path("nbd.sock").display()));
        command.arg("--control").arg(self.path("control"));
        self.start(command)
    }

    /// Serves a config, to which the listener on `nbd.sock` and the control socket are added.
    pub(crate) fn serve_config(&self, config: &str) -> Server {
        let path = self.write_config(config);
        let mut command = self.command();
        command.args(["serve", "-v", "--config"]).arg(path);
        self.start(command)
    }

    /// Writes the config that [`serve_config`](Self::serve_config) serves. What begins with `server:` is for `[server]`.
    pub(crate) fn write_config(&self, config: &str) -> PathBuf {
        let (server, rest): (Vec<&str>, Vec<&str>) =
            config.lines().map(str::trim).partition(|line| line.starts_with("server:"));
        let server: String = server.iter().map(|line| format!("{}\n", &line["server:".len()..])).collect();
        let text = format!(
            "{}\n[listen]\nnbd = [\"unix:nbd.sock\"]\n[server]\ncontrol = \"control\"\n{server}",
            rest.join("\n")
        );
        let path = self.path("config.toml");
        fs::write(&path, text).unwrap();
        path
    }

    /// Starts a server that will listen on `nbd.sock`.
    pub(crate) fn start(&self, mut command: Command) -> Server {
        let log = self.path("log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let out = self.path("out");
        command.stderr(file).stdout(File::create(&out).unwrap());
        let socket = self.path("nbd.sock");
        match ServerProcess::start_at(&mut command, &socket, PATIENCE) {
            Ok(process) => Server { process, socket, control: self.path("control"), log, out },
            Err(error) => panic!("{command:?}: {error}: {}", fs::read_to_string(log).unwrap_or_default()),
        }
    }
}

/// What a program said, for messages.
pub(crate) fn said(output: &Output) -> String {
    let Output { status, stdout, stderr } = output;
    format!("{status}: {}{}", String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr))
}

/// A program that must succeed; what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `qemu-img create` of a LUKS container. qemu 7.2 measures how fast the machine is once, by a clock that ticks in milliseconds, and
/// gives up if none has passed; later ones measure again.
pub(crate) fn run_luks_create(command: &mut Command) {
    for _ in 0..50 {
        let output = command.output().unwrap();
        if output.status.success() {
            return;
        }
        let said = said(&output);
        assert!(said.contains("Unable to get accurate CPU usage"), "{command:?}: {said}");
    }
    panic!("{command:?}: no time passes");
}

/// A program that must fail; what it said.
pub(crate) fn run_to_fail(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} succeeded: {}", said(&output));
    said(&output)
}

/// A command at a terminal of its own, which echoes what is typed unless it is told not to. Each answer is typed once what is
/// shown ends with its question, and must not be seen. Returns what the terminal showed.
pub(crate) fn at_a_terminal(place: &Place, command: &str, answers: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut terminal = Command::new("script");
    place.prepare(&mut terminal);
    let command = format!("{} {command}", env!("CARGO_BIN_EXE_inlinecrypt"));
    terminal.args(["--quiet", "--return", "--echo", "always", "--command", &command, "/dev/null"]);
    terminal.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = ServerProcess::start(&mut terminal).unwrap();
    let (mut keys, mut screen) =
        (process.child().stdin.take().unwrap(), process.child().stdout.take().unwrap());
    let mut shown = Vec::new();
    for (question, answer) in answers {
        while !shown.ends_with(question.as_bytes()) {
            let mut byte = [0];
            let read = screen.read(&mut byte).unwrap();
            assert_eq!(read, 1, "no {question:?}: {}", String::from_utf8_lossy(&shown));
            shown.push(byte[0]);
        }
        eventually("the terminal shows what is typed no longer", || !echoes(process.pid()));
        writeln!(keys, "{answer}").unwrap();
    }
    screen.read_to_end(&mut shown).unwrap();
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(answers.iter().all(|(_, answer)| !shown.contains(answer)), "{shown}");
    (process.wait(PATIENCE).unwrap().code(), shown)
}

/// Whether the terminal of the process that `script` started echoes.
fn echoes(script: u32) -> bool {
    let children = fs::read_to_string(format!("/proc/{script}/task/{script}/children")).unwrap();
    let child = children.split_whitespace().next().expect("it runs");
    let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
    // proc(5): behind the name come state, parent, group, session, terminal; of that, the low byte is the number.
    let terminal: u32 = stat.rsplit(") ").next().unwrap().split(' ').nth(4).unwrap().parse().unwrap();
    let settings = run(Command::new("stty").arg("-F").arg(format!("/dev/pts/{}", terminal & 0xff)).arg("-a"));
    settings.split_whitespace().any(|word| word == "echo")
}

/// A running server. Whatever it logged, it must not have panicked.
pub(crate) struct Server {
    pub(crate) process: ServerProcess,
    pub(crate) socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
    out: PathBuf,
}

impl Server {
    /// A connection that gives up sometime.
    pub(crate) fn dial(&self) -> UnixStream {
        dial(&self.socket)
    }

    /// A client of today's kind.
    pub(crate) fn client(&self, export: &str) -> Client<UnixStream> {
        Client::connect(self.dial(), export).unwrap()
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// What it printed to standard output.
    pub(crate) fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    pub(crate) fn status_text(&self, place: &Place) -> String {
        place.run_ok([
            OsStr::new("status"),
            "--json".as_ref(),
            "--control".as_ref(),
            self.control.as_os_str(),
        ])
    }

    pub(crate) fn status(&self, place: &Place) -> serde_json::Value {
        serde_json::from_str(&self.status_text(place)).unwrap()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.child().try_wait().unwrap().is_none()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.process.pid().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.process.wait(PATIENCE).expect("the server ends")
    }

    /// Stops it in an orderly way.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
        assert!(!self.socket.exists(), "the socket is left");
    }

    /// Kilobytes that are resident now, and that were at most.
    pub(crate) fn resident_kib(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("the kernel tells");
            line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        if thread::panicking() {
            eprintln!("the server's log:\n{log}");
        } else {
            assert!(!log.contains("panicked"), "{log}");
        }
    }
}

/// A connection that gives up sometime.
pub(crate) fn dial(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        match UnixStream::connect(socket) {
            // Its queue is full for a moment.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            done => break done.unwrap(),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Waits until something becomes true.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Says that something cannot be tested here. Fails where nothing may be skipped.
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var_os(tools::REQUIRE_TOOLS).is_none_or(|value| value != "1"),
        "cannot be skipped: {why}"
    );
    eprintln!("SKIPPED: {why}");
}

/// Whether we may mount filesystems; says so if not. Where there is neither the privilege nor the device, nobody can ask
/// for more, so this never fails.
pub(crate) fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root() && {
        let folder = temp_dir();
        inlinecrypt_testkit::undo::Mount::new(folder.path(), &["-t", "tmpfs", "tmpfs"]).is_ok()
    };
    if !may {
        eprintln!("SKIPPED: this user may not mount filesystems");
    }
    may
}

/// Whether there are loop devices; says so if not.
pub(crate) fn may_loop() -> bool {
    let may = may_mount() && Path::new("/dev/loop-control").exists();
    if !may {
        eprintln!("SKIPPED: no loop devices");
    }
    may
}

/// A seed for this run, printed for the next one.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("INLINECRYPT_SEED") {
        Ok(text) => text.parse().expect("INLINECRYPT_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) ^ now.as_secs() << 20
        }
    };
    eprintln!("INLINECRYPT_SEED={seed}");
    seed
}
