//! The way to a TPM: one command, one answer.

use super::wire::{MESSAGE_BYTES_MAX, Reader};
use crate::fail;
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_engine::root::Tcti;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use zeroize::Zeroizing;

/// How long an answer may take. Making a key takes the slowest TPMs some seconds.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(120);

/// An open way.
pub(super) enum Transport {
    Device(File),
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Transport {
    pub(super) fn open(tcti: &Tcti) -> Result<Self, Error> {
        let opened = match tcti {
            Tcti::Device(path) => File::options().read(true).write(true).open(path).map(Self::Device),
            Tcti::Unix(path) => UnixStream::connect(path).and_then(|stream| {
                stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
                Ok(Self::Unix(stream))
            }),
            Tcti::Tcp { host, port } => TcpStream::connect((&**host, *port)).and_then(|stream| {
                stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }),
        };
        opened.map_err(|why| {
            let (kind, advice) = match why.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => (
                    ErrorKind::NotFound,
                    "look whether there is one (ls /dev/tpm*) and it is switched on in the firmware, or name another \
                     with tcti=",
                ),
                io::ErrorKind::PermissionDenied => {
                    (ErrorKind::Permission, "run as a user who may use it; mostly that is the group tss")
                }
                io::ErrorKind::ResourceBusy => (
                    ErrorKind::Busy,
                    "another program has it; use the device with a resource manager, /dev/tpmrm0",
                ),
                _ => (ErrorKind::EngineFailed, "check that it works, and the name"),
            };
            fail(kind, format!("no TPM at {tcti}: {}; {advice}", plain(&why)))
        })
    }

    /// Sends a command and receives its answer.
    pub(super) fn exchange(&mut self, command: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let done = match self {
            Self::Device(device) => through_device(device, command),
            Self::Unix(stream) => through_stream(stream, command),
            Self::Tcp(stream) => through_stream(stream, command),
        };
        done.map_err(|why| {
            fail(
                ErrorKind::EngineFailed,
                format!("the TPM does not answer: {}; check that it works", plain(&why)),
            )
        })
    }
}

/// Without the number, which says nothing more.
fn plain(why: &impl Display) -> String {
    let text = why.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// The kernel takes a command in one write, and gives the answer in one read.
fn through_device(device: &mut File, command: &[u8]) -> io::Result<Zeroizing<Vec<u8>>> {
    device.write_all(command)?;
    let mut answer = Zeroizing::new(vec![0; MESSAGE_BYTES_MAX]);
    let len = device.read(&mut answer)?;
    answer.truncate(len);
    Ok(answer)
}

fn through_stream(stream: &mut (impl Read + Write), command: &[u8]) -> io::Result<Zeroizing<Vec<u8>>> {
    stream.write_all(command)?;
    let mut answer = Zeroizing::new(vec![0; MESSAGE_BYTES_MAX]);
    stream.read_exact(&mut answer[..HEADER_BYTES])?;
    let mut header = Reader(&answer[2..HEADER_BYTES]);
    let len = header.u32().and_then(|len| usize::try_from(len).ok());
    let len = len.filter(|len| (HEADER_BYTES..=MESSAGE_BYTES_MAX).contains(len)).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "the answer has a length that no answer of a TPM has")
    })?;
    stream.read_exact(&mut answer[HEADER_BYTES..len])?;
    answer.truncate(len);
    Ok(answer)
}

/// Tag, length, code.
pub(super) const HEADER_BYTES: usize = 10;
