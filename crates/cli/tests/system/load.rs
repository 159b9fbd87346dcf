//! Random requests on a stretch of an export, and whether every answer is right.

use inlinecrypt_testkit::nbd::{NbdError, Reply, cmd};
use inlinecrypt_testkit::{Client, Shadow, Version, pattern};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

/// A flag that says when to end. Up as soon as its guard is dropped, so that nobody goes on for ever when a test fails.
#[derive(Default)]
pub(crate) struct Until(AtomicBool);

impl Until {
    pub(crate) fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Ends it when dropped.
    pub(crate) fn guard(&self) -> UntilGuard<'_> {
        UntilGuard(self)
    }
}

pub(crate) struct UntilGuard<'u>(&'u Until);

impl Drop for UntilGuard<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Where threads wait for each other, again and again. When one of them panics, so do all others.
pub(crate) struct Meeting {
    count: usize,
    state: Mutex<Met>,
    changed: Condvar,
}

#[derive(Default)]
struct Met {
    here: usize,
    rounds: u64,
    broken: bool,
}

impl Meeting {
    pub(crate) fn of(count: usize) -> Self {
        Self { count, state: Mutex::default(), changed: Condvar::new() }
    }

    /// For a thread that takes part, for as long as it does.
    pub(crate) fn attend(&self) -> Attendance<'_> {
        Attendance(self)
    }
}

pub(crate) struct Attendance<'m>(&'m Meeting);

impl Attendance<'_> {
    pub(crate) fn wait(&self) {
        let mut met = self.0.state.lock().unwrap();
        met.here += 1;
        if met.here == self.0.count {
            met.here = 0;
            met.rounds += 1;
            self.0.changed.notify_all();
            return;
        }
        let round = met.rounds;
        while met.rounds == round {
            if met.broken {
                drop(met);
                panic!("another thread has panicked");
            }
            met = self.0.changed.wait(met).unwrap();
        }
    }
}

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.state.lock().unwrap().broken = true;
            self.0.changed.notify_all();
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// Offsets and lengths are multiples of this.
    pub(crate) block: u64,
    /// Longest request.
    pub(crate) len_max: u64,
    /// Requests under way at once. Times `len_max` it must fit a socket's buffer, since who sends does not receive.
    pub(crate) depth: usize,
    /// Of a hundred requests, how many read.
    pub(crate) reads: u64,
    /// How many trim.
    pub(crate) trims: u64,
    /// How many write zeroes.
    pub(crate) zeroes: u64,
    /// How many flush.
    pub(crate) flushes: u64,
}

impl Habits {
    /// Half reads, half writes.
    pub(crate) const MIXED: Self =
        Self { block: 512, len_max: 16 << 10, depth: 4, reads: 45, trims: 2, zeroes: 4, flushes: 1 };
    /// Nothing but writes and a few flushes.
    pub(crate) const WRITES: Self = Self { reads: 0, trims: 0, flushes: 2, depth: 6, ..Self::MIXED };
}

/// A client that keeps a stretch of an export busy, all alone in it.
pub(crate) struct Load {
    pub(crate) shadow: Shadow,
    habits: Habits,
    random: u64,
    under_way: Vec<Asked>,
    /// Requests that were answered.
    pub(crate) answered: u64,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    cookie: u64,
    kind: u16,
    offset: u64,
    len: u64,
    version: Version,
}

impl Load {
    pub(crate) fn new(seed: u64, offset: u64, len: u64, habits: Habits) -> Self {
        let shadow = Shadow::new(seed, offset, len);
        Self { shadow, habits, random: seed, under_way: Vec::new(), answered: 0 }
    }

    fn random(&mut self, below: u64) -> u64 {
        pattern::splitmix64(&mut self.random) % below
    }

    /// Writes all of the stretch once.
    pub(crate) fn fill(&mut self, client: &mut Client<UnixStream>) {
        let (mut at, end) = (self.shadow.offset(), self.shadow.offset() + self.shadow.len());
        while at < end {
            let len = (end - at).min(1 << 20);
            let (version, data) = self.shadow.begin(at, len);
            client.write(at, &data).unwrap();
            self.shadow.settle(at, len, version);
            at += len;
        }
    }

