//! Lines of device-mapper tables: dm-crypt's `crypt` and dm-inlinecrypt's `inlinecrypt`, read and written.
//!
//! ```text
//!   0 256 crypt aes-xts-plain64 KEY 0 /dev/sdx 64 2 sector_size:4096 iv_large_sectors
//!   | |   |     cipher          |   | |        |  `- options, and how many
//!   | |   target                |   | |        `- where the data begins, in sectors
//!   | length in sectors         |   | device
//!   start                       |   IV offset in sectors
//!                               - or hexadecimal digits or :SIZE:TYPE:DESCRIPTION
//! ```
//!
//! Sectors have 512 bytes throughout. What is refused says which field it is. A key never stands in an error, nor in what
//! `Debug` and `Display` show.

mod cipher;

pub use cipher::{Cipher, CipherError, CipherSpec, IvMode};

use crate::config::{DataUnitSize, KeyType};
use crate::key::WRAPPED_KEY_BYTES_MAX;
use crate::volume::{IvLayout, Layout, SECTOR_BYTES};
use std::borrow::Cow;
use std::fmt;
use std::fmt::Write as _;
use std::ops::Range;
use zeroize::{Zeroize as _, Zeroizing};

/// Largest data unit that Linux's targets take, in bytes.
pub const SECTOR_SIZE_MAX: u32 = 4096;

/// Which target a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// dm-crypt.
    Crypt,
    /// dm-inlinecrypt: AES-256-XTS only, on hardware or through blk-crypto's fallback. The bytes are dm-crypt's.
    Inlinecrypt,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crypt => "crypt",
            Self::Inlinecrypt => "inlinecrypt",
        })
    }
}

/// The key field.
#[derive(Clone, PartialEq, Eq)]
pub enum TableKey {
    /// `-`: said elsewhere.
    Absent,
    /// Hexadecimal digits: the key itself.
    Bytes(Zeroizing<Vec<u8>>),
    /// A key in the kernel's keyring, which nobody but the kernel can read.
    Keyring {
        /// Its length in bytes.
        bytes: usize,
        /// What kind of key: `logon`, `user`, `encrypted`, `trusted`.
        kind: String,
        /// Its name.
        description: String,
    },
}

impl fmt::Debug for TableKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("Absent"),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Self::Keyring { bytes, kind, description } => {
                write!(f, "Keyring({bytes} bytes, {kind}, {description:?})")
            }
        }
    }
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What it is for.
    pub target: Target,
    /// Length of the volume, in sectors. Never 0, and whole data units.
    pub length_sectors: u64,
    /// Cipher and IV mode.
    pub cipher: CipherSpec,
    /// The key.
    pub key: TableKey,
    /// What is added to sector numbers, in sectors: whole data units.
    pub iv_offset_sectors: u64,
    /// The device, by path or as `MAJOR:MINOR`. Never empty.
    pub device: String,
    /// Where the volume begins on the device, in sectors.
    pub start_sectors: u64,
    /// Whether discards go through to the device.
    pub allow_discards: bool,
    /// Length of a data unit: 512 to 4096 bytes.
    pub sector_size: DataUnitSize,
    /// Whether IVs count data units and not sectors.
    pub iv_large_sectors: bool,
    /// What dm-inlinecrypt is told of the key's form. `None` is raw.
    pub key_type: Option<KeyType>,
    /// Options that tell the kernel how to compute, and change no byte: as they were written.
    pub indifferent: Vec<Indifferent>,
}

/// Options that tell the kernel how to compute, and change no byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Indifferent {
    /// `same_cpu_crypt`
    SameCpuCrypt,
    /// `submit_from_crypt_cpus`
    SubmitFromCryptCpus,
    /// `high_priority`
    HighPriority,
    /// `no_read_workqueue`
    NoReadWorkqueue,
    /// `no_write_workqueue`
    NoWriteWorkqueue,
}

