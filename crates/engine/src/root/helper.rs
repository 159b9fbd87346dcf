//! Between us and the short-lived process that talks to a TPM or a token: drivers and modules of others never run where
//! keys are.
//!
//! ```text
//!   asks:    Request   spec, PIN, what to open | secret to wrap    one message, then the end
//!   answers: Answer    secret | wrapped, or the error              one message, then the end
//!
//!   message:  magic "icrk", length (4 bytes, little-endian), that many bytes, check value (8 bytes)
//!   in it:    fields, each with its length before it (4 bytes, little-endian)
//! ```
//!
//! Both ends are the same program, so there is no version. The answer is read by whoever uses the root, which need not be
//! the process that asked. A helper that dies says nothing, and that is told, too.

use super::container::{BODY_BYTES_MAX, Container};
use super::spec::RootSpec;
use inlinecrypt_cipher::kdf::counter_mode_cmac;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::fmt;
use std::io::{self, Read, Write};
use zeroize::Zeroizing;

const MAGIC: [u8; 4] = *b"icrk";
const CHECK_BYTES: usize = 8;

/// A spec with paths of 4096 bytes, each percent-encoded; a container; a PIN: far less than this.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// A secret of a root.
pub type Secret = Box<Zeroizing<[u8; 32]>>;

/// What the helper is asked for.
pub struct Request {
    /// Which root: where the TPM or the token is.
    pub spec: RootSpec,
    /// The PIN, if one was asked for.
    pub pin: Option<Zeroizing<Vec<u8>>>,
    /// What to do.
    pub task: Task,
}

/// What to do.
pub enum Task {
    /// Open this.
    Open(Container),
    /// Wrap this.
    Wrap(Secret),
}

/// What the helper answers.
pub enum Answer {
    /// It is open.
    Opened(Secret),
    /// It is wrapped, and opens again.
    Wrapped {
        /// Whether a PIN is needed to open it.
        asks: bool,
        /// What stands in the container.
        body: Vec<u8>,
    },
}

impl Request {
    /// Writes it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let Self { spec, pin, task } = self;
        let mut message = Message::new();
        message.field(&spec.to_bytes());
        message.field(&[u8::from(pin.is_some())]);
        message.field(pin.as_ref().map_or(&[], |pin| pin));
        match task {
            Task::Open(container) => {
                message.field(b"o");
                message.field(&container.to_bytes());
            }
            Task::Wrap(secret) => {
                message.field(b"w");
                message.field(&secret[..]);
            }
        }
        message.send(to)
    }

    /// Reads one.
    ///
    /// # Errors
    ///
    /// [`Bug`](ErrorKind::Bug) if it is none: only this program writes them.
    pub fn receive(from: &mut impl Read) -> Result<Self, Error> {
        let strange =
            || Error::new(ErrorKind::Bug, Op::Open).detail("a request that this program does not write");
        let message = Message::receive(from).map_err(|why| strange().because(why))?.ok_or_else(strange)?;
        let mut fields = message.fields();
        let mut next = || fields.next().ok_or_else(strange);
        let spec = RootSpec::parse(next()?)?;
        let has_pin = next()? == [1];
        let pin = own(next()?);
        let task = match (next()?, next()?) {
            (b"o", bytes) => Task::Open(
                Container::parse(bytes).map_err(|(kind, why)| Error::new(kind, Op::Open).detail(why))?,
            ),
            (b"w", bytes) => Task::Wrap(secret(bytes).ok_or_else(strange)?),
            _ => return Err(strange()),
        };
        Ok(Self { spec, pin: has_pin.then_some(pin), task })
    }
}

/// Shows no PIN and no secret.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { spec, pin: _, task } = self;
        let task = match task {
            Task::Open(_) => "open",
            Task::Wrap(_) => "wrap",
        };
        write!(f, "Request({task}, {spec})")
    }
}

/// Shows no secret.
impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open(_) => "Open",
            Self::Wrap(_) => "Wrap",
        })
    }
}

/// Shows no secret.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opened(_) => "Opened",
            Self::Wrapped { .. } => "Wrapped",
        })
    }
}