    /// Asks and checks until `is_over`, then until all is answered.
    ///
    /// # Errors
    ///
    /// The stream's. An answer that says no, or is wrong, is a panic.
    pub(crate) fn run(
        &mut self,
        client: &mut Client<UnixStream>,
        is_over: impl Fn() -> bool,
    ) -> Result<(), NbdError> {
        while !is_over() {
            if self.under_way.len() < self.habits.depth && self.ask(client)? {
                continue;
            }
            let reply = client.receive()?;
            self.take(&reply);
        }
        self.finish(client)
    }

    /// Asks and checks until the server dies, which somebody must see to, and takes what it had answered before.
    pub(crate) fn run_until_killed(&mut self, client: &mut Client<UnixStream>) {
        let ended = self.run(client, || false);
        assert!(matches!(ended, Err(NbdError::Io(_))), "{ended:?}");
        let ended = self.finish(client);
        assert!(matches!(ended, Ok(()) | Err(NbdError::Io(_))), "{ended:?}");
    }

    /// Takes all answers that are still to come.
    ///
    /// # Errors
    ///
    /// The stream's.
    pub(crate) fn finish(&mut self, client: &mut Client<UnixStream>) -> Result<(), NbdError> {
        while !self.under_way.is_empty() {
            let reply = client.receive()?;
            self.take(&reply);
        }
        Ok(())
    }

    /// The server is gone, and no answer will come any more. Says how many are missing.
    pub(crate) fn give_up(&mut self) -> u64 {
        let missing = self.under_way.len() as u64;
        self.under_way.clear();
        missing
    }

    /// Whether all of the stretch is right, by reading it.
    pub(crate) fn check_all(&mut self, client: &mut Client<UnixStream>) {
        let (mut at, end) = (self.shadow.offset(), self.shadow.offset() + self.shadow.len());
        while at < end {
            let len = (end - at).min(1 << 20);
            let data = client.read(at, u32::try_from(len).unwrap()).unwrap();
            self.shadow.adopt(at, &data).unwrap();
            at += len;
        }
    }

    /// Sends a request that does not touch what others under way touch. Says whether it found one.
    fn ask(&mut self, client: &mut Client<UnixStream>) -> Result<bool, NbdError> {
        let Habits { block, len_max, reads, trims, zeroes, flushes, depth: _ } = self.habits;
        let len = (1 + self.random(len_max / block)) * block;
        let len = len.min(self.shadow.len());
        let offset = self.shadow.offset() + self.random((self.shadow.len() - len) / block + 1) * block;
        let touches = |asked: &Asked| offset < asked.offset + asked.len && asked.offset < offset + len;
        if self.under_way.iter().any(touches) {
            return Ok(self.under_way.is_empty());
        }
        let short = u32::try_from(len).unwrap();
        let dice = self.random(100);
        let (kind, len, version, sent) = if dice < reads {
            (cmd::READ, len, Version::ZEROES, client.send(cmd::READ, 0, offset, short, &[]))
        } else if dice < reads + trims {
            self.shadow.forget(offset, len);
            (cmd::TRIM, len, Version::ZEROES, client.send(cmd::TRIM, 0, offset, short, &[]))
        } else if dice < reads + trims + zeroes {
            let version = self.shadow.begin_zeroes(offset, len);
            (
                cmd::WRITE_ZEROES,
                len,
                version,
                client.send(cmd::WRITE_ZEROES, cmd::FLAG_NO_HOLE, offset, short, &[]),
            )
        } else if dice < reads + trims + zeroes + flushes {
            (cmd::FLUSH, 0, Version::ZEROES, client.send(cmd::FLUSH, 0, 0, 0, &[]))
        } else {
            let (version, data) = self.shadow.begin(offset, len);
            let fua = if self.random(50) == 0 { cmd::FLAG_FUA } else { 0 };
            (cmd::WRITE, len, version, client.send(cmd::WRITE, fua, offset, short, &data))
        };
        self.under_way.push(Asked { cookie: sent?, kind, offset, len, version });
        Ok(true)
    }

    fn take(&mut self, reply: &Reply) {
        let index = self.under_way.iter().position(|asked| asked.cookie == reply.cookie).expect("asked for");
        let asked = self.under_way.swap_remove(index);
        assert_eq!(reply.errno, 0, "{asked:?}: {}", reply.error_text);
        match asked.kind {
            cmd::READ => {
                if let Err(wrong) = self.shadow.check(asked.offset, &reply.data) {
                    panic!("{asked:?}: {wrong}");
                }
            }
            cmd::WRITE | cmd::WRITE_ZEROES => self.shadow.settle(asked.offset, asked.len, asked.version),
            _ => {}
        }
        self.answered += 1;
    }
}
