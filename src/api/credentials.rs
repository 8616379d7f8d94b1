//! Who this agent is and whom it trusts, as of now: TLS settings and bearer token, read again when their files change.
//!
//! In: an [`ApiTarget`]. Out: a numbered [`Identity`]; a new number means that connections of the old one should end. Files
//! are compared by (mtime, size, inode) before each request, so a rotated certificate is used by the next request without
//! watching anything. A half-written pair keeps the identity that works.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::HeaderValue;
use jiff::Timestamp;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use serde::Deserialize;

use super::kubeconfig::{ApiSetupError, ApiTarget, ExecPlugin, PemSource, TokenSource};
use crate::time::{Clock, SystemClock};

/// Where Go looks for the system's roots, for a kubeconfig without a certificate authority.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
const EXEC_DEADLINE: Duration = Duration::from_secs(60);

/// Credentials cannot be had right now. Shown in logs; never holds key material.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(super) struct CredentialError(String);

/// One consistent set of TLS settings.
pub(super) struct Identity {
    /// Grows with every change.
    pub(super) number: u64,
    pub(super) tls: Arc<ClientConfig>,
    stamps: Vec<Option<Stamp>>,
    /// Which answer of the credential plugin the client certificate came from.
    exec_serial: u64,
}

type Stamp = (i64, i64, u64, u64);

fn stamp(path: &Path) -> Option<Stamp> {
    std::fs::metadata(path).ok().map(|m| (m.mtime(), m.mtime_nsec(), m.size(), m.ino()))
}

/// The live credentials of one kubeconfig, shared by all clients.
pub(super) struct Credentials {
    target: ApiTarget,
    identity: Mutex<Arc<Identity>>,
    exec: tokio::sync::Mutex<ExecState>,
}

#[derive(Default)]
struct ExecState {
    serial: u64,
    answer: Option<Arc<ExecAnswer>>,
}

/// What a plugin said.
struct ExecAnswer {
    serial: u64,
    token: Option<String>,
    certificate: Option<(Vec<u8>, Vec<u8>)>,
    expires: Option<Timestamp>,
}

impl Credentials {
    /// Reads everything once, so that a wrong path or an expired certificate is found at start.
    pub(super) fn new(target: ApiTarget) -> Result<Self, ApiSetupError> {
        let identity = build(&target, None, 1)?;
        if let Some((certificate, _)) = &target.client_certificate {
            report_expired(certificate)?;
        }
        Ok(Self { target, identity: Mutex::new(Arc::new(identity)), exec: tokio::sync::Mutex::default() })
    }

    pub(super) fn target(&self) -> &ApiTarget {
        &self.target
    }

    /// The identity and the `Authorization` header to use for one request.
    pub(super) async fn current(&self) -> Result<(Arc<Identity>, Option<HeaderValue>), CredentialError> {
        let answer = match &self.target.exec {
            Some(plugin) => Some(self.exec_answer(plugin).await?),
            None => None,
        };
        let identity = self.identity(answer.as_deref());
        let token = match (&self.target.token, &answer) {
            (Some(TokenSource::Inline(token)), _) => Some(token.clone()),
            (Some(TokenSource::File(path)), _) => Some(read_token(path)?),
            (None, Some(answer)) => answer.token.clone(),
            (None, None) => None,
        };
        Ok((identity, token.map(|t| bearer(&t)).transpose()?))
    }

    /// The apiserver said 401: whatever was cached may be revoked.
    pub(super) async fn rejected(&self) {
        self.exec.lock().await.answer = None;
    }

    fn identity(&self, answer: Option<&ExecAnswer>) -> Arc<Identity> {
        let mut current = self.identity.lock().unwrap_or_else(PoisonError::into_inner);
        let serial = answer.filter(|a| a.certificate.is_some()).map_or(0, |a| a.serial);
        if current.exec_serial != serial || current.stamps != stamps(&self.target) {
            match build(&self.target, answer, current.number + 1) {
                Ok(fresh) => {
                    tracing::info!(number = fresh.number, "API client credentials were read again");
                    *current = Arc::new(fresh);
                }
                Err(error) => tracing::warn!(%error, "changed API client credentials cannot be used yet"),
            }
        }
        Arc::clone(&current)
    }

