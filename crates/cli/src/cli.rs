//! The one definition of the command line: parsing, help, manual pages and completions all come from it.

mod fscrypt;
pub(crate) mod luks;

pub(crate) use fscrypt::{FscryptCat, FscryptCommand, FscryptImage, FscryptInfo, FscryptLs, FscryptVerify};

use self::luks::LuksCommand;
use crate::ask::HELPER;
use crate::engine_process::EngineHome;
use crate::keyfile::KeySource;
use crate::luks::unlock::HELPER as LUKS_HELPER;
use crate::plan::EnginePlan;
use crate::report::EXIT_CODES;
use crate::size::Size;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueEnum};
use inlinecrypt_core::config::{DataUnitSize, KeyType, Mode};
use inlinecrypt_core::disk::CHUNK_BYTES;
use inlinecrypt_core::reencrypt::state::ZONE_BYTES_MAX;
use inlinecrypt_core::volume::{IvLayout, SECTOR_BYTES};
use inlinecrypt_engine::{EngineSpec, RootSpec, Sample};
use inlinecrypt_io::listen::Listen;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  inlinecrypt serve --create 1GiB demo.img      make an encrypted volume and serve it
  inlinecrypt serve demo.img                    serve it again
  inlinecrypt volume info demo.img              what is known about it
  inlinecrypt status                            what the running servers do
  inlinecrypt check servers.toml                whether a config can be served";

/// Encrypted volumes over NBD, on a keyslot framework that is Linux's.
///
/// A volume is a file or block device of ciphertext, in the layout of dm-crypt. Its key is hardware-wrapped: what lies on
/// the disk is a blob that only the engine opens, under a root that is made when first needed and kept in
/// $INLINECRYPT_HOME, else $XDG_DATA_HOME/inlinecrypt, else ~/.local/share/inlinecrypt.
#[derive(Debug, Parser)]
#[command(name = "inlinecrypt", version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"), max_term_width = 100)]
pub(crate) struct Cli {
    /// Log more, to standard error: -v what happens, -vv connections, -vvv everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 100)]
    pub(crate) verbose: u8,
    /// Log what FILTER says: a level (error, warn, info, debug, trace), or TARGET=LEVEL,...
    #[arg(long, global = true, value_name = "FILTER", display_order = 101)]
    pub(crate) log: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs. A new one is a file in `cmd/` and a variant here.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve volumes over NBD until SIGTERM or SIGINT
    ///
    /// Each VOLUME is a file or block device. Its description VOLUME.toml, if there is one, says how to read it and by
    /// which key; options and config may add to it but not contradict it. The second signal ends the server at once.
    ///
    /// Sockets that the service manager hands over (systemd socket activation) are served, too; with them, no socket is
    /// made unless --nbd asks for it.
    Serve(Box<Serve>),
    /// Make volumes and look at them
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Make LUKS2 containers, and change their passphrases
    ///
    /// They are cryptsetup's, which opens and changes what is made here, and the other way round. What serves them is
    /// `inlinecrypt serve`.
    #[command(subcommand)]
    Luks(LuksCommand),
    /// Make keys, wrap them, and look at them
    #[command(subcommand)]
    Key(KeyCommand),
    /// Make roots, look at them, and change who keeps them
    ///
    /// A root wraps keys for storage. It is a secret in a file; what differs is what protects that file:
    ///
    /// file: its permissions. passphrase: a passphrase. tpm2: a TPM 2.0, with a PIN and with registers that have to stay
    /// as they are, if asked for. pkcs11: a key on a token. `inlinecrypt root create --help` shows how each is written.
    #[command(subcommand)]
    Root(RootCommand),
    /// Talk to a TPM or token; started by other commands
    #[command(name = HELPER, hide = true)]
    RootHelper,
    /// Open a LUKS container; started by other commands
    #[command(name = LUKS_HELPER, hide = true)]
    LuksHelper,
    /// Look at engines
    #[command(subcommand)]
    Engine(EngineCommand),
    /// Read and verify files that Linux's fscrypt encrypted, on ext4 images that nobody has mounted
    #[command(subcommand)]
    Fscrypt(FscryptCommand),
    /// Show what running servers do
    Status(Status),
    /// Check a config: whether all of it can be served. Changes nothing
    Check(Check),
    /// Show what this machine's kernel and block devices can do of inline encryption
    Probe(Probe),
    /// Measure ciphers, engines and the whole path on this machine, with the machine's own limits beside them
    ///
    /// cipher: the modes, in memory. engine: orders to an engine, in this process and in one of its own. path: a server of
    /// ours and a client of this program on a socket pair, over memory and over a file; plain, with the engine in this
    /// process, and with the engine in one of its own.
    Bench(Bench),
    /// Print completions for a shell
    Completions(Completions),
    /// Write the manual pages
    Man(Man),
}

/// What to measure.
#[derive(Args, Debug)]
#[command(after_help = "\
Ciphers and engines: each figure is the median of seven rounds of one thread. The path: of five
rounds, in which all servers take turns, so that what else the machine does hits them alike.
Still compare figures of one run only.

Examples:
  inlinecrypt bench
  inlinecrypt bench cipher engine --json
  inlinecrypt bench path --file /srv/volumes --size 1GiB
      over a file in that directory, which is removed again; without --file in $TMPDIR, else in the current directory
  inlinecrypt bench path --stages --time 3
      also where the processor time of a request goes
  inlinecrypt bench --engine ice:next --json")]
