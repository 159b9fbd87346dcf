use super::*;
use crate::config::Mode;
use proptest::prelude::*;

const XTS_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\
                       202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f";

fn parse(line: &str) -> Result<Table, (Field, Why)> {
    Table::parse(line).map_err(|error| (error.field, error.why))
}

#[test]
fn the_lines_of_the_images_are_understood() {
    let line = format!(
        "0 256 crypt aes-xts-plain64 {XTS_KEY} 34359738360 /dev/loop0 64 2 sector_size:4096 iv_large_sectors"
    );
    let table = Table::parse(&line).unwrap();
    assert_eq!((table.length_sectors, table.start_sectors), (256, 64));
    assert_eq!(table.iv_offset_sectors, 34_359_738_360);
    assert_eq!((table.sector_size.bytes(), table.iv()), (4096, IvLayout::DataUnits));
    assert!(!table.allow_discards);
    let TableKey::Bytes(key) = &table.key else { panic!("{table:?}") };
    assert!(key.iter().copied().eq(0..64));
    assert_eq!(*table.with_key(), line);
    // Without iv_large_sectors, sectors are counted.
    let table = Table::parse("0 256 crypt aes-xts-plain64 - 8 /dev/sdx 64 1 sector_size:4096").unwrap();
    assert_eq!((table.iv(), table.key), (IvLayout::Sectors, TableKey::Absent));
    // As dmsetup prints a table, with a device's number, and as a file may hold it.
    let table =
        Table::parse("# a comment\n\n  0 8 crypt aes-cbc-essiv:sha256 :16:logon:my:key 0 7:0 0\n").unwrap();
    assert_eq!(table.device, "7:0");
    let keyring = TableKey::Keyring { bytes: 16, kind: "logon".into(), description: "my:key".into() };
    assert_eq!(table.key, keyring);
    let line = "0 8 crypt aes-xts-plain64 - 0 a\\ b\\\\c 0 3 allow_discards no_read_workqueue same_cpu_crypt";
    let table = Table::parse(line).unwrap();
    assert_eq!(table.device, "a b\\c");
    assert!(table.allow_discards);
    assert_eq!(table.indifferent, [Indifferent::NoReadWorkqueue, Indifferent::SameCpuCrypt]);
    assert_eq!(table.to_string(), line);
}

#[test]
fn dm_inlinecrypt_takes_what_its_constructor_takes() {
    let line = "0 8 inlinecrypt aes-xts-plain64 - 0 /dev/sdx 0";
    assert_eq!(parse(line).unwrap().target, Target::Inlinecrypt);
    let with = |options: &str| parse(&format!("{line} {options}"));
    let wrapped = with("3 keytype:hw-wrapped sector_size:4096 iv_large_sectors").unwrap();
    assert_eq!(wrapped.key_type, Some(KeyType::HardwareWrapped));
    assert_eq!(with("1 sector_size:4096"), Err((Field::Option, Why::NeedsLargeSectors)));
    assert_eq!(with("1 keytype:cooked"), Err((Field::Option, Why::KeyType)));
    assert_eq!(with("1 same_cpu_crypt"), Err((Field::Option, Why::UnknownOption)));
    let other = "0 8 inlinecrypt capi:xts(aes)-plain64 - 0 /dev/sdx 0";
    assert_eq!(parse(other), Err((Field::Cipher, Why::NotInlinecrypts)));
    let short = format!("0 8 inlinecrypt aes-xts-plain64 {} 0 /dev/sdx 0", &XTS_KEY[..64]);
    assert_eq!(parse(&short), Err((Field::Key, Why::KeyLength { actual: 32, cipher: Cipher::AesXts })));
    assert_eq!(
        parse("0 8 crypt aes-xts-plain64 - 0 /dev/sdx 0 1 keytype:raw"),
        Err((Field::Option, Why::NotCrypts))
    );
}