    async fn exec_answer(&self, plugin: &ExecPlugin) -> Result<Arc<ExecAnswer>, CredentialError> {
        let mut state = self.exec.lock().await;
        if let Some(answer) = &state.answer
            && answer.expires.is_none_or(|at| SystemClock.now().wall < at)
        {
            return Ok(Arc::clone(answer));
        }
        let mut answer = run_plugin(plugin, &self.target).await?;
        state.serial += 1;
        answer.serial = state.serial;
        let answer = Arc::new(answer);
        state.answer = Some(Arc::clone(&answer));
        Ok(answer)
    }
}

fn bearer(token: &str) -> Result<HeaderValue, CredentialError> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| CredentialError("the bearer token is not a valid header value".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn read_token(path: &Path) -> Result<String, CredentialError> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
        Ok(_) => Err(CredentialError(format!("token file {} is empty", path.display()))),
        Err(e) => Err(CredentialError(format!("cannot read token file {}: {e}", path.display()))),
    }
}

fn stamps(target: &ApiTarget) -> Vec<Option<Stamp>> {
    let pair = target.client_certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
    target
        .ca
        .iter()
        .chain(pair)
        .filter_map(|source| match source {
            PemSource::File(path) => Some(stamp(path)),
            PemSource::Inline { .. } => None,
        })
        .collect()
}

fn read_pem(source: &PemSource) -> Result<Vec<u8>, ApiSetupError> {
    match source {
        PemSource::Inline { pem, .. } => Ok(pem.clone()),
        PemSource::File(path) => {
            std::fs::read(path).map_err(|source| ApiSetupError::Unreadable { file: path.clone(), source })
        }
    }
}

fn certificates(origin: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ApiSetupError> {
    let wrong = |message: String| ApiSetupError::Pem { origin: origin.to_owned(), message };
    let list: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| wrong(format!("is no valid PEM: {e}")))?;
    if list.is_empty() { Err(wrong("holds no certificate".to_owned())) } else { Ok(list) }
}

fn build(target: &ApiTarget, answer: Option<&ExecAnswer>, number: u64) -> Result<Identity, ApiSetupError> {
    // Stamps before contents: a change between the two is then seen by the next request.
    let stamps = stamps(target);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls_error =
        |origin: &str, e: TlsError| ApiSetupError::Pem { origin: origin.to_owned(), message: e.to_string() };
    let versions = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| tls_error("TLS", e))?;
    let verified = if target.insecure_skip_tls_verify {
        versions.dangerous().with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
    } else {
        versions.with_root_certificates(roots(target)?)
    };
    let exec_certificate = answer.and_then(|a| a.certificate.as_ref().map(|c| (a.serial, c)));
    let (exec_serial, pair) = match (exec_certificate, &target.client_certificate) {
        (Some((serial, (certificate, key))), _) => (
            serial,
            Some(("credential plugin".to_owned(), certificate.clone(), "credential plugin".to_owned(), key.clone())),
        ),
        (None, Some((certificate, key))) => {
            (0, Some((certificate.origin(), read_pem(certificate)?, key.origin(), read_pem(key)?)))
        }
        (None, None) => (0, None),
    };
    let tls = match pair {
        None => verified.with_no_client_auth(),
        Some((certificate_origin, certificate, key_origin, key)) => {
            let chain = certificates(&certificate_origin, &certificate)?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| ApiSetupError::Pem {
                origin: key_origin.clone(),
                message: "holds no usable private key".to_owned(),
            })?;
            verified.with_client_auth_cert(chain, key).map_err(|e| tls_error(&key_origin, e))?
        }
    };
    Ok(Identity { number, tls: Arc::new(tls), stamps, exec_serial })
}