pub(crate) struct Bench {
    /// What to measure [default: everything]
    #[arg(value_name = "WHAT", value_enum)]
    pub(crate) what: Vec<BenchArg>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Where the path's file is made: a directory, or a name that nothing has yet. It is removed again, however this ends
    /// [default: $TMPDIR, else the current directory]
    #[arg(long, value_name = "PATH", help_heading = "Path")]
    pub(crate) file: Option<PathBuf>,
    /// Bytes of that file, and of the memory beside it: at least 16 MiB. What fits the processor's cache is fast
    /// [default: 256MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Path", value_parser = parse_bench_size)]
    pub(crate) size: Option<u64>,
    /// Seconds for each figure of the path, of which there are about 50: 0.01 to 60 [default: 0.6]
    #[arg(long, value_name = "SECONDS", help_heading = "Path", value_parser = parse_bench_time)]
    pub(crate) time: Option<Duration>,
    /// Also show where a request's processor time goes, stage by stage
    #[arg(long, help_heading = "Path")]
    pub(crate) stages: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchArg {
    /// The modes, in memory
    Cipher,
    /// Orders to an engine
    Engine,
    /// From a client through the server to memory and to a file
    Path,
}

/// Where engines run.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Engine")]
pub(crate) struct IsolationArgs {
    /// Process in which engines run: own (one that holds the keys, which this one never sees), none (this one, which then
    /// holds them), or unix:PATH (an engine service's) [default: own]
    #[arg(long, value_name = "WHERE")]
    pub(crate) engine_process: Option<EngineHome>,
    /// What to do where the system cannot lock the engine process up entirely: report it, or require it and not serve
    /// [default: report]
    #[arg(long, value_name = "WHAT", value_enum)]
    pub(crate) sandbox: Option<SandboxArg>,
}

impl IsolationArgs {
    /// What the command line says goes before what a config says.
    pub(crate) fn apply(&self, engine: &mut EnginePlan) {
        let said = self.engine_process.clone().or_else(|| engine.home.take());
        engine.home = Some(said.unwrap_or_default());
        if let Some(sandbox) = self.sandbox {
            engine.require_sandbox = sandbox == SandboxArg::Require;
        }
    }
}

/// What to do where something of the sandbox is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SandboxArg {
    /// Say so, and go on.
    Report,
    /// Do not serve.
    Require,
}

/// How a volume lies on its backing. What is not given comes from the volume's description, else from the defaults.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Layout of the volume")]
pub(crate) struct LayoutArgs {
    /// Crypto mode: AES-256-XTS, AES-128-CBC-ESSIV, Adiantum, SM4-XTS or AES-128-XTS [default: AES-256-XTS]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub(crate) mode: Option<Mode>,
    /// Size of a data unit, in bytes: a power of two from 512 to 65536 [default: 4096]
    #[arg(long, value_name = "BYTES", value_parser = parse_data_unit)]
    pub(crate) data_unit: Option<DataUnitSize>,
    /// Size of the logical block that clients see, in bytes: 512 up to the data unit [default: 512 with XTS, else the
    /// data unit]
    #[arg(long, value_name = "BYTES", value_parser = parse_block)]
    pub(crate) block: Option<u32>,
    /// What is added to the sector number before it becomes a data unit number, in sectors of 512 bytes [default: 0]
    #[arg(long, value_name = "SECTORS")]
    pub(crate) iv_offset: Option<u64>,
    /// Which data unit number each data unit has: data-units, its own (dm-crypt with iv_large_sectors); sectors, that of its
    /// first sector (dm-crypt without); upper-half, its own in the upper half of the IV (SPDK and ubiblk, whose data units
    /// are their blocks) [default: data-units]
    #[arg(long, value_name = "LAYOUT", value_parser = parse_iv)]
    pub(crate) iv: Option<IvLayout>,
    /// Where the volume begins in its file or device, in bytes (units k, M, G, ...): a multiple of 512 [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = parse_offset)]
    pub(crate) offset: Option<u64>,
}

/// Engine and root.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Engine that encrypts
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<EngineSpec>, help = engine_help())]
    pub(crate) engine: Option<EngineSpec>,
    /// Root, which wraps keys for storage: a file, or what `inlinecrypt root create --help` lists [default: root.key in
    /// the home described in `inlinecrypt --help`]
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<RootSpec>)]
    pub(crate) root: Option<RootSpec>,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
    /// Which keys an engine serves that serves one type only: decided now, or by the first volume [default: first]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) key_type: Option<KeyTypeArg>,
}

/// Where passphrases and PINs of roots come from, and those of LUKS containers.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PassphraseArgs {
    /// Read the passphrase or PIN (of the root, or of a LUKS container) from FILE, for its owner alone; a line feed at the end does not count [default:
    /// asked for at the terminal]
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_fd")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// The same from the open descriptor N
    #[arg(long, value_name = "N")]
    pub(crate) passphrase_fd: Option<u32>,
}

/// What decides which keys an exclusive engine serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeyTypeArg {
    /// The first volume whose key is admitted
    #[default]
    First,
    /// Raw keys
    Raw,
    /// Hardware-wrapped keys
    Wrapped,
}

impl KeyTypeArg {
    /// The type, if it is decided ahead of any key.
    pub(crate) fn declared(self) -> Option<KeyType> {
        match self {
            Self::First => None,
            Self::Raw => Some(KeyType::Raw),
            Self::Wrapped => Some(KeyType::HardwareWrapped),
        }
    }
}

/// Who gets a keyslot next when there are too few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyArg {
    /// In order of priority and arrival, with quanta
    Fair,
    /// As in Linux: whoever comes by first, without quanta or bounds
    Upstream,
}

