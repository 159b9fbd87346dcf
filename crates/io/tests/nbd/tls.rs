//! TLS: modes, client certificates, injected plaintext, bad files.

use super::{PATIENCE, Rig, eventually};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_io::export::nbd::{ClientCertificates, ServerOptions, TlsFiles, TlsMode, TlsSetup};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener};
use inlinecrypt_testkit::nbd::{NbdError, cmd, opt};
use inlinecrypt_testkit::{Client, pattern, require_tool, temp_dir};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const SIZE: u64 = 16 << 20;

/// An authority, and files for a server that it signed.
struct Pki {
    folder: tempfile::TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = temp_dir();
        let pki = Self { folder, authority };
        let (certificate, key) = pki.sign("localhost");
        fs::write(pki.path("cert.pem"), certificate).unwrap();
        fs::write(pki.path("key.pem"), key).unwrap();
        fs::set_permissions(pki.path("key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(pki.path("ca.pem"), pki.authority.pem()).unwrap();
        pki
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate and its key, as PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.authority).unwrap().pem(), key.serialize_pem())
    }

    fn files(&self, client_certificates: ClientCertificates) -> TlsFiles {
        TlsFiles {
            certificates: self.path("cert.pem"),
            key: self.path("key.pem"),
            client_authority: Some(self.path("ca.pem")),
            client_certificates,
        }
    }

    fn rig(
        &self,
        mode: fn(TlsSetup) -> TlsMode,
        client_certificates: ClientCertificates,
        workers: usize,
    ) -> Rig {
        let setup = TlsSetup::load(&self.files(client_certificates)).unwrap();
        let options = ServerOptions {
            tls: mode(setup),
            workers: Some(workers),
            handshake_time_max: Duration::from_secs(5),
            ..ServerOptions::default()
        };
        Rig::with_options(RamDisk::new(SIZE), options)
    }

    fn client_config(&self, shows_certificate: bool) -> Arc<ClientConfig> {
        use rustls::pki_types::pem::PemObject;
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(if shows_certificate {
            let (certificate, key) = self.sign("client");
            let chain = rustls::pki_types::CertificateDer::pem_slice_iter(certificate.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .unwrap();
            builder
                .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
                .unwrap()
        } else {
            builder.with_no_client_auth()
        })
    }
}

type TlsStream = StreamOwned<ClientConnection, UnixStream>;

fn upgrade(mut client: Client<UnixStream>, config: Arc<ClientConfig>) -> Client<TlsStream> {
    assert!(client.option(opt::STARTTLS, &[]).unwrap().is_empty());
    let connection = ClientConnection::new(config, ServerName::try_from("localhost").unwrap()).unwrap();
    Client::resume(StreamOwned::new(connection, client.into_stream()))
}

fn settle(client: &mut Client<TlsStream>) -> Result<(), NbdError> {
    client.structured_reply()?;
    client.set_meta_context("disk", &["base:allocation"])?;
    client.go("disk").map(drop)
}

/// Its keys stay here: it rests with the others, goes on if nothing comes of it, and is closed between two requests else.
#[test]
fn a_connection_with_tls_is_held_but_not_handed_over() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::None, 0);
    let mut client = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(false));
    settle(&mut client).unwrap();
    for round in 0..20u8 {
        for at in 0..8 {
            client.send(cmd::WRITE, 0, at * 70_000, 70_000, &[round; 70_000]).unwrap();
        }
        let held = rig.server.hold(PATIENCE).unwrap();
        assert_eq!((held.connections.len(), held.stay, held.cut_off), (0, 1, 0));
        rig.server.resume();
        for _ in 0..8 {
            assert_eq!(client.receive().unwrap().errno, 0);
        }
        assert!(client.read(0, 560_000).unwrap() == [round; 560_000]);
    }
    rig.server.hold(PATIENCE).unwrap();
    assert_eq!(rig.server.close_held(), 1);
    // With TLS's goodbye, so that the client knows that nothing was cut off.
    let end = client.receive().unwrap_err();
    assert!(matches!(&end, NbdError::Io(error) if error.to_string().contains("failed to fill")), "{end:?}");
    assert_eq!(rig.server.status().connections_now, 0);
}

