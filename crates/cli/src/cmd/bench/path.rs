//! The whole path: a client, a socket, the server, and memory or a file; with encryption and without.
//!
//! ```text
//!   client --socket pair--> echo                                          what any server costs
//!   client --socket pair--> server -> no disk                             what ours costs   (--stages)
//!   client --socket pair--> server -> plain volume -> memory | file
//!   client --socket pair--> server -> volume whose engine does nothing -> file              (--stages)
//!   client --socket pair--> server -> encrypted volume, engine in this process -> memory | file
//!   client --socket pair--> server -> encrypted volume, engine in a process of its own -> memory | file
//! ```
//!
//! All of them stand ready at once and take turns, load by load and round by round, in another order each time, so that what
//! else the machine does hits them alike. Where the time of a request goes is the difference of two lines: nothing is measured within the server, so
//! nothing of it is slower for being measured.

use super::client::{Client, Done, Order, Places, Shape, Way};
use super::memory::MemoryBacking;
use super::nothing::NoDisk;
use super::scratch::Scratch;
use super::{echo, median};
use crate::ask::Asker;
use crate::cli::{Bench, PassphraseArgs};
use crate::engine_process::{EngineHome, Started};
use crate::host::HostEngine;
use crate::plain;
use crate::plan;
use crate::report::{Code, Failure};
use crate::size::Size;
use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::backing::{Access, Backing};
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::disk::Disk;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::plain::PlainVolume;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::LiveVolume;
use inlinecrypt_core::testing::IdleEngine;
use inlinecrypt_core::volume::{Discard, Layout, Volume};
use inlinecrypt_io::backing::testing::SplitMix64;
use inlinecrypt_io::export::ExportSpec;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::fmt::Write as _;
use std::hint::black_box;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Rounds of which the median counts: short ones, since what disturbs is short, too.
const ROUNDS: u32 = 5;
/// What is measured if nothing is said.
const SIZE: u64 = 256 << 20;
const TIME: Duration = Duration::from_millis(600);
/// Memory through which copying and the cipher go: more than caches have.
const LIMIT_BYTES: usize = 64 << 20;

/// Where the bytes are in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Place {
    /// Nowhere: what the machine can do.
    Limit,
    Memory,
    File,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum What {
    Copy,
    Cipher,
    Echo,
    File,
    NoDisk,
    Plain,
    NoCipher,
    InProcess,
    Isolated,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Copy => "copying memory",
            Self::Cipher => "the cipher alone",
            Self::Echo => "the same bytes over a socket pair",
            Self::File => "the file by pread and pwrite",
            Self::NoDisk => "the server without a disk",
            Self::Plain => "plain",
            Self::NoCipher => "the server with an engine that does nothing",
            Self::InProcess => "encrypted, engine in this process",
            Self::Isolated => "encrypted, engine in its own",
        }
    }
}

/// What came out, for one kind of request.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figure {
    place: Place,
    what: What,
    way: &'static str,
    bytes: u32,
    depth: usize,
    requests_per_s: f64,
    mb_per_s: f64,
    /// Processor time of the server, its engine's process included, and not that of the client: of the round with the least.
    /// `null` for limits without a
    /// server, and where the system does not tell.
    server_cpu_us: Option<f64>,
    /// Throughput as a share of the plain volume's at the same place.
    of_plain: Option<f64>,
}

/// What was measured of the path.
#[derive(Debug, Serialize)]
pub(super) struct PathReport {
    engine: String,
    mode: &'static str,
    data_unit_bytes: u32,
    size_bytes: u64,
    seconds_per_figure: f64,
    /// The directory in which the file was.
    directory: String,
    figures: Vec<Figure>,
    #[serde(skip)]
    with_stages: bool,
}

/// A client and what serves it.
struct Rung {
    place: Place,
    what: What,
    /// `None` for the echo, which has a new socket pair each time.
    client: Option<Client>,
    /// Whose processor time counts besides ours.
    profile: Option<Arc<CryptoProfile>>,
}