/// How urgent a volume's requests are when keyslots are scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PriorityArg {
    /// Waits behind others, and leaves its keyslot first
    Low,
    /// Neither
    Normal,
    /// Goes before others, and leaves its keyslot last
    High,
}

fn engine_help() -> String {
    format!("Engine that encrypts [default: {}]. One of:\n{}", EngineSpec::default(), EngineSpec::HELP)
}

const SERVE_EXAMPLES: &str = "\
Examples:
  inlinecrypt serve --create 1GiB demo.img
      makes demo.img, its wrapped key demo.img.key and its description demo.img.toml, and serves it on demo.img.sock
  inlinecrypt serve --nbd tcp:127.0.0.1:10809 a.img b.img
      two volumes, as exports \"a\" and \"b\"
  inlinecrypt serve --key raw:volume.key --data-unit 512 --read-only /dev/sdx
      what dm-crypt wrote with aes-xts-plain64
  inlinecrypt serve --passphrase-file pass disk.luks
      a LUKS container, by cryptsetup or by `inlinecrypt luks create`; without --passphrase-file the passphrase is asked for
  dmsetup table --showkeys secret | inlinecrypt serve --dm-table-file -
      a volume of dm-crypt's, by the line of its table; docs/dm-crypt.md
  inlinecrypt serve --nbd tcp:0.0.0.0:10809 --tls-cert server.pem --tls-key server.key demo.img
  inlinecrypt serve --plain old.img
      as it is, WITHOUT encryption: to copy an image in or out, or to see what encryption costs
  inlinecrypt serve --config servers.toml
  inlinecrypt serve --control demo.control --take-over demo.control demo.img
      a new program takes over from the one that serves demo.img with that control socket, which then ends

A config:
  [[engine]]                      # none: one engine \"default\"
  name = \"e0\"
  spec = \"software:slots=8\"
  # key_type = \"first\", \"raw\" or \"wrapped\", for engines that serve one type only
  # policy = \"fair\", or \"upstream\" as in Linux; program_share = 10, the percentage of time for programming keys
  root = \"root.key\"               # or tpm2:..., passphrase:..., pkcs11:...; paths are relative to the config
  # passphrase_file = \"root.pass\", for a root that asks for a passphrase or PIN
  # process = \"own\", \"none\" or \"unix:PATH\"; sandbox = \"report\" or \"require\"; deaths_max = 3: after so many ends of
  # the engine process within a minute no other is started; realtime = true as --engine-realtime does

  [[volume]]
  name = \"db1\"                    # export name; default: the file's, without its extension
  path = \"db1.img\"
  key = \"db1.img.key\"             # or \"raw:FILE\"; default: PATH.key
  engine = \"e0\"                   # default: the first
  # key_id, mode, data_unit, block, iv_offset, iv, offset, length, read_only, fallback, discard, direct
  # dm_table = \"0 2048 crypt aes-xts-plain64 - 0 db1.img 0\" says mode, data unit, IVs, place and length as dm-crypt does
  # plain = true serves it WITHOUT encryption; together with nothing that is about keys, data units or engines
  # size = BYTES refuses a file that has become shorter; `volume create` writes it into the description
  # for LUKS containers: header, passphrase_file, key_file, recover
  # priority = \"low\", \"normal\" or \"high\"; pin = true keeps the key in its keyslot; preprogram = true puts it there
  # at once; spill_after_us = N sends a raw key's requests to software that would wait longer for a keyslot

  [listen]
  nbd = [\"unix:db.sock\"]
  # tls, tls_cert, tls_key, tls_client_ca, tls_verify_client

  [server]
  # control, workers, connections_max, stop_seconds, zero_copy";

/// Serve volumes.
#[derive(Args, Debug)]
#[command(after_help = SERVE_EXAMPLES)]
pub(crate) struct Serve {
    /// Files or block devices to serve
    #[arg(value_name = "VOLUME")]
    pub(crate) volumes: Vec<PathBuf>,
    /// Make the volume first, of SIZE bytes (units k, M, G, T, P, E or KiB, MiB, ... EiB)
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["config", "read_only"])]
    pub(crate) create: Option<Size>,
    /// Key of the volume: FILE for a wrapped key, raw:FILE for a raw one, - for standard input [default: VOLUME.key]
    #[arg(long, value_name = "FILE", value_parser = key_parser())]
    pub(crate) key: Option<KeySource>,
    /// Serve what a line of dm-crypt's or dm-inlinecrypt's table says: START LENGTH crypt CIPHER - IV_OFFSET DEVICE START
    /// [NUMBER OPTION...]. With - for the key, which --key names
    #[arg(long, value_name = "LINE", conflicts_with_all = ["volumes", "config", "create", "dm_table_file"])]
    pub(crate) dm_table: Option<String>,
    /// The same from FILE, or - for standard input, where the line may have its key as dmsetup table --showkeys prints it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["volumes", "config", "create"])]
    pub(crate) dm_table_file: Option<PathBuf>,
    /// Where to listen: unix:PATH or tcp:HOST:PORT; may be repeated [default: unix:VOLUME.sock]
    #[arg(long, value_name = "PLACE", value_parser = parse_core::<Listen>)]
    pub(crate) nbd: Vec<Listen>,
    /// Name of the export [default: the volume's file name without its extension]
    #[arg(long, value_name = "EXPORT")]
    pub(crate) name: Option<String>,
    /// Take volumes, engines and listeners from FILE (TOML)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) isolation: IsolationArgs,
    /// Let the engine process work at the lowest real-time priority, before everybody without one. Where we measured it gained
    /// nothing, and made the server slower where other programs keep the CPUs busy: measure before you use it
    /// (docs/performance.md). Not served if that is not permitted: it takes CAP_SYS_NICE, or LimitRTPRIO=1 in a systemd unit
    /// (ulimit -r 1)
    #[arg(long, help_heading = "Engine")]
    pub(crate) engine_realtime: bool,
    /// Compare what hardware does with software: all requests, or one in N (sample=N). The first difference stops the
    /// engine; `inlinecrypt status` tells which keyslot and data unit it was
    #[arg(long, value_name = "SHARE", value_parser = parse_core::<Sample>)]
    pub(crate) verify: Option<Sample>,
    /// Whether software may serve a raw key instead of the engine: never, if the engine cannot, or always [default:
    /// off]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub(crate) fallback: Option<FallbackArg>,
    /// How urgent its requests are when keyslots are scarce [default: normal]
    #[arg(long, value_name = "HOW", value_enum)]
    pub(crate) priority: Option<PriorityArg>,
    /// Keep its key in a keyslot, whoever else wants one
    #[arg(long)]
    pub(crate) pin: bool,
    /// Whether trim gives storage back; whoever sees the file learns which parts are unused [default: pass]
    #[arg(long, value_name = "WHAT", value_enum)]
    pub(crate) discard: Option<DiscardArg>,
    /// Serve without encryption, for comparison and for images that are still to be moved in or out: what clients write lies
    /// on the disk as it is. Together with nothing that is about keys, data units or engines
    #[arg(long)]
    pub(crate) plain: bool,
    /// Let nobody write
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Header of the LUKS container, if it is not with the data
    #[arg(long, value_name = "FILE", help_heading = "LUKS", conflicts_with = "create")]
    pub(crate) header: Option<PathBuf>,
    /// Open LUKS containers with the content of FILE, every byte of it, as cryptsetup's --key-file does
    #[arg(long, value_name = "FILE", help_heading = "LUKS", conflicts_with_all = ["passphrase_file", "passphrase_fd"])]
    pub(crate) key_file: Option<PathBuf>,
    /// Open the LUKS container by a passphrase, though there is a wrapped key in its header
    #[arg(long, help_heading = "LUKS", conflicts_with = "create")]
    pub(crate) recover: bool,
    /// Bypass the page cache (O_DIRECT)
    #[arg(long)]
    pub(crate) direct: bool,
    /// Let volumes that are half re-encrypted rest as they are; without, the server goes on with it
    #[arg(long)]
    pub(crate) pause_reencryption: bool,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Socket for `inlinecrypt status`, or none [default: PID.sock in $XDG_RUNTIME_DIR/inlinecrypt]
    #[arg(long, value_name = "PATH", help_heading = "Server")]
    pub(crate) control: Option<PathBuf>,
    /// Take over from the running server with this control socket, without a failed request: its listening sockets, its
    /// volumes, which all have to be served here too and by the same keys, and its connections. Connections with TLS are
    /// closed between two requests, and their clients have to connect again. If anything fails, that server goes on
    #[arg(long, value_name = "CONTROL", help_heading = "Server", conflicts_with = "create")]
    pub(crate) take_over: Option<PathBuf>,
    /// Most threads for each connection besides its own; they may pay where the disk waits for a medium. With --direct, short
    /// reads and writes that come together wait together without them, through io_uring, but for durable ones (FUA) [default: 0;
    /// with --direct and io_uring, 4]
    #[arg(long, value_name = "N", help_heading = "Server", value_parser = parse_workers)]
    pub(crate) workers: Option<usize>,
    /// Lend clients on Unix sockets what they read, which saves a copy (from Linux 6.5). Not where a proxy stands between that
    /// splices from its socket, as systemd-socket-proxyd and programs written in Go do: it could send on what that memory is
    /// used for next
    #[arg(long, help_heading = "Server")]
    pub(crate) zero_copy: bool,
}

