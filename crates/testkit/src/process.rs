//! Servers as processes that end with the test.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// How often a starting server is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A process that is killed, by its own number, when dropped.
#[derive(Debug)]
pub struct ServerProcess(Child);

impl ServerProcess {
    /// Starts a server.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self)
    }

    /// Starts a server and waits until it accepts connections at `socket`.
    ///
    /// # Errors
    ///
    /// The system's; [`TimedOut`](io::ErrorKind::TimedOut); or that the server ended instead.
    pub fn start_at(command: &mut Command, socket: &Path, time_max: Duration) -> io::Result<Self> {
        let mut server = Self::start(command)?;
        let deadline = Instant::now() + time_max;
        while UnixStream::connect(socket).is_err() {
            if let Some(status) = server.0.try_wait()? {
                return Err(io::Error::other(format!("the server ended: {status}")));
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(POLL);
        }
        Ok(server)
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// The process, to wait for or to talk to.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// The system's; [`TimedOut`](io::ErrorKind::TimedOut).
    pub fn wait(&mut self, time_max: Duration) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + time_max;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(POLL);
        }
    }

    /// Kills it without warning, as a crash would.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.0.kill()?;
        self.0.wait()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ends_at_once_is_noticed() {
        let error = ServerProcess::start_at(
            &mut Command::new("false"),
            Path::new("/nowhere"),
            Duration::from_secs(9),
        );
        assert!(error.unwrap_err().to_string().contains("ended"));
    }

    #[test]
    fn a_server_does_not_outlive_its_guard() {
        let server = ServerProcess::start(Command::new("sleep").arg("60")).unwrap();
        let proc = format!("/proc/{}", server.pid());
        assert!(Path::new(&proc).exists());
        drop(server);
        assert!(!Path::new(&proc).exists());
    }
}
