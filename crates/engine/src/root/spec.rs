//! What can be written for a root, and what it means. Nothing is opened here.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a root is, and who keeps it.
///
/// ```
/// use inlinecrypt_engine::RootSpec;
///
/// let spec: RootSpec = "/var/lib/inlinecrypt/root".parse()?;
/// assert_eq!(spec.to_string(), "file:/var/lib/inlinecrypt/root");
/// let spec: RootSpec = "tpm2:/etc/root.tpm,pcrs=sha256:7+11".parse()?;
/// assert_eq!(spec.path(), std::path::Path::new("/etc/root.tpm"));
/// # Ok::<(), inlinecrypt_core::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RootSpec {
    /// In a file, as it is. `file:PATH`, or a path alone.
    File(PathBuf),
    /// In a file, wrapped by a passphrase. `passphrase:PATH`
    Passphrase(PathBuf),
    /// In a file, sealed by a TPM 2.0. `tpm2:PATH[,OPTION]...`
    Tpm2(Tpm2Spec),
    /// In a file, wrapped by a key on a PKCS#11 token. `pkcs11:...`, an RFC 7512 URI
    Pkcs11(Box<Pkcs11Spec>),
}

/// A secret sealed by a TPM 2.0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tpm2Spec {
    /// The container.
    pub path: PathBuf,
    /// The registers that have to stay as they are.
    pub pcrs: Option<Pcrs>,
    /// Whether it takes a PIN.
    pub pin: bool,
    /// The way to the TPM.
    pub tcti: Tcti,
}

/// Platform configuration registers: a bank, and which of its 24 registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pcrs {
    /// The bank.
    pub bank: PcrBank,
    /// Bit `i` stands for register `i`. Never zero.
    pub mask: u32,
}

/// The hash of a bank of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PcrBank {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
}

/// How many registers a bank has, on every PC (PC Client Platform TPM Profile, 4.6).
pub const PCR_COUNT: u32 = 24;

/// The way to a TPM ("TPM command transmission interface").
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Tcti {
    /// A device, best one with a resource manager.
    Device(PathBuf),
    /// A unix socket on which TPM commands are spoken as they are: swtpm.
    Unix(PathBuf),
    /// The same over TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

impl Default for Tcti {
    fn default() -> Self {
        Self::Device("/dev/tpmrm0".into())
    }
}

/// A secret wrapped by a key on a token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pkcs11Spec {
    /// The container: `file`.
    pub path: PathBuf,
    /// The module: `module-path`. A path, or a library's name.
    pub module: PathBuf,
    /// The token's label: `token`.
    pub token: Option<String>,
    /// Its maker: `manufacturer`.
    pub manufacturer: Option<String>,
    /// Its model: `model`.
    pub model: Option<String>,
    /// Its serial number: `serial`.
    pub serial: Option<String>,
    /// The key's label: `object`.
    pub object: Option<String>,
    /// The key's identifier: `id`.
    pub id: Option<Vec<u8>>,
    /// The file that holds the PIN: `pin-source`.
    pub pin_source: Option<PathBuf>,
}

impl RootSpec {
    /// What can be written, for help texts.
    pub const HELP: &str = "\
[file:]PATH            a file that only its owner reads
passphrase:PATH        a file wrapped by a passphrase (argon2id)
tpm2:PATH[,pcrs=BANK:N+N...][,pin][,tcti=WAY]
                       a file that only this TPM 2.0 opens; BANK is sha256 or sha384; WAY is device:PATH
                       [default: device:/dev/tpmrm0], unix:PATH or tcp:HOST:PORT; a comma in a PATH is written ,,
pkcs11:token=LABEL;object=KEY?module-path=LIBRARY&file=PATH[&pin-source=FILE]
                       a file that a key on a token opens; an RFC 7512 URI, also with serial, manufacturer, model, id";