impl Answer {
    /// Writes it, or the error.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn send(result: &Result<Self, Error>, to: &mut impl Write) -> io::Result<()> {
        let mut message = Message::new();
        match result {
            Ok(Self::Opened(secret)) => {
                message.field(b"o");
                message.field(&secret[..]);
            }
            Ok(Self::Wrapped { asks, body }) => {
                message.field(b"w");
                message.field(&[u8::from(*asks)]);
                message.field(body);
            }
            Err(error) => {
                let number = ErrorKind::ALL.iter().position(|kind| *kind == error.kind());
                message.field(b"e");
                message.field(&[number.and_then(|number| u8::try_from(number).ok()).unwrap_or(u8::MAX)]);
                message.field(text_of(error).as_bytes());
            }
        }
        message.send(to)
    }

    /// Reads one to its end, which is where the helper ended.
    ///
    /// # Errors
    ///
    /// The error that the helper met, with `op` and `name` before it; [`EngineFailed`](ErrorKind::EngineFailed) if it did
    /// not answer.
    ///
    /// # Blocking
    ///
    /// Waits for the helper.
    pub fn receive(from: &mut impl Read, op: Op, name: &str) -> Result<Self, Error> {
        let silent = || {
            Error::new(ErrorKind::EngineFailed, op).detail(format!(
                "{name}: the process that talks to it ended without an answer; the system's log may say why"
            ))
        };
        let message = Message::receive(from).map_err(|why| silent().because(why))?.ok_or_else(silent)?;
        let mut fields = message.fields();
        let mut next = || fields.next().ok_or_else(silent);
        match next()? {
            b"o" => Ok(Self::Opened(secret(next()?).ok_or_else(silent)?)),
            b"w" => {
                let (asks, body) = (next()? == [1], next()?.to_vec());
                if body.len() > BODY_BYTES_MAX { Err(silent()) } else { Ok(Self::Wrapped { asks, body }) }
            }
            b"e" => {
                let number = next()?.first().map_or(usize::MAX, |number| usize::from(*number));
                let kind = *ErrorKind::ALL.get(number).unwrap_or(&ErrorKind::EngineFailed);
                Err(Error::new(kind, op).detail(format!("{name}: {}", String::from_utf8_lossy(next()?))))
            }
            _ => Err(silent()),
        }
    }
}

/// What an error says beyond its kind and what was being done, which travel by themselves.
fn text_of(error: &Error) -> String {
    let text = error.chain();
    let general = Error::new(error.kind(), error.op()).to_string();
    match text.strip_prefix(&general) {
        Some(special) => special.strip_prefix(": ").unwrap_or(special).to_owned(),
        None => text,
    }
}

fn own(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(bytes.to_vec())
}

fn secret(bytes: &[u8]) -> Option<Secret> {
    let bytes: &[u8; 32] = bytes.try_into().ok()?;
    let mut secret = Box::new(Zeroizing::new([0; 32]));
    secret.copy_from_slice(bytes);
    Some(secret)
}

/// A message: wiped when dropped, and never moved to more room.
struct Message(Zeroizing<Vec<u8>>);

impl Message {
    fn new() -> Self {
        Self(Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX)))
    }

    fn field(&mut self, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).expect("fields are short");
        assert!(self.0.len() + 4 + bytes.len() <= MESSAGE_BYTES_MAX, "more than any message of ours holds");
        self.0.extend(len.to_le_bytes());
        self.0.extend(bytes);
    }

    fn fields(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (len, tail) = rest.split_first_chunk::<4>()?;
            let (field, tail) = tail.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
            rest = tail;
            Some(field)
        })
    }

    fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let len = u32::try_from(self.0.len()).expect("shorter than MESSAGE_BYTES_MAX");
        to.write_all(&MAGIC)?;
        to.write_all(&len.to_le_bytes())?;
        to.write_all(&self.0)?;
        to.write_all(&check_value(&self.0))?;
        to.flush()
    }

    /// `None` if it is not whole, or not one.
    fn receive(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(MESSAGE_BYTES_MAX + 64));
        from.take(MESSAGE_BYTES_MAX as u64 + 32).read_to_end(&mut bytes)?;
        let Some((MAGIC, rest)) = bytes.split_first_chunk::<4>().map(|(magic, rest)| (*magic, rest)) else {
            return Ok(None);
        };
        let Some((len, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let Some((content, check)) = rest.split_last_chunk::<CHECK_BYTES>() else { return Ok(None) };
        let is_whole = usize::try_from(u32::from_le_bytes(*len)) == Ok(content.len());
        if !is_whole || content.len() > MESSAGE_BYTES_MAX || *check != check_value(content) {
            return Ok(None);
        }
        Ok(Some(Self(own(content))))
    }
}