impl Rung {
    fn over(place: Place, what: What, disk: Arc<dyn Disk>) -> Result<Self, Failure> {
        let connect = || -> io::Result<Client> {
            let spec = ExportSpec { name: String::new(), description: String::new(), disk };
            let server = NbdServer::new([spec], ServerOptions::default()).map_err(io::Error::other)?;
            let (ours, theirs) = UnixStream::pair()?;
            // The connection's thread keeps the server, and ends when the client goes.
            server.serve(theirs)?;
            let mut client = Client::connect(ours, 16 * (what as u64) + place as u64)?;
            if what != What::NoDisk {
                client.check()?;
            }
            Ok(client)
        };
        let client = connect().map_err(|error| failed(what, &error))?;
        Ok(Self { place, what, client: Some(client), profile: None })
    }

    /// Does the work of a round.
    fn measure(&mut self, shape: Shape, way: Way, time: Duration) -> Result<Sample, Failure> {
        let meter = Meter::start(self.profile.as_deref());
        let done = match &mut self.client {
            Some(client) => client.run(shape, way, time),
            None => echo::run(shape, way, time),
        };
        let Done { requests, seconds } = done.map_err(|error| failed(self.what, &error))?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let requests = requests.max(1) as f64;
        let cpu = meter.stop(self.profile.as_deref());
        Ok(Sample { seconds: seconds / requests, cpu_us: cpu.map(|cpu| cpu * 1e6 / requests) })
    }
}

fn failed(what: What, error: &io::Error) -> Failure {
    Failure::of_io(format!("cannot measure: {}", what.name()), error, "The log (-vv) may say more.")
}

/// A round's figures, for each request.
#[derive(Clone, Copy, Debug)]
struct Sample {
    seconds: f64,
    cpu_us: Option<f64>,
}

/// The processor time that others than the calling thread take.
struct Meter {
    others: f64,
    engine: Option<f64>,
}

impl Meter {
    fn start(profile: Option<&CryptoProfile>) -> Self {
        Self { engine: engine_seconds(profile), others: other_threads_seconds() }
    }

    fn stop(self, profile: Option<&CryptoProfile>) -> Option<f64> {
        let ours = other_threads_seconds() - self.others;
        Some(ours + engine_seconds(profile)? - self.engine?)
    }
}

/// Of all threads of this process but the calling one.
fn other_threads_seconds() -> f64 {
    let seconds = |clock| {
        let time = clock_gettime(clock);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let (whole, part) = (time.tv_sec as f64, time.tv_nsec as f64);
        whole + part / 1e9
    };
    seconds(ClockId::ProcessCPUTime) - seconds(ClockId::ThreadCPUTime)
}

/// Of the engine's process, which is 0 if it has none. `None` if the system does not tell.
fn engine_seconds(profile: Option<&CryptoProfile>) -> Option<f64> {
    let Some(process) = profile.and_then(|profile| profile.status().process) else { return Some(0.0) };
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid?)).ok()?;
    let mut sum_ns = 0.0;
    for task in tasks {
        // Time on a processor in nanoseconds, then other things (Documentation/scheduler/sched-stats.rst).
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        sum_ns += text.split_ascii_whitespace().next()?.parse::<f64>().ok()?;
    }
    Some(sum_ns / 1e9)
}