/// Certificates.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsArgs {
    /// Whether clients must or may use TLS [default: required with --tls-cert, else off]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub(crate) tls: Option<TlsArg>,
    /// Our certificate and those that sign it, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key, PEM; for its owner alone
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The authority that signs clients' certificates, PEM; asks clients for theirs
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Refuse clients without a certificate
    #[arg(long, requires = "tls_client_ca")]
    pub(crate) tls_verify_client: bool,
}

/// When software serves a raw key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FallbackArg {
    /// Never
    Off,
    /// If the engine cannot
    Allowed,
    /// Always
    Forced,
}

/// What becomes of trim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiscardArg {
    /// It gives storage back
    Pass,
    /// It is not offered
    Off,
}

/// Whether TLS is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TlsArg {
    /// Nothing is served without
    Required,
    /// As clients like
    Allowed,
    /// Never
    Off,
}

/// What is done with volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume: key, description and file
    #[command(after_help = "\
Examples:
  inlinecrypt volume create --size 1GiB demo.img
  inlinecrypt volume create --size 10G --data-unit 512 --key raw:secret.key demo.img")]
    Create(Box<VolumeCreate>),
    /// Show what is known about a volume
    #[command(after_help = "\
Examples:
  inlinecrypt volume info demo.img
  inlinecrypt volume info --json demo.img
  inlinecrypt volume info --dm-table demo.img
      the line with which Linux's dm-crypt opens it, without its key")]
    Info(VolumeInfo),
    /// Get a volume under another key, or into another layout, also while it is served
    ///
    /// If a server of this user serves the volume, the server does the work: clients stay connected and notice nothing but
    /// that requests to the part at hand wait for a moment. This command shows how far it is; ending it (Ctrl-C) leaves
    /// the server at work. If nobody serves it, this command does the work itself; ending it lets the work rest.
    ///
    /// What is not asked for of the layout stays as it is, and --engine and --root are the volume's now.
    ///
    /// At any moment all of it may be killed, or the power go: `serve` and --resume go on from there. Until it is done
    /// both keys are needed. The state lies beside the volume, in VOLUME.reencrypt; in the end VOLUME.toml names the new
    /// key and layout, and the old key's file stays unless --remove-old-key is given.
    ///
    /// A LUKS2 container gets a new volume key, which the same passphrases open, in the same LUKS keyslots: each is asked for,
    /// or given. A LUKS keyslot whose passphrase nobody gives is dropped with --drop-others; without, nothing begins. The state
    /// is in the header, as cryptsetup writes it: cryptsetup reencrypt --resume-only goes on with it, and --resume goes on
    /// with cryptsetup's.
    #[command(
        visible_alias = "convert",
        after_help = "\
Examples:
  inlinecrypt volume reencrypt demo.img
      a new hardware-wrapped key, in demo.img.XXXXXXXX.key
  inlinecrypt volume reencrypt --key raw:new.key --throttle 50MiB demo.img
  inlinecrypt volume convert --data-unit 512 --mode Adiantum demo.img
      another layout, with a new key
  inlinecrypt volume reencrypt --passphrase-file pass disk.luks
      a LUKS2 container
  inlinecrypt volume reencrypt --passphrase-file pass --other-passphrase-file second disk.luks
      one with two passphrases, which both keep their LUKS keyslots
  inlinecrypt volume reencrypt --passphrase-file pass --drop-others disk.luks
      one whose other passphrases shall not open it any more
  inlinecrypt volume reencrypt --pause demo.img
  inlinecrypt volume reencrypt --resume --progress-json demo.img"
    )]
    Reencrypt(Box<VolumeReencrypt>),
}

