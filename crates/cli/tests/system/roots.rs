//! Roots that a TPM or a token keeps: a real TPM in software (swtpm), a real PKCS#11 module (SoftHSM), and the tools that
//! people use with them.

use crate::rig::{PATIENCE, Place, at_a_terminal, run, said};
use inlinecrypt_testkit::{ServerProcess, pattern, require_tool};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

const PIN: &[u8] = b"24681357";

/// A TPM with a state of its own, started and empty.
struct Tpm {
    socket: PathBuf,
    _process: ServerProcess,
}

impl Tpm {
    /// `None` if there is no swtpm.
    fn start(place: &Place, name: &str) -> Option<Self> {
        let swtpm = require_tool("swtpm")?;
        let (state, socket) = (place.path(&format!("{name}.state")), place.path(name));
        fs::create_dir(&state).unwrap();
        let mut command = Command::new(swtpm);
        command
            .args(["socket", "--tpm2", "--flags", "startup-clear,not-need-init"])
            .arg("--tpmstate")
            .arg(format!("dir={}", state.display()))
            .arg("--server")
            .arg(format!("type=unixio,path={}", socket.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}.ctrl", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = ServerProcess::start_at(&mut command, &socket, PATIENCE).expect("swtpm starts");
        Some(Self { socket, _process: process })
    }

    /// How a root that it keeps in `file` is written.
    fn root(&self, file: &str, options: &str) -> String {
        format!("tpm2:{file}{options},tcti=unix:{}", self.socket.display())
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> Option<String> {
        let mut command = Command::new(require_tool(name)?);
        command.env("TPM2TOOLS_TCTI", format!("swtpm:path={}", self.socket.display())).args(arguments);
        Some(run(&mut command))
    }
}

/// SoftHSM with tokens of its own.
struct Tokens {
    config: PathBuf,
    module: PathBuf,
}

impl Tokens {
    /// `None` if there is no SoftHSM.
    fn new(place: &Place, labels: &[&str]) -> Option<Self> {
        let tool = require_tool("softhsm2-util")?;
        let places = ["/usr/lib/softhsm", "/usr/lib64/pkcs11", "/usr/local/lib/softhsm", "/usr/lib/pkcs11"];
        let module =
            places.map(|folder| Path::new(folder).join("libsofthsm2.so")).into_iter().find(|m| m.exists());
        let module = module.expect("softhsm2-util is there, and its module is not");
        let (config, tokens) = (place.path("softhsm2.conf"), place.path("tokens"));
        fs::create_dir(&tokens).unwrap();
        let text = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
        fs::write(&config, text).unwrap();
        let this = Self { config, module };
        for label in labels {
            let pin = str::from_utf8(PIN).unwrap();
            let arguments =
                ["--init-token", "--free", "--label", label, "--so-pin", "99999999", "--pin", pin];
            run(Command::new(&tool).env("SOFTHSM2_CONF", &this.config).args(arguments));
        }
        Some(this)
    }

    fn root(&self, token: &str, key: &str, file: &str) -> String {
        format!("pkcs11:token={token};object={key}?module-path={}&file={file}", self.module.display())
    }

    /// Runs our command where it finds these tokens.
    fn run(&self, place: &Place, arguments: &[&str]) -> Output {
        place.command().env("SOFTHSM2_CONF", &self.config).args(arguments).output().unwrap()
    }

    fn run_ok(&self, place: &Place, arguments: &[&str]) -> String {
        done(&self.run(place, arguments))
    }
}

#[track_caller]
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Checks that it failed with this code, saying each of these.
#[track_caller]
fn refused(output: &Output, code: i32, saying: &[&str]) {
    let text = said(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for part in saying {
        assert!(text.contains(part), "{part:?} is missing: {text}");
    }
}

fn pins(place: &Place) {
    place.secret("pin", PIN);
    place.secret("wrong", b"00000000");
    place.secret("word", b"correct horse");
}

/// A root wanders from keeper to keeper. Its volume is served by each, and its identifier stays.
#[test]
fn a_root_goes_from_file_to_tpm_to_token_to_passphrase_and_back() {
    let place = Place::new();
    let (Some(tpm), Some(tokens)) = (Tpm::start(&place, "tpm"), Tokens::new(&place, &["vault"])) else {
        return;
    };
    pins(&place);
    place.run_ok(["root", "create", "root"]);
    place.run_ok(["volume", "create", "--size", "1MiB", "--root", "root", "v.img"]);
    let data = pattern::bytes(1, 0, 8192);
    let server = place.serve(["v.img"]);
    server.client("v").write(4096, &data).unwrap();
    server.stop();
    let plain = fs::read(place.path("root")).unwrap();

    let ways = [
        ("root".to_owned(), "word"),
        (tpm.root("root.tpm", ",pcrs=sha256:7+11,pin"), "pin"),
        (tokens.root("vault", "root", "root.token"), "pin"),
        ("passphrase:root.pass".to_owned(), "word"),
        ("file:back".to_owned(), "word"),
    ];
    let id = |spec: &str| {
        let info = tokens.run_ok(&place, &["root", "info", "--json", spec]);
        serde_json::from_str::<serde_json::Value>(&info).unwrap()["id"].clone()
    };
    for pair in ways.windows(2) {
        let [(from, secret), (to, new_secret)] = pair else { unreachable!("windows of two") };
        let rewrap = ["root", "rewrap", "--from", from, "--passphrase-file", secret, "--to", to];
        tokens.run_ok(&place, &[&rewrap[..], &["--new-passphrase-file", new_secret]].concat());
        assert_eq!(id(from), id(to), "{to}");

        let mut command = place.command();
        command.env("SOFTHSM2_CONF", &tokens.config);
        command.args(["serve", "v.img", "--root", to, "--passphrase-file", new_secret, "--nbd"]);
        command.arg(format!("unix:{}", place.path("nbd.sock").display()));
        command.arg("--control").arg(place.path("control"));
        let server = place.start(command);
        assert_eq!(server.client("v").read(4096, 8192).unwrap(), data, "{to}");
        server.stop();
    }
    assert_eq!(fs::read(place.path("back")).unwrap(), plain);
    for name in ["root.tpm", "root.token", "root.pass"] {
        assert_eq!(fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o7777, 0o600, "{name}");
        let bytes = fs::read(place.path(name)).unwrap();
        assert!(!bytes.windows(16).any(|part| part == &plain[20..36]), "{name} shows the secret");
    }
}

#[test]
fn a_tpm_counts_wrong_pins_and_locks_itself() {
    let place = Place::new();
    let Some(tpm) = Tpm::start(&place, "tpm") else { return };
    pins(&place);
    let root = tpm.root("r", ",pin");
    place.run_ok(["root", "create", &root, "--passphrase-file", "pin"]);
    place.run_ok(["key", "generate", "--root", &root, "--passphrase-file", "pin", "--out", "k"]);
    let open =
        |pin: &str| place.run(["key", "prepare", "--in", "k", "--root", &root, "--passphrase-file", pin]);
    // swtpm's default: three failures.
    refused(&open("wrong"), 2, &["wrong PIN (2 tries left"]);
    refused(&open("wrong"), 2, &["wrong PIN (1 tries left"]);
    done_binary(&open("pin"));
    refused(&open("wrong"), 2, &["locked itself", "tpm2_dictionarylockout"]);
    refused(&open("pin"), 2, &["locked itself"]);
    if tpm.tool("tpm2_dictionarylockout", &["--clear-lockout"]).is_some() {
        done_binary(&open("pin"));
    }
    // Nobody there to ask, and a PIN that is empty.
    let mut alone = Command::new(require_tool("setsid").expect("of util-linux, which every system has"));
    place.prepare(&mut alone);
    alone
        .arg("--wait")
        .arg(env!("CARGO_BIN_EXE_inlinecrypt"))
        .args(["key", "prepare", "--in", "k", "--root", &root]);
    refused(&alone.output().unwrap(), 2, &["PIN of root r", "no terminal", "--passphrase-file"]);
    place.secret("none", b"\n");
    refused(&open("none"), 2, &["empty"]);
}

#[track_caller]
fn done_binary(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_moved_register_is_named_and_others_do_not_matter() {
    let place = Place::new();
    let Some(tpm) = Tpm::start(&place, "tpm") else { return };
    let root = tpm.root("r", ",pcrs=sha256:7+11");
    place.run_ok(["root", "create", &root]);
    place.run_ok(["key", "generate", "--root", &root, "--out", "k"]);
    let digest = format!("{:064x}", 7);
    let Some(_) = tpm.tool("tpm2_pcrextend", &[&format!("12:sha256={digest}")]) else { return };
    place.run_ok(["key", "info", "k", "--root", &root]);
    // The spec need not say again what the container knows, but may not say something else.
    place.run_ok(["key", "info", "k", "--root", &tpm.root("r", "")]);
    let other = tpm.root("r", ",pcrs=sha256:7");
    refused(
        &place.run(["key", "info", "k", "--root", &other]),
        4,
        &["sealed to sha256:7+11, not to sha256:7"],
    );

    tpm.tool("tpm2_pcrextend", &[&format!("11:sha256={digest}")]).unwrap();
    let output = place.run(["key", "info", "k", "--root", &root]);
    refused(&output, 2, &["register 11 of sha256 was 0000000000000000..., and is", "root rewrap"]);
    assert!(!said(&output).contains("register 7"), "{}", said(&output));
}

#[test]
fn another_tpm_opens_nothing_and_says_so() {
    let place = Place::new();
    let (Some(ours), Some(theirs)) = (Tpm::start(&place, "ours"), Tpm::start(&place, "theirs")) else {
        return;
    };
    place.run_ok(["root", "create", &ours.root("r", "")]);
    place.run_ok(["key", "generate", "--root", &ours.root("r", ""), "--out", "k"]);
    let output = place.run(["key", "info", "k", "--root", &theirs.root("r", "")]);
    refused(&output, 2, &["sealed by another TPM, or this one was cleared"]);
    if ours.tool("tpm2_clear", &[]).is_some() {
        let output = place.run(["key", "info", "k", "--root", &ours.root("r", "")]);
        refused(&output, 2, &["sealed by another TPM, or this one was cleared"]);
    }
}

#[test]
fn nothing_is_left_in_the_tpm() {
    let place = Place::new();
    let Some(tpm) = Tpm::start(&place, "tpm") else { return };
    let root = tpm.root("r", "");
    place.run_ok(["root", "create", &root]);
    // More often than a TPM has room for sessions or objects.
    for _ in 0..8 {
        place.run_ok(["key", "generate", "--root", &root, "--out", "k"]);
        fs::remove_file(place.path("k")).unwrap();
    }
    for handles in ["handles-transient", "handles-loaded-session", "handles-persistent"] {
        let Some(left) = tpm.tool("tpm2_getcap", &[handles]) else { return };
        assert_eq!(left.trim(), "", "{handles}");
    }
}

/// Somebody between us and the TPM: hands everything on, remembers it, and changes what it is told to.
struct Interposer {
    socket: PathBuf,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Interposer {
    fn start(place: &Place, tpm: &Tpm, change: impl Fn(u32, &mut Vec<u8>) + Send + 'static) -> Self {
        let (socket, to) = (place.path("between"), tpm.socket.clone());
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let memory = seen.clone();
        // Ends with the process.
        thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, mut tpm) = (client.unwrap(), UnixStream::connect(&to).unwrap());
                while let Some(command) = message(&mut client) {
                    tpm.write_all(&command).unwrap();
                    let code = u32::from_be_bytes(command[6..10].try_into().unwrap());
                    let mut answer = message(&mut tpm).unwrap();
                    memory.lock().unwrap().extend([&command[..], &answer].concat());
                    change(code, &mut answer);
                    client.write_all(&answer).unwrap();
                }
            }
        });
        Self { socket, seen }
    }

    fn root(&self, options: &str) -> String {
        format!("tpm2:r{options},tcti=unix:{}", self.socket.display())
    }
}

fn message(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).ok()?;
    let len = usize::try_from(u32::from_be_bytes(header[2..6].try_into().unwrap())).unwrap();
    let mut rest = vec![0; len - header.len()];
    stream.read_exact(&mut rest).ok()?;
    Some([&header[..], &rest].concat())
}

