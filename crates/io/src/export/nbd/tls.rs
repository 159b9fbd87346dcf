//! TLS: from PEM files to a server configuration, and a TLS connection as a reader and a writer of their own.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// Whether clients may or must use TLS.
#[derive(Clone, Debug, Default)]
pub enum TlsMode {
    /// No TLS.
    #[default]
    Off,
    /// As the client likes.
    Allowed(TlsSetup),
    /// Nothing is served, nor told, without TLS.
    Required(TlsSetup),
}

/// Which certificates clients must show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// None; not even asked for.
    #[default]
    None,
    /// One that our authority has signed, or none.
    Optional,
    /// One that our authority has signed.
    Required,
}

/// Where the certificates are.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Our certificate and those that sign it, PEM.
    pub certificates: PathBuf,
    /// Our private key, PEM. Must not be readable by everybody; by its group only if root owns it.
    pub key: PathBuf,
    /// The authority that signs clients' certificates, PEM. Needed unless `client_certificates` is `None`.
    pub client_authority: Option<PathBuf>,
    /// Which certificates clients must show.
    pub client_certificates: ClientCertificates,
}

/// A checked TLS configuration.
#[derive(Clone)]
pub struct TlsSetup(Arc<ServerConfig>);

impl fmt::Debug for TlsSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsSetup")
    }
}

/// A key file that is longer is none.
const PEM_BYTES_MAX: u64 = 1024 * 1024;

impl TlsSetup {
    /// Reads and checks everything.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::Permission`] (also for a key file that others can read), or
    /// [`ErrorKind::Invalid`], each with the file and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Self, Error> {
        let TlsFiles { certificates, key, client_authority, client_certificates } = files;
        let chain = read_certificates(certificates)?;
        let key = read_key(key)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid("TLS versions").because(error))?;
        let builder = match (client_certificates, client_authority) {
            (ClientCertificates::None, _) => builder.with_no_client_auth(),
            (_, None) => return Err(invalid("client certificates need the authority that signs them")),
            (wanted, Some(path)) => {
                builder.with_client_cert_verifier(read_authority(path, *wanted, provider)?)
            }
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|error| invalid("certificate and key do not go together").because(error))?;
        Ok(Self(Arc::new(config)))
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, Op::Open).detail(why.into())
}

/// A PEM file's content. Zeroized when dropped, since it may hold a key.
fn read_pem(path: &Path, what: &str) -> Result<Zeroizing<Vec<u8>>, Error> {
    let refuse = |error: io::Error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Permission,
            _ => ErrorKind::Invalid,
        };
        Error::new(kind, Op::Open).detail(format!("{what} {}", path.display())).because(error)
    };
    let file = File::open(path).map_err(refuse)?;
    let len = file.metadata().map_err(refuse)?.len();
    if len > PEM_BYTES_MAX {
        return Err(invalid(format!("{what} {}: too long for a PEM file", path.display())));
    }
    // Room for all of it at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(len).unwrap_or(0) + 1));
    file.take(PEM_BYTES_MAX).read_to_end(&mut bytes).map_err(refuse)?;
    Ok(bytes)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = read_pem(path, "certificate file")?;
    let chain = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(format!("certificate file {}: bad PEM", path.display())).because(error))?;
    if chain.is_empty() {
        return Err(invalid(format!("certificate file {}: no certificate in it", path.display())));
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    if let Ok(meta) = path.metadata() {
        // As PostgreSQL does: a key may be shared with a group by root, but by nobody with everybody.
        let open_to = if meta.uid() == 0 { 0o037 } else { 0o077 };
        if meta.mode() & open_to != 0 {
            return Err(Error::new(ErrorKind::Permission, Op::Open).detail(format!(
                "key file {} can be used by others (mode {:03o}); make it 600",
                path.display(),
                meta.mode() & 0o777
            )));
        }
    }
    let bytes = read_pem(path, "key file")?;
    PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|error| invalid(format!("key file {}: no private key in it", path.display())).because(error))
}