/// Get a volume under another key.
#[derive(Args, Debug)]
pub(crate) struct VolumeReencrypt {
    /// A file or block device with a description, or a LUKS2 container
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: PathBuf,
    /// Its new key: FILE for a wrapped key, raw:FILE for a raw one [default: a new one in VOLUME.XXXXXXXX.key]
    #[arg(long, value_name = "FILE", value_parser = key_parser())]
    pub(crate) key: Option<KeySource>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// Key file of a LUKS container: every byte of FILE (- for standard input) counts, as in cryptsetup's --key-file; not while the
    /// container is served
    #[arg(long, value_name = "FILE", conflicts_with_all = ["passphrase_file", "passphrase_fd"], help_heading = "Engine")]
    pub(crate) key_file: Option<PathBuf>,
    /// Header of the LUKS container, if it is not with the data; where a server serves it, that knows
    #[arg(long, value_name = "FILE", help_heading = "LUKS")]
    pub(crate) header: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) others: luks::OtherArgs,
    /// Engine for the new key, if another; not while the volume is served
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<EngineSpec>, help_heading = "Engine")]
    pub(crate) new_engine: Option<EngineSpec>,
    /// Root of the new key, if another; not while the volume is served
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<RootSpec>, help_heading = "Engine")]
    pub(crate) new_root: Option<RootSpec>,
    /// Read the new root's passphrase from this file, if it has another than the present one; also with --resume
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
    /// Most bytes in a second, as a size [default: as many as there are]
    #[arg(long, help_heading = "Re-encryption", value_name = "SIZE")]
    pub(crate) throttle: Option<Size>,
    /// How much is re-encrypted at once: a multiple of 256 KiB up to 64 MiB. Clients that come to that part wait for it
    /// [default: 1MiB]
    #[arg(long, help_heading = "Re-encryption", value_name = "SIZE", value_parser = parse_zone)]
    pub(crate) zone: Option<u64>,
    /// Leave zones without storage as they are. They were never written or were trimmed; what is read there is noise, and
    /// changes to another
    #[arg(long, help_heading = "Re-encryption")]
    pub(crate) keep_holes: bool,
    /// Remove the file of the old key once nothing is under it any more
    #[arg(long, help_heading = "Re-encryption")]
    pub(crate) remove_old_key: bool,
    /// Go on with what was interrupted or paused; with --throttle, at that rate
    #[arg(long, help_heading = "Re-encryption", conflicts_with_all = ["key", "mode", "data_unit", "block", "iv_offset",
        "new_engine", "new_root", "zone", "keep_holes", "remove_old_key", "other_passphrase_file", "other_passphrase_fd",
        "other_key_file", "drop_others"])]
    pub(crate) resume: bool,
    /// Let the server rest after the part at hand
    #[arg(long, help_heading = "Re-encryption", conflicts_with_all = ["resume", "offline", "key", "mode", "data_unit",
        "block", "iv_offset", "zone", "throttle", "other_passphrase_file", "other_passphrase_fd", "other_key_file",
        "drop_others"])]
    pub(crate) pause: bool,
    /// Do not ask any server
    #[arg(long, help_heading = "Re-encryption", conflicts_with = "control")]
    pub(crate) offline: bool,
    /// Control socket of the server that serves the volume [default: looked for among those of this user]
    #[arg(long, help_heading = "Re-encryption", value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Do not wait for the server to finish
    #[arg(long, help_heading = "Re-encryption", conflicts_with = "offline")]
    pub(crate) detach: bool,
    /// Show progress as JSON, a line each half second, with the keys and units of `cryptsetup --progress-json`
    #[arg(long, help_heading = "Re-encryption")]
    pub(crate) progress_json: bool,
}