#[test]
fn whoever_listens_between_us_and_the_tpm_sees_neither_secret_nor_pin() {
    let place = Place::new();
    let Some(tpm) = Tpm::start(&place, "tpm") else { return };
    pins(&place);
    let between = Interposer::start(&place, &tpm, |_, _| {});
    place.run_ok(["root", "create", "plain"]);
    let root = between.root(",pin");
    place.run_ok(["root", "rewrap", "--from", "plain", "--to", &root, "--new-passphrase-file", "pin"]);
    place.run_ok(["key", "generate", "--root", &root, "--passphrase-file", "pin", "--out", "k"]);
    let secret = &fs::read(place.path("plain")).unwrap()[20..52];
    let seen = between.seen.lock().unwrap();
    assert!(seen.len() > 2000, "{} bytes", seen.len());
    for (what, bytes) in [("secret", &secret[..8]), ("PIN", PIN)] {
        assert!(!seen.windows(bytes.len()).any(|part| part == bytes), "the {what} was sent as it is");
    }
}

#[test]
fn an_answer_that_was_changed_on_the_way_is_noticed() {
    const TPM_CC_UNSEAL: u32 = 0x15e;
    const TPM_CC_CREATE_PRIMARY: u32 = 0x131;
    let place = Place::new();
    let Some(tpm) = Tpm::start(&place, "tpm") else { return };
    place.run_ok(["root", "create", &tpm.root("r", "")]);
    place.run_ok(["key", "generate", "--root", &tpm.root("r", ""), "--out", "k"]);
    // One bit of the secret.
    let between = Interposer::start(&place, &tpm, |code, answer| {
        if code == TPM_CC_UNSEAL {
            answer[20] ^= 1;
        }
    });
    let open = |root: &str| place.run(["key", "info", "k", "--root", root]);
    refused(&open(&between.root("")), 2, &["something between us and it changed it"]);
    // One bit of the key for which the session would be salted.
    let between = Interposer::start(&place, &tpm, |code, answer| {
        if code == TPM_CC_CREATE_PRIMARY {
            answer[60] ^= 1;
        }
    });
    refused(&open(&between.root("")), 2, &["another TPM"]);
    done(&open(&tpm.root("r", "")));
}

