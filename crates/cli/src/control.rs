//! The control socket: how `status` asks a running server.
//!
//! One line of JSON comes in, one JSON document goes out, and the connection ends. Both sides are bounded in bytes and
//! time, and each client has a thread of its own, of which there are few: who hangs holds up nobody.

use crate::luks::keep::OtherKeyslots;
use crate::report::Failure;
use inlinecrypt_core::error::Error;
use inlinecrypt_io::export::CountersSnapshot;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener, Stopper, Stream};
use serde::{Deserialize, Serialize};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use zeroize::Zeroizing;

/// Version of requests and answers. Grows when a field changes its meaning or goes away; new fields do not count.
pub(crate) const VERSION: u32 = 1;

/// Paths and passphrases are the longest that is said.
const REQUEST_BYTES_MAX: usize = 16 << 10;
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// How long either side waits for the other.
const TIME_MAX: Duration = Duration::from_secs(2);
/// How long a client waits until a re-encryption has begun: an engine opens a key, and a journal is written; of a container each
/// passphrase takes its key derivation two or three times.
const BEGIN_TIME_MAX: Duration = Duration::from_secs(600);
/// Clients at once. One more is turned away.
const CLIENTS_MAX: usize = 8;

/// What a client asks.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    /// What the server does.
    Status,
    /// Reset an engine, or all: their keyslots are lost and programmed again.
    Reset {
        /// Which.
        engine: Option<String>,
    },
    /// Re-encrypt a volume, or let that rest.
    Reencrypt(ReencryptRequest),
    /// Which LUKS keyslots of a container the server's passphrase does not open.
    MissingKeyslots {
        /// The container, absolute.
        volume: String,
    },
    /// Hand over to the server that asks. What follows is in `take_over.rs`.
    TakeOver,
}

/// What is to be done about the re-encryption of a volume.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReencryptRequest {
    /// The file or block device, absolute.
    pub(crate) volume: String,
    pub(crate) action: ReencryptAction,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ReencryptAction {
    Begin {
        /// As on a command line, and absolute. A new one is made if there is none.
        key: Option<String>,
        mode: Option<String>,
        data_unit_bytes: Option<u32>,
        block_bytes: Option<u32>,
        iv_offset_sectors: Option<u64>,
        iv: Option<String>,
        zone_bytes: u64,
        throttle_bytes: u64,
        keep_holes: bool,
        remove_old_key: bool,
        /// Left out if nothing is said of them, as a server of before knows it.
        #[serde(default, skip_serializing_if = "OtherKeyslots::is_unsaid")]
        others: OtherKeyslots,
    },
    Pause,
    Resume {
        throttle_bytes: Option<u64>,
    },
}

/// What answers requests.
pub(crate) trait Answers: Send + Sync {
    /// What the server does.
    fn report(&self) -> ServerReport;
    /// Resets one engine or all. The names of those that were reset, or why not.
    fn reset(&self, engine: Option<&str>) -> Result<Vec<String>, String>;
    /// Re-encrypts a volume, or lets that rest. What a person should know besides, if there is anything.
    fn reencrypt(&self, request: &ReencryptRequest) -> Result<Option<String>, Failure>;
    /// The LUKS keyslots of a container that the server's passphrase does not open; none of what is no container.
    fn missing_keyslots(&self, volume: &str) -> Result<Vec<u32>, Failure>;
    /// Hands over to the server at the other end of `stream`, or tells it why not.
    fn hand_over(&self, stream: &Stream) -> io::Result<()>;
}