fn roots(target: &ApiTarget) -> Result<RootCertStore, ApiSetupError> {
    let mut store = RootCertStore::empty();
    let Some(ca) = &target.ca else {
        for file in SYSTEM_ROOTS {
            if let Ok(pem) = std::fs::read(file) {
                store.add_parsable_certificates(certificates(file, &pem)?);
                break;
            }
        }
        return Ok(store);
    };
    let origin = ca.origin();
    for certificate in certificates(&origin, &read_pem(ca)?)? {
        store.add(certificate).map_err(|e| ApiSetupError::Pem {
            origin: origin.clone(),
            message: format!("unusable certificate authority: {e}"),
        })?;
    }
    Ok(store)
}

fn report_expired(source: &PemSource) -> Result<(), ApiSetupError> {
    let origin = source.origin();
    let chain = certificates(&origin, &read_pem(source)?)?;
    let wrong = |message: String| ApiSetupError::Pem { origin: origin.clone(), message };
    let leaf = chain.first().ok_or_else(|| wrong("holds no certificate".to_owned()))?;
    let (_, leaf) =
        x509_parser::parse_x509_certificate(leaf).map_err(|e| wrong(format!("is no X.509 certificate: {e}")))?;
    let not_after = leaf.validity().not_after.timestamp();
    if not_after < SystemClock.now().wall.as_second() {
        // Not fatal: the file may be renewed under us, and what runs needs its probes meanwhile.
        let not_after = Timestamp::from_second(not_after).map(|t| t.to_string()).unwrap_or_default();
        tracing::error!(origin, not_after, "The client certificate has expired; the apiserver will refuse it");
    }
    Ok(())
}

/// `insecure-skip-tls-verify`: signatures are still checked, the chain and the name are not.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Deserialize)]
struct ExecCredential {
    status: Option<ExecCredentialStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ExecCredentialStatus {
    expiration_timestamp: Option<Timestamp>,
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
}

/// What the plugin reads from `KUBERNETES_EXEC_INFO`.
fn exec_info(plugin: &ExecPlugin, target: &ApiTarget) -> serde_json::Value {
    let mut spec = serde_json::json!({ "interactive": false });
    if plugin.provide_cluster_info {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let ca = target.ca.as_ref().and_then(|ca| read_pem(ca).ok()).unwrap_or_default();
        spec["cluster"] = serde_json::json!({
            "server": target.server.to_string(),
            "tls-server-name": target.tls_server_name,
            "insecure-skip-tls-verify": target.insecure_skip_tls_verify,
            "certificate-authority-data": STANDARD.encode(ca),
        });
    }
    serde_json::json!({ "kind": "ExecCredential", "apiVersion": plugin.api_version, "spec": spec })
}

async fn run_plugin(plugin: &ExecPlugin, target: &ApiTarget) -> Result<ExecAnswer, CredentialError> {
    let name = &plugin.command;
    let wrong = |message: String| CredentialError(format!("credential plugin {name}: {message}"));
    let child = tokio::process::Command::new(name)
        .args(&plugin.args)
        .envs(plugin.env.iter().map(|(k, v)| (k, v)))
        .env("KUBERNETES_EXEC_INFO", exec_info(plugin, target).to_string())
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(EXEC_DEADLINE, child).await {
        Err(_) => return Err(wrong(format!("no answer within {} s", EXEC_DEADLINE.as_secs()))),
        Ok(Err(e)) if e.kind() == std::io::ErrorKind::NotFound && !plugin.install_hint.is_empty() => {
            return Err(wrong(format!("{e}; {}", plugin.install_hint)));
        }
        Ok(Err(e)) => return Err(wrong(e.to_string())),
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(wrong(format!("{}: {}", output.status, said.trim().chars().take(400).collect::<String>())));
    }
    let answer: ExecCredential = serde_json::from_slice(&output.stdout)
        .map_err(|e| wrong(format!("answer is no ExecCredential (line {}, column {})", e.line(), e.column())))?;
    let status = answer.status.ok_or_else(|| wrong("answer has no status".to_owned()))?;
    let certificate = match (status.client_certificate_data, status.client_key_data) {
        (Some(certificate), Some(key)) => Some((certificate.into_bytes(), key.into_bytes())),
        (None, None) => None,
        _ => {
            return Err(wrong("answer has a certificate without its key, or a key without its certificate".to_owned()));
        }
    };
    if certificate.is_none() && status.token.is_none() {
        return Err(wrong("answer has neither token nor certificate".to_owned()));
    }
    Ok(ExecAnswer { serial: 0, token: status.token, certificate, expires: status.expiration_timestamp })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt, path::PathBuf};