/// Make a volume.
#[derive(Args, Debug)]
pub(crate) struct VolumeCreate {
    /// The file to make
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: PathBuf,
    /// Its size in bytes (units k, M, G, T, P, E or KiB, MiB, ... EiB): a multiple of the data unit
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Size,
    /// Its key: FILE for a wrapped key, raw:FILE for a raw one, - for standard input [default: a new one in VOLUME.key]
    #[arg(long, value_name = "FILE", value_parser = key_parser())]
    pub(crate) key: Option<KeySource>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// Show what is known about a volume.
#[derive(Args, Debug)]
pub(crate) struct VolumeInfo {
    /// A file or block device
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: PathBuf,
    /// Header of the LUKS container, if it is not with the data
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
    /// As JSON
    #[arg(long, conflicts_with = "dm_table")]
    pub(crate) json: bool,
    /// Print the line of a table with which Linux's dm-crypt opens the volume, with - for its key
    #[arg(long)]
    pub(crate) dm_table: bool,
    /// With --dm-table: print the key, too, if it is a raw one
    #[arg(long, requires = "dm_table")]
    pub(crate) show_key: bool,
}

/// The key ladder.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a new key that nobody outside the engine ever sees, wrapped for storage
    #[command(after_help = "\
Examples:
  inlinecrypt key generate --out volume.key
  inlinecrypt key generate --root /etc/inlinecrypt/root.key > volume.key
  inlinecrypt key generate --device /dev/sda --out disk.key
      by the hardware of a disk, through the kernel")]
    Generate(KeyGenerate),
    /// Wrap a raw key of 32 bytes for storage
    #[command(after_help = "\
Examples:
  inlinecrypt key import --in raw.key --out volume.key
  head -c 32 /dev/urandom | inlinecrypt key import > volume.key
  inlinecrypt key import --device /dev/sda --in raw.key --out disk.key")]
    Import(KeyTransform),
    /// Turn a stored key into one for this start of an engine
    ///
    /// What comes out is of use only to the engine that made it, until it stops. The software engine stops with this
    /// command, so with it this shows that a key can be prepared, and what the result looks like. With --device, it is what
    /// the kernel takes for this boot: fscrypt, dm-inlinecrypt.
    #[command(after_help = "\
Examples:
  inlinecrypt key prepare --in volume.key --out volume.ephemeral
  inlinecrypt key prepare --device /dev/sda --in disk.key --out disk.ephemeral")]
    Prepare(KeyTransform),
    /// Show what a wrapped key says about itself, and whether the root opens it
    #[command(after_help = "\
Examples:
  inlinecrypt key info volume.key
  inlinecrypt key info --json < volume.key")]
    Info(KeyInfo),
}

/// Make a new key.
#[derive(Args, Debug)]
pub(crate) struct KeyGenerate {
    /// New file for the wrapped key [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Ask the hardware of this block device, through the kernel, and no engine of ours
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["engine", "root", "passphrase_file", "passphrase_fd", "key_type"])]
    pub(crate) device: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// From one form of a key to the next.
#[derive(Args, Debug)]
pub(crate) struct KeyTransform {
    /// File of the key to start from [default: standard input]
    #[arg(long, value_name = "FILE")]
    pub(crate) r#in: Option<PathBuf>,
    /// New file for the result [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Ask the hardware of this block device, through the kernel, and no engine of ours
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["engine", "root", "passphrase_file", "passphrase_fd", "key_type"])]
    pub(crate) device: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// Show a wrapped key.
#[derive(Args, Debug)]
pub(crate) struct KeyInfo {
    /// File of the wrapped key [default: standard input]
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

fn root_help() -> String {
    format!("How the root is kept. One of:\n{}", RootSpec::HELP)
}

/// What is done with roots.
#[derive(Debug, Subcommand)]
pub(crate) enum RootCommand {
    /// Make a new root
    ///
    /// With pkcs11, a key that is missing on the token is made there: AES-256, and it never leaves the token.
    #[command(after_help = "\
Examples:
  inlinecrypt root create /etc/inlinecrypt/root.key
  inlinecrypt root create passphrase:root.pass
  inlinecrypt root create tpm2:root.tpm,pcrs=sha256:7,pin
  inlinecrypt root create pkcs11:token=vault;object=root?module-path=/usr/lib/softhsm/libsofthsm2.so&file=root.token

In a shell, write quotes around a URI: the characters ; ? and & mean something to it.")]
    Create(RootCreate),
    /// Show what a root says about itself, without opening it
    #[command(after_help = "\
Examples:
  inlinecrypt root info
  inlinecrypt root info --json tpm2:root.tpm")]
    Info(RootInfoArgs),
    /// Let another keep a root: the same root, so volumes and wrapped keys stay as they are
    ///
    /// The file of --to is new, or that of --from; then it is replaced when the new one is on the disk, and not before.
    #[command(after_help = "\
Examples:
  inlinecrypt root rewrap --to tpm2:root.tpm
      the usual root, by the TPM; the usual file stays and is a copy
  inlinecrypt root rewrap --from passphrase:root.pass --to passphrase:root.pass
      another passphrase
  inlinecrypt root rewrap --from passphrase:root.pass --to tpm2:new.tpm,pcrs=sha256:7
      after the registers have changed for good, from a copy that a passphrase opens")]
    Rewrap(RootRewrap),
}

/// Make a root.
#[derive(Args, Debug)]
pub(crate) struct RootCreate {
    #[arg(value_name = "SPEC", value_parser = parse_core::<RootSpec>, help = root_help())]
    pub(crate) root: RootSpec,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
}

/// Show a root.
#[derive(Args, Debug)]
pub(crate) struct RootInfoArgs {
    /// The root [default: the usual one]
    #[arg(value_name = "SPEC", value_parser = parse_core::<RootSpec>)]
    pub(crate) root: Option<RootSpec>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Wrap a root anew.
#[derive(Args, Debug)]
pub(crate) struct RootRewrap {
    /// The root as it is kept now [default: the usual one]
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<RootSpec>)]
    pub(crate) from: Option<RootSpec>,
    #[arg(long, value_name = "SPEC", value_parser = parse_core::<RootSpec>, help = root_help())]
    pub(crate) to: RootSpec,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
    /// Like --passphrase-file, for --to
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_fd")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
    /// Like --passphrase-fd, for --to
    #[arg(long, value_name = "N")]
    pub(crate) new_passphrase_fd: Option<u32>,
}

