//! Who asks, and whether they may (contract C-06, E-01).
//!
//! Until SubjectAccessReview exists, exactly one identity may: the apiserver's own kubelet client. Every other identity that the
//! client CA vouches for gets 403, whatever its groups; everything else gets 401. TLS only makes sure that the peer holds the key of the
//! certificate it shows (see `tls`); the chain is checked here, so that a bad certificate ends in 401, not in a failed handshake.

use std::{path::PathBuf, sync::Arc};

use hyper::{Method, Request, header};
use jiff::Timestamp;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::{ServerError, routes, tls::Watched};

/// The common name of the certificate with which kubeadm's apiserver comes to kubelets.
const APISERVER_IDENTITY: &str = "kube-apiserver-kubelet-client";

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub name: String,
    /// The caller came with a certificate that the client CA vouches for.
    certified: bool,
}

/// Decides who a request comes from.
pub(super) struct Authn {
    client_ca: Option<Watched<Arc<dyn ClientCertVerifier>>>,
    anonymous: bool,
}

impl Authn {
    /// Fails when the CA file is named but cannot be used.
    pub fn new(client_ca_file: Option<PathBuf>, anonymous: bool) -> Result<Self, ServerError> {
        let client_ca = client_ca_file
            .map(|path| {
                let load = |paths: &[PathBuf]| verifier(&paths[0]);
                Watched::new(vec![path.clone()], load).map_err(|message| ServerError::ClientCa { path, message })
            })
            .transpose()?;
        Ok(Self { client_ca, anonymous })
    }

    /// `None`: 401. Takes the credentials out of the request, so that they go no further.
    pub fn authenticate<B>(
        &self,
        request: &mut Request<B>,
        certificates: &[CertificateDer<'static>],
        wall: Timestamp,
    ) -> Option<User> {
        let bearer = request.headers_mut().remove(header::AUTHORIZATION).is_some();
        if let Some(user) = self.by_certificate(certificates, wall) {
            return Some(user);
        }
        // No token is good until TokenReview exists; a bad credential is never anonymous.
        let anonymous = self.anonymous && !bearer && certificates.is_empty();
        anonymous.then(|| User { name: "system:anonymous".to_owned(), certified: false })
    }

    fn by_certificate(&self, certificates: &[CertificateDer<'static>], wall: Timestamp) -> Option<User> {
        let (leaf, intermediates) = certificates.split_first()?;
        let verifier = self.client_ca.as_ref()?.current();
        let seconds = u64::try_from(wall.as_second()).ok()?;
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        if let Err(error) = verifier.verify_client_cert(leaf, intermediates, now) {
            tracing::debug!(%error, "client certificate refused");
            return None;
        }
        // Of several common names Go takes the last.
        let (_, parsed) = x509_parser::parse_x509_certificate(leaf).ok()?;
        let name = parsed.subject().iter_common_name().last()?.as_str().ok()?.to_owned();
        (!name.is_empty()).then_some(User { name, certified: true })
    }
}

fn verifier(path: &std::path::Path) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|e| e.to_string())? {
        roots.add(certificate.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    }
    if roots.is_empty() {
        return Err("data does not contain any valid RSA or ECDSA certificates".to_owned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    builder.build().map_err(|e| e.to_string())
}

/// `Err` is the text of the 403 (contract E-01).
pub(super) fn authorize(user: &User, method: &Method, path: &str) -> Result<(), String> {
    if user.certified && user.name == APISERVER_IDENTITY {
        return Ok(());
    }
    let (verb, subresources) = (routes::verb(method), routes::subresources(path).join(" "));
    Err(format!("Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{subresources}])\n", user.name))
}