/// Measures the path as asked.
pub(super) fn measure(args: &Bench) -> Result<PathReport, Failure> {
    let (size, time) = (args.size.unwrap_or(SIZE), args.time.unwrap_or(TIME));
    let scratch = Scratch::make(args.file.as_deref(), size)?;
    let file = scratch.backing(size)?;
    let spec = plan::engine_from(&args.engine)?.spec.to_string();
    let mut figures = limits(&scratch, size)?;
    let mut rungs = rungs(args, file, size)?;
    let (mut order, mut random) = ((0..rungs.len()).collect::<Vec<_>>(), SplitMix64::new(4));
    for shape in Shape::ALL {
        for way in Way::BOTH {
            let mut samples: Vec<Vec<Sample>> = rungs.iter().map(|_| Vec::new()).collect();
            for _ in 0..ROUNDS {
                // In another order each time: who comes first after another place was used finds nothing in the cache.
                shuffle(&mut order, &mut random);
                for &at in &order {
                    samples[at].push(rungs[at].measure(shape, way, time / ROUNDS)?);
                }
            }
            for (rung, samples) in rungs.iter().zip(&samples) {
                let seconds = middle(samples.iter().map(|sample| sample.seconds));
                let cpu = samples.iter().map(|sample| sample.cpu_us).collect::<Option<Vec<_>>>();
                // Whatever disturbs only adds.
                let cpu = cpu.map(|cpu| cpu.into_iter().fold(f64::INFINITY, f64::min));
                figures.push(Figure::of(rung.place, rung.what, shape, way, seconds, cpu));
            }
        }
    }
    let plain: Vec<Figure> = figures.iter().filter(|figure| figure.what == What::Plain).copied().collect();
    for figure in figures.iter_mut().filter(|figure| matches!(figure.what, What::InProcess | What::Isolated))
    {
        let same = plain.iter().find(|plain| plain.place == figure.place && plain.is_like(figure));
        figure.of_plain = same.map(|plain| figure.requests_per_s / plain.requests_per_s);
    }
    Ok(PathReport {
        engine: spec,
        mode: Mode::Aes256Xts.info().name,
        data_unit_bytes: DataUnitSize::DEFAULT.bytes(),
        size_bytes: size,
        seconds_per_figure: time.as_secs_f64(),
        directory: scratch.directory.display().to_string(),
        figures,
        with_stages: args.stages,
    })
}

/// Everything that is served, ready to be asked.
fn rungs(args: &Bench, file: Arc<dyn Backing>, size: u64) -> Result<Vec<Rung>, Failure> {
    let mut engines = Vec::new();
    for (what, home) in [(What::InProcess, EngineHome::None), (What::Isolated, EngineHome::Own)] {
        let mut plan = plan::engine_from(&args.engine)?;
        plan.home = Some(home);
        let mut asker = Asker::new(&PassphraseArgs::default());
        let engine = HostEngine::start_at_home(&plan, false, false, &mut asker);
        engines.push((what, engine.map_err(|error| Failure::of("cannot start the engine", &error))?.profile));
    }
    let cannot = |error: Error| Failure::of("cannot make a volume to measure", &error);
    let mut rungs = vec![Rung { place: Place::Limit, what: What::Echo, client: None, profile: None }];
    if args.stages {
        rungs.push(Rung::over(Place::Limit, What::NoDisk, Arc::new(NoDisk::new(size)))?);
    }
    let memory: Arc<dyn Backing> = Arc::new(MemoryBacking::new(size).map_err(cannot)?);
    let pool = plain::pool();
    for (place, backing) in [(Place::Memory, memory), (Place::File, file)] {
        let plain = PlainVolume::new(backing.clone(), size, Access::ReadWrite, Discard::Off, pool.clone());
        rungs.push(Rung::over(place, What::Plain, Arc::new(plain.map_err(cannot)?))?);
        for (what, profile) in &engines {
            let volume = encrypted(profile, backing.clone(), size).map_err(cannot)?;
            let rung = Rung::over(place, *what, Arc::new(LiveVolume::new(volume)))?;
            rungs.push(Rung { profile: Some(profile.clone()), ..rung });
        }
        if args.stages && place == Place::File {
            let engine = Started {
                engine: Arc::new(IdleEngine::default()),
                fallback: None,
                root: None,
                isolated: None,
            };
            let engine = HostEngine::of(&plan::engine_from(&args.engine)?, engine).map_err(cannot)?;
            let volume = encrypted(&engine.profile, backing, size).map_err(cannot)?;
            rungs.push(Rung::over(place, What::NoCipher, Arc::new(LiveVolume::new(volume)))?);
        }
    }
    Ok(rungs)
}

/// A volume as they are made if nothing else is asked for, under a key that protects nothing.
fn encrypted(profile: &Arc<CryptoProfile>, backing: Arc<dyn Backing>, size: u64) -> Result<Volume, Error> {
    let layout = Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, 0, size)?;
    let raw: Vec<u8> = (0u8..64).collect();
    let form = KeyForm::Raw(RawKey::new(&raw));
    let key = Key::new(layout.mode(), layout.data_unit_size(), layout.dun_bytes(), form, Hardware::Allowed)?;
    let admission = profile.admit(key, Fallback::Off)?;
    Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Off)
}