/// What is done with engines.
#[derive(Debug, Subcommand)]
pub(crate) enum EngineCommand {
    /// Show what an engine can do, as sysfs shows it for hardware
    #[command(after_help = "\
Examples:
  inlinecrypt engine info
  inlinecrypt engine info --engine software:slots=4 --json")]
    Info(EngineInfo),
    /// Reset the engines of a running server: their keyslots are lost and programmed again
    #[command(after_help = "\
Examples:
  inlinecrypt engine reset --control /run/inlinecrypt/db.sock")]
    Reset(EngineReset),
    /// Run engine processes for servers that ask for them, until SIGTERM or SIGINT
    ///
    /// Each server that connects (serve --engine-process unix:PATH) gets an engine process of its own, locked up like one
    /// that it would start itself, with nothing of other servers' in it. Only this user and root may connect.
    ///
    /// The first signal lets no more servers in, and the service ends with the last of its engine processes, which end when
    /// their servers do. The second signal ends it at once, and with it all engine processes: requests of servers that
    /// still run are answered with EIO then.
    #[command(after_help = "\
Examples:
  inlinecrypt engine serve --listen unix:/run/inlinecrypt/engine.sock
  inlinecrypt engine serve --listen unix:/run/inlinecrypt/engine.sock --realtime
  inlinecrypt serve --engine-process unix:/run/inlinecrypt/engine.sock demo.img
      a server that uses it")]
    Serve(EngineServe),
}

/// Run engine processes.
#[derive(Args, Debug)]
pub(crate) struct EngineServe {
    /// Where servers connect: unix:PATH
    #[arg(long, value_name = "PLACE", value_parser = parse_core::<Listen>)]
    pub(crate) listen: Listen,
    /// Let all engine processes work at the lowest real-time priority, and not only those whose servers ask for it with
    /// --engine-realtime. It takes CAP_SYS_NICE, or LimitRTPRIO=1 in a systemd unit (ulimit -r 1)
    #[arg(long)]
    pub(crate) realtime: bool,
}

/// Reset engines.
#[derive(Args, Debug)]
pub(crate) struct EngineReset {
    /// Control socket of the server
    #[arg(long, value_name = "PATH")]
    pub(crate) control: PathBuf,
    /// The engine [default: all of the server]
    #[arg(value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
}

/// Show an engine.
#[derive(Args, Debug)]
pub(crate) struct EngineInfo {
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what running servers do.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  inlinecrypt status
  inlinecrypt status --json --control /run/inlinecrypt/db.sock")]
pub(crate) struct Status {
    /// Control socket of one server [default: all servers of this user]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Check a config.
#[derive(Args, Debug)]
#[command(after_help = "\
Not looked at, since it changes by the moment or shows only when the file is opened for writing:
  whether a volume, a socket or a port is in use; whether this host has an address to listen on;
  whether the length of a file and the data units fit O_DIRECT (direct = true)
Whether real-time priority (realtime = true) is permitted to who runs this is a note: the server may be another's.

Examples:
  inlinecrypt check servers.toml")]
pub(crate) struct Check {
    /// A config or a volume's description (TOML)
    #[arg(value_name = "CONFIG")]
    pub(crate) config: PathBuf,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
}

/// Look at hardware.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  inlinecrypt probe
  inlinecrypt probe --json
  inlinecrypt probe --sysfs board/sys --kernel-config board/config
      another machine's, copied here")]
pub(crate) struct Probe {
    /// Look at devices in DIR, a sysfs or a copy of one [default: /sys]
    #[arg(long, value_name = "DIR")]
    pub(crate) sysfs: Option<PathBuf>,
    /// Look at the kernel in DIR, a procfs or a copy of one [default: /proc; none with --sysfs]
    #[arg(long, value_name = "DIR")]
    pub(crate) proc: Option<PathBuf>,
    /// The kernel's configuration, gzipped or not [default: /proc/config.gz, else where distributions put it; none with
    /// --sysfs]
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel_config: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Print completions.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  inlinecrypt completions bash > ~/.local/share/bash-completion/completions/inlinecrypt")]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Write the manual pages.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  inlinecrypt man ~/.local/share/man/man1
  inlinecrypt man | man -l -")]
pub(crate) struct Man {
    /// Directory for all pages [default: the first page alone, to standard output]
    #[arg(value_name = "DIR")]
    pub(crate) directory: Option<PathBuf>,
}

fn key_parser() -> impl clap::builder::TypedValueParser<Value = KeySource> {
    OsStringValueParser::new().try_map(|text| KeySource::parse(&text, Path::new("")))
}

/// What the crates below parse. Their errors begin with what was being done, which is plain here.
fn parse_core<T: FromStr<Err = inlinecrypt_core::error::Error>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: inlinecrypt_core::error::Error| {
        let text = error.to_string();
        text.strip_prefix("open: invalid argument: ").map(str::to_owned).unwrap_or(text)
    })
}

pub(crate) fn parse_mode(text: &str) -> Result<Mode, String> {
    Mode::from_name(text).ok_or_else(|| {
        let known: Vec<&str> = Mode::ALL.iter().map(|mode| mode.info().name).collect();
        format!("no mode {text:?}; the modes are: {}", known.join(", "))
    })
}

fn parse_data_unit(text: &str) -> Result<DataUnitSize, String> {
    data_unit(text.parse::<Size>()?.0)
}

/// A data unit size that volumes may have.
pub(crate) fn data_unit(bytes: u64) -> Result<DataUnitSize, String> {
    u32::try_from(bytes)
        .ok()
        .and_then(DataUnitSize::from_bytes)
        .filter(|size| (DataUnitSize::MIN_SERVED..=DataUnitSize::MAX_SERVED).contains(size))
        .ok_or_else(|| format!("{bytes} bytes are no data unit: it is a power of two from 512 to 65536"))
}

pub(crate) fn parse_iv(text: &str) -> Result<IvLayout, String> {
    IvLayout::from_name(text).ok_or_else(|| {
        let known = IvLayout::ALL.map(IvLayout::name);
        format!("no IV layout {text:?}; there are: {}", known.join(", "))
    })
}

fn parse_offset(text: &str) -> Result<u64, String> {
    offset(text.parse::<Size>()?.0)
}

/// Where a volume may begin.
pub(crate) fn offset(bytes: u64) -> Result<u64, String> {
    if bytes.is_multiple_of(SECTOR_BYTES.into()) {
        Ok(bytes)
    } else {
        Err(format!("{bytes} bytes are not a multiple of {SECTOR_BYTES}"))
    }
}

fn parse_block(text: &str) -> Result<u32, String> {
    let bytes = text.parse::<Size>()?.0;
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| bytes.is_power_of_two() && (512..=65_536).contains(bytes))
        .ok_or_else(|| format!("{bytes} bytes are no logical block: it is a power of two from 512 to 65536"))
}