#[test]
fn a_token_opens_with_its_pin_and_says_what_is_wrong_otherwise() {
    let place = Place::new();
    let Some(tokens) = Tokens::new(&place, &["vault", "other"]) else { return };
    pins(&place);
    let root = tokens.root("vault", "root", "r");
    tokens.run_ok(&place, &["root", "create", &root, "--passphrase-file", "pin"]);
    tokens.run_ok(&place, &["key", "generate", "--root", &root, "--passphrase-file", "pin", "--out", "k"]);
    let open = |root: &str, pin: &str| {
        tokens.run(&place, &["key", "info", "k", "--root", root, "--passphrase-file", pin])
    };
    done(&open(&root, "pin"));
    refused(
        &open(&root, "wrong"),
        2,
        &["wrong PIN for token \"vault\"", "does not say how many tries are left"],
    );
    refused(&open(&tokens.root("none", "root", "r"), "pin"), 4, &["no such token", "\"vault\" (serial"]);
    refused(&open(&tokens.root("vault", "none", "r"), "pin"), 4, &["has no key \"none\""]);
    let any = root.replace("token=vault;", "");
    refused(&open(&any, "pin"), 4, &["fits several tokens"]);
    let libc = "pkcs11:object=root?module-path=libc.so.6&file=r";
    refused(&open(libc, "pin"), 4, &["libc.so.6 cannot be loaded", "C_GetFunctionList"]);

    // Another token with a key of that name.
    tokens
        .run_ok(&place, &["root", "create", &tokens.root("other", "root", "r2"), "--passphrase-file", "pin"]);
    refused(&open(&tokens.root("other", "root", "r"), "pin"), 2, &["on token \"vault\" (serial"]);

    // With the PIN in a file of the URI nobody is asked; others may not read that file.
    let root = format!("{root}&pin-source=file:{}", place.path("pin").display());
    done(&tokens.run(&place, &["key", "info", "k", "--root", &root]));
    fs::set_permissions(place.path("pin"), fs::Permissions::from_mode(0o644)).unwrap();
    refused(&tokens.run(&place, &["key", "info", "k", "--root", &root]), 2, &["chmod 600"]);
}