impl Indifferent {
    /// Every one.
    pub const ALL: [Self; 5] = [
        Self::SameCpuCrypt,
        Self::SubmitFromCryptCpus,
        Self::HighPriority,
        Self::NoReadWorkqueue,
        Self::NoWriteWorkqueue,
    ];

    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SameCpuCrypt => "same_cpu_crypt",
            Self::SubmitFromCryptCpus => "submit_from_crypt_cpus",
            Self::HighPriority => "high_priority",
            Self::NoReadWorkqueue => "no_read_workqueue",
            Self::NoWriteWorkqueue => "no_write_workqueue",
        }
    }
}

/// A field of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Where the line begins in the mapped device.
    Start,
    /// How long it is.
    Length,
    /// For which target.
    Target,
    /// Cipher and IV mode.
    Cipher,
    /// The key.
    Key,
    /// What is added to sector numbers.
    IvOffset,
    /// The device below.
    Device,
    /// Where the data begins on it.
    DeviceStart,
    /// How many options follow.
    OptionCount,
    /// An option.
    Option,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Length => "length",
            Self::Target => "target",
            Self::Cipher => "cipher",
            Self::Key => "key",
            Self::IvOffset => "IV offset",
            Self::Device => "device",
            Self::DeviceStart => "start on the device",
            Self::OptionCount => "number of options",
            Self::Option => "option",
        })
    }
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// The line ends before it.
    Missing,
    /// There is more than one line.
    SecondLine,
    /// A whole number is wanted.
    NotANumber,
    /// The number of bytes does not fit 64 bits.
    TooLarge,
    /// The line begins further on in its device: it is one of several.
    NotTheFirst,
    /// The volume would be empty.
    Empty,
    /// Neither `crypt` nor `inlinecrypt`.
    UnknownTarget,
    /// The cipher is not served.
    Cipher(CipherError),
    /// dm-inlinecrypt takes `aes-xts-plain64` only.
    NotInlinecrypts,
    /// Neither `-` nor hexadecimal digits nor a keyring's key.
    NotAKey,
    /// Hexadecimal digits, and an odd number of them.
    HalfAByte,
    /// No mode of the cipher takes a key of so many bytes.
    KeyLength {
        /// Bytes that there are.
        actual: usize,
        /// The cipher.
        cipher: Cipher,
    },
    /// Not `:SIZE:TYPE:DESCRIPTION`.
    Keyring,
    /// Not whole data units.
    NotWholeUnits {
        /// Length of a data unit, in bytes.
        unit_bytes: u32,
    },
    /// As many options were announced, and there are others.
    OptionCount {
        /// How many there are.
        found: usize,
    },
    /// The option is not known.
    UnknownOption,
    /// The option is known, and means a format that is not served.
    Integrity,
    /// Not a power of two from 512 to 4096.
    SectorSize,
    /// dm-inlinecrypt wants `iv_large_sectors` with it.
    NeedsLargeSectors,
    /// Neither `raw` nor `hw-wrapped`.
    KeyType,
    /// dm-crypt has no such option.
    NotCrypts,
}