/// A sector size of LUKS2.
pub(crate) fn parse_sector(text: &str) -> Result<u32, String> {
    match text.parse::<Size>()?.0 {
        bytes @ (512 | 1024 | 2048 | 4096) => Ok(u32::try_from(bytes).expect("at most 4096")),
        other => Err(format!("{other} bytes are no sector size: it is 512, 1024, 2048 or 4096")),
    }
}

fn parse_zone(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<Size>()?.0;
    let fits = (1..=ZONE_BYTES_MAX).contains(&bytes) && bytes % CHUNK_BYTES as u64 == 0;
    if fits {
        Ok(bytes)
    } else {
        Err(format!("{bytes} bytes are no zone: it is a multiple of 256 KiB up to 64 MiB"))
    }
}

fn parse_bench_size(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<Size>()?.0;
    let fits = (16 << 20..=1 << 44).contains(&bytes) && bytes.is_multiple_of(1 << 20);
    if fits {
        Ok(bytes)
    } else {
        Err(format!("{bytes} bytes: it is a multiple of 1 MiB from 16 MiB to 16 TiB"))
    }
}

fn parse_bench_time(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.01..=60.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "a number of seconds from 0.01 to 60".to_owned())
}

fn parse_workers(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&workers| workers <= WORKERS_MAX)
        .ok_or_else(|| format!("a number from 0 to {WORKERS_MAX}"))
}

/// More threads for one connection only wait for each other.
pub(crate) const WORKERS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Command, CommandFactory as _};

    fn for_each(command: &Command, path: &str, visit: &mut dyn FnMut(&Command, &str)) {
        visit(command, path);
        for inner in command.get_subcommands() {
            for_each(inner, &format!("{path} {}", inner.get_name()), visit);
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// Whoever copies an example gets what it says.
    #[test]
    fn every_example_in_the_help_parses() {
        let mut examples = 0;
        for_each(&Cli::command(), "", &mut |command, path| {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                help.contains("Examples:") || command.has_subcommands() || path.contains("help"),
                "{path} has no examples"
            );
            for line in help.lines().filter_map(|line| line.strip_prefix("  inlinecrypt ")) {
                // Comments stand behind several blanks; redirections are the shell's.
                let line = line.split("   ").next().unwrap_or_default();
                let line = line.split(['<', '>', '|']).next().unwrap_or_default();
                let words = std::iter::once("inlinecrypt").chain(line.split_whitespace());
                if let Err(error) = Cli::try_parse_from(words) {
                    panic!("{path}: {line}: {error}");
                }
                examples += 1;
            }
        });
        assert!(examples >= 20, "only {examples} examples were found");
    }

    #[test]
    fn the_config_in_the_help_is_one() {
        let (_, config) = SERVE_EXAMPLES.split_once("A config:\n").expect("it is there");
        let text = config
            .replace("# key_id, mode,", "")
            .replace("# dm_table", "# # dm_table")
            .replace("# tls,", "")
            .replace("# control,", "");
        let text: String = text
            .lines()
            .filter(|line| line.contains(['[', '=']) && !line.trim_start().starts_with('#'))
            .map(|line| format!("{line}\n"))
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        std::fs::write(&path, &text).unwrap();
        let file =
            crate::config::ConfigFile::read(&path).unwrap_or_else(|failures| panic!("{failures:?}\n{text}"));
        assert_eq!(file.config.volume.len(), 1);
        assert_eq!(file.config.engine.len(), 1);
        assert_eq!(file.config.listen.nbd.as_deref(), Some(&["unix:db.sock".to_owned()][..]));
    }

    #[test]
    fn usage_says_units_and_exit_codes() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains(EXIT_CODES));
    }
}