/// What one thread does with the same bytes in the same order, without a server. The file is filled.
fn limits(scratch: &Scratch, size: u64) -> Result<Vec<Figure>, Failure> {
    let cipher = Mode::Aes256Xts.info().expand(&(0u8..64).collect::<Vec<_>>()).expect("halves that differ");
    let unit = DataUnitSize::DEFAULT.bytes() as usize;
    let from = vec![1u8; LIMIT_BYTES];
    let mut into = vec![2u8; LIMIT_BYTES];
    let mut figures = Vec::new();
    let mut trouble = None;
    for shape in Shape::ALL {
        let len = shape.len as usize;
        for way in Way::BOTH {
            let mut places = Places::new(shape, LIMIT_BYTES as u64, 1);
            let mut range = || {
                let at = usize::try_from(places.next()).expect("within LIMIT_BYTES");
                at..at + len
            };
            let copied = median(|| {
                let range = range();
                black_box(&mut into[range.clone()]).copy_from_slice(black_box(&from[range]));
            });
            let crypted = median(|| {
                let data = &mut into[range()];
                match way {
                    Way::Read => cipher.decrypt(0.into(), unit, black_box(data)),
                    Way::Write => cipher.encrypt(0.into(), unit, black_box(data)),
                }
            });
            let mut places = Places::new(shape, size, 2);
            let data = &mut into[..len];
            let moved = median(|| {
                let at = places.next();
                let moved = match way {
                    Way::Read => rustix::io::pread(scratch.as_fd(), &mut *data, at),
                    Way::Write => rustix::io::pwrite(scratch.as_fd(), data, at),
                };
                match moved {
                    Ok(moved) if moved == len => {}
                    Ok(_) => trouble = Some(io::ErrorKind::UnexpectedEof.into()),
                    Err(errno) => trouble = Some(io::Error::from(errno)),
                }
            });
            if let Some(error) = trouble {
                return Err(failed(What::File, &error));
            }
            for (what, seconds) in [(What::Copy, copied), (What::Cipher, crypted), (What::File, moved)] {
                figures.push(Figure::of(Place::Limit, what, shape, way, seconds, None));
            }
        }
    }
    Ok(figures)
}

