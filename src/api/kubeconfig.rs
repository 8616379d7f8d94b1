//! Reads a kubeconfig: which server to talk to, how to trust it, and who this agent is.
//!
//! In: a file. Out: an [`ApiTarget`], with paths made absolute and data decoded, nothing fetched. Files that credentials point
//! at are read by [`credentials`](super::credentials), which also reads them again when they change.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer};

/// Why no client can be built. Always names the file and the field.
#[derive(Debug, thiserror::Error)]
pub enum ApiSetupError {
    #[error("cannot read {}: {source}", file.display())]
    Unreadable {
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("kubeconfig {}: {message}", file.display())]
    Malformed { file: PathBuf, message: String },
    /// A context, cluster or user that something refers to is not there.
    #[error("kubeconfig {}: {kind} \"{name}\" does not exist (named by {field})", file.display())]
    Missing { file: PathBuf, kind: &'static str, name: String, field: String },
    #[error("kubeconfig {}: {field}: {message}", file.display())]
    Field { file: PathBuf, field: String, message: String },
    #[error("{origin}: {message}")]
    Pem { origin: String, message: String },
    #[error("user agent {0:?} is not a valid header value")]
    UserAgent(String),
}

/// PEM text, from the kubeconfig itself or from a file.
#[derive(Clone)]
pub(super) enum PemSource {
    Inline { field: String, pem: Vec<u8> },
    File(PathBuf),
}

impl PemSource {
    /// How errors name it.
    pub(super) fn origin(&self) -> String {
        match self {
            Self::Inline { field, .. } => field.clone(),
            Self::File(path) => path.display().to_string(),
        }
    }
}

/// A bearer token. Never shown.
#[derive(Clone)]
pub(super) enum TokenSource {
    Inline(String),
    File(PathBuf),
}

/// A credential plugin of `client.authentication.k8s.io`.
#[derive(Clone)]
pub(super) struct ExecPlugin {
    pub(super) api_version: String,
    pub(super) command: String,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) install_hint: String,
    pub(super) provide_cluster_info: bool,
}

/// The chosen context of a kubeconfig. Holds secrets, so it has no `Debug`.
#[derive(Clone)]
pub(super) struct ApiTarget {
    pub(super) server: http::Uri,
    pub(super) tls_server_name: Option<String>,
    pub(super) insecure_skip_tls_verify: bool,
    pub(super) ca: Option<PemSource>,
    pub(super) client_certificate: Option<(PemSource, PemSource)>,
    pub(super) token: Option<TokenSource>,
    pub(super) exec: Option<ExecPlugin>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "kebab-case")]
struct File {
    current_context: String,
    #[serde(deserialize_with = "nullable")]
    clusters: Vec<NamedCluster>,
    #[serde(deserialize_with = "nullable")]
    users: Vec<NamedUser>,
    #[serde(deserialize_with = "nullable")]
    contexts: Vec<NamedContext>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    cluster: Cluster,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "kebab-case")]
struct Cluster {
    server: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    user: User,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "kebab-case")]
struct User {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<String>,
    exec: Option<Exec>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Exec {
    api_version: Option<String>,
    command: Option<String>,
    #[serde(deserialize_with = "nullable")]
    args: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    env: Vec<EnvVar>,
    install_hint: Option<String>,
    provide_cluster_info: bool,
}

#[derive(Deserialize)]
struct EnvVar {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    context: Context,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Context {
    cluster: String,
    user: Option<String>,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads the file and resolves its current context. Does blocking I/O on one small file.
pub(super) fn load(path: &Path) -> Result<ApiTarget, ApiSetupError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ApiSetupError::Unreadable { file: path.to_owned(), source })?;
    parse(path, &text)
}

/// The resolution itself; `path` names the file in errors and is where relative paths start.
fn parse(path: &Path, text: &str) -> Result<ApiTarget, ApiSetupError> {
    let reader = Reader { path };
    let file: File = serde_saphyr::from_str(text)
        .map_err(|e| ApiSetupError::Malformed { file: path.to_owned(), message: first_line(&e.to_string()) })?;
    if file.current_context.is_empty() {
        return Err(reader.field("current-context", "is not set"));
    }
    let name = &file.current_context;
    let context = &file
        .contexts
        .iter()
        .find(|c| c.name == *name)
        .ok_or_else(|| reader.missing("context", name, "current-context"))?
        .context;
    let at = format!("contexts[{name}]");
    let cluster = file
        .clusters
        .iter()
        .find(|c| c.name == context.cluster)
        .ok_or_else(|| reader.missing("cluster", &context.cluster, &format!("{at}.context.cluster")))?;
    let no_user = User::default();
    let (user_name, user) = match context.user.as_deref().filter(|u| !u.is_empty()) {
        None => ("", &no_user),
        Some(wanted) => file
            .users
            .iter()
            .find(|u| u.name == wanted)
            .map(|u| (u.name.as_str(), &u.user))
            .ok_or_else(|| reader.missing("user", wanted, &format!("{at}.context.user")))?,
    };
    reader.target(cluster, user_name, user)
}

/// YAML errors quote the lines around them, and those may hold a key.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

struct Reader<'a> {
    path: &'a Path,
}

