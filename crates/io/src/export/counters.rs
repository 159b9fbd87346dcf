//! What an export has done so far, for `status`.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Kinds of requests, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Trims.
    Trim,
    /// Writes of zeroes.
    WriteZeroes,
    /// Hints that something will be read.
    Cache,
    /// Questions about what is allocated.
    BlockStatus,
}

/// How many there are of [`Kind`].
const KINDS: usize = 7;

/// Counters of one export. Each is exact; together they are no snapshot of one moment.
#[derive(Debug, Default)]
pub struct Counters {
    connections_now: AtomicU64,
    connections_total: AtomicU64,
    requests: [AtomicU64; KINDS],
    bytes: [AtomicU64; KINDS],
    errors: AtomicU64,
}

impl Counters {
    /// A client has come.
    pub(crate) fn connected(&self) {
        self.connections_now.fetch_add(1, Relaxed);
        self.connections_total.fetch_add(1, Relaxed);
    }

    /// A client has gone.
    pub(crate) fn disconnected(&self) {
        self.connections_now.fetch_sub(1, Relaxed);
    }

    /// A request over `len_bytes` was done.
    pub(crate) fn done(&self, kind: Kind, len_bytes: u64) {
        self.requests[kind as usize].fetch_add(1, Relaxed);
        self.bytes[kind as usize].fetch_add(len_bytes, Relaxed);
    }

    /// Several requests of one kind were done, over so many bytes each.
    pub(crate) fn done_many(&self, kind: Kind, lens: impl Iterator<Item = usize>) {
        let (mut requests, mut bytes) = (0, 0);
        for len in lens {
            requests += 1;
            bytes += len as u64;
        }
        if requests > 0 {
            self.requests[kind as usize].fetch_add(requests, Relaxed);
            self.bytes[kind as usize].fetch_add(bytes, Relaxed);
        }
    }

    /// A request was answered with an error.
    pub(crate) fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// The numbers as they are now.
    #[must_use]
    pub fn snapshot(&self) -> CountersSnapshot {
        let Self { connections_now, connections_total, requests: _, bytes: _, errors } = self;
        let of = |kind: Kind| KindSnapshot {
            requests: self.requests[kind as usize].load(Relaxed),
            bytes: self.bytes[kind as usize].load(Relaxed),
        };
        CountersSnapshot {
            connections_now: connections_now.load(Relaxed),
            connections_total: connections_total.load(Relaxed),
            read: of(Kind::Read),
            write: of(Kind::Write),
            flush: of(Kind::Flush),
            trim: of(Kind::Trim),
            write_zeroes: of(Kind::WriteZeroes),
            cache: of(Kind::Cache),
            block_status: of(Kind::BlockStatus),
            errors: errors.load(Relaxed),
        }
    }
}

/// The numbers of an export at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CountersSnapshot {
    /// Clients that are connected.
    pub connections_now: u64,
    /// Clients that ever were.
    pub connections_total: u64,
    /// Reads that were answered with data.
    pub read: KindSnapshot,
    /// Writes that succeeded.
    pub write: KindSnapshot,
    /// Flushes that succeeded. They have no bytes.
    pub flush: KindSnapshot,
    /// Trims that succeeded.
    pub trim: KindSnapshot,
    /// Writes of zeroes that succeeded.
    pub write_zeroes: KindSnapshot,
    /// Hints taken.
    pub cache: KindSnapshot,
    /// Questions about allocation that were answered.
    pub block_status: KindSnapshot,
    /// Requests of any kind that were answered with an error.
    pub errors: u64,
}

/// The numbers of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KindSnapshot {
    /// How many.
    pub requests: u64,
    /// How many bytes they covered.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_under_their_kind() {
        let counters = Counters::default();
        counters.connected();
        counters.done(Kind::Write, 4096);
        counters.done(Kind::Write, 512);
        counters.done(Kind::BlockStatus, 1);
        counters.failed();
        counters.disconnected();
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.write, KindSnapshot { requests: 2, bytes: 4608 });
        assert_eq!(snapshot.block_status.requests, 1);
        assert_eq!(snapshot.read, KindSnapshot::default());
        assert_eq!((snapshot.connections_now, snapshot.connections_total, snapshot.errors), (0, 1, 1));
    }
}
