//! Roots in files: who may reach them, how they are made, what damage is found.

use super::file::{Access, shell_word, split};
use super::*;
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode};
use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Barrier;
use tempfile::TempDir;

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A root file as it stands, and where.
fn root_file() -> (TempDir, PathBuf, Vec<u8>) {
    let directory = directory();
    let path = directory.path().join("root");
    Root::create_file(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    (directory, path, bytes)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The error of opening a root. It names the file, on one line.
#[track_caller]
fn refusal(path: &Path) -> (ErrorKind, String) {
    described(path, Root::open_file(path))
}

#[track_caller]
fn described(path: &Path, result: Result<Root, Error>) -> (ErrorKind, String) {
    let error = result.expect_err("must be refused");
    let text = error.chain();
    assert!(text.contains(&path.display().to_string()) && text.lines().count() == 1, "{text}");
    (error.kind(), text)
}

fn names_in(directory: &Path) -> Vec<OsString> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn a_new_root_is_for_its_owner_alone_and_opens_again() {
    let directory = directory();
    let path = directory.path().join("new").join("deeper").join("root");
    let created = Root::create_file(&path).unwrap();
    let opened = Root::open_file(&path).unwrap();

    assert_eq!(created.id(), opened.id());
    let status = fs::metadata(&path).unwrap();
    assert_eq!((status.mode() & 0o7777, status.len(), status.nlink()), (0o600, 64, 1));
    for parent in path.ancestors().skip(1).take(2) {
        assert_eq!(fs::metadata(parent).unwrap().mode() & 0o7777, 0o700);
    }
    assert_eq!(names_in(path.parent().unwrap()), ["root"]);
}

#[test]
fn two_roots_differ() {
    let directory = directory();
    let [one, other] = ["one", "other"].map(|name| Root::create_file(directory.path().join(name)).unwrap());
    assert_ne!(one.id(), other.id());
}

#[test]
fn creating_never_replaces_what_is_there() {
    let (directory, path, bytes) = root_file();
    assert_eq!(described(&path, Root::create_file(&path)).0, ErrorKind::Invalid);
    assert_eq!(fs::read(&path).unwrap(), bytes);

    let dangling = directory.path().join("dangling");
    symlink(directory.path().join("nowhere"), &dangling).unwrap();
    assert_eq!(described(&dangling, Root::create_file(&dangling)).0, ErrorKind::Invalid);
    assert_eq!(described(&dangling, Root::open_or_create_file(&dangling)).0, ErrorKind::NotFound);
    assert_eq!(names_in(directory.path()).len(), 2);
}

#[test]
fn a_damaged_root_is_not_replaced_by_a_new_one() {
    let (_directory, path, mut bytes) = root_file();
    bytes[30] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert_eq!(described(&path, Root::open_or_create_file(&path)).0, ErrorKind::KeyRejected);
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn first_starts_at_once_end_with_one_root() {
    const STARTERS: usize = 8;
    for _ in 0..20 {
        let directory = directory();
        let path = directory.path().join("made").join("root");
        let barrier = Barrier::new(STARTERS);
        let ids: Vec<_> = std::thread::scope(|scope| {
            let starters: Vec<_> = (0..STARTERS)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        Root::open_or_create_file(&path).unwrap().id()
                    })
                })
                .collect();
            starters.into_iter().map(|starter| starter.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(Root::open_file(&path).unwrap().id(), ids[0]);
        assert_eq!(names_in(path.parent().unwrap()), ["root"]);
    }
}

#[test]
fn creators_at_once_have_one_winner() {
    let directory = directory();
    let path = directory.path().join("root");
    let results: Vec<_> = std::thread::scope(|scope| {
        let creators: Vec<_> = (0..8).map(|_| scope.spawn(|| Root::create_file(&path))).collect();
        creators.into_iter().map(|creator| creator.join().unwrap()).collect()
    });
    let mut winners = results.iter().filter_map(|result| result.as_ref().ok());
    assert_eq!(winners.next().unwrap().id(), Root::open_file(&path).unwrap().id());
    assert!(winners.next().is_none());
}

#[test]
fn any_access_for_others_is_refused_with_the_command_that_ends_it() {
    let (_directory, path, _) = root_file();
    for mode in 1..=0o077 {
        set_mode(&path, 0o600 | mode);
        let (kind, text) = refusal(&path);
        assert_eq!(kind, ErrorKind::Permission, "{mode:o}");
        assert!(text.contains(&format!("mode {:04o}", 0o600 | mode)), "{text}");
        assert!(text.contains(&format!("chmod 600 {}", path.display())), "{text}");
    }
    for mode in [0o600, 0o400, 0o700] {
        set_mode(&path, mode);
        Root::open_file(&path).unwrap();
    }
}

#[test]
fn a_file_that_we_may_not_read_is_a_matter_of_permission() {
    let (_directory, path, _) = root_file();
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: root may read everything");
        return;
    }
    set_mode(&path, 0);
    assert_eq!(refusal(&path).0, ErrorKind::Permission);
    assert_eq!(described(&path, Root::open_or_create_file(&path)).0, ErrorKind::Permission);
}

#[test]
fn a_file_is_trusted_if_it_is_ours_or_roots() {
    let path = Path::new("/root-file");
    let owned = |owner, us| Access { is_file: true, permissions: 0o600, owner, us }.check(path);
    assert!(owned(1000, 1000).is_ok());
    assert!(owned(0, 1000).is_ok());
    assert!(owned(0, 0).is_ok());
    for (owner, us) in [(1001, 1000), (1000, 0)] {
        let (kind, why) = owned(owner, us).unwrap_err();
        assert_eq!(kind, ErrorKind::Permission);
        assert!(why.contains(&format!("chown {us} /root-file")), "{why}");
    }
}

#[test]
fn a_file_of_somebody_else_is_refused() {
    let (_directory, path, _) = root_file();
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
    let (kind, text) = refusal(&path);
    assert_eq!(kind, ErrorKind::Permission);
    assert!(text.contains("belongs to user 12345"), "{text}");
}

#[test]
fn what_is_not_a_regular_file_is_refused_without_waiting() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("directory")).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _listener = UnixListener::bind(at("socket")).unwrap();
    symlink(at("loop"), at("loop")).unwrap();
    symlink("/dev/null", at("null")).unwrap();
    for name in ["directory", "fifo", "socket", "loop", "null"] {
        assert_eq!(refusal(&at(name)).0, ErrorKind::Invalid, "{name}");
        assert_eq!(described(&at(name), Root::open_or_create_file(at(name))).0, ErrorKind::Invalid, "{name}");
    }
}