    /// The file of this root.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Passphrase(path) => path,
            Self::Tpm2(spec) => &spec.path,
            Self::Pkcs11(spec) => &spec.path,
        }
    }

    /// The same, with paths that are not absolute taken from `base` on: that of its file, and that of the PIN.
    #[must_use]
    pub fn relative_to(mut self, base: &Path) -> Self {
        // An absolute path replaces the base; an empty base changes nothing.
        let path = match &mut self {
            Self::File(path) | Self::Passphrase(path) => path,
            Self::Tpm2(spec) => &mut spec.path,
            Self::Pkcs11(spec) => {
                if let Some(source) = &mut spec.pin_source {
                    *source = base.join(&*source);
                }
                &mut spec.path
            }
        };
        *path = base.join(&*path);
        self
    }

    /// What [`Display`](fmt::Display) shows, to the byte: paths need not be UTF-8.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::File(path) => [b"file:", path.as_os_str().as_bytes()].concat(),
            Self::Passphrase(path) => [b"passphrase:", path.as_os_str().as_bytes()].concat(),
            Self::Tpm2(Tpm2Spec { path, pcrs, pin, tcti }) => {
                let mut bytes = [b"tpm2:", &comma_doubled(path.as_os_str().as_bytes())[..]].concat();
                if let Some(pcrs) = pcrs {
                    bytes.extend(format!(",pcrs={pcrs}").bytes());
                }
                if *pin {
                    bytes.extend(b",pin");
                }
                if *tcti != Tcti::default() {
                    bytes.extend(b",tcti=");
                    bytes.extend(comma_doubled(&tcti.to_bytes()));
                }
                bytes
            }
            Self::Pkcs11(spec) => spec.uri().into_bytes(),
        }
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote, or a person.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid), saying what can be written.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        let shown = shown(text);
        let refused =
            |why: &str| Error::new(ErrorKind::Invalid, Op::Open).detail(format!("root {shown}: {why}"));
        let (kind, rest) = match text.iter().position(|byte| *byte == b':') {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (&b"file"[..], text),
        };
        let path = match kind {
            b"file" => rest,
            b"passphrase" if rest.is_empty() => {
                return Err(refused("a path is missing; write passphrase:PATH"));
            }
            b"passphrase" => return Ok(Self::Passphrase(path_of(rest))),
            b"tpm2" => return Tpm2Spec::parse(rest).map(Self::Tpm2).map_err(|why| refused(&why)),
            b"pkcs11" => {
                return Pkcs11Spec::parse(rest).map(Box::new).map(Self::Pkcs11).map_err(|why| refused(&why));
            }
            // A word and a colon is a kind of root that a later version may know, not a file.
            word if !word.is_empty() && word.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-') => {
                return Err(refused(&format!(
                    "no kind of root {:?}; the kinds are: file, passphrase, tpm2, pkcs11 (for a file of that name \
                     write file:{})",
                    String::from_utf8_lossy(word),
                    String::from_utf8_lossy(text),
                )));
            }
            _ => text,
        };
        if path.is_empty() {
            return Err(refused("a path is missing; write file:PATH"));
        }
        Ok(Self::File(path_of(path)))
    }
}

/// What was written, as messages show it. A PIN in it is not repeated.
fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match text.find("pin-value") {
        Some(at) => format!("{:?}", format!("{}pin-value=...", &text[..at])),
        None => format!("{text:?}"),
    }
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

/// As part of a list in which a comma separates, and two commas are one that does not.
fn comma_doubled(text: &[u8]) -> Vec<u8> {
    let doubled = |byte: &u8| if *byte == b',' { vec![b',', b','] } else { vec![*byte] };
    text.iter().flat_map(doubled).collect()
}

/// The parts of such a list.
fn split_at_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else {
            parts.last_mut().expect("never empty").push(byte);
        }
    }
    parts
}

impl Tpm2Spec {
    fn parse(text: &[u8]) -> Result<Self, String> {
        const OPTIONS: &str = "pcrs=BANK:N+N..., pin, tcti=WAY (a comma in a path is written ,,)";
        let mut parts = split_at_commas(text).into_iter();
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err("a path is missing; write tpm2:PATH".into());
        }
        let mut spec = Self { path: path_of(&path), pcrs: None, pin: false, tcti: Tcti::default() };
        for part in parts {
            let text = String::from_utf8_lossy(&part);
            match text.split_once('=') {
                Some(("pcrs", pcrs)) => spec.pcrs = Some(pcrs.parse()?),
                Some(("tcti", _)) => spec.tcti = Tcti::parse(&part[b"tcti=".len()..])?,
                None if text == "pin" => spec.pin = true,
                _ => return Err(format!("no option {text:?}; the options are: {OPTIONS}")),
            }
        }
        Ok(spec)
    }
}

impl PcrBank {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
        }
    }

    /// Bytes of one register.
    #[must_use]
    pub const fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }
}

impl Pcrs {
    /// The registers, in ascending order.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        (0..PCR_COUNT).filter(move |number| self.mask & (1 << number) != 0)
    }
}

impl fmt::Display for Pcrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.numbers().map(|number| number.to_string()).collect();
        write!(f, "{}:{}", self.bank.name(), numbers.join("+"))
    }
}

