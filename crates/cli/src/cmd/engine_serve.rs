//! `engine serve`: engine processes for servers that ask for them.
//!
//! ```text
//!   server --connect--> service --starts, hands the connection to--> engine process, in its cage
//!     '------------------- orders, shared memory, keys ----------------------'
//! ```
//!
//! The service starts processes and waits for their end, and does nothing else: no order, key or data passes through it. A
//! process whose server goes ends by itself; a server whose process ends connects again.

use super::serve::{catch_signals, raise_descriptor_limit};
use crate::cli::EngineServe;
use crate::report::{Code, Failure, note, print};
use inlinecrypt_engine::isolated::{LanePriority, ProcessLauncher, realtime};
use inlinecrypt_io::listen::{self, Listen, ListenOptions, Listener, Peer, Stream};
use std::io;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Most engine processes at once: each may lock 64 MiB of secret memory.
const PROCESSES_MAX: usize = 256;

/// Stack of a thread that waits for the end of a process.
const STACK_BYTES: usize = 64 << 10;

pub(super) fn run(EngineServe { listen: place, realtime }: EngineServe) -> Result<(), Failure> {
    let priority = if realtime { LanePriority::Realtime } else { LanePriority::Usual };
    if realtime {
        realtime::check_permitted().map_err(|error| Failure::of("cannot serve engines", &error))?;
    }
    let mut signals = catch_signals()?;
    raise_descriptor_limit();
    let Listen::Unix(path) = &place else {
        return Err(Failure::new(
            Code::Wrong,
            format!("an engine service cannot listen on {place}: it shares memory with its servers"),
            "Name a Unix socket: --listen unix:PATH",
        ));
    };
    let listener = Listener::bind_packets(path, ListenOptions { unix_mode: 0o600 })
        .map_err(|error| Failure::of_file("cannot serve engines", &error))?;
    let stopper = listener.stopper();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            signals.forever().next();
            stopper.stop();
        })
        .map_err(no_thread)?;

    // A reader that has gone is no reason to stop.
    let _ =
        print(&format!("engine service at {place}\n  inlinecrypt serve --engine-process {place} VOLUME\n"));
    if let Err(error) = listen::notify_ready() {
        note(error.chain());
    }
    let processes = Arc::new(Processes::default());
    let launcher = ProcessLauncher::this_program().with_priority(priority);
    // Here and on no other thread: a process ends with the thread that started it.
    loop {
        match listener.accept() {
            Ok(Some(server)) => {
                let peer = server.peer();
                match admit(server, &launcher, &processes) {
                    Ok(pid) => tracing::info!(%peer, pid, "engine process started"),
                    Err(why) => tracing::warn!(%peer, "no engine process: {why}"),
                }
            }
            Ok(None) => break,
            Err(error) => tracing::warn!("engine service: {}", error.chain()),
        }
    }

    drop(listener);
    if let Err(error) = listen::notify_stopping() {
        note(error.chain());
    }
    let left = processes.count();
    if left > 0 {
        note(format_args!(
            "stopping once {left} engine processes have ended, each with its server; another signal ends them now"
        ));
    }
    processes.wait_for_all();
    Ok(())
}

fn no_thread(error: io::Error) -> Failure {
    Failure::of_io("cannot start a thread", &error, "Raise the limit on threads (ulimit -u).")
}

/// Starts a process for a server that has connected; its number, or why there is none.
fn admit(server: Stream, launcher: &ProcessLauncher, processes: &Arc<Processes>) -> Result<u32, String> {
    match server.peer() {
        Peer::Unix { uid, .. } if uid == 0 || uid == rustix::process::geteuid().as_raw() => {}
        _ => return Err("neither root nor the user of this service".to_owned()),
    }
    if processes.count() >= PROCESSES_MAX {
        return Err(format!("there are {PROCESSES_MAX} already"));
    }
    let child = launcher.start(server.into()).map_err(|error| error.chain())?;
    let pid = child.id();
    processes.add(child).map_err(|error| format!("no thread to wait for its end: {error}"))?;
    Ok(pid)
}

/// The engine processes that run.
#[derive(Debug, Default)]
struct Processes {
    count: Mutex<usize>,
    gone: Condvar,
}

impl Processes {
    fn count(&self) -> usize {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `child`, and has its end waited for.
    fn add(self: &Arc<Self>, child: Child) -> io::Result<()> {
        // Killed and waited for if there is no thread for it.
        let mut child = Reaped(child);
        let processes = self.clone();
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let reap = move || {
            let pid = child.0.id();
            match child.0.wait() {
                Ok(status) => tracing::info!(pid, %status, "engine process ended"),
                Err(error) => tracing::warn!(pid, %error, "engine process cannot be waited for"),
            }
            processes.one_less();
        };
        thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(reap)
            .map(drop)
            .inspect_err(|_| self.one_less())
    }

    fn one_less(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.gone.notify_all();
    }

    fn wait_for_all(&self) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.gone.wait_while(count, |count| *count > 0));
    }
}

/// A process that has ended once this is dropped.
#[derive(Debug)]
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Without effect if it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