#[test]
fn a_symbolic_link_to_a_root_is_followed() {
    let (directory, path, _) = root_file();
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    assert_eq!(Root::open_file(&link).unwrap().id(), Root::open_file(&path).unwrap().id());
    assert_eq!(Root::open_or_create_file(&link).unwrap().id(), Root::open_file(&path).unwrap().id());
}

#[test]
fn a_missing_file_is_not_found_and_a_file_for_a_directory_invalid() {
    let (directory, path, _) = root_file();
    assert_eq!(refusal(&directory.path().join("none")).0, ErrorKind::NotFound);
    assert_eq!(refusal(&path.join("below")).0, ErrorKind::Invalid);
    assert_eq!(described(&path.join("below"), Root::create_file(path.join("below"))).0, ErrorKind::Invalid);
    for nameless in ["/", "", "..", "/tmp/.."] {
        assert_eq!(Root::create_file(nameless).unwrap_err().kind(), ErrorKind::Invalid, "{nameless:?}");
    }
}

#[test]
fn a_path_in_a_command_can_be_pasted() {
    assert_eq!(shell_word(Path::new("/var/lib/root-1")), "/var/lib/root-1");
    assert_eq!(shell_word(Path::new("/my keys/it's")), r"'/my keys/it'\''s'");
}