#[test]
fn what_is_refused_says_which_field_and_why() {
    use Field as F;
    let line = |at: usize, text: &str| {
        let mut words: Vec<&str> =
            "0 16 crypt aes-xts-plain64 - 0 /dev/sdx 64 1 sector_size:4096".split(' ').collect();
        words[at] = text;
        words.join(" ")
    };
    let eight = Why::NotWholeUnits { unit_bytes: 4096 };
    let short = Why::KeyLength { actual: 2, cipher: Cipher::AesXts };
    for (at, text, field, why) in [
        (0, "x", F::Start, Why::NotANumber),
        (0, "-1", F::Start, Why::NotANumber),
        (0, "8", F::Start, Why::NotTheFirst),
        (1, "0", F::Length, Why::Empty),
        (1, "+8", F::Length, Why::NotANumber),
        (1, "36028797018963968", F::Length, Why::TooLarge),
        (1, "99999999999999999999", F::Length, Why::TooLarge),
        (1, "12", F::Length, eight.clone()),
        (2, "linear", F::Target, Why::UnknownTarget),
        (3, "aes", F::Cipher, Why::Cipher(CipherError::Form)),
        (4, "nothex", F::Key, Why::NotAKey),
        (4, "012", F::Key, Why::HalfAByte),
        (4, "0123", F::Key, short.clone()),
        (4, ":2:logon:k", F::Key, short),
        (4, ":64:logon", F::Key, Why::Keyring),
        (4, ":x:logon:k", F::Key, Why::Keyring),
        (5, "4", F::IvOffset, eight),
        (5, "1.5", F::IvOffset, Why::NotANumber),
        (7, "36028797018963967", F::DeviceStart, Why::TooLarge),
        (8, "2", F::OptionCount, Why::OptionCount { found: 1 }),
        (8, "x", F::OptionCount, Why::NotANumber),
        (9, "sector_size:8192", F::Option, Why::SectorSize),
        (9, "sector_size:256", F::Option, Why::SectorSize),
        (9, "sector_size:+512", F::Option, Why::SectorSize),
        (9, "sector_size", F::Option, Why::UnknownOption),
        (9, "integrity:32:aead", F::Option, Why::Integrity),
        (9, "allow_discard", F::Option, Why::UnknownOption),
    ] {
        let line = line(at, text);
        assert_eq!(parse(&line), Err((field, why)), "{line}");
        let error = Table::parse(&line).unwrap_err();
        assert_eq!(&line[error.at.clone()], text, "it points at the field");
        assert!(error.to_string().contains(&field.to_string()), "{error}");
        assert_eq!(error.to_string().contains(text), field != F::Key, "{error}");
    }
    assert_eq!(parse(""), Err((F::Start, Why::Missing)));
    assert_eq!(parse("0 8 crypt aes-xts-plain64 -"), Err((F::IvOffset, Why::Missing)));
    let two = "0 8 crypt aes-xts-plain64 - 0 d 0\n8 8 crypt aes-xts-plain64 - 0 d 8\n";
    assert_eq!(parse(two), Err((F::Start, Why::SecondLine)));
}

/// Nobody who reads a log or a message learns a key.
#[test]
fn keys_do_not_show() {
    let table = Table::parse(&format!("0 8 crypt aes-xts-plain64 {XTS_KEY} 0 /dev/sdx 0")).unwrap();
    assert!(!format!("{table:?}{table}").contains("0102"));
    assert_eq!(table.to_string(), "0 8 crypt aes-xts-plain64 - 0 /dev/sdx 0");
    let error = Table::parse(&format!("0 8 crypt aes-xts-plain64 {XTS_KEY}0 0 /dev/sdx 0")).unwrap_err();
    assert!(!format!("{error:?}{error}").contains("0102"));
    let error = Table::parse(&format!("0 8 crypt aes-xts-plain64 x{XTS_KEY} 0 /dev/sdx 0")).unwrap_err();
    assert!(!format!("{error:?}{error}").contains("0102"));
    // Also not if it stands where the key does not belong.
    let mut words = vec!["0", "8", "crypt", "aes-xts-plain64", "0", "/dev/sdx", "0", "0"];
    for at in 0..words.len() {
        words.insert(at, XTS_KEY);
        match Table::parse(&words.join(" ")) {
            Ok(table) => assert_eq!(at, 4, "{table:?}"),
            Err(error) => assert!(!format!("{error:?}{error}").contains("0102"), "{error}"),
        }
        words.remove(at);
    }
    let slashed = format!("{}\\{}", &XTS_KEY[..31], &XTS_KEY[31..62]);
    let error = Table::parse(&format!("0 8 {slashed} aes-xts-plain64 - 0 d 0")).unwrap_err();
    assert!(!format!("{error:?}{error}").contains("0102"), "{error}");
    let error = Table::parse(&format!("0 8 crypt aes-{XTS_KEY}-plain64 - 0 d 0")).unwrap_err();
    assert!(!format!("{error:?}{error}").contains("0102"), "{error}");
}

#[test]
fn an_iv_of_32_bits_is_only_served_where_nothing_is_dropped() {
    let fits = |iv: &str, offset: u64, options: &str| {
        Table::parse(&format!("0 8 crypt aes-xts-{iv} - {offset} d 0 {options}")).unwrap().iv_fits()
    };
    assert!(fits("plain", (1 << 32) - 8, ""));
    assert!(!fits("plain", (1 << 32) - 7, ""));
    assert!(fits("plain64", (1 << 32) - 7, ""));
    assert!(fits("plain", (1 << 35) - 8, "2 sector_size:4096 iv_large_sectors"));
    assert!(!fits("plain", (1 << 35) - 8, "1 sector_size:4096"));
    assert!(!fits("plain64", u64::MAX, ""));
}