/// A line that is refused: which field, where it stands, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableError {
    /// The field.
    pub field: Field,
    /// Where it stands in the text, in bytes. At the end, if it is missing.
    pub at: Range<usize>,
    /// What is wrong.
    pub why: Why,
    /// The field's text; `None` for keys, and where there is none.
    shown: Option<String>,
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, at, why, shown } = self;
        write!(f, "{field}")?;
        match shown {
            Some(text) => write!(f, " {text:?} (character {})", at.start + 1)?,
            None if *why != Why::Missing => write!(f, " (character {})", at.start + 1)?,
            None => {}
        }
        f.write_str(": ")?;
        match why {
            Why::Missing => f.write_str(
                "it is missing; a line is START LENGTH crypt CIPHER KEY IV_OFFSET DEVICE START [NUMBER OPTION...]",
            ),
            Why::SecondLine => f.write_str("a second line; a volume is one line, so serve each by itself"),
            Why::NotANumber => f.write_str("it is no whole number"),
            Why::TooLarge => f.write_str("it is more bytes than 64 bits count"),
            Why::NotTheFirst => {
                f.write_str("it is not 0, so this is one line of several; write 0 and serve it as a volume of its own")
            }
            Why::Empty => f.write_str("the volume would be empty"),
            Why::UnknownTarget => f.write_str("the targets are crypt and inlinecrypt"),
            Why::Cipher(why) => why.fmt(f),
            Why::NotInlinecrypts => f.write_str("inlinecrypt takes aes-xts-plain64 with a key of 64 bytes; the target crypt takes more"),
            Why::NotAKey => f.write_str("it is neither -, nor hexadecimal digits, nor :SIZE:TYPE:DESCRIPTION"),
            Why::HalfAByte => f.write_str("an odd number of hexadecimal digits"),
            Why::KeyLength { actual, cipher } => {
                let known: Vec<String> = cipher
                    .modes()
                    .iter()
                    .map(|mode| format!("{} with {}", mode.info().key_bytes, mode.info().name))
                    .collect();
                write!(f, "a key of {actual} bytes; the cipher takes {}", known.join(", or "))
            }
            Why::Keyring => f.write_str("a key in the kernel's keyring is written :SIZE:TYPE:DESCRIPTION"),
            Why::NotWholeUnits { unit_bytes } => write!(
                f,
                "it is not a multiple of {}, the sectors of a data unit of {unit_bytes} bytes",
                unit_bytes / SECTOR_BYTES
            ),
            Why::OptionCount { found } => write!(f, "{found} options follow"),
            Why::UnknownOption => f.write_str("it is not known"),
            Why::Integrity => f.write_str(
                "volumes with integrity data are not served: tags lie between the data, which only dm-integrity reads; \
                 open it with the kernel",
            ),
            Why::SectorSize => write!(f, "it is a power of two from 512 to {SECTOR_SIZE_MAX}"),
            Why::NeedsLargeSectors => {
                f.write_str("inlinecrypt takes more than 512 only with iv_large_sectors; the target crypt takes it without")
            }
            Why::KeyType => f.write_str("a key's type is raw or hw-wrapped"),
            Why::NotCrypts => f.write_str("it belongs to the target inlinecrypt"),
        }
    }
}

impl std::error::Error for TableError {}

/// Why a volume has no line in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTable {
    /// Its data units are too large.
    DataUnit(DataUnitSize),
    /// Its IVs are not dm-crypt's.
    Iv(IvLayout),
    /// It does not begin at a sector.
    Start(u64),
}

impl fmt::Display for NoTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DataUnit(size) => {
                write!(f, "data units of {size} bytes, and Linux's targets take up to {SECTOR_SIZE_MAX}")
            }
            Self::Iv(iv) => write!(f, "the IV layout {iv}, which no target of Linux's has"),
            Self::Start(bytes) => write!(f, "it begins at byte {bytes}, which is no multiple of 512"),
        }
    }
}

impl std::error::Error for NoTable {}

/// Whether there are as many hexadecimal digits in a row as a key has at least. Nothing else that is meant has.
fn may_hold_key(text: &str) -> bool {
    text.split(|c: char| !c.is_ascii_hexdigit()).any(|digits| digits.len() >= 32)
}

/// A field of the text, as it stands there.
#[derive(Clone)]
struct Word<'t> {
    text: &'t str,
    at: Range<usize>,
}