/// Finds what was cut or mixed. The key is no secret.
fn check_value(content: &[u8]) -> [u8; CHECK_BYTES] {
    let mut value = [0; CHECK_BYTES];
    counter_mode_cmac(b"inlinecrypt root helper messages", content, &mut value);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::WrappingKeyId;
    use crate::root::container::Keeper;

    fn sent(result: &Result<Answer, Error>) -> Vec<u8> {
        let mut bytes = Vec::new();
        Answer::send(result, &mut bytes).unwrap();
        bytes
    }

    fn received(mut bytes: &[u8]) -> Result<Answer, Error> {
        Answer::receive(&mut bytes, Op::Open, "root r")
    }

    fn a_secret() -> Secret {
        Box::new(Zeroizing::new([7; 32]))
    }

    #[test]
    fn a_secret_arrives_and_every_flipped_bit_and_cut_is_noticed() {
        let bytes = sent(&Ok(Answer::Opened(a_secret())));
        assert!(matches!(received(&bytes), Ok(Answer::Opened(secret)) if **secret == [7; 32]));
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(received(&changed).unwrap_err().kind(), ErrorKind::EngineFailed, "bit {bit}");
        }
        for len in 0..bytes.len() {
            let error = received(&bytes[..len]).unwrap_err();
            assert!(error.to_string().contains("without an answer"), "{error}");
        }
    }

    #[test]
    fn an_error_arrives_with_its_kind_and_its_words() {
        for kind in ErrorKind::ALL {
            let error =
                Error::new(*kind, Op::Open).detail("why; what to do").because(io::Error::other("cause"));
            let arrived = received(&sent(&Err(error))).unwrap_err();
            assert_eq!(arrived.kind(), *kind);
            let expected = Error::new(*kind, Op::Open).detail("root r: why; what to do: cause").to_string();
            assert_eq!(arrived.to_string(), expected);
        }
    }

    #[test]
    fn a_request_arrives_whole() {
        let id = WrappingKeyId::from_bytes([3; 8]);
        let container = Container { keeper: Keeper::Tpm2, asks: true, id, body: vec![1; BODY_BYTES_MAX] };
        let spec: RootSpec = "tpm2:r,pin".parse().unwrap();
        for (pin, task) in [(None, Task::Open(container.clone())), (Some(own(b"")), Task::Wrap(a_secret()))] {
            let request = Request { spec: spec.clone(), pin, task };
            let mut bytes = Vec::new();
            request.send(&mut bytes).unwrap();
            let arrived = Request::receive(&mut &bytes[..]).unwrap();
            assert_eq!(arrived.spec, spec);
            assert_eq!(arrived.pin, request.pin);
            match (arrived.task, request.task) {
                (Task::Open(arrived), Task::Open(_)) => assert_eq!(arrived, container),
                (Task::Wrap(arrived), Task::Wrap(sent)) => assert_eq!(**arrived, **sent),
                _ => panic!("another task"),
            }
        }
    }

    #[test]
    fn debug_shows_neither_pin_nor_secret() {
        let request = Request {
            spec: "tpm2:r".parse().unwrap(),
            pin: Some(own(b"24681")),
            task: Task::Wrap(a_secret()),
        };
        assert_eq!(format!("{request:?} {:?}", request.task), "Request(wrap, tpm2:r) Wrap");
        assert_eq!(format!("{:?}", Answer::Opened(a_secret())), "Opened");
    }
}