#[test]
fn the_key_on_the_token_never_leaves_it() {
    let place = Place::new();
    let Some(tokens) = Tokens::new(&place, &["vault"]) else { return };
    let Some(tool) = require_tool("pkcs11-tool") else { return };
    pins(&place);
    let root = tokens.root("vault", "root", "r");
    tokens.run_ok(&place, &["root", "create", &root, "--passphrase-file", "pin"]);
    let pkcs11 = |arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command.env("SOFTHSM2_CONF", &tokens.config).arg("--module").arg(&tokens.module);
        command
            .args(["--token-label", "vault", "--login", "--pin", str::from_utf8(PIN).unwrap()])
            .args(arguments);
        run(&mut command)
    };
    let listed = pkcs11(&["--list-objects", "--type", "secrkey"]);
    assert!(listed.contains("never extractable") && listed.contains("always sensitive"), "{listed}");

    // A token that has RSA only.
    pkcs11(&["--keypairgen", "--key-type", "rsa:2048", "--label", "pair", "--id", "42"]);
    let root = tokens.root("vault", "pair", "r2");
    tokens.run_ok(&place, &["root", "create", &root, "--passphrase-file", "pin"]);
    tokens.run_ok(&place, &["key", "generate", "--root", &root, "--passphrase-file", "pin", "--out", "k"]);
    tokens.run_ok(&place, &["key", "info", "k", "--root", &root, "--passphrase-file", "pin"]);
    let info = tokens.run_ok(&place, &["root", "info", &root]);
    assert!(info.contains("RSA-OAEP") && info.contains("pair (id 42)"), "{info}");
}

#[test]
fn a_passphrase_is_typed_without_being_seen() {
    let place = Place::new();
    if require_tool("script").is_none() || require_tool("stty").is_none() {
        return;
    }
    let typed = |words: &[&str], code: i32, command: &str, saying: &str| {
        // The second time it is asked for is to be sure.
        let answers: Vec<(&str, &str)> = ["r: ", "n: "].into_iter().zip(words.iter().copied()).collect();
        let (ended, shown) = at_a_terminal(&place, command, &answers);
        assert_eq!(ended, Some(code), "{shown}");
        assert!(shown.contains(saying), "{saying:?} is missing: {shown}");
    };
    typed(&["horse", "house"], 2, "root create passphrase:r", "something else was typed");
    typed(&["horse", "horse"], 0, "root create passphrase:r", "made root");
    typed(&["horse"], 0, "key generate --root passphrase:r --out k", "wrapped under root");
    typed(&["house"], 2, "key info k --root passphrase:r", "does not open");
}