impl Word<'_> {
    /// Without the backslashes that let blanks be part of it (`dm_split_args` of `drivers/md/dm-table.c`).
    fn plain(&self) -> Cow<'_, str> {
        if !self.text.contains('\\') {
            return Cow::Borrowed(self.text);
        }
        let mut plain = String::with_capacity(self.text.len());
        let mut chars = self.text.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => plain.push(chars.next().unwrap_or('\\')),
                c => plain.push(c),
            }
        }
        Cow::Owned(plain)
    }

    fn wrong(&self, field: Field, why: Why) -> TableError {
        // A key may stand in the wrong place, too.
        let plain = self.plain();
        let shown = match field {
            Field::Key => None,
            _ if may_hold_key(&plain) => None,
            _ => Some(plain.into_owned()),
        };
        TableError { field, at: self.at.clone(), why, shown }
    }

    fn number(&self, field: Field) -> Result<u64, TableError> {
        let digits = self.plain();
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(self.wrong(field, Why::NotANumber));
        }
        digits.parse().map_err(|_too_large: std::num::ParseIntError| self.wrong(field, Why::TooLarge))
    }

    /// A number of sectors whose bytes can be counted.
    fn sectors(&self, field: Field) -> Result<u64, TableError> {
        let sectors = self.number(field)?;
        match sectors.checked_mul(SECTOR_BYTES.into()) {
            Some(_) => Ok(sectors),
            None => Err(self.wrong(field, Why::TooLarge)),
        }
    }
}

/// The words of a line, apart at blanks that no backslash stands before.
struct Words<'t> {
    text: &'t str,
    next: usize,
}

impl<'t> Iterator for Words<'t> {
    type Item = Word<'t>;

    fn next(&mut self) -> Option<Word<'t>> {
        let blank = |byte: u8| byte.is_ascii_whitespace() || byte == 0x0b;
        let bytes = self.text.as_bytes();
        let start = (self.next..bytes.len()).find(|&at| !blank(bytes[at]))?;
        let mut end = start;
        while end < bytes.len() && !blank(bytes[end]) {
            // What stands behind a backslash belongs to the word, whatever it is.
            end += if bytes[end] == b'\\' && end + 1 < bytes.len() { 2 } else { 1 };
        }
        // A backslash may stand before the first byte of several.
        while !self.text.is_char_boundary(end) {
            end += 1;
        }
        self.next = end;
        Some(Word { text: &self.text[start..end], at: start..end })
    }
}

impl<'t> Words<'t> {
    fn field(&mut self, field: Field) -> Result<Word<'t>, TableError> {
        let end = self.text.len();
        self.next().ok_or(TableError { field, at: end..end, why: Why::Missing, shown: None })
    }
}

