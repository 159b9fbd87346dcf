//! `fscrypt`: its part of the command line.

use super::{EngineArgs, IsolationArgs};
use crate::keyfile::KeySource;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Subcommand};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// What is done with encrypted files on an ext4 image.
#[derive(Debug, Subcommand)]
pub(crate) enum FscryptCommand {
    /// List a directory, its names decrypted
    ///
    /// Names whose key was not given are shown as Linux shows them without it, and can be used in paths.
    #[command(after_help = "\
Examples:
  inlinecrypt fscrypt ls disk.img --key raw:master.key
  inlinecrypt fscrypt ls -lR disk.img home/user --key raw:master.key
  inlinecrypt fscrypt ls disk.img
      without a key")]
    Ls(FscryptLs),
    /// Write the contents of a file to standard output, decrypted
    #[command(after_help = "\
Examples:
  inlinecrypt fscrypt cat disk.img home/user/notes.txt --key raw:master.key
  inlinecrypt fscrypt cat /dev/sdx1 data/key.pem --key wrapped.key --root root.key > key.pem
      a hardware-wrapped key; contents are decrypted by the engine")]
    Cat(FscryptCat),
    /// Check that what is on the disk is exactly what policies and keys say
    ///
    /// Contexts, names, links, padding, metadata's checksums, and whether the bytes can be ciphertext at all. Encryption of
    /// files authenticates nothing: that each byte is right, only the plaintext tells, with --against. docs/fscrypt.md lists
    /// what is checked and what cannot be.
    ///
    /// All problems are printed, one a line. The exit code is 4 if there are any, 2 if a key is missing or wrong, else 0.
    #[command(after_help = "\
Examples:
  inlinecrypt fscrypt verify disk.img --key raw:master.key
  inlinecrypt fscrypt verify disk.img --key raw:master.key --against /mnt/plaintext --json
  inlinecrypt fscrypt verify disk.img --key 0011223344556677=raw:old.key
      a policy of version 1, by the descriptor with which its key was added")]
    Verify(FscryptVerify),
    /// Show how a file, directory or link is encrypted: policy, nonce, DUNs, and on demand its keys
    #[command(after_help = "\
Examples:
  inlinecrypt fscrypt info disk.img home/user/notes.txt --key raw:master.key
  inlinecrypt fscrypt info disk.img home/user --key raw:master.key --show-keys --json")]
    Info(FscryptInfo),
}

/// An image and keys.
#[derive(Args, Debug)]
pub(crate) struct FscryptImage {
    /// Image or block device with ext4, which nobody has mounted; it is only read
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,
    /// A master key, may be repeated: raw:FILE for a raw one, FILE for a wrapped one, - for standard input; before it
    /// DESCRIPTOR= (16 hexadecimal digits) if a policy of version 1 calls it so and it is not what e4crypt would choose
    #[arg(long = "key", value_name = "KEY", value_parser = key_parser())]
    pub(crate) keys: Vec<FscryptKey>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) isolation: IsolationArgs,
}

/// A master key, and what policies of version 1 call it.
#[derive(Clone, Debug)]
pub(crate) struct FscryptKey {
    pub(crate) descriptor: Option<[u8; 8]>,
    pub(crate) source: KeySource,
}

/// List.
#[derive(Args, Debug)]
pub(crate) struct FscryptLs {
    #[command(flatten)]
    pub(crate) on: FscryptImage,
    /// The directory [default: the root]
    #[arg(value_name = "PATH", default_value = "/", hide_default_value = true)]
    pub(crate) path: OsString,
    /// And all directories in it
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,
    /// With inode, kind, size and derivation of each
    #[arg(short = 'l', long)]
    pub(crate) long: bool,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Read.
#[derive(Args, Debug)]
pub(crate) struct FscryptCat {
    #[command(flatten)]
    pub(crate) on: FscryptImage,
    /// The file
    #[arg(value_name = "PATH")]
    pub(crate) path: OsString,
}

/// Verify.
#[derive(Args, Debug)]
pub(crate) struct FscryptVerify {
    #[command(flatten)]
    pub(crate) on: FscryptImage,
    /// Where to start [default: the root]
    #[arg(value_name = "PATH", default_value = "/", hide_default_value = true)]
    pub(crate) path: OsString,
    /// Encrypt the files below DIR, which are the same tree in plaintext, and compare the bytes
    #[arg(long, value_name = "DIR")]
    pub(crate) against: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show.
#[derive(Args, Debug)]
pub(crate) struct FscryptInfo {
    #[command(flatten)]
    pub(crate) on: FscryptImage,
    /// The file, directory or link
    #[arg(value_name = "PATH")]
    pub(crate) path: OsString,
    /// Show the keys derived for it, too, in hexadecimal: whoever sees them can read it
    #[arg(long)]
    pub(crate) show_keys: bool,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn key_parser() -> impl clap::builder::TypedValueParser<Value = FscryptKey> {
    OsStringValueParser::new().try_map(|text| parse_key(&text))
}

fn parse_key(text: &OsStr) -> Result<FscryptKey, String> {
    let (descriptor, rest) = match text.as_bytes().split_at_checked(16) {
        Some((digits, [b'=', rest @ ..])) => match hex8(digits) {
            Some(descriptor) => (Some(descriptor), OsStr::from_bytes(rest)),
            None => (None, text),
        },
        _ => (None, text),
    };
    Ok(FscryptKey { descriptor, source: KeySource::parse(rest, Path::new(""))? })
}

fn hex8(digits: &[u8]) -> Option<[u8; 8]> {
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let number = u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_before_a_key_is_its_name_and_other_names_are_files() {
        let parse = |text: &str| parse_key(OsStr::new(text)).unwrap();
        assert_eq!(
            parse("0011223344556677=raw:k").descriptor,
            Some([0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77])
        );
        assert_eq!(parse("0011223344556677=raw:k").source.written(), "raw:k");
        assert_eq!(parse("raw:0011223344556677=k").source.written(), "raw:0011223344556677=k");
        assert_eq!(parse("+011223344556677=k").descriptor, None);
        assert_eq!(parse("k").descriptor, None);
        assert!(parse_key(OsStr::new("0011223344556677=")).is_err());
    }
}