/// What a server says about itself.
#[derive(Debug, Serialize)]
pub(crate) struct ServerReport {
    pub(crate) version: u32,
    pub(crate) program_version: &'static str,
    pub(crate) pid: u32,
    /// Seconds since the beginning of 1970.
    pub(crate) started_at: u64,
    pub(crate) stopping: bool,
    pub(crate) uris: Vec<String>,
    pub(crate) connections: ConnectionsReport,
    pub(crate) volumes: Vec<VolumeReport>,
    pub(crate) engines: Vec<EngineReport>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ConnectionsReport {
    pub(crate) now: usize,
    pub(crate) refused: u64,
    pub(crate) handshakes_failed: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct VolumeReport {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
    /// Whether it is not encrypted at all: then there are no data units, key and engine, and what is said of them is
    /// `plain`, `none`, 0 or empty.
    pub(crate) plain: bool,
    pub(crate) mode: &'static str,
    pub(crate) data_unit_bytes: u32,
    pub(crate) block_bytes: u32,
    pub(crate) iv_offset_sectors: u64,
    /// The IV layout, as --iv names it.
    pub(crate) iv: &'static str,
    /// Where it begins in its file.
    pub(crate) offset_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) key_type: &'static str,
    pub(crate) key_id: String,
    pub(crate) engine: String,
    /// `engine` or `fallback`.
    pub(crate) served_by: &'static str,
    /// `ok`; `data_lost` once something could not be made stable; `no_key` if its engine is gone, or the key with it.
    pub(crate) state: &'static str,
    /// Why, if not `ok`.
    pub(crate) reason: Option<String>,
    /// Requests that the backing failed.
    pub(crate) backing_failures: u64,
    /// What it is being re-encrypted to, or was while this server ran.
    pub(crate) reencrypt: Option<ReencryptReport>,
    pub(crate) counters: CountersSnapshot,
}

/// How far a re-encryption is.
#[derive(Debug, Serialize)]
pub(crate) struct ReencryptReport {
    /// `running`, `paused`, `failing` (it tries again) or `done`.
    pub(crate) state: &'static str,
    /// Why, if `failing`.
    pub(crate) reason: Option<String>,
    pub(crate) done_bytes: u64,
    pub(crate) size_bytes: u64,
    /// Most bytes in a second; 0 for as many as there are.
    pub(crate) throttle_bytes: u64,
    /// The new key.
    pub(crate) key_id: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct EngineReport {
    pub(crate) name: String,
    pub(crate) spec: String,
    /// `engine` or `fallback`.
    pub(crate) role: &'static str,
    pub(crate) root_id: Option<String>,
    pub(crate) keys_admitted: usize,
    pub(crate) keys_pinned: u32,
    /// Requests that went to software since a keyslot would have taken too long.
    pub(crate) spills: u64,
    /// `any`, `undecided`, `switching`, `raw`, `hardware-wrapped` or `poisoned`.
    pub(crate) key_type: &'static str,
    /// Who decided that, if it had to be decided.
    pub(crate) decided_by: Option<String>,
    /// When, in seconds since the beginning of 1970.
    pub(crate) decided_at: Option<u64>,
    /// `None` for an engine in the serving process.
    pub(crate) process: Option<ProcessReport>,
    /// `ok`, or `stopped` if it serves nothing until it is started again.
    pub(crate) state: &'static str,
    /// Why, if not `ok`.
    pub(crate) reason: Option<String>,
    /// `None` for an engine without keyslots.
    pub(crate) keyslots: Option<KeyslotsReport>,
}

/// The process that an engine has for itself.
#[derive(Debug, Serialize)]
pub(crate) struct ProcessReport {
    /// `None` while none runs.
    pub(crate) pid: Option<u32>,
    pub(crate) restarts: u64,
    pub(crate) last_pause_us: u64,
    /// Why none runs, if none will be started.
    pub(crate) stopped: Option<String>,
    /// Its cage, a line each; what the system lacks begins with `MISSING`.
    pub(crate) sandbox: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct KeyslotsReport {
    pub(crate) waiting: usize,
    pub(crate) waits: u64,
    pub(crate) longest_wait_us: u64,
    pub(crate) resets: u64,
    pub(crate) slots: Vec<SlotReport>,
}

#[derive(Debug, Serialize)]
pub(crate) struct SlotReport {
    pub(crate) slot: usize,
    pub(crate) key_id: Option<String>,
    pub(crate) users: u32,
    pub(crate) hits: u64,
    pub(crate) programs: u64,
    pub(crate) program_failures: u64,
    pub(crate) evictions: u64,
    pub(crate) waits: u64,
}

/// What answers; ends when dropped.
#[derive(Debug)]
pub(crate) struct ControlServer {
    stopper: Stopper,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl ControlServer {
    /// A socket at `path`, for [`start`](Self::start).
    pub(crate) fn bind(path: &Path) -> Result<Listener, Error> {
        Listener::bind(&Listen::Unix(path.to_owned()), ListenOptions { unix_mode: 0o600 })
    }

    /// Answers at `listener` with what `server` says then.
    pub(crate) fn start(listener: Listener, server: Arc<dyn Answers>) -> Result<Self, Error> {
        let stopper = listener.stopper();
        let clients = Arc::new(AtomicUsize::new(0));
        let accept = move || loop {
            match listener.accept() {
                Ok(None) => return,
                Err(error) => tracing::warn!("control socket: {}", error.chain()),
                Ok(Some(stream)) => {
                    if clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
                        clients.fetch_sub(1, Ordering::Relaxed);
                        continue;
                    }
                    let (server, here) = (server.clone(), clients.clone());
                    let talk = move || {
                        if let Err(error) = answer(&stream, &*server) {
                            tracing::debug!(%error, "control client");
                        }
                        here.fetch_sub(1, Ordering::Relaxed);
                    };
                    if thread::Builder::new()
                        .name("control".to_owned())
                        .stack_size(256 << 10)
                        .spawn(talk)
                        .is_err()
                    {
                        clients.fetch_sub(1, Ordering::Relaxed);
                    }
                }
            }
        };
        let acceptor =
            thread::Builder::new().name("control-accept".to_owned()).stack_size(256 << 10).spawn(accept);
        match acceptor {
            Ok(acceptor) => Ok(Self { stopper, acceptor: Some(acceptor) }),
            Err(error) => Err(Error::new(
                inlinecrypt_core::error::ErrorKind::OutOfMemory,
                inlinecrypt_core::error::Op::Open,
            )
            .because(error)),
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stopper.stop();
        // The listener goes with it, and the socket's name with that.
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn answer(stream: &Stream, server: &dyn Answers) -> io::Result<()> {
    stream.set_read_timeout(Some(TIME_MAX))?;
    stream.set_write_timeout(Some(TIME_MAX))?;
    let line = read_line(stream)?;
    let answer = match serde_json::from_slice(&line) {
        Ok(Request::TakeOver) => return server.hand_over(stream),
        Ok(Request::Reencrypt(request)) => serde_json::to_vec(&match server.reencrypt(&request) {
            Ok(note) => serde_json::json!({ "version": VERSION, "done": true, "note": note }),
            Err(Failure { code, what, advice }) => serde_json::json!({
                "version": VERSION, "error": what, "advice": advice, "code": code as u8,
            }),
        }),
        Ok(Request::MissingKeyslots { volume }) => {
            serde_json::to_vec(&match server.missing_keyslots(&volume) {
                Ok(missing) => serde_json::json!({ "version": VERSION, "missing": missing }),
                Err(Failure { what, .. }) => serde_json::json!({ "version": VERSION, "error": what }),
            })
        }
        Ok(Request::Status) => serde_json::to_vec(&server.report()),
        Ok(Request::Reset { engine }) => serde_json::to_vec(&match server.reset(engine.as_deref()) {
            Ok(engines) => serde_json::json!({ "version": VERSION, "reset": engines }),
            Err(why) => serde_json::json!({ "version": VERSION, "error": why }),
        }),
        Err(error) => serde_json::to_vec(&serde_json::json!({
            "version": VERSION,
            "error": format!("not a request: {error}"),
        })),
    };
    let mut stream = stream;
    stream.write_all(&answer?)
}

/// A request, which may have passphrases in it: all of it at one place, which is wiped.
fn read_line(mut stream: &Stream) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(vec![0; REQUEST_BYTES_MAX]);
    let mut filled = 0;
    while filled < line.len() {
        match stream.read(&mut line[filled..]) {
            Ok(0) => break,
            Ok(read) => {
                let end = line[filled..filled + read].iter().position(|&byte| byte == b'\n');
                filled += end.unwrap_or(read);
                if end.is_some() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    line.truncate(filled);
    Ok(line)
}

/// Asks the server at `path` what it does.
pub(crate) fn ask(path: &Path) -> io::Result<serde_json::Value> {
    send(path, &Request::Status)
}

/// Asks the server at `path` to reset an engine, or all.
pub(crate) fn ask_to_reset(path: &Path, engine: Option<String>) -> io::Result<serde_json::Value> {
    send(path, &Request::Reset { engine })
}

/// Asks the server at `path` to re-encrypt, or to let that rest.
pub(crate) fn ask_to_reencrypt(path: &Path, request: ReencryptRequest) -> io::Result<serde_json::Value> {
    send_patiently(path, &Request::Reencrypt(request), BEGIN_TIME_MAX)
}

/// Asks the server at `path` which LUKS keyslots of a container its passphrase does not open. None where a server does not know.
pub(crate) fn ask_for_missing_keyslots(path: &Path, volume: &str) -> io::Result<Vec<u32>> {
    let request = Request::MissingKeyslots { volume: volume.to_owned() };
    let answer = send_patiently(path, &request, BEGIN_TIME_MAX)?;
    Ok(serde_json::from_value(answer["missing"].clone()).unwrap_or_default())
}

/// The request by which another server takes over.
pub(crate) fn take_over_request() -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(&Request::TakeOver)?)
}

fn send(path: &Path, request: &Request) -> io::Result<serde_json::Value> {
    send_patiently(path, request, TIME_MAX * 2)
}

fn send_patiently(path: &Path, request: &Request, time_max: Duration) -> io::Result<serde_json::Value> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(time_max))?;
    stream.set_write_timeout(Some(TIME_MAX))?;
    // Room for all at once: growing would leave copies of passphrases behind.
    let mut line = Zeroizing::new(Vec::with_capacity(2 * REQUEST_BYTES_MAX));
    serde_json::to_writer(&mut *line, request)?;
    line.push(b'\n');
    if line.len() > REQUEST_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "what is to be said is too long"));
    }
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Removes the control sockets that killed servers of ours left in `directory`: sockets of this user, named by a process,
/// that refuse connections.
pub(crate) fn remove_stale(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if let Some(inode) = our_socket(&path)
            && UnixStream::connect(&path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
            // A server that has come meanwhile has another.
            && our_socket(&path) == Some(inode)
        {
            tracing::debug!("{}: its server was killed", path.display());
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Which file it is, if it is a socket that a server of this user made by default.
fn our_socket(path: &Path) -> Option<(u64, u64)> {
    let (stem, extension) = (path.file_stem()?.to_str()?, path.extension()?);
    if extension != "sock" || stem.parse::<u32>().is_err() {
        return None;
    }
    let metadata = path.symlink_metadata().ok()?;
    let ours = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.file_type().is_socket();
    ours.then(|| (metadata.dev(), metadata.ino()))
}