#[test]
fn volumes_have_lines_if_linux_has_their_layout() {
    let unit = |bytes| DataUnitSize::from_bytes(bytes).unwrap();
    let layout =
        |mode, bytes, iv| Layout::new(mode, unit(bytes), None, 256, 1 << 20).unwrap().with_iv(iv).unwrap();
    let line = |mode, bytes, iv| {
        Table::of(&layout(mode, bytes, iv), "/dev/sdx", 32768).map(|table| table.to_string())
    };
    let (units, sectors) = (IvLayout::DataUnits, IvLayout::Sectors);
    assert_eq!(
        line(Mode::Aes256Xts, 4096, units).unwrap(),
        "0 2048 crypt aes-xts-plain64 - 256 /dev/sdx 64 2 sector_size:4096 iv_large_sectors"
    );
    assert_eq!(
        line(Mode::Aes128Xts, 4096, sectors).unwrap(),
        "0 2048 crypt aes-xts-plain64 - 256 /dev/sdx 64 1 sector_size:4096"
    );
    assert_eq!(
        line(Mode::Aes128CbcEssiv, 512, units).unwrap(),
        "0 2048 crypt aes-cbc-essiv:sha256 - 256 /dev/sdx 64"
    );
    assert_eq!(line(Mode::Adiantum, 8192, units), Err(NoTable::DataUnit(unit(8192))));
    assert_eq!(line(Mode::Aes256Xts, 512, IvLayout::UpperHalf), Err(NoTable::Iv(IvLayout::UpperHalf)));
    assert_eq!(Table::of(&layout(Mode::Aes256Xts, 512, units), "d", 100), Err(NoTable::Start(100)));
}

fn key_for(target: Target, cipher: Cipher, key_type: Option<KeyType>) -> BoxedStrategy<TableKey> {
    let lens: Vec<usize> = match (target, key_type) {
        (_, Some(KeyType::HardwareWrapped)) => vec![1, 100, 128],
        (Target::Inlinecrypt, _) => vec![64],
        (Target::Crypt, _) => cipher.modes().iter().map(|mode| mode.info().key_bytes).collect(),
    };
    let len = prop::sample::select(lens);
    prop_oneof![
        Just(TableKey::Absent),
        (len.clone(), any::<u64>()).prop_map(|(len, seed)| {
            TableKey::Bytes(Zeroizing::new(
                (0..len).map(|at| (seed >> (at % 8 * 8)).to_le_bytes()[0]).collect(),
            ))
        }),
        (len, "[a-z]{1,9}", "\\PC{1,20}").prop_map(|(bytes, kind, description)| TableKey::Keyring {
            bytes,
            kind,
            description
        }),
    ]
    .boxed()
}

fn tables() -> impl Strategy<Value = Table> {
    let key_type = prop_oneof![Just(None), Just(Some(KeyType::Raw)), Just(Some(KeyType::HardwareWrapped))];
    let head = (
        any::<bool>(),
        prop::sample::select(&Cipher::ALL[..]),
        any::<bool>(),
        key_type,
        9u32..=12,
        (1u64..1 << 40, 0u64..1 << 50, 0u64..1 << 40),
        any::<(bool, bool)>(),
        "[ -~\\t\\PC]{1,20}",
        prop::sample::subsequence(&Indifferent::ALL[..], 0..=5),
    );
    head.prop_flat_map(
        |(
            crypt,
            cipher,
            plain,
            key_type,
            log2,
            (units, offset, start),
            (discards, large),
            device,
            indifferent,
        )| {
            let (target, cipher, key_type, indifferent, large) = if crypt {
                (Target::Crypt, cipher, None, indifferent, large)
            } else {
                (Target::Inlinecrypt, Cipher::AesXts, key_type, Vec::new(), true)
            };
            let iv = if plain && crypt { IvMode::Plain } else { IvMode::Plain64 };
            key_for(target, cipher, key_type).prop_map(move |key| Table {
                target,
                length_sectors: units << (log2 - 9),
                cipher: CipherSpec { cipher, iv },
                key,
                iv_offset_sectors: offset << (log2 - 9),
                device: device.clone(),
                start_sectors: start,
                allow_discards: discards,
                sector_size: DataUnitSize::from_bytes(1 << log2).unwrap(),
                iv_large_sectors: large,
                key_type,
                indifferent: indifferent.clone(),
            })
        },
    )
}

proptest! {
    #[test]
    fn what_is_printed_is_what_was_meant(table in tables()) {
        let line = table.with_key();
        prop_assert_eq!(Table::parse(&line).map_err(|error| error.to_string()), Ok(table.clone()), "{}", *line);
        // Without the key all else is the same.
        let absent = Table::parse(&table.to_string()).unwrap();
        if let TableKey::Bytes(_) = table.key {
            prop_assert_eq!(absent, Table { key: TableKey::Absent, ..table });
        } else {
            prop_assert_eq!(absent, table);
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "[0-9a-f:\\\\ \\n\\PC]{0,80}") {
        let _ = Table::parse(&text);
        let _ = Table::parse(&format!("0 8 crypt aes-xts-plain64 {text}"));
    }
}