impl Table {
    /// Reads a line. Blank lines and lines that begin with `#` beside it do not count, as for dmsetup.
    ///
    /// # Errors
    ///
    /// [`TableError`], for the first field that is refused. It holds nothing of the key.
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let (line, base) = the_line(text)?;
        Self::parse_line(line)
            .map_err(|error| TableError { at: error.at.start + base..error.at.end + base, ..error })
    }

    fn parse_line(line: &str) -> Result<Self, TableError> {
        let mut words = Words { text: line, next: 0 };
        let start = words.field(Field::Start)?;
        if start.number(Field::Start)? != 0 {
            return Err(start.wrong(Field::Start, Why::NotTheFirst));
        }
        let length = words.field(Field::Length)?;
        let length_sectors = length.sectors(Field::Length)?;
        if length_sectors == 0 {
            return Err(length.wrong(Field::Length, Why::Empty));
        }
        let target_word = words.field(Field::Target)?;
        let target = match &*target_word.plain() {
            "crypt" => Target::Crypt,
            "inlinecrypt" => Target::Inlinecrypt,
            _ => return Err(target_word.wrong(Field::Target, Why::UnknownTarget)),
        };
        let cipher_word = words.field(Field::Cipher)?;
        let cipher = CipherSpec::parse(&cipher_word.plain())
            .map_err(|why| cipher_word.wrong(Field::Cipher, Why::Cipher(why)))?;
        if target == Target::Inlinecrypt && *cipher_word.plain() != *"aes-xts-plain64" {
            return Err(cipher_word.wrong(Field::Cipher, Why::NotInlinecrypts));
        }
        let key_word = words.field(Field::Key)?;
        let iv_offset = words.field(Field::IvOffset)?;
        let iv_offset_sectors = iv_offset.number(Field::IvOffset)?;
        let device = words.field(Field::Device)?.plain().into_owned();
        let start = words.field(Field::DeviceStart)?;
        let start_sectors = start.sectors(Field::DeviceStart)?;
        if start_sectors
            .checked_add(length_sectors)
            .and_then(|end| end.checked_mul(SECTOR_BYTES.into()))
            .is_none()
        {
            return Err(start.wrong(Field::DeviceStart, Why::TooLarge));
        }
        let mut table = Self {
            target,
            length_sectors,
            cipher,
            key: TableKey::Absent,
            iv_offset_sectors,
            device,
            start_sectors,
            allow_discards: false,
            sector_size: DataUnitSize::MIN_SERVED,
            iv_large_sectors: false,
            key_type: None,
            indifferent: Vec::new(),
        };
        let sector_size = table.take_options(&mut words)?;
        table.key = key(&key_word, &table)?;
        let unit_bytes = table.sector_size.bytes();
        if let Some(word) = sector_size
            && target == Target::Inlinecrypt
            && unit_bytes > SECTOR_BYTES
            && !table.iv_large_sectors
        {
            return Err(word.wrong(Field::Option, Why::NeedsLargeSectors));
        }
        for (word, field, sectors) in
            [(length, Field::Length, length_sectors), (iv_offset, Field::IvOffset, iv_offset_sectors)]
        {
            if !sectors.is_multiple_of((unit_bytes / SECTOR_BYTES).into()) {
                return Err(word.wrong(field, Why::NotWholeUnits { unit_bytes }));
            }
        }
        Ok(table)
    }

    /// Reads the options, and says which one is the sector size.
    fn take_options<'t>(&mut self, words: &mut Words<'t>) -> Result<Option<Word<'t>>, TableError> {
        let Some(count) = words.next() else { return Ok(None) };
        let said = count.number(Field::OptionCount)?;
        let options: Vec<Word<'_>> = words.by_ref().collect();
        if options.len() as u64 != said {
            return Err(count.wrong(Field::OptionCount, Why::OptionCount { found: options.len() }));
        }
        let mut sector_size = None;
        for option in options {
            let wrong = |why| Err(option.wrong(Field::Option, why));
            let text = option.plain();
            let (name, value) = match text.split_once(':') {
                Some((name, value)) => (name, Some(value)),
                None => (&*text, None),
            };
            match (name, value) {
                ("allow_discards", None) => self.allow_discards = true,
                ("iv_large_sectors", None) => self.iv_large_sectors = true,
                ("sector_size", Some(bytes)) => {
                    let size = bytes
                        .parse()
                        .ok()
                        .filter(|_| bytes.bytes().all(|byte| byte.is_ascii_digit()))
                        .filter(|bytes| (SECTOR_BYTES..=SECTOR_SIZE_MAX).contains(bytes))
                        .and_then(DataUnitSize::from_bytes);
                    match size {
                        Some(size) => self.sector_size = size,
                        None => return wrong(Why::SectorSize),
                    }
                    sector_size = Some(option.clone());
                }
                ("keytype", Some(_)) if self.target == Target::Crypt => return wrong(Why::NotCrypts),
                ("keytype", Some("raw")) => self.key_type = Some(KeyType::Raw),
                ("keytype", Some("hw-wrapped")) => self.key_type = Some(KeyType::HardwareWrapped),
                ("keytype", Some(_)) => return wrong(Why::KeyType),
                ("integrity" | "integrity_key_size", Some(_)) => return wrong(Why::Integrity),
                (name, None) if self.target == Target::Crypt => {
                    match Indifferent::ALL.into_iter().find(|known| known.name() == name) {
                        Some(known) if self.indifferent.contains(&known) => {}
                        Some(known) => self.indifferent.push(known),
                        None => return wrong(Why::UnknownOption),
                    }
                }
                _ => return wrong(Why::UnknownOption),
            }
        }
        Ok(sector_size)
    }

    /// The line for a volume that lies on `device` from `start_bytes` on, without its key.
    ///
    /// # Errors
    ///
    /// [`NoTable`] if Linux has no such layout.
    pub fn of(layout: &Layout, device: &str, start_bytes: u64) -> Result<Self, NoTable> {
        let sector_size = layout.data_unit_size();
        if sector_size.bytes() > SECTOR_SIZE_MAX {
            return Err(NoTable::DataUnit(sector_size));
        }
        let iv_large_sectors = match layout.iv() {
            IvLayout::DataUnits => sector_size.bytes() > SECTOR_BYTES,
            IvLayout::Sectors => false,
            IvLayout::UpperHalf => return Err(NoTable::Iv(layout.iv())),
        };
        if !start_bytes.is_multiple_of(SECTOR_BYTES.into()) {
            return Err(NoTable::Start(start_bytes));
        }
        Ok(Self {
            target: Target::Crypt,
            length_sectors: layout.size_bytes() / u64::from(SECTOR_BYTES),
            cipher: CipherSpec { cipher: Cipher::of(layout.mode()), iv: IvMode::Plain64 },
            key: TableKey::Absent,
            iv_offset_sectors: layout.iv_offset_sectors(),
            device: device.to_owned(),
            start_sectors: start_bytes / u64::from(SECTOR_BYTES),
            allow_discards: false,
            sector_size,
            iv_large_sectors,
            key_type: None,
            indifferent: Vec::new(),
        })
    }

    /// The IV layout that it means.
    #[must_use]
    pub fn iv(&self) -> IvLayout {
        if self.iv_large_sectors || self.sector_size.bytes() == SECTOR_BYTES {
            IvLayout::DataUnits
        } else {
            IvLayout::Sectors
        }
    }

    /// Whether its IVs fit what the IV mode keeps of them: `plain` drops all but 32 bits, which nobody means to happen.
    #[must_use]
    pub fn iv_fits(&self) -> bool {
        let last = self.iv_offset_sectors.checked_add(self.length_sectors - 1);
        let shift = match self.iv() {
            IvLayout::Sectors => 0,
            IvLayout::DataUnits | IvLayout::UpperHalf => self.sector_size.log2() - 9,
        };
        match self.cipher.iv {
            IvMode::Plain64 => last.is_some(),
            IvMode::Plain => last.is_some_and(|last| last >> shift <= u32::MAX.into()),
        }
    }

    /// The line with its key, for whoever may see that.
    #[must_use]
    pub fn with_key(&self) -> Zeroizing<String> {
        let TableKey::Bytes(bytes) = &self.key else { return Zeroizing::new(self.to_string()) };
        let mut digits = Zeroizing::new(String::with_capacity(bytes.len() * 2));
        for byte in bytes.iter() {
            let _ = write!(digits, "{byte:02x}");
        }
        let (before, after) = self.around_key();
        let mut line = Zeroizing::new(String::with_capacity(before.len() + digits.len() + after.len()));
        line.push_str(&before);
        line.push_str(&digits);
        line.push_str(&after);
        line
    }

    fn around_key(&self) -> (String, String) {
        let Self {
            target,
            length_sectors,
            cipher,
            key: _,
            iv_offset_sectors,
            device,
            start_sectors,
            allow_discards,
            sector_size,
            iv_large_sectors,
            key_type,
            indifferent,
        } = self;
        let mut options = Vec::new();
        match key_type {
            Some(KeyType::Raw) => options.push("keytype:raw".to_owned()),
            Some(KeyType::HardwareWrapped) => options.push("keytype:hw-wrapped".to_owned()),
            None => {}
        }
        options.extend(allow_discards.then(|| "allow_discards".to_owned()));
        if sector_size.bytes() != SECTOR_BYTES {
            options.push(format!("sector_size:{sector_size}"));
        }
        options.extend(iv_large_sectors.then(|| "iv_large_sectors".to_owned()));
        options.extend(indifferent.iter().map(|option| option.name().to_owned()));
        let mut after = format!(" {iv_offset_sectors} {} {start_sectors}", escaped(device));
        if !options.is_empty() {
            let _ = write!(after, " {} {}", options.len(), options.join(" "));
        }
        (format!("0 {length_sectors} {target} {cipher} "), after)
    }
}

