//! One run of a credential provider's program (contract I-07): the request as JSON on stdin, the answer as JSON on stdout. At most a minute.
//!
//! What a program prints on stdout is secret; its stderr goes into the error, cut to a few lines' worth.

use std::{collections::BTreeMap, io, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncWriteExt, process::Command};

use super::{super::metrics::ImageMetrics, config::ProviderConfig};
use crate::{config::GoDuration, time::Clock};

const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_STDERR: usize = 4096;

/// What is asked. Its token is a secret, so there is no `Debug`.
#[derive(Clone, Default)]
pub(super) struct PluginRequest {
    /// Registry and repository, without tag.
    pub(super) image: String,
    /// Empty: none.
    pub(super) service_account_token: String,
    pub(super) service_account_annotations: BTreeMap<String, String>,
}

/// For how much of what a program was asked its answer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CacheKeyType {
    Image,
    Registry,
    Global,
}

/// Registry pattern → (username, password).
pub(super) type Logins = BTreeMap<String, (String, String)>;

/// What came back. No `Debug`: it is secret.
#[derive(Clone)]
pub(super) struct PluginResponse {
    pub(super) cache_key_type: Result<CacheKeyType, String>,
    /// `None`: the provider's default. Zero: not at all.
    pub(super) cache_duration: Option<GoDuration>,
    pub(super) logins: Arc<Logins>,
}

/// Asks a provider.
#[async_trait]
pub(super) trait Plugin: Send + Sync + 'static {
    /// The error's text never holds credentials.
    async fn ask(&self, request: PluginRequest) -> Result<PluginResponse, String>;
}

/// A program in the directory of `--image-credential-provider-bin-dir`.
pub(super) struct ExecPlugin {
    pub(super) program: PathBuf,
    pub(super) config: ProviderConfig,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) metrics: ImageMetrics,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'static str,
    api_version: &'a str,
    image: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    service_account_token: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    service_account_annotations: &'a BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    #[serde(default)]
    api_version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Response {
    kind: String,
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(default)]
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<GoDuration>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

#[async_trait]
impl Plugin for ExecPlugin {
    async fn ask(&self, request: PluginRequest) -> Result<PluginResponse, String> {
        let version = &self.config.api_version;
        let body = serde_json::to_vec(&Request {
            kind: "CredentialProviderRequest",
            api_version: version,
            image: &request.image,
            service_account_token: &request.service_account_token,
            service_account_annotations: &request.service_account_annotations,
        })
        .map_err(|error| format!("failed to encode auth request: {error}"))?;
        let started = self.clock.now().mono;
        let ran = self.run(body).await;
        self.metrics.plugin_ran(&self.config.name, self.clock.now().mono - started, ran.is_err());
        let stdout = ran.map_err(|(why, stderr)| {
            format!(
                "error execing credential provider plugin {} for image {}: {why}: {stderr}",
                self.config.name, request.image
            )
        })?;
        decode(&stdout, version)
    }
}