#[test]
fn data_goes_through_tls_and_back() {
    let pki = Pki::new();
    for workers in [0, 3] {
        let rig = pki.rig(TlsMode::Required, ClientCertificates::None, workers);
        let mut client = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(false));
        settle(&mut client).unwrap();
        for len in [1, 512, 4096, 100_000, 5 << 20] {
            let data = pattern::bytes(4, 700, len);
            client.write(700, &data).unwrap();
            assert!(client.read(700, u32::try_from(len).unwrap()).unwrap() == data, "{len}");
        }
        for seed in 0..200 {
            client.send(cmd::WRITE, 0, seed * 4096, 4096, &pattern::bytes(seed, 0, 4096)).unwrap();
        }
        for _ in 0..200 {
            assert_eq!(client.receive().unwrap().errno, 0);
        }
        client.disconnect().unwrap();
        eventually("the connection is gone", || rig.server.status().connections_now == 0);
    }
}

#[test]
fn where_tls_is_required_nothing_is_told_without_it() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::None, 0);
    let mut client = Client::greet(rig.dial()).unwrap();
    const TLS_REQD: Option<u32> = Some(5);
    assert_eq!(client.list().unwrap_err().refusal(), TLS_REQD);
    assert_eq!(client.info("disk").unwrap_err().refusal(), TLS_REQD);
    assert_eq!(client.info("nothing").unwrap_err().refusal(), TLS_REQD);
    assert_eq!(client.go("disk").unwrap_err().refusal(), TLS_REQD);
    assert_eq!(client.structured_reply().unwrap_err().refusal(), TLS_REQD);
    assert_eq!(client.option(4711, &[]).unwrap_err().refusal(), TLS_REQD);
    let mut old = Client::greet(rig.dial()).unwrap();
    assert!(matches!(old.export_name("disk"), Err(NbdError::Io(_))));
    let mut leaving = Client::greet(rig.dial()).unwrap();
    leaving.option(opt::ABORT, &[]).unwrap();
    let mut client = upgrade(client, pki.client_config(false));
    assert_eq!(client.option(opt::STARTTLS, &[]).unwrap_err().refusal(), Some(3));
    assert_eq!(client.list().unwrap().len(), 1);
}

#[test]
fn where_tls_is_allowed_both_ways_lead_in() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Allowed, ClientCertificates::None, 0);
    rig.client().write(0, &[1; 512]).unwrap();
    let mut client = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(false));
    settle(&mut client).unwrap();
    assert_eq!(client.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn nothing_negotiated_before_tls_counts_after_it() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Allowed, ClientCertificates::None, 0);
    let mut client = Client::greet(rig.dial()).unwrap();
    client.structured_reply().unwrap();
    client.set_meta_context("disk", &["base:allocation"]).unwrap();
    let mut client = upgrade(client, pki.client_config(false));
    const DF: u16 = 128;
    assert_eq!(client.go("disk").unwrap().flags & DF, 0);
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(client.block_status(0, 512, 0).unwrap_err().errno(), Some(22));
}

#[test]
fn plaintext_behind_starttls_ends_the_connection() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Allowed, ClientCertificates::None, 0);
    let mut client = Client::greet(rig.dial()).unwrap();
    let starttls = b"IHAVEOPT\0\0\0\x05\0\0\0\0";
    let list = b"IHAVEOPT\0\0\0\x03\0\0\0\0";
    client.stream().write_all(&[&starttls[..], list].concat()).unwrap();
    let mut rest = Vec::new();
    client.stream().read_to_end(&mut rest).unwrap();
    // The acknowledgement at most; no list of exports.
    assert!(rest.len() <= 20, "{rest:?}");
}

#[test]
fn plaintext_instead_of_the_tls_handshake_ends_the_connection() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::None, 0);
    let mut client = Client::greet(rig.dial()).unwrap();
    client.option(opt::STARTTLS, &[]).unwrap();
    client.stream().write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
    let mut rest = Vec::new();
    let _ = client.stream().read_to_end(&mut rest);
    assert!(!rest.windows(4).any(|text| text == b"disk"), "{rest:?}");
    eventually("it is counted", || rig.server.status().handshakes_failed == 1);
}

#[test]
fn who_stalls_in_the_tls_handshake_is_cut_off_in_time() {
    let pki = Pki::new();
    let setup = TlsSetup::load(&pki.files(ClientCertificates::None)).unwrap();
    let options = ServerOptions {
        tls: TlsMode::Required(setup),
        handshake_time_max: Duration::from_millis(200),
        ..ServerOptions::default()
    };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let mut client = Client::greet(rig.dial()).unwrap();
    client.option(opt::STARTTLS, &[]).unwrap();
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_required_client_certificate_is_required() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::Required, 0);
    let mut without = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(false));
    assert!(settle(&mut without).is_err());
    let mut with = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(true));
    settle(&mut with).unwrap();
    with.write(0, &[1; 512]).unwrap();
}

