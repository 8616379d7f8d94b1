//! Docker config: registry credentials in pull secrets and in files of the node (contract I-05, I-06).

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose};
use serde::Deserialize;

use super::credentials::{Coordinates, Credential, CredentialSource, Keyring};
use crate::api::SecretData;

/// Why a config cannot be read. Says where, never what stands there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DockerConfigError {
    #[error("docker config is not valid JSON of the expected form (line {line}, column {column})")]
    Json { line: usize, column: usize },
    #[error("unable to parse auth field, must be formatted as base64(username:password)")]
    Auth,
}

/// `config.json`, and `.dockerconfigjson` in secrets.
#[derive(Deserialize, Default)]
struct ConfigJson {
    #[serde(default)]
    auths: Option<Auths>,
}

/// `.dockercfg` is this alone.
type Auths = BTreeMap<String, Entry>;

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    email: Option<String>,
    /// base64 of `username:password`; wins over the two.
    #[serde(default)]
    auth: Option<String>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entry(<redacted>)")
    }
}

impl Entry {
    fn credential(self, source: &CredentialSource) -> Result<Credential, DockerConfigError> {
        let (username, password) = match self.auth.as_deref().map(str::trim).filter(|auth| !auth.is_empty()) {
            Some(auth) => decode(auth)?,
            None => (self.username.unwrap_or_default(), self.password.unwrap_or_default()),
        };
        Ok(Credential { username, password, email: self.email.unwrap_or_default(), source: source.clone() })
    }
}

fn decode(auth: &str) -> Result<(String, String), DockerConfigError> {
    let engine = if auth.ends_with('=') { general_purpose::STANDARD } else { general_purpose::STANDARD_NO_PAD };
    let decoded = engine.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let decoded = decoded.ok_or(DockerConfigError::Auth)?;
    let (username, password) = decoded.split_once(':').ok_or(DockerConfigError::Auth)?;
    Ok((username.to_owned(), password.to_owned()))
}

/// Adds what a pull secret holds. Secrets of other types, and empty ones, hold nothing.
pub(super) fn add_secret(
    keyring: &mut Keyring,
    secret: &SecretData,
    namespace: &str,
    name: &str,
) -> Result<(), DockerConfigError> {
    let of = Coordinates { uid: secret.uid.clone(), namespace: namespace.to_owned(), name: name.to_owned() };
    let source = CredentialSource::Secret(of);
    let data = |key: &str| secret.data.get(key).filter(|bytes| !bytes.is_empty());
    match secret.type_.as_str() {
        "kubernetes.io/dockerconfigjson" => {
            data(".dockerconfigjson").map_or(Ok(()), |bytes| add(keyring, config_json(bytes)?, &source))
        }
        "kubernetes.io/dockercfg" => {
            data(".dockercfg").map_or(Ok(()), |bytes| add(keyring, from_json(bytes)?, &source))
        }
        _ => Ok(()),
    }
}

fn config_json(bytes: &[u8]) -> Result<Auths, DockerConfigError> {
    from_json::<ConfigJson>(bytes).map(|config| config.auths.unwrap_or_default())
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, DockerConfigError> {
    serde_json::from_slice(bytes).map_err(|e| DockerConfigError::Json { line: e.line(), column: e.column() })
}

fn add(keyring: &mut Keyring, auths: Auths, source: &CredentialSource) -> Result<(), DockerConfigError> {
    for (registry, entry) in auths {
        keyring.add(&registry, entry.credential(source)?);
    }
    Ok(())
}

/// Where the node's own docker config may be, in the order of search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeConfigFiles {
    json: Vec<PathBuf>,
    legacy: Vec<PathBuf>,
}

impl NodeConfigFiles {
    /// `<root>`, the working directory, `$HOME/.docker`, `/.docker`; the legacy file in `<root>`, the working directory, `$HOME`, `/`.
    pub(super) fn below(root_dir: &Path, home: Option<&Path>) -> Self {
        let here = Path::new(".");
        let slash = Path::new("/");
        let docker = home.map(|home| home.join(".docker"));
        let json = [Some(root_dir), Some(here), docker.as_deref(), Some(Path::new("/.docker"))];
        let legacy = [Some(root_dir), Some(here), home, Some(slash)];
        Self {
            json: json.into_iter().flatten().map(|dir| dir.join("config.json")).collect(),
            legacy: legacy.into_iter().flatten().map(|dir| dir.join(".dockercfg")).collect(),
        }
    }