fn read_authority(
    path: &Path,
    wanted: ClientCertificates,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| invalid(format!("authority {}: not usable", path.display())).because(error))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = match wanted {
        ClientCertificates::Required => builder,
        ClientCertificates::Optional | ClientCertificates::None => builder.allow_unauthenticated(),
    };
    builder
        .build()
        .map_err(|error| invalid(format!("authority {}: not usable", path.display())).because(error))
}

/// Does the TLS handshake over `transport` and hands out the connection's two ends, each with its own way to it.
///
/// # Errors
///
/// The transport's, or [`io::ErrorKind::InvalidData`] with what TLS did not like.
pub(super) fn accept<S: Read + Write>(setup: &TlsSetup, mut transport: S) -> io::Result<Tls> {
    let mut connection = ServerConnection::new(setup.0.clone()).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut transport)?;
    }
    // Session tickets of TLS 1.3 may still be waiting.
    while connection.wants_write() {
        connection.write_tls(&mut transport)?;
    }
    Ok(Tls(Arc::new(Mutex::new(connection))))
}

/// A TLS connection after its handshake.
#[derive(Clone, Debug)]
pub(super) struct Tls(
    /// Held while encrypting and sending, and while decrypting; never while waiting for the client to say something.
    Arc<Mutex<ServerConnection>>,
);

impl Tls {
    pub(super) fn reader<S: Read + Write>(&self, transport: S) -> TlsReader<S> {
        TlsReader { tls: self.clone(), transport, received: vec![0; TLS_RECEIVE_BYTES], start: 0, end: 0 }
    }

    pub(super) fn writer<S: Write>(&self, transport: S) -> TlsWriter<S> {
        TlsWriter { tls: self.clone(), transport }
    }

    /// Says goodbye, as far as the client still listens.
    pub(super) fn close(&self, mut transport: impl Write) {
        let mut connection = self.lock();
        connection.send_close_notify();
        while connection.wants_write() {
            if connection.write_tls(&mut transport).is_err() {
                break;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, ServerConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two records of greatest length.
const TLS_RECEIVE_BYTES: usize = 2 * (16 * 1024 + 256 + 5);

/// The receiving end.
#[derive(Debug)]
pub(super) struct TlsReader<S> {
    tls: Tls,
    transport: S,
    /// Ciphertext that TLS has not taken yet lies in `start..end`.
    received: Vec<u8>,
    start: usize,
    end: usize,
}

impl<S> TlsReader<S> {
    pub(super) fn transport(&mut self) -> &mut S {
        &mut self.transport
    }
}

impl<S: Read + Write> Read for TlsReader<S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut connection = self.tls.lock();
                match connection.reader().read(into) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if self.start < self.end {
                    let mut rest = &self.received[self.start..self.end];
                    self.start += connection.read_tls(&mut rest)?;
                    let processed = connection.process_new_packets();
                    // Alerts and answers to key updates.
                    while connection.wants_write() {
                        connection.write_tls(&mut self.transport)?;
                    }
                    processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                    continue;
                }
            }
            let len = self.transport.read(&mut self.received)?;
            if len == 0 {
                // Without TLS's own goodbye: somebody may have cut the line.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (self.start, self.end) = (0, len);
        }
    }
}

/// The sending end.
#[derive(Debug)]
pub(super) struct TlsWriter<S> {
    tls: Tls,
    transport: S,
}

impl<S: Write> TlsWriter<S> {
    fn send(&mut self, take: impl FnOnce(&mut ServerConnection) -> io::Result<usize>) -> io::Result<usize> {
        let mut connection = self.tls.lock();
        let len = take(&mut connection)?;
        while connection.wants_write() {
            connection.write_tls(&mut self.transport)?;
        }
        Ok(len)
    }
}

impl<S: Write> Write for TlsWriter<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(|connection| connection.writer().write(bytes))
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(|connection| connection.writer().write_vectored(parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