#[test]
fn a_client_certificate_of_another_authority_is_refused() {
    let (pki, stranger) = (Pki::new(), Pki::new());
    for wanted in [ClientCertificates::Required, ClientCertificates::Optional] {
        let rig = pki.rig(TlsMode::Required, wanted, 0);
        let mut config = ClientConfig::clone(&pki.client_config(false));
        config.client_auth_cert_resolver = stranger.client_config(true).client_auth_cert_resolver.clone();
        let mut client = upgrade(Client::greet(rig.dial()).unwrap(), Arc::new(config));
        assert!(settle(&mut client).is_err());
    }
}

#[test]
fn an_optional_client_certificate_is_optional() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::Optional, 0);
    for shows in [false, true] {
        let mut client = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(shows));
        settle(&mut client).unwrap();
    }
}

#[test]
fn stopping_ends_tls_connections_properly() {
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::None, 0);
    let mut client = upgrade(Client::greet(rig.dial()).unwrap(), pki.client_config(false));
    settle(&mut client).unwrap();
    client.write(0, &[1; 512]).unwrap();
    assert_eq!(rig.server.stop(PATIENCE).unwrap().cut_off, 0);
    // With TLS's goodbye: a clean end, no error.
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_real_client_comes_in_by_tls() {
    let Some(nbdinfo) = require_tool("nbdinfo") else { return };
    let pki = Pki::new();
    let rig = pki.rig(TlsMode::Required, ClientCertificates::Required, 0);
    let tcp = Listen::Tcp { host: "localhost".to_owned(), port: 0 };
    let tcp = Listener::bind(&tcp, ListenOptions::default()).unwrap();
    let Listen::Tcp { port, .. } = tcp.place() else { panic!("a TCP port was asked for") };
    rig.server.listen(tcp).unwrap();
    // The names that libnbd looks for.
    let (certificate, key) = pki.sign("client");
    fs::copy(pki.path("ca.pem"), pki.path("ca-cert.pem")).unwrap();
    fs::write(pki.path("client-cert.pem"), certificate).unwrap();
    fs::write(pki.path("client-key.pem"), key).unwrap();
    let folder = pki.folder.path().display();
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={folder}");
    let output = Command::new(nbdinfo).arg(&uri).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("with TLS") && text.contains("export-size: 16777216"), "{text}");
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let pki = Pki::new();
    for mode in [0o604, 0o644, 0o620, 0o602] {
        fs::set_permissions(pki.path("key.pem"), fs::Permissions::from_mode(mode)).unwrap();
        let error = TlsSetup::load(&pki.files(ClientCertificates::None)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.to_string().contains("make it 600"), "{error}");
    }
}

#[test]
fn bad_files_are_named_with_what_is_wrong() {
    let pki = Pki::new();
    let good = pki.files(ClientCertificates::Required);
    let write = |name: &str, text: &str| {
        fs::write(pki.path(name), text).unwrap();
        fs::set_permissions(pki.path(name), fs::Permissions::from_mode(0o600)).unwrap();
        pki.path(name)
    };
    let missing = pki.path("nothing.pem");
    let empty = write("empty.pem", "");
    let broken = write("broken.pem", "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n");
    let (other_certificate, _) = pki.sign("localhost");
    let other = write("other.pem", &other_certificate);
    let with = |change: &dyn Fn(&mut TlsFiles)| {
        let mut files = good.clone();
        change(&mut files);
        TlsSetup::load(&files).unwrap_err()
    };
    let cases: Vec<(inlinecrypt_core::error::Error, ErrorKind, &str)> = vec![
        (with(&|files| files.certificates = missing.clone()), ErrorKind::NotFound, "nothing.pem"),
        (with(&|files| files.certificates = empty.clone()), ErrorKind::Invalid, "no certificate"),
        (with(&|files| files.certificates = broken.clone()), ErrorKind::Invalid, "bad PEM"),
        (with(&|files| files.certificates = other.clone()), ErrorKind::Invalid, "do not go together"),
        (with(&|files| files.key = missing.clone()), ErrorKind::NotFound, "nothing.pem"),
        (with(&|files| files.key = other.clone()), ErrorKind::Invalid, "no private key"),
        (with(&|files| files.client_authority = None), ErrorKind::Invalid, "authority"),
        (with(&|files| files.client_authority = Some(empty.clone())), ErrorKind::Invalid, "no certificate"),
    ];
    for (error, kind, text) in cases {
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(error.chain().contains(text), "{} lacks {text:?}", error.chain());
        assert!(!error.chain().contains("PRIVATE"), "{}", error.chain());
    }
    assert!(Path::new(&good.key).exists());
}