/// As the kernel takes it, but for a key's bytes, for which `-` stands.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = self.around_key();
        f.write_str(&before)?;
        match &self.key {
            TableKey::Absent | TableKey::Bytes(_) => f.write_str("-")?,
            TableKey::Keyring { bytes, kind, description } => {
                write!(f, ":{bytes}:{}:{}", escaped(kind), escaped(description))?;
            }
        }
        f.write_str(&after)
    }
}

/// With a backslash before what would end the word or take the backslash's meaning.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\\' || c.is_ascii_whitespace() || c == '\x0b' {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// The one line that is neither blank nor a comment, and where it begins.
fn the_line(text: &str) -> Result<(&str, usize), TableError> {
    let mut found = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let start = at;
        at += line.len();
        let line = line.strip_suffix('\n').unwrap_or(line);
        if line.trim_start().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        if found.is_some() {
            return Err(TableError { field: Field::Start, at: start..at, why: Why::SecondLine, shown: None });
        }
        found = Some((line, start));
    }
    Ok(found.unwrap_or((text, 0)))
}

/// The key field. Nothing of it gets into an error.
fn key(word: &Word<'_>, table: &Table) -> Result<TableKey, TableError> {
    let wrong = |why| Err(word.wrong(Field::Key, why));
    let is_wrapped = table.key_type == Some(KeyType::HardwareWrapped);
    let cipher = table.cipher.cipher;
    let fits = |len: usize| match table.target {
        _ if is_wrapped => (1..=WRAPPED_KEY_BYTES_MAX).contains(&len),
        Target::Crypt => cipher.mode(len).is_some(),
        Target::Inlinecrypt => len == 64,
    };
    if word.text == "-" {
        return Ok(TableKey::Absent);
    }
    if let Some(rest) = word.text.strip_prefix(':') {
        let mut parts = rest.splitn(3, ':');
        let (Some(size), Some(kind), Some(description)) = (parts.next(), parts.next(), parts.next()) else {
            return wrong(Why::Keyring);
        };
        let plain = |text| Word { text, at: word.at.clone() }.plain().into_owned();
        let (kind, description) = (plain(kind), plain(description));
        let bytes = size.parse().ok().filter(|_| size.bytes().all(|byte| byte.is_ascii_digit()));
        return match bytes {
            Some(bytes) if !kind.is_empty() && !kind.contains(':') && !description.is_empty() => {
                if !fits(bytes) {
                    return wrong(Why::KeyLength { actual: bytes, cipher });
                }
                Ok(TableKey::Keyring { bytes, kind, description })
            }
            _ => wrong(Why::Keyring),
        };
    }
    let digits = word.text.as_bytes();
    let mut bytes = Zeroizing::new(Vec::with_capacity(digits.len() / 2));
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return wrong(Why::NotAKey);
    }
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return wrong(Why::HalfAByte);
    }
    for &[high, low] in pairs {
        match (value(high), value(low)) {
            (Some(high), Some(low)) => bytes.push(high << 4 | low),
            _ => return wrong(Why::NotAKey),
        }
    }
    if !fits(bytes.len()) {
        let actual = bytes.len();
        bytes.zeroize();
        return wrong(Why::KeyLength { actual, cipher });
    }
    Ok(TableKey::Bytes(bytes))
}

#[cfg(test)]
mod tests;