impl FromStr for Pcrs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            |why: String| format!("pcrs={text}: {why}; write for example pcrs=sha256:7 or pcrs=sha256:7+11");
        let (bank, numbers) = text.split_once(':').ok_or_else(|| wrong("the bank is missing".into()))?;
        let bank = [PcrBank::Sha256, PcrBank::Sha384]
            .into_iter()
            .find(|known| known.name() == bank)
            .ok_or_else(|| wrong(format!("no bank {bank:?}, only sha256 and sha384")))?;
        let mut mask = 0;
        for number in numbers.split('+') {
            match number.parse::<u32>() {
                Ok(register) if register < PCR_COUNT => mask |= 1 << register,
                _ => return Err(wrong(format!("no register {number:?}, only 0 to {}", PCR_COUNT - 1))),
            }
        }
        Ok(Self { bank, mask })
    }
}

impl Tcti {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Device(path) => [b"device:", path.as_os_str().as_bytes()].concat(),
            Self::Unix(path) => [b"unix:", path.as_os_str().as_bytes()].concat(),
            Self::Tcp { host, port } => format!("tcp:{host}:{port}").into_bytes(),
        }
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let wrong = || {
            format!(
                "tcti={}: no way to a TPM; write device:PATH, unix:PATH or tcp:HOST:PORT",
                String::from_utf8_lossy(text)
            )
        };
        let some = |path: &[u8]| if path.is_empty() { Err(wrong()) } else { Ok(path_of(path)) };
        if let Some(path) = text.strip_prefix(b"device:") {
            Ok(Self::Device(some(path)?))
        } else if let Some(path) = text.strip_prefix(b"unix:") {
            Ok(Self::Unix(some(path)?))
        } else if let Some(place) = text.strip_prefix(b"tcp:").and_then(|place| str::from_utf8(place).ok()) {
            let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
            let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            if host.is_empty() { Err(wrong()) } else { Ok(Self::Tcp { host: host.to_owned(), port }) }
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.to_bytes()))
    }
}

impl Pkcs11Spec {
    /// RFC 7512: path attributes, separated by semicolons; `?`; query attributes, separated by ampersands. Ours is
    /// `file`, a vendor's query attribute in its terms.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let mut spec = Self {
            path: PathBuf::new(),
            module: PathBuf::new(),
            token: None,
            manufacturer: None,
            model: None,
            serial: None,
            object: None,
            id: None,
            pin_source: None,
        };
        let (path, query) = match text.iter().position(|byte| *byte == b'?') {
            Some(at) => (&text[..at], &text[at + 1..]),
            None => (text, &b""[..]),
        };
        let attributes = |text: &[u8], separator: u8| -> Result<Vec<(String, Vec<u8>)>, String> {
            let parts = text.split(|byte| *byte == separator).filter(|part| !part.is_empty());
            parts
                .map(|part| {
                    let at = part.iter().position(|byte| *byte == b'=').ok_or_else(|| {
                        format!("{:?} has no value; write NAME=VALUE", String::from_utf8_lossy(part))
                    })?;
                    let name = String::from_utf8_lossy(&part[..at]).into_owned();
                    Ok((name, decode(&part[at + 1..])?))
                })
                .collect()
        };
        let set = |place: &mut Option<String>, name: &str, value: Vec<u8>| {
            let value =
                String::from_utf8(value).map_err(|why| format!("{name}: {why}; write it in UTF-8"))?;
            if place.replace(value).is_some() { Err(twice(name)) } else { Ok(()) }
        };
        for (name, value) in attributes(path, b';')? {
            match &*name {
                "token" => set(&mut spec.token, &name, value)?,
                "manufacturer" => set(&mut spec.manufacturer, &name, value)?,
                "model" => set(&mut spec.model, &name, value)?,
                "serial" => set(&mut spec.serial, &name, value)?,
                "object" => set(&mut spec.object, &name, value)?,
                "id" if spec.id.is_none() => spec.id = Some(value),
                "id" => return Err(twice("id")),
                // Which kind of key it is shows on the token.
                "type" if matches!(&value[..], b"secret-key" | b"private") => {}
                "type" => return Err("type: the key is a secret key or a private one; leave it out".into()),
                _ => {
                    return Err(format!(
                        "no attribute {name:?} before the \"?\"; there are: token, manufacturer, model, serial, object, id"
                    ));
                }
            }
        }
        for (name, value) in attributes(query, b'&')? {
            let place = match &*name {
                "module-path" => &mut spec.module,
                "file" => &mut spec.path,
                "pin-source" if value.starts_with(b"|") => {
                    return Err("pin-source: commands are not run; name a file".into());
                }
                "pin-source" => {
                    let path = value.strip_prefix(b"file:").unwrap_or(&value);
                    let path = path.strip_prefix(b"//").unwrap_or(path);
                    if spec.pin_source.replace(path_of(path)).is_some() {
                        return Err(twice(&name));
                    }
                    continue;
                }
                "pin-value" => {
                    return Err(
                        "pin-value: a PIN in an argument or config is seen by others; name a file with \
                                pin-source, or leave it out and be asked"
                            .into(),
                    );
                }
                _ => {
                    return Err(format!(
                        "no attribute {name:?} behind the \"?\"; there are: module-path, file, pin-source"
                    ));
                }
            };
            if !place.as_os_str().is_empty() {
                return Err(twice(&name));
            }
            *place = path_of(&value);
        }
        let missing = |what: &str| {
            format!("{what} is missing; write pkcs11:token=LABEL;object=KEY?module-path=LIBRARY&file=PATH")
        };
        if spec.object.is_none() && spec.id.is_none() {
            return Err(missing("the key's name (object or id)"));
        }
        if spec.module.as_os_str().is_empty() {
            return Err(missing("the module (module-path)"));
        }
        if spec.path.as_os_str().is_empty() {
            return Err(missing("the root's own file (file)"));
        }
        Ok(spec)
    }

    fn uri(&self) -> String {
        let Self { path, module, token, manufacturer, model, serial, object, id, pin_source } = self;
        let mut before = Vec::new();
        for (name, value) in [
            ("token", token),
            ("manufacturer", manufacturer),
            ("model", model),
            ("serial", serial),
            ("object", object),
        ] {
            before.extend(value.as_ref().map(|value| format!("{name}={}", encode(value.as_bytes()))));
        }
        before.extend(id.as_ref().map(|id| format!("id={}", encode(id))));
        let mut uri = format!(
            "pkcs11:{}?module-path={}&file={}",
            before.join(";"),
            encode(module.as_os_str().as_bytes()),
            encode(path.as_os_str().as_bytes())
        );
        if let Some(source) = pin_source {
            let _ = write!(uri, "&pin-source={}", encode(source.as_os_str().as_bytes()));
        }
        uri
    }
}