    fn self_signed(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let made = rcgen::generate_simple_self_signed(vec!["node".to_owned()]).unwrap();
        let (cert, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (cert, key)
    }

    fn target() -> ApiTarget {
        ApiTarget {
            server: "https://127.0.0.1:1".parse().unwrap(),
            tls_server_name: None,
            insecure_skip_tls_verify: true,
            ca: None,
            client_certificate: None,
            token: None,
            exec: None,
        }
    }

    #[tokio::test]
    async fn rotated_files_make_a_new_identity_and_half_written_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = self_signed(dir.path(), "a");
        let mut target = target();
        target.client_certificate = Some((PemSource::File(cert.clone()), PemSource::File(key.clone())));
        let credentials = Credentials::new(target).unwrap();
        assert_eq!(credentials.current().await.unwrap().0.number, 1);
        assert_eq!(credentials.current().await.unwrap().0.number, 1);

        std::fs::write(&cert, "half").unwrap();
        assert_eq!(credentials.current().await.unwrap().0.number, 1);

        let (fresh_cert, fresh_key) = self_signed(dir.path(), "b");
        std::fs::rename(fresh_cert, &cert).unwrap();
        std::fs::rename(fresh_key, &key).unwrap();
        assert_eq!(credentials.current().await.unwrap().0.number, 2);
    }

    #[tokio::test]
    async fn a_token_file_is_read_for_every_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "one\n").unwrap();
        let mut target = target();
        target.token = Some(TokenSource::File(path.clone()));
        let credentials = Credentials::new(target).unwrap();
        assert_eq!(credentials.current().await.unwrap().1.unwrap(), "Bearer one");
        std::fs::write(&path, "two").unwrap();
        let header = credentials.current().await.unwrap().1.unwrap();
        assert_eq!(header, "Bearer two");
        assert!(!format!("{header:?}").contains("two"));
    }

    #[tokio::test]
    async fn a_plugin_is_asked_again_after_expiry_or_rejection_only() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("plugin");
        let log = dir.path().join("calls");
        let body = format!(
            "#!/bin/sh\necho x >> {}\nprintf '%s' \"$KUBERNETES_EXEC_INFO\" | grep -q '\"interactive\":false' || exit 3\n\
             echo '{{\"status\":{{\"token\":\"'$A$1'\",\"expirationTimestamp\":\"2999-01-01T00:00:00Z\"}}}}'\n",
            log.display()
        );
        std::fs::write(&script, body).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut target = target();
        target.exec = Some(ExecPlugin {
            api_version: "client.authentication.k8s.io/v1".to_owned(),
            command: script.display().to_string(),
            args: vec!["arg".to_owned()],
            env: vec![("A".to_owned(), "env".to_owned())],
            install_hint: String::new(),
            provide_cluster_info: false,
        });
        let credentials = Credentials::new(target).unwrap();
        for _ in 0..3 {
            assert_eq!(credentials.current().await.unwrap().1.unwrap(), "Bearer envarg");
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 1);
        credentials.rejected().await;
        credentials.current().await.unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 2);
    }

    #[test]
    fn setup_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut unreadable = target();
        unreadable.insecure_skip_tls_verify = false;
        unreadable.ca = Some(PemSource::File("/nowhere/ca.crt".into()));
        let message = Credentials::new(unreadable).err().unwrap().to_string();
        assert!(message.starts_with("cannot read /nowhere/ca.crt: No such file"), "{message}");

        let mut params = rcgen::CertificateParams::new(vec!["node".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 2, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = dir.path().join("old.pem");
        std::fs::write(&cert, params.self_signed(&key).unwrap().pem() + &key.serialize_pem()).unwrap();
        let mut expired = target();
        expired.client_certificate = Some((PemSource::File(cert.clone()), PemSource::File(cert.clone())));
        assert!(Credentials::new(expired).is_ok(), "the file may be renewed under a running agent");
    }
}