    /// The first file that can be read; none means no credentials. Read at every pull: it is small, and may be rotated.
    pub(super) async fn keyring(&self) -> Keyring {
        let files = self.json.iter().map(|path| (path, true)).chain(self.legacy.iter().map(|path| (path, false)));
        for (path, json) in files {
            let Ok(bytes) = tokio::fs::read(path).await else { continue };
            let mut keyring = Keyring::default();
            let auths = if json { config_json(&bytes) } else { from_json(&bytes) };
            match auths.and_then(|auths| add(&mut keyring, auths, &CredentialSource::Node)) {
                Ok(()) => return keyring,
                Err(error) => tracing::warn!(path = %path.display(), %error, "docker config file is left out"),
            }
        }
        Keyring::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(type_: &str, key: &str, content: &str) -> SecretData {
        SecretData {
            type_: type_.into(),
            data: [(key.to_owned(), content.as_bytes().to_vec())].into(),
            ..Default::default()
        }
    }

    fn lookup(secret: &SecretData, image: &str) -> Vec<(String, String)> {
        let mut keyring = Keyring::default();
        add_secret(&mut keyring, secret, "ns", "s").unwrap();
        keyring.lookup(image).into_iter().map(|c| (c.username, c.password)).collect()
    }

    #[test]
    fn i05_both_secret_types() {
        let both = [
            secret(
                "kubernetes.io/dockerconfigjson",
                ".dockerconfigjson",
                r#"{"auths":{"reg.io":{"auth":"dTpwOnE="}},"credsStore":"x"}"#,
            ),
            secret(
                "kubernetes.io/dockercfg",
                ".dockercfg",
                r#"{"reg.io":{"username":"u","password":"p:q","email":"e"}}"#,
            ),
        ];
        for secret in both {
            assert_eq!(lookup(&secret, "reg.io/a"), [("u".to_owned(), "p:q".to_owned())]);
        }
        let unpadded =
            secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", r#"{"auths":{"reg.io":{"auth":"dTpwcQ"}}}"#);
        assert_eq!(lookup(&unpadded, "reg.io/a"), [("u".to_owned(), "pq".to_owned())]);
        assert!(lookup(&secret("Opaque", ".dockerconfigjson", "{"), "reg.io/a").is_empty());
        assert!(lookup(&secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", ""), "reg.io/a").is_empty());
    }

    #[test]
    fn i05_a_broken_secret_is_an_error_that_tells_nothing_of_its_content() {
        for content in [
            r#"{"auths":{"reg.io":{"auth":"hush!"}}}"#,
            r#"{"auths":"hush"}"#,
            r#"{"auths":{"r":{"auth":"aHVzaA=="}}}"#,
        ] {
            let secret = secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", content);
            let error = add_secret(&mut Keyring::default(), &secret, "ns", "s").unwrap_err().to_string();
            assert!(!error.contains("hush"), "{error}");
        }
    }

    #[tokio::test]
    async fn i06_node_files_in_order() {
        let (root, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = NodeConfigFiles::below(root.path(), Some(home.path()));
        let user = |keyring: Keyring| keyring.lookup("reg.io/a").into_iter().map(|c| c.username).collect::<Vec<_>>();
        let config = |user: &str| format!(r#"{{"auths":{{"reg.io":{{"username":"{user}","password":"p"}}}}}}"#);
        std::fs::write(home.path().join(".dockercfg"), r#"{"reg.io":{"username":"legacy"}}"#).unwrap();
        assert_eq!(user(files.keyring().await), ["legacy"]);
        std::fs::create_dir(home.path().join(".docker")).unwrap();
        std::fs::write(home.path().join(".docker/config.json"), config("home")).unwrap();
        assert_eq!(user(files.keyring().await), ["home"]);
        std::fs::write(root.path().join("config.json"), "broken").unwrap();
        assert_eq!(user(files.keyring().await), ["home"]);
        std::fs::write(root.path().join("config.json"), config("root")).unwrap();
        assert_eq!(user(files.keyring().await), ["root"]);
    }
}