#[test]
fn a_name_alone_means_the_directory_we_are_in() {
    assert_eq!(split(Path::new("root")), Some((Path::new("."), "root".as_ref())));
}

#[test]
fn every_flipped_bit_and_every_other_length_is_refused() {
    let (_directory, path, bytes) = root_file();
    let kind_of = |changed: &[u8]| {
        fs::write(&path, changed).unwrap();
        refusal(&path).0
    };
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        // Magic and version: another kind of file. The rest: a damaged root.
        let expected = if bit / 8 < SECRET_AT { ErrorKind::Invalid } else { ErrorKind::KeyRejected };
        assert_eq!(kind_of(&changed), expected, "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert_eq!(kind_of(&bytes[..len]), ErrorKind::KeyRejected, "cut to {len}");
    }
    for more in [1, 64, 1 << 20] {
        let mut changed = bytes.clone();
        changed.resize(bytes.len() + more, 0);
        assert_eq!(kind_of(&changed), ErrorKind::KeyRejected, "{more} more");
    }
    fs::write(&path, &bytes).unwrap();
    Root::open_file(&path).unwrap();
}

#[test]
fn each_damage_has_its_message() {
    let (_directory, path, bytes) = root_file();
    let blob = Root::open_file(&path).unwrap().wrapper().wrap(&[7; 32]);
    let long = [&bytes[..], b"\n"].concat();
    let mut version = bytes.clone();
    version[16] = 3;
    let mut secret = bytes.clone();
    secret[40] ^= 1;
    let cases: [(&[u8], &str); 7] = [
        (b"", "empty"),
        (&bytes[..63], "cut off after 63 bytes"),
        (&long, "longer than the 64 bytes"),
        (&version, "version 3; this program knows 1 and 2"),
        (&secret, "check value is wrong"),
        (&[0x17; 64], "is not a root file"),
        (&blob, "is a long-term wrapped key, not a root"),
    ];
    for (content, expected) in cases {
        fs::write(&path, content).unwrap();
        let (_, text) = refusal(&path);
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

/// Pins format and derivation: if this fails, roots of earlier versions open nothing any more. Computed by another
/// implementation (Python's `cryptography`) from the documentation.
#[test]
fn the_format_of_version_1_does_not_change() {
    let secret: [u8; 32] = std::array::from_fn(|i| u8::try_from(i).unwrap());
    let root = Root::from_secret(&secret, RootSpec::File("/r".into()));
    assert_eq!(hex::encode(&serialize(&secret)[..SECRET_AT]), "696e6c696e65637279707420726f6f7401000000");
    assert_eq!(hex::encode(check_value(&secret)), "8b534ef05075f39d32d7afdb");
    assert_eq!(root.id().to_string(), "f0448990fb0900fd");
}

#[test]
fn debug_shows_the_public_name_and_the_place_only() {
    let root = Root::from_secret(&[0xb7; 32], RootSpec::File("/r".into()));
    assert_eq!(format!("{root:?}"), format!("Root({}, file:/r)", root.id()));
}

/// Answers with one passphrase, and counts how often it was asked.
struct Answers(&'static [u8], u32);

impl Ask for Answers {
    fn secret(&mut self, _question: &Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        self.1 += 1;
        Ok(Zeroizing::new(self.0.to_vec()))
    }

    fn helper(&mut self) -> Result<std::process::Command, Error> {
        Ok(std::process::Command::new("false"))
    }
}

#[test]
fn a_root_changes_its_keeper_and_stays_the_same_root() {
    let (directory, path, plain) = root_file();
    let file = RootSpec::File(path.clone());
    let id = Root::open(&file).unwrap().id();
    let sealed_at = directory.path().join("sealed");
    let sealed = RootSpec::Passphrase(sealed_at.clone());

    Root::rewrap(&file, &mut Unattended, &sealed, &mut Answers(b"one", 0)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), plain, "the old one is left alone");
    let mut ask = Answers(b"one", 0);
    assert_eq!(Root::open_with(&sealed, &mut ask).unwrap().id(), id);
    assert_eq!(ask.1, 1);
    assert_eq!(fs::metadata(&sealed_at).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(RootInfo::look(&sealed).unwrap().id(), id);
    assert!(sealed.needs_asking() && !file.needs_asking());
    let stored = fs::read(&sealed_at).unwrap();
    assert!(
        !stored.windows(8).any(|bytes| plain[SECRET_AT..CHECK_AT].windows(8).any(|secret| bytes == secret))
    );

    // In place, through a link: another passphrase.
    let mut old = File::open(&sealed_at).unwrap();
    let link = directory.path().join("link");
    symlink(&sealed_at, &link).unwrap();
    Root::rewrap(
        &sealed,
        &mut Answers(b"one", 0),
        &RootSpec::Passphrase(link.clone()),
        &mut Answers(b"two", 0),
    )
    .unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let mut untouched = Vec::new();
    std::io::Read::read_to_end(&mut old, &mut untouched).unwrap();
    assert_eq!(untouched, stored, "the old file was written to, not replaced");
    let wrong = Root::open_with(&sealed, &mut Answers(b"one", 0)).unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::KeyRejected);
    assert!(wrong.to_string().contains("does not open with this passphrase"), "{wrong}");

    // And back to a file as it is, under the same name.
    let back = RootSpec::File(sealed_at.clone());
    Root::rewrap(&sealed, &mut Answers(b"two", 0), &back, &mut Unattended).unwrap();
    assert_eq!(fs::read(&sealed_at).unwrap(), plain);
    assert_eq!(names_in(directory.path()).len(), 3);
}

#[test]
fn a_failed_rewrap_leaves_everything_as_it_was() {
    let (directory, path, plain) = root_file();
    let file = RootSpec::File(path.clone());
    let at = |name: &str| directory.path().join(name);
    fs::write(at("other"), b"mine").unwrap();
    for (to, kind) in [
        // Something has the name, no passphrase, a helper that says nothing: also in place.
        (format!("passphrase:{}", at("other").display()), ErrorKind::Invalid),
        (format!("passphrase:{}", at("new").display()), ErrorKind::KeyRejected),
        (format!("passphrase:{}", path.display()), ErrorKind::KeyRejected),
        (format!("tpm2:{}", path.display()), ErrorKind::EngineFailed),
    ] {
        let error =
            Root::rewrap(&file, &mut Unattended, &to.parse().unwrap(), &mut Answers(b"", 0)).unwrap_err();
        assert_eq!(error.kind(), kind, "{to}: {error}");
        assert_eq!(fs::read(&path).unwrap(), plain);
        assert_eq!(fs::read(at("other")).unwrap(), b"mine");
        assert_eq!(names_in(directory.path()).len(), 2);
    }
}

#[test]
fn roots_that_nobody_is_there_to_open_say_so() {
    let directory = directory();
    let spec = RootSpec::Passphrase(directory.path().join("p"));
    assert_eq!(Root::open(&spec).unwrap_err().kind(), ErrorKind::NotFound);
    // Never made by the way: a typing error would make one.
    assert_eq!(Root::open_or_create(&spec, &mut Answers(b"x", 0)).unwrap_err().kind(), ErrorKind::NotFound);
    Root::create(&spec, &mut Answers(b"x", 0)).unwrap();
    let error = Root::open(&spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.to_string().contains("nobody to ask"), "{error}");
}

#[test]
fn a_root_of_another_kind_is_refused_with_the_right_one() {
    let (directory, path, _) = root_file();
    let sealed = directory.path().join("sealed");
    Root::create(&RootSpec::Passphrase(sealed.clone()), &mut Answers(b"x", 0)).unwrap();
    for (spec, expected) in [
        (RootSpec::Passphrase(path), "is not wrapped; name it as file:PATH"),
        (RootSpec::File(sealed.clone()), "is wrapped; name it as passphrase:PATH"),
        (format!("tpm2:{}", sealed.display()).parse().unwrap(), "name it as passphrase:..."),
    ] {
        let error = Root::open_with(&spec, &mut Answers(b"x", 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn others_may_not_reach_a_container_either() {
    let directory = directory();
    let spec = RootSpec::Passphrase(directory.path().join("sealed"));
    Root::create(&spec, &mut Answers(b"x", 0)).unwrap();
    set_mode(spec.path(), 0o644);
    let error = Root::open_with(&spec, &mut Answers(b"x", 0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.to_string().contains("chmod 600"), "{error}");
    assert_eq!(RootInfo::look(&spec).unwrap_err().kind(), ErrorKind::Permission);
}

#[test]
fn material_survives_being_sent() {
    let (directory, path, _) = root_file();
    let sealed = RootSpec::Passphrase(directory.path().join("sealed"));
    Root::create(&sealed, &mut Answers(b"x", 0)).unwrap();
    for spec in [RootSpec::File(path), sealed] {
        let expected = Root::open_with(&spec, &mut Answers(b"x", 0)).unwrap().id();
        let material = spec.gather(&mut Answers(b"x", 0)).unwrap();
        assert_eq!(format!("{material:?}"), format!("RootMaterial({spec})"));
        let again = RootMaterial::from_parts(material.into_parts()).unwrap();
        let root = Root::from_material(again).unwrap();
        assert_eq!((root.id(), root.spec()), (expected, &spec));
    }
}

/// Material whose helper answered with `secret`, for a container that says `id`.
fn answered(secret: &[u8; 32], id: WrappingKeyId) -> RootMaterial {
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut opened = Box::new(Zeroizing::new([0; 32]));
    opened.copy_from_slice(secret);
    Answer::send(&Ok(Answer::Opened(opened)), &mut theirs).unwrap();
    let container = Container { keeper: Keeper::Tpm2, asks: false, id, body: vec![1, 2, 3] };
    RootMaterial::Helper { spec: "tpm2:/r".parse().unwrap(), container, answer: ours.into() }
}

#[test]
fn what_a_helper_answers_has_to_be_the_root_that_the_container_names() {
    let id = Root::from_secret(&[7; 32], RootSpec::File("/r".into())).id();
    let sent = RootMaterial::from_parts(answered(&[7; 32], id).into_parts()).unwrap();
    assert_eq!(Root::from_material(sent).unwrap().id(), id);
    let error = Root::from_material(answered(&[8; 32], id)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::KeyRejected);
    assert!(error.to_string().contains("opens to another root"), "{error}");
}

#[test]
fn pieces_that_are_no_material_are_refused() {
    let (_directory, path, _) = root_file();
    let spec = RootSpec::File(path);
    let parts = || spec.gather(&mut Unattended).unwrap().into_parts();
    for spoil in [
        |parts: &mut RootParts| parts.kind = 9,
        |parts: &mut RootParts| parts.kind = 2,
        |parts: &mut RootParts| parts.plain.truncate(3),
        |parts: &mut RootParts| parts.plain[0] = 0xff,
        |parts: &mut RootParts| parts.descriptors.clear(),
        |parts: &mut RootParts| parts.descriptors.push(parts.descriptors[0].try_clone().unwrap()),
    ] {
        let mut parts = parts();
        spoil(&mut parts);
        RootMaterial::from_parts(parts).expect_err("must be refused");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), magic in any::<bool>()) {
        let bytes = if magic { [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat() } else { bytes };
        prop_assert!(parse(&bytes).is_err());
    }

    #[test]
    fn every_secret_survives_the_file(secret in prop::array::uniform32(any::<u8>())) {
        prop_assert_eq!(**parse(&*serialize(&secret)).unwrap(), secret);
    }
}
