//! A home of its own for each test, and the command in it.

use inlinecrypt_testkit::{Client, ServerProcess, temp_dir};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Long enough for a loaded machine. Nothing waits so long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const MIB: u64 = 1 << 20;

/// A folder with a home of its own, so that nothing of the user's is read or written.
pub(crate) struct Place(TempDir);

/// What the command said.
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {:?}\n--- out\n{}--- err\n{}", self.code, self.out, self.err)
    }
}

impl Said {
    /// Checks that it failed as it should: with this code, in two lines, saying each of these.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, saying: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self}");
        let told: Vec<&str> = self.err.lines().filter(|line| !line.starts_with("note: ")).collect();
        assert!(told.len() >= 2, "two lines, what and what to do: {self}");
        assert!(told[0].starts_with("inlinecrypt: ") && told[1].starts_with("  "), "{self}");
        assert!(told[1].trim().len() > 10, "advice: {self}");
        for text in saying {
            assert!(self.err.contains(text), "{text:?} is missing: {self}");
        }
        assert_eq!(self.out, "", "{self}");
        self
    }

    #[track_caller]
    pub(crate) fn done(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        self.done();
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self(temp_dir());
        fs::create_dir(place.path("run")).unwrap();
        fs::set_permissions(place.path("run"), fs::Permissions::from_mode(0o700)).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    /// The command, with nothing but our environment.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_inlinecrypt"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path("nowhere"))
            .env("INLINECRYPT_HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .current_dir(self.0.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end. A server that comes up although it should not is stopped by the `timeout` of
    /// [`run_command`](Self::run_command).
    pub(crate) fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Said {
        let mut command = self.command();
        command.args(arguments);
        run_command(command)
    }

    /// The same with these bytes on standard input.
    pub(crate) fn run_with<S: AsRef<OsStr>>(
        &self,
        input: &[u8],
        arguments: impl IntoIterator<Item = S>,
    ) -> std::process::Output {
        let file = self.write("stdin", input);
        self.command().args(arguments).stdin(File::open(file).unwrap()).output().unwrap()
    }

    /// A file for its owner alone.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        path
    }

    /// A sparse file.
    pub(crate) fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        File::create_new(&path).unwrap().set_len(len).unwrap();
        path
    }

    /// A raw key of that length. Its bytes are those of a counter, so the halves of an XTS key differ.
    pub(crate) fn raw_key(&self, name: &str, len: u8) -> PathBuf {
        self.write(name, &(0..len).map(|byte| byte ^ 0xa5).collect::<Vec<u8>>())
    }

    /// `volume create`, which must succeed.
    #[track_caller]
    pub(crate) fn create(&self, name: &str) {
        self.run(["volume", "create", "--size", "1MiB", name]).done();
    }

    /// Serves with these arguments, and waits until `socket` answers.
    #[track_caller]
    pub(crate) fn serve<S: AsRef<OsStr>>(
        &self,
        socket: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Server {
        let mut command = self.command();
        command.arg("serve").args(arguments);
        self.start(socket, command)
    }

    /// Starts a server that takes over from `old`, and waits until that has ended.
    #[track_caller]
    pub(crate) fn start_over(&self, socket: &str, mut command: Command, mut old: Server) -> Server {
        let (out, err) = (self.path("new.out"), self.path("new.err"));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let process = ServerProcess::start(&mut command).unwrap();
        let ended = old.process.wait(PATIENCE).unwrap();
        assert!(ended.success(), "{}{}", old.err(), fs::read_to_string(&err).unwrap_or_default());
        Server { process, socket: self.path(socket), out, err }
    }

    #[track_caller]
    pub(crate) fn start(&self, socket: &str, mut command: Command) -> Server {
        let out = self.path(&format!("{socket}.out"));
        let err = self.path(&format!("{socket}.err"));
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let socket = self.path(socket);
        match ServerProcess::start_at(&mut command, &socket, PATIENCE) {
            Ok(process) => Server { process, socket, out, err },
            Err(error) => panic!("{command:?}: {error}: {}", fs::read_to_string(err).unwrap_or_default()),
        }
    }
}

/// Runs a command to its end, which comes after a minute at the latest.
#[track_caller]
pub(crate) fn run_command(mut command: Command) -> Said {
    let mut process = ServerProcess::start(command.stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap();
    let child = process.child();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |stream: &mut dyn std::io::Read| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    std::thread::scope(|scope| {
        let out = scope.spawn(move || read(&mut out));
        let err = scope.spawn(move || read(&mut err));
        let status = process.wait(PATIENCE);
        if status.is_err() {
            // So that the streams end.
            process.kill().unwrap();
        }
        let said = Said {
            code: status.as_ref().ok().and_then(ExitStatus::code),
            out: out.join().unwrap(),
            err: err.join().unwrap(),
        };
        assert!(status.is_ok(), "it did not end: {said}");
        said
    })
}

/// A running server.
pub(crate) struct Server {
    pub(crate) process: ServerProcess,
    socket: PathBuf,
    out: PathBuf,
    err: PathBuf,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A client of the export of that name.
    #[track_caller]
    pub(crate) fn client(&self, name: &str) -> Client<UnixStream> {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client::connect(stream, name).unwrap_or_else(|error| panic!("{error:?}: {}", self.err()))
    }

    /// What it has printed so far.
    pub(crate) fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    pub(crate) fn err(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    /// Waits until it has printed its greeting, which it does when all is ready.
    #[track_caller]
    pub(crate) fn greeting(&self) -> String {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.out().contains("try next") {
            assert!(std::time::Instant::now() < deadline, "{}", self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.out()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Stops it as a service manager does.
    #[track_caller]
    pub(crate) fn stop(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.process.wait(PATIENCE).unwrap();
        assert_eq!(status.code(), Some(0), "{}", self.err());
        self.err()
    }
}

/// Checks that what was read is what was written, and says where not, instead of all of it.
#[track_caller]
pub(crate) fn assert_same(read: &[u8], written: &[u8]) {
    assert_eq!(read.len(), written.len());
    let wrong: Vec<usize> = (0..read.len()).filter(|&at| read[at] != written[at]).collect();
    assert!(
        wrong.is_empty(),
        "{} of {} bytes differ, from byte {} to {}",
        wrong.len(),
        read.len(),
        wrong[0],
        wrong[wrong.len() - 1]
    );
}
