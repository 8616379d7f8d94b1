//! The serving side of TLS: the certificate, read again when its files change, and clients that may show one (contract C-04,
//! C-05, E-23).
//!
//! Whether files changed is looked up when a connection comes: no watch, no timer, and a swapped symlink counts too.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use jiff::Timestamp;
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{ServerSettings, self_signed};

/// The serving certificate cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("unable to load TLS files {cert:?} and {key:?}: {message}")]
    Load { cert: PathBuf, key: PathBuf, message: String },
    #[error("unable to write self signed cert {path:?}: {message}")]
    SelfSigned { path: PathBuf, message: String },
}

/// A value made from files, made again when they change. A change that does not load is logged and the old value kept.
pub(super) struct Watched<T> {
    paths: Vec<PathBuf>,
    load: fn(&[PathBuf]) -> Result<T, String>,
    state: Mutex<(Vec<Option<FileMark>>, T)>,
}

/// Enough of a file's metadata to see that it is another one.
type FileMark = (u64, u64, Option<SystemTime>);

impl<T: Clone> Watched<T> {
    pub fn new(paths: Vec<PathBuf>, load: fn(&[PathBuf]) -> Result<T, String>) -> Result<Self, String> {
        let marks = marks(&paths);
        let value = load(&paths)?;
        Ok(Self { paths, load, state: Mutex::new((marks, value)) })
    }

    pub fn current(&self) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let marks = marks(&self.paths);
        if marks != state.0 {
            match (self.load)(&self.paths) {
                Ok(value) => {
                    tracing::info!(files = ?self.paths, "certificate files reloaded");
                    state.1 = value;
                }
                Err(error) => {
                    tracing::error!(files = ?self.paths, %error, "certificate files changed but cannot be used")
                }
            }
            state.0 = marks;
        }
        state.1.clone()
    }
}

fn marks(paths: &[PathBuf]) -> Vec<Option<FileMark>> {
    use std::os::unix::fs::MetadataExt;
    let mark = |path: &PathBuf| fs::metadata(path).ok().map(|m| (m.ino(), m.len(), m.modified().ok()));
    paths.iter().map(mark).collect()
}

/// The TLS configuration of 10250.
pub(super) struct ServingKeys(Watched<Arc<ServerConfig>>);

impl ServingKeys {
    /// From the configured files, else from `cert_dir/kubelet.crt` and `.key`, made when they are not there.
    pub fn load(settings: &ServerSettings, wall: Timestamp) -> Result<Self, TlsError> {
        let (cert, key) = match &settings.tls_files {
            Some(files) => files.clone(),
            None => self_signed::ensure(&settings.cert_dir, &settings.hostname, &settings.node_ips, wall)?,
        };
        let watched = Watched::new(vec![cert.clone(), key.clone()], |paths| server_config(&paths[0], &paths[1]));
        watched.map(Self).map_err(|message| TlsError::Load { cert, key, message })
    }

    pub fn current(&self) -> Arc<ServerConfig> {
        self.0.current()
    }
}

pub(super) fn server_config(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|e| format!("{}: {e}", cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| format!("{}: {e}", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(Arc::new(HoldsItsKey { provider }))
        .with_single_cert(chain, key)
        .map_err(|e| e.to_string())?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Asks for a client certificate and checks only that the peer holds its key. Whom it belongs to and who vouches for it is
/// the authenticator's business.
struct HoldsItsKey {
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for HoldsItsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HoldsItsKey")
    }
}

impl ClientCertVerifier for HoldsItsKey {
    fn client_auth_mandatory(&self) -> bool {
        false
    }
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