impl Reader<'_> {
    fn field(&self, field: &str, message: impl Into<String>) -> ApiSetupError {
        ApiSetupError::Field { file: self.path.to_owned(), field: field.to_owned(), message: message.into() }
    }

    fn missing(&self, kind: &'static str, name: &str, field: &str) -> ApiSetupError {
        ApiSetupError::Missing { file: self.path.to_owned(), kind, name: name.to_owned(), field: field.to_owned() }
    }

    fn absolute(&self, relative: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(relative)
    }

    /// Data wins over the path, as in client-go.
    fn pem(
        &self,
        at: &str,
        field: &str,
        data: Option<&str>,
        file: Option<&str>,
    ) -> Result<Option<PemSource>, ApiSetupError> {
        if let Some(data) = data.filter(|d| !d.is_empty()) {
            let field = format!("{at}.{field}-data");
            let compact: String = data.split_whitespace().collect();
            let pem = STANDARD.decode(compact).map_err(|_| self.field(&field, "is not valid base64"))?;
            let field = format!("{}: {field}", self.path.display());
            return Ok(Some(PemSource::Inline { field, pem }));
        }
        Ok(file.filter(|f| !f.is_empty()).map(|f| PemSource::File(self.absolute(f))))
    }

    fn target(&self, cluster: &NamedCluster, user_name: &str, user: &User) -> Result<ApiTarget, ApiSetupError> {
        let at = format!("clusters[{}].cluster", cluster.name);
        let cluster = &cluster.cluster;
        let server = self.server(&at, cluster.server.as_deref().unwrap_or_default())?;
        let insecure = cluster.insecure_skip_tls_verify.unwrap_or(false);
        let ca = self.pem(
            &at,
            "certificate-authority",
            cluster.certificate_authority_data.as_deref(),
            cluster.certificate_authority.as_deref(),
        )?;
        if insecure && ca.is_some() {
            let message = "cannot be combined with a certificate authority";
            return Err(self.field(&format!("{at}.insecure-skip-tls-verify"), message));
        }
        let at = format!("users[{user_name}].user");
        let certificate = self.pem(
            &at,
            "client-certificate",
            user.client_certificate_data.as_deref(),
            user.client_certificate.as_deref(),
        )?;
        let key = self.pem(&at, "client-key", user.client_key_data.as_deref(), user.client_key.as_deref())?;
        let client_certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => return Err(self.field(&format!("{at}.client-key"), "is not set, but a certificate is")),
            (None, Some(_)) => {
                return Err(self.field(&format!("{at}.client-certificate"), "is not set, but a key is"));
            }
        };
        let token_file = user.token_file.as_deref().filter(|f| !f.is_empty());
        let token = match (token_file, user.token.as_deref().filter(|t| !t.is_empty())) {
            (Some(file), _) => Some(TokenSource::File(self.absolute(file))),
            (None, Some(token)) => Some(TokenSource::Inline(token.to_owned())),
            (None, None) => None,
        };
        let exec = user.exec.as_ref().map(|exec| self.exec(&at, exec)).transpose()?;
        Ok(ApiTarget {
            server,
            tls_server_name: cluster.tls_server_name.clone().filter(|n| !n.is_empty()),
            insecure_skip_tls_verify: insecure,
            ca,
            client_certificate,
            token,
            exec,
        })
    }

    fn server(&self, at: &str, text: &str) -> Result<http::Uri, ApiSetupError> {
        let field = format!("{at}.server");
        if text.is_empty() {
            return Err(self.field(&field, "is not set"));
        }
        let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let server: http::Uri = text.parse().map_err(|e| self.field(&field, format!("{text:?}: {e}")))?;
        match server.scheme_str() {
            Some("https" | "http") if server.host().is_some() => Ok(server),
            _ => Err(self.field(&field, format!("{text:?} is no http or https URL"))),
        }
    }

    fn exec(&self, at: &str, exec: &Exec) -> Result<ExecPlugin, ApiSetupError> {
        let at = format!("{at}.exec");
        let api_version = exec.api_version.clone().unwrap_or_default();
        if !matches!(api_version.as_str(), "client.authentication.k8s.io/v1" | "client.authentication.k8s.io/v1beta1") {
            return Err(self.field(&format!("{at}.apiVersion"), format!("{api_version:?} is not supported")));
        }
        let command = exec.command.clone().filter(|c| !c.is_empty());
        let command = command.ok_or_else(|| self.field(&format!("{at}.command"), "is not set"))?;
        // A bare name is looked up in PATH; anything with a slash is relative to the kubeconfig.
        let command = if command.contains('/') { self.absolute(&command).display().to_string() } else { command };
        Ok(ExecPlugin {
            api_version,
            command,
            args: exec.args.clone(),
            env: exec.env.iter().map(|e| (e.name.clone(), e.value.clone())).collect(),
            install_hint: exec.install_hint.clone().unwrap_or_default(),
            provide_cluster_info: exec.provide_cluster_info,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
apiVersion: v1
kind: Config
current-context: here
clusters:
- name: c
  cluster: {server: 'https://10.0.0.1:6443', certificate-authority: pki/ca.crt, tls-server-name: api.internal}
contexts:
- name: here
  context: {cluster: c, user: u}
users:
- name: u
  user: {client-certificate: /pki/current.pem, client-key: /pki/current.pem}
";

    fn fail(text: &str) -> String {
        match parse(Path::new("/etc/kubernetes/kubelet.conf"), text) {
            Ok(_) => panic!("accepted"),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn relative_paths_start_at_the_kubeconfig() {
        let target = parse(Path::new("/etc/kubernetes/kubelet.conf"), GOOD).unwrap();
        assert_eq!(target.ca.unwrap().origin(), "/etc/kubernetes/pki/ca.crt");
        assert_eq!(target.client_certificate.unwrap().0.origin(), "/pki/current.pem");
        assert_eq!(target.tls_server_name.as_deref(), Some("api.internal"));
        assert_eq!(target.server.to_string(), "https://10.0.0.1:6443/");
    }

    #[test]
    fn errors_name_file_and_field() {
        let file = "kubeconfig /etc/kubernetes/kubelet.conf: ";
        let table = [
            (
                GOOD.replace("current-context: here", "current-context: x"),
                "context \"x\" does not exist (named by current-context)",
            ),
            (GOOD.replace("current-context: here", ""), "current-context: is not set"),
            (
                GOOD.replace("cluster: c,", "cluster: d,"),
                "cluster \"d\" does not exist (named by contexts[here].context.cluster)",
            ),
            (GOOD.replace("user: u}", "user: w}"), "user \"w\" does not exist (named by contexts[here].context.user)"),
            (
                GOOD.replace("https://10.0.0.1:6443", "ftp://a"),
                "clusters[c].cluster.server: \"ftp://a\" is no http or https URL",
            ),
            (
                GOOD.replace(", client-key: /pki/current.pem", ""),
                "users[u].user.client-key: is not set, but a certificate is",
            ),
            (
                GOOD.replace("client-certificate: /pki/current.pem", "client-certificate-data: '%%%'"),
                "users[u].user.client-certificate-data: is not valid base64",
            ),
            (
                GOOD.replace(
                    "{client-certificate: /pki/current.pem, client-key: /pki/current.pem}",
                    "{exec: {apiVersion: v0, command: x}}",
                ),
                "users[u].user.exec.apiVersion: \"v0\" is not supported",
            ),
        ];
        for (text, expected) in table {
            assert_eq!(fail(&text), format!("{file}{expected}"));
        }
    }

    #[test]
    fn malformed_yaml_never_quotes_the_file() {
        let message = fail("users:\n- name: u\n  user: {token: [s3cret}\n");
        assert!(!message.contains("s3cret"), "{message}");
    }

    #[test]
    fn token_file_wins_over_token_as_in_client_go() {
        let text = GOOD.replace(
            "{client-certificate: /pki/current.pem, client-key: /pki/current.pem}",
            "{token: abc, tokenFile: /run/token}",
        );
        let target = parse(Path::new("/k"), &text).unwrap();
        assert!(matches!(target.token, Some(TokenSource::File(f)) if f == Path::new("/run/token")));
    }
}