/// Puts them into any order, each as likely as the others.
fn shuffle(order: &mut [usize], random: &mut SplitMix64) {
    for last in (1..order.len()).rev() {
        let other = random.below(last as u64 + 1);
        order.swap(last, usize::try_from(other).expect("at most last"));
    }
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Figure {
    fn of(place: Place, what: What, shape: Shape, way: Way, seconds: f64, cpu_us: Option<f64>) -> Self {
        let requests_per_s = 1.0 / seconds;
        Self {
            place,
            what,
            way: way.name(),
            bytes: shape.len,
            depth: shape.depth,
            requests_per_s,
            mb_per_s: requests_per_s * f64::from(shape.len) / 1e6,
            server_cpu_us: cpu_us,
            of_plain: None,
        }
    }

    /// Whether the other was asked for the same.
    fn is_like(&self, other: &Self) -> bool {
        (self.way, self.bytes, self.depth) == (other.way, other.bytes, other.depth)
    }

    fn is_of(&self, shape: Shape, way: Way) -> bool {
        (self.way, self.bytes, self.depth) == (way.name(), shape.len, shape.depth)
    }
}

impl PathReport {
    fn find(&self, place: Place, what: What, shape: Shape, way: Way) -> Option<&Figure> {
        let mut figures = self.figures.iter();
        figures.find(|figure| figure.place == place && figure.what == what && figure.is_of(shape, way))
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        let mut text = format!(
            "path, one connection over a socket pair, {}, data unit {}, engine {}; {}, in memory and in a file in {}; medians of \
             {ROUNDS} rounds\n",
            self.mode,
            self.data_unit_bytes,
            self.engine,
            Size(self.size_bytes),
            crate::report::printable(&self.directory),
        );
        let columns = Shape::ALL.map(|shape| format!("{}, {}", shape.name, shape.unit()));
        push_row(&mut text, "  read / write (of plain)", &columns);
        let groups = [
            ("limits, one thread", Place::Limit, &[What::Copy, What::Cipher, What::File, What::Echo][..]),
            ("in memory", Place::Memory, &[What::Plain, What::InProcess, What::Isolated]),
            ("in a file", Place::File, &[What::Plain, What::InProcess, What::Isolated]),
        ];
        for (title, place, rows) in groups {
            let _ = writeln!(text, "  {title}");
            for what in rows {
                let cells = Shape::ALL.map(|shape| self.cell(place, *what, shape));
                push_row(&mut text, &format!("    {}", what.name()), &cells);
            }
        }
        if self.with_stages {
            text.push_str(&self.describe_stages());
        }
        text
    }

    /// `2131 / 2986 (97 / 99 %)`, the shares being those of plain.
    fn cell(&self, place: Place, what: What, shape: Shape) -> String {
        let [read, write] = Way::BOTH.map(|way| self.find(place, what, shape, way));
        let (Some(read), Some(write)) = (read, write) else { return String::new() };
        let value = |figure: &Figure| match shape.order {
            Order::Sequential => format!("{:.0}", figure.mb_per_s),
            Order::Random => format!("{:.1}", figure.requests_per_s / 1e3),
        };
        let mut text = format!("{} / {}", value(read), value(write));
        if let (Some(read), Some(write)) = (read.of_plain, write.of_plain) {
            let _ = write!(text, " ({:.0} / {:.0} %)", read * 100.0, write * 100.0);
        }
        text
    }

    /// What each stage adds: the difference of two lines above each other.
    fn describe_stages(&self) -> String {
        let stages = [
            ("bytes received and sent", Place::Limit, What::Echo),
            ("+ requests parsed, replies made", Place::Limit, What::NoDisk),
            ("+ volume, and memory copied", Place::Memory, What::Plain),
            ("+ the file instead of memory", Place::File, What::Plain),
            ("+ data units and keyslot", Place::File, What::NoCipher),
            ("+ the cipher", Place::File, What::InProcess),
            ("+ hand-over to the engine process", Place::File, What::Isolated),
        ];
        let mut text = format!(
            "\nstages, processor time of server and engine process in us a request, the least of {ROUNDS} rounds: all so far, and \
             what the stage adds\n"
        );
        let _ = write!(text, "{:<35}", "  read, write");
        for shape in Shape::ALL {
            let _ = write!(text, "  {:>28}", shape.name);
        }
        text.push('\n');
        let mut before: Option<(Place, What)> = None;
        for (name, place, what) in stages {
            let _ = write!(text, "  {name:<33}");
            for shape in Shape::ALL {
                for way in Way::BOTH {
                    let cpu = |(place, what)| self.find(place, what, shape, way)?.server_cpu_us;
                    let cell = match (cpu((place, what)), before.and_then(cpu)) {
                        (None, _) => "-".to_owned(),
                        (Some(all), None) => format!("{all:.1}"),
                        (Some(all), Some(earlier)) => format!("{all:.1} {:+.1}", all - earlier),
                    };
                    let _ = write!(text, "  {cell:>13}");
                }
            }
            text.push('\n');
            before = Some((place, what));
        }
        text
    }
}

/// A line of the table: a name, and what it has for each kind of request.
fn push_row(text: &mut String, name: &str, cells: &[String]) {
    let _ = write!(text, "{name:<37}");
    for cell in cells {
        let _ = write!(text, "  {cell:<30}");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
}

/// What is asked for of the path, where the path is not.
pub(super) fn refuse_without(args: &Bench) -> Result<(), Failure> {
    let given = [
        ("--file", args.file.is_some()),
        ("--size", args.size.is_some()),
        ("--time", args.time.is_some()),
        ("--stages", args.stages),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((what, _)) => Err(Failure::new(
            Code::Wrong,
            format!("{what} is for the path, which is not to be measured"),
            "Leave it out, or measure the path, too: inlinecrypt bench path",
        )),
    }
}