impl ExecPlugin {
    /// Stdout, or (why, stderr).
    async fn run(&self, mut body: Vec<u8>) -> Result<Vec<u8>, (String, String)> {
        body.push(b'\n');
        let failed = |error: io::Error| (error.to_string(), String::new());
        let mut child = Command::new(&self.program)
            .args(&self.config.args)
            .envs(self.config.env.iter().map(|v| (&v.name, &v.value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let feed = async move {
            // A program may answer without reading.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(&body).await;
            }
        };
        let both = async { tokio::join!(feed, child.wait_with_output()).1 };
        let Ok(ended) = tokio::time::timeout(TIMEOUT, both).await else {
            return Err(("context deadline exceeded".to_owned(), String::new()));
        };
        let output = ended.map_err(failed)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        use std::os::unix::process::ExitStatusExt;
        let why = match (output.status.code(), output.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal: {}", signal.unwrap_or_default()),
        };
        let stderr = &output.stderr[..output.stderr.len().min(MAX_STDERR)];
        Err((why, String::from_utf8_lossy(stderr).into_owned()))
    }
}

/// Strict. A decoding error says nothing of what could not be decoded.
fn decode(stdout: &[u8], version: &str) -> Result<PluginResponse, String> {
    let meta: TypeMeta = serde_json::from_slice(stdout)
        .map_err(|_| "error reading GVK from response: couldn't get version/kind; json parse error".to_owned())?;
    if meta.api_version != version {
        return Err(format!(
            "apiVersion from credential plugin response did not match expected apiVersion:{version}, actual apiVersion:{}",
            meta.api_version
        ));
    }
    let undecodable = || "error decoding credential provider plugin response from stdout".to_owned();
    let response: Response = serde_json::from_slice(stdout).map_err(|_| undecodable())?;
    if response.kind != "CredentialProviderResponse" {
        return Err(undecodable());
    }
    let cache_key_type = match response.cache_key_type.as_str() {
        "Image" => Ok(CacheKeyType::Image),
        "Registry" => Ok(CacheKeyType::Registry),
        "Global" => Ok(CacheKeyType::Global),
        other => Err(other.to_owned()),
    };
    let logins = response.auth.unwrap_or_default();
    let logins = logins.into_iter().map(|(registry, login)| (registry, (login.username, login.password))).collect();
    Ok(PluginResponse { cache_key_type, cache_duration: response.cache_duration, logins: Arc::new(logins) })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    use super::*;
    use crate::time::SystemClock;

    const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

    fn plugin(dir: &Path, script: &str) -> ExecPlugin {
        let program = dir.join("p");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = serde_json::json!({
            "name": "p", "apiVersion": V1, "args": ["one", "two"], "env": [{"name": "MINE", "value": "set"}],
        });
        let metrics = ImageMetrics::unregistered();
        ExecPlugin { program, config: serde_json::from_value(config).unwrap(), clock: Arc::new(SystemClock), metrics }
    }

    fn request() -> PluginRequest {
        PluginRequest { image: "reg.io/a".into(), ..Default::default() }
    }

    #[tokio::test]
    async fn i07_a_program_gets_request_arguments_and_environment() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let answer = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"Registry","cacheDuration":"5m","auth":{{"reg.io":{{"username":"u","password":"p"}}}}}}"#
        );
        let script =
            format!("{{ cat; echo \"$1 $2 $MINE ${{PATH:+path}}\"; }} > {}\ncat <<'X'\n{answer}\nX", seen.display());
        let full = PluginRequest {
            service_account_token: "token".into(),
            service_account_annotations: [("k".to_owned(), "v".to_owned())].into(),
            ..request()
        };
        let response = plugin(dir.path(), &script).ask(full).await.unwrap();
        assert_eq!(response.cache_key_type, Ok(CacheKeyType::Registry));
        assert_eq!(response.cache_duration, Some(GoDuration::from_secs(300)));
        assert_eq!(response.logins.get("reg.io"), Some(&("u".to_owned(), "p".to_owned())));
        assert_eq!(
            fs::read_to_string(&seen).unwrap(),
            format!(
                "{{\"kind\":\"CredentialProviderRequest\",\"apiVersion\":\"{V1}\",\"image\":\"reg.io/a\",\"serviceAccountToken\":\"token\",\"serviceAccountAnnotations\":{{\"k\":\"v\"}}}}\none two set path\n"
            )
        );
        assert!(plugin(dir.path(), &script).ask(request()).await.is_ok());
        assert!(fs::read_to_string(seen).unwrap().starts_with(&format!(
            "{{\"kind\":\"CredentialProviderRequest\",\"apiVersion\":\"{V1}\",\"image\":\"reg.io/a\"}}\n"
        )));
    }

    #[tokio::test]
    async fn i07_failures_are_told_with_stderr_and_without_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let failure = async |script: &str| plugin(dir.path(), script).ask(request()).await.err().unwrap();
        assert_eq!(
            failure("echo no login >&2; exit 3").await,
            "error execing credential provider plugin p for image reg.io/a: exit status 3: no login\n"
        );
        assert_eq!(
            failure(r#"echo '{"apiVersion":"v9","kind":"x"}'"#).await,
            format!(
                "apiVersion from credential plugin response did not match expected apiVersion:{V1}, actual apiVersion:v9"
            )
        );
        for hush in [
            format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","auth":"hush"}}"#),
            format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","hush":1}}"#),
            format!(r#"{{"kind":"Other","apiVersion":"{V1}"}}"#),
        ] {
            let error = failure(&format!("echo '{hush}'")).await;
            assert_eq!(error, "error decoding credential provider plugin response from stdout");
        }
        assert!(failure("echo hush").await.starts_with("error reading GVK from response"));
    }

    #[test]
    fn i07_answers_without_a_known_cache_key_type_are_kept_for_the_error() {
        let text = format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}","cacheKeyType":"Node"}}"#);
        assert_eq!(decode(text.as_bytes(), V1).ok().unwrap().cache_key_type, Err("Node".to_owned()));
    }
}