fn twice(name: &str) -> String {
    format!("{name} is given twice; give it once")
}

/// RFC 7512 2.3: letters, digits and what need not be encoded in either part.
fn encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:@,+".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

fn decode(text: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let byte = tail
            .get(..2)
            .and_then(|digits| str::from_utf8(digits).ok())
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .ok_or("a \"%\" is not followed by two hexadecimal digits; write %25 for the sign itself")?;
        bytes.push(byte);
        rest = &tail[2..];
    }
    Ok(bytes)
}

impl fmt::Display for RootSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.to_bytes()))
    }
}

impl FromStr for RootSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> RootSpec {
        text.parse().unwrap_or_else(|error: Error| panic!("{text}: {error}"))
    }

    #[test]
    fn specs_are_paths_with_or_without_their_kind() {
        for (text, path) in [
            ("file:/var/root", "/var/root"),
            ("/var/root", "/var/root"),
            ("root", "root"),
            ("file:tpm2:x", "tpm2:x"),
            ("./tpm2:x", "./tpm2:x"),
            (":x", ":x"),
        ] {
            assert_eq!(parsed(text), RootSpec::File(path.into()), "{text}");
        }
        assert_eq!(parsed("passphrase:a,b"), RootSpec::Passphrase("a,b".into()));
    }

    #[test]
    fn a_tpm_has_options() {
        let RootSpec::Tpm2(spec) = parsed("tpm2:a,,b,pcrs=sha256:7+11+7,pin,tcti=tcp:[::1]:2321") else {
            panic!("not a TPM")
        };
        assert_eq!(spec.path, Path::new("a,b"));
        let pcrs = spec.pcrs.unwrap();
        assert_eq!((pcrs.bank, pcrs.numbers().collect::<Vec<_>>()), (PcrBank::Sha256, vec![7, 11]));
        assert!(spec.pin);
        assert_eq!(spec.tcti, Tcti::Tcp { host: "::1".into(), port: 2321 });
    }

    #[test]
    fn a_token_is_named_by_its_uri() {
        let uri = "pkcs11:token=my%20token;id=%01%ff;type=secret-key?pin-source=file:/etc/pin&module-path=/m.so&file=r";
        let RootSpec::Pkcs11(spec) = parsed(uri) else { panic!("not a token") };
        assert_eq!(spec.token.as_deref(), Some("my token"));
        assert_eq!(spec.id.as_deref(), Some(&[1, 0xff][..]));
        assert_eq!((spec.object, spec.pin_source), (None, Some("/etc/pin".into())));
        assert_eq!((spec.module, spec.path), ("/m.so".into(), "r".into()));
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        for (text, expected) in [
            ("tang:x", "no kind of root \"tang\"; the kinds are: file, passphrase, tpm2, pkcs11"),
            ("", "a path is missing"),
            ("file:", "a path is missing"),
            ("passphrase:", "write passphrase:PATH"),
            ("tpm2:", "write tpm2:PATH"),
            ("tpm2:r,prcs=sha256:7", "no option \"prcs=sha256:7\""),
            ("tpm2:r,pcrs=7", "the bank is missing"),
            ("tpm2:r,pcrs=sha1:7", "no bank \"sha1\""),
            ("tpm2:r,pcrs=sha256:", "no register \"\""),
            ("tpm2:r,pcrs=sha256:24", "only 0 to 23"),
            ("tpm2:r,tcti=swtpm", "write device:PATH"),
            ("tpm2:r,tcti=tcp:h:0", "tcp:HOST:PORT"),
            ("pkcs11:token=x", "the key's name"),
            ("pkcs11:object=x?file=r", "module-path"),
            ("pkcs11:object=x?module-path=m", "(file)"),
            ("pkcs11:object=x?module-path=m&file=r&pin-source=|cat", "commands are not run"),
            ("pkcs11:object=x;object=y?module-path=m&file=r", "object is given twice"),
            ("pkcs11:object=%zz?module-path=m&file=r", "hexadecimal"),
            ("pkcs11:object?module-path=m&file=r", "has no value"),
            ("pkcs11:slot-id=1;object=x?module-path=m&file=r", "no attribute \"slot-id\""),
        ] {
            let error = text.parse::<RootSpec>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_pin_in_a_uri_is_refused_and_not_repeated() {
        let error = "pkcs11:object=x?module-path=m&file=r&pin-value=24681".parse::<RootSpec>().unwrap_err();
        assert!(error.to_string().contains("pin-source") && !error.to_string().contains("24681"), "{error}");
    }

    #[test]
    fn paths_are_relative_to_a_base() {
        let base = Path::new("/etc/x");
        for (text, expected) in [
            ("r", "file:/etc/x/r"),
            ("passphrase:/r", "passphrase:/r"),
            ("tpm2:r,pin", "tpm2:/etc/x/r,pin"),
            (
                "pkcs11:object=k?module-path=m&file=r&pin-source=p",
                "pkcs11:object=k?module-path=m&file=/etc/x/r&pin-source=/etc/x/p",
            ),
        ] {
            assert_eq!(parsed(text).relative_to(base).to_string(), expected);
            assert_eq!(parsed(text).relative_to(Path::new("")), parsed(text));
        }
    }

    fn paths() -> impl Strategy<Value = PathBuf> {
        prop::collection::vec(1..=255_u8, 1..20).prop_map(|bytes| path_of(&bytes))
    }

    fn specs() -> impl Strategy<Value = RootSpec> {
        let text = || prop::option::of("[ -~é]{0,8}");
        prop_oneof![
            paths().prop_map(RootSpec::File),
            paths().prop_map(RootSpec::Passphrase),
            (paths(), prop::option::of(1..1_u32 << 24), any::<bool>(), paths(), any::<bool>()).prop_map(
                |(path, mask, pin, way, device)| RootSpec::Tpm2(Tpm2Spec {
                    path,
                    pcrs: mask.map(|mask| Pcrs { bank: PcrBank::Sha384, mask }),
                    pin,
                    tcti: if device { Tcti::Device(way) } else { Tcti::Unix(way) },
                })
            ),
            (paths(), paths(), text(), text(), text(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(
                |(path, module, token, serial, object, id)| RootSpec::Pkcs11(Box::new(Pkcs11Spec {
                    pin_source: serial.as_ref().map(|_| "pin".into()),
                    path,
                    module,
                    token,
                    manufacturer: None,
                    model: None,
                    serial,
                    object,
                    id: Some(id),
                }))
            ),
        ]
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(spec in specs()) {
            prop_assert_eq!(RootSpec::parse(&spec.to_bytes()).unwrap(), spec);
        }

        #[test]
        fn anything_is_read_or_refused(text in prop::collection::vec(any::<u8>(), 0..60), kind in 0..4_usize) {
            let kind = [&b"tpm2:"[..], b"pkcs11:", b"passphrase:", b""][kind];
            let _ = RootSpec::parse(&[kind, &text].concat());
        }
    }
}
