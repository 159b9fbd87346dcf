//! What can be written behind `inlinecrypt luks`.

use crate::cli::{EngineArgs, PassphraseArgs, parse_mode, parse_sector};
use crate::size::Size;
use clap::{Args, Subcommand, ValueEnum};
use inlinecrypt_core::config::Mode;
use std::path::PathBuf;

/// What is done with LUKS containers.
#[derive(Debug, Subcommand)]
pub(crate) enum LuksCommand {
    /// Make a LUKS2 container
    ///
    /// A new file, or with --header a new header for data that lies elsewhere. Its key is opened by a passphrase; or it is
    /// hardware-wrapped (--wrapped, --import), and lies in the header.
    #[command(after_help = "\
Examples:
  inlinecrypt luks create --size 1GiB disk.luks
      asks for a passphrase; cryptsetup opens it, too
  inlinecrypt luks create --size 1GiB --passphrase-file pass --label backup disk.luks
  inlinecrypt luks create --size 1GiB --wrapped disk.luks
      the key is made in the engine, and nobody else ever has it
  inlinecrypt luks create --size 1GiB --import master.bin --recovery disk.luks
      a key of your own, wrapped; and a passphrase that opens the same data with cryptsetup, should the root be lost")]
    Create(Box<LuksCreate>),
    /// Add a passphrase
    #[command(after_help = "\
Examples:
  inlinecrypt luks add-key disk.luks
  inlinecrypt luks add-key --passphrase-file pass --new-passphrase-file second disk.luks")]
    AddKey(LuksAddKey),
    /// Replace a passphrase by another
    #[command(after_help = "\
Examples:
  inlinecrypt luks change-key disk.luks
  inlinecrypt luks change-key --passphrase-file pass --new-passphrase-file next disk.luks")]
    ChangeKey(LuksChangeKey),
    /// Remove a passphrase, by itself or by the number of its LUKS keyslot
    #[command(after_help = "\
Examples:
  inlinecrypt luks remove-key --slot 1 disk.luks
  inlinecrypt luks remove-key --passphrase-file second disk.luks")]
    RemoveKey(LuksRemoveKey),
    /// Whether a passphrase opens it, and which LUKS keyslot that is
    #[command(after_help = "\
Examples:
  inlinecrypt luks test disk.luks
  inlinecrypt luks test --passphrase-file pass disk.luks")]
    Test(LuksTest),
    /// Show the header
    #[command(after_help = "\
Examples:
  inlinecrypt luks dump disk.luks
  inlinecrypt luks dump --json disk.luks")]
    Dump(LuksDump),
    /// Copy the header into a file
    ///
    /// Whoever has the copy and a passphrase of its time opens the data, also after that passphrase was removed.
    #[command(after_help = "\
Examples:
  inlinecrypt luks header-backup --out disk.header disk.luks")]
    HeaderBackup(LuksBackup),
    /// Put a copy of the header back
    #[command(after_help = "\
Examples:
  inlinecrypt luks header-restore --in disk.header disk.luks")]
    HeaderRestore(LuksRestore),
    /// Make both copies of a damaged header the same again, from the one that is whole
    #[command(after_help = "\
Examples:
  inlinecrypt luks repair disk.luks")]
    Repair(LuksRepair),
    /// Remove all passphrases and the wrapped key: without a backup of the header the data is gone
    #[command(after_help = "\
Examples:
  inlinecrypt luks erase --force disk.luks")]
    Erase(LuksErase),
    /// Make the data longer or shorter
    #[command(after_help = "\
Examples:
  inlinecrypt luks resize --size 2GiB disk.luks
  inlinecrypt luks resize --size 512MiB --shrink disk.luks
      after the filesystem in it has been made smaller")]
    Resize(LuksResize),
}

/// Key files, as cryptsetup has them.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OpenArgs {
    #[command(flatten)]
    pub(crate) passphrase: PassphraseArgs,
    /// The same, and every byte of FILE (- for standard input) counts, as in cryptsetup's --key-file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["passphrase_file", "passphrase_fd"])]
    pub(crate) key_file: Option<PathBuf>,
}

/// Where a new passphrase comes from.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NewArgs {
    /// Like --passphrase-file, for the new one [default: asked for at the terminal]
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_fd")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
    /// Like --passphrase-fd, for the new one
    #[arg(long, value_name = "N")]
    pub(crate) new_passphrase_fd: Option<u32>,
    /// Like --key-file, for the new one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["new_passphrase_file", "new_passphrase_fd"])]
    pub(crate) new_key_file: Option<PathBuf>,
}

/// Passphrases of the other LUKS keyslots of a container that is re-encrypted.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OtherArgs {
    /// Passphrase of another LUKS keyslot, which keeps it: from FILE, for its owner alone; a line feed at the end does not
    /// count. May be repeated [default: each is asked for at the terminal, if the first one is]
    #[arg(long, value_name = "FILE", help_heading = "LUKS")]
    pub(crate) other_passphrase_file: Vec<PathBuf>,
    /// The same from the open descriptor N
    #[arg(long, value_name = "N", help_heading = "LUKS")]
    pub(crate) other_passphrase_fd: Vec<u32>,
    /// The same from FILE, of which every byte counts, as in cryptsetup's --key-file
    #[arg(long, value_name = "FILE", help_heading = "LUKS")]
    pub(crate) other_key_file: Vec<PathBuf>,
    /// Drop the LUKS keyslots that none of the passphrases opens: they go with the old key
    #[arg(long, help_heading = "LUKS")]
    pub(crate) drop_others: bool,
}

/// What a passphrase costs to try. Named as cryptsetup names them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cost of the passphrase")]
pub(crate) struct KdfArgs {
    /// Key derivation
    #[arg(long, value_name = "NAME", value_enum, default_value_t = KdfArg::Argon2id)]
    pub(crate) pbkdf: KdfArg,
    /// Hash of pbkdf2
    #[arg(long, value_name = "HASH", default_value = "sha256")]
    pub(crate) hash: String,
    /// How long it shall take on this machine, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(crate) iter_time: u64,
    /// Most memory for argon2, in KiB [default: 1 GiB, or half of what is free]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(32..=4_194_304))]
    pub(crate) pbkdf_memory: Option<u32>,
    /// Lanes of argon2 [default: as many as there are CPUs, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4))]
    pub(crate) pbkdf_parallel: Option<u32>,
    /// Iterations of pbkdf2 or passes of argon2, instead of measuring
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pbkdf_force_iterations: Option<u32>,
}

/// Which key derivation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KdfArg {
    /// Argon2id: needs memory
    Argon2id,
    /// Argon2i: the same for those that have no other
    Argon2i,
    /// PBKDF2: for boot loaders, and where memory is scarce
    Pbkdf2,
}

/// Make a container.
#[derive(Args, Debug)]
pub(crate) struct LuksCreate {
    /// The file to make; with --header the data, made if it does not exist
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// Size of the data in bytes (units k, M, G, T, P, E or KiB, MiB, ... EiB): a multiple of the sector size
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
    /// Put the header into this new file, and nothing before the data
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
    /// Crypto mode: AES-256-XTS, AES-128-XTS, AES-128-CBC-ESSIV, Adiantum or SM4-XTS
    #[arg(long, value_name = "MODE", value_parser = parse_mode, default_value = "AES-256-XTS")]
    pub(crate) mode: Mode,
    /// Sector size in bytes: 512, 1024, 2048 or 4096
    #[arg(long, value_name = "BYTES", value_parser = parse_sector, default_value = "4096")]
    pub(crate) sector_size: u32,
    /// Room for the header: where the data begins
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    pub(crate) header_size: Size,
    /// Name for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) label: String,
    /// Another
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) subsystem: String,
    /// UUID [default: a random one]
    #[arg(long, value_name = "UUID")]
    pub(crate) uuid: Option<String>,
    /// Key file of the passphrase: every byte of FILE (- for standard input) counts, as in cryptsetup's --key-file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["passphrase_file", "passphrase_fd", "wrapped", "import"])]
    pub(crate) key_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) kdf: KdfArgs,
    /// Have the engine make the key, wrapped; no passphrase opens it
    #[arg(long, help_heading = "Wrapped key", conflicts_with = "import")]
    pub(crate) wrapped: bool,
    /// Wrap a raw key of 32 bytes from FILE (- for standard input), from which the data's is derived
    #[arg(long, value_name = "FILE", help_heading = "Wrapped key")]
    pub(crate) import: Option<PathBuf>,
    /// Ask for a passphrase that opens the same data without engine and root, also with cryptsetup
    #[arg(long, help_heading = "Wrapped key", requires = "import")]
    pub(crate) recovery: bool,
    /// Read that passphrase from FILE, for its owner alone; a line feed at the end does not count
    #[arg(long, value_name = "FILE", help_heading = "Wrapped key", requires = "import")]
    pub(crate) recovery_passphrase_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// Add a passphrase.
#[derive(Args, Debug)]
pub(crate) struct LuksAddKey {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// LUKS keyslot for it [default: the first that is free]
    #[arg(long, value_name = "N")]
    pub(crate) slot: Option<u32>,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    #[command(flatten)]
    pub(crate) new: NewArgs,
    #[command(flatten)]
    pub(crate) kdf: KdfArgs,
}

/// Replace a passphrase.
#[derive(Args, Debug)]
pub(crate) struct LuksChangeKey {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// LUKS keyslot to change [default: the one that the passphrase opens]
    #[arg(long, value_name = "N")]
    pub(crate) slot: Option<u32>,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    #[command(flatten)]
    pub(crate) new: NewArgs,
    #[command(flatten)]
    pub(crate) kdf: KdfArgs,
}

/// Remove a passphrase.
#[derive(Args, Debug)]
pub(crate) struct LuksRemoveKey {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// LUKS keyslot to remove, without its passphrase [default: the one that the passphrase opens]
    #[arg(long, value_name = "N")]
    pub(crate) slot: Option<u32>,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// Also if it is the last one, after which nothing opens the data
    #[arg(long)]
    pub(crate) force: bool,
}

/// Try a passphrase.
#[derive(Args, Debug)]
pub(crate) struct LuksTest {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// LUKS keyslot to try [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) slot: Option<u32>,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Show the header.
#[derive(Args, Debug)]
pub(crate) struct LuksDump {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Copy the header.
#[derive(Args, Debug)]
pub(crate) struct LuksBackup {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// New file for the copy
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

/// Put a header back.
#[derive(Args, Debug)]
pub(crate) struct LuksRestore {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// The copy
    #[arg(long, value_name = "FILE")]
    pub(crate) r#in: PathBuf,
    /// Also where no header tells that the copy belongs there, or one tells that it does not
    #[arg(long)]
    pub(crate) force: bool,
}

/// Repair the header.
#[derive(Args, Debug)]
pub(crate) struct LuksRepair {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
}

/// Erase the keys.
#[derive(Args, Debug)]
pub(crate) struct LuksErase {
    /// The container, or its header
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// Do it: without, it is only said what would be lost
    #[arg(long)]
    pub(crate) force: bool,
}

/// Make the data longer or shorter.
#[derive(Args, Debug)]
pub(crate) struct LuksResize {
    /// The container; with --header its data
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: PathBuf,
    /// Its header, if it is not with the data
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
    /// New size of the data in bytes: a multiple of the sector size
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Size,
    /// Allow it to become shorter: what lies behind the new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,
}
