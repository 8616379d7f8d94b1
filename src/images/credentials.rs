//! Which credentials are tried for an image, and in which order (contract I-05); where each comes from, for the pull records (I-10).

use std::fmt;

use protocols::cri::v1;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::glob;
use crate::containers::go_json;

const DEFAULT_REGISTRY: &str = "index.docker.io";

/// Which object a credential belongs to, as the pull records write it (contract I-10).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Coordinates {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// Who may use what was pulled with a credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) enum CredentialSource {
    /// The node's own files, or a provider that knows no pod: every pod of the node.
    #[default]
    Node,
    Secret(Coordinates),
    ServiceAccount(Coordinates),
}

/// One login. Its `Debug` shows nothing of it but where it is from.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Credential {
    pub(super) username: String,
    pub(super) password: String,
    /// Part of the hash, never sent.
    pub(super) email: String,
    pub(super) source: CredentialSource,
}

impl Credential {
    /// SHA-256 in hex over the JSON that the Go kubelet hashes (contract I-10).
    pub(super) fn hash(&self) -> String {
        let fields = [("username", &self.username), ("password", &self.password), ("email", &self.email)];
        let set = fields.iter().filter(|(_, value)| !value.is_empty());
        let json: Vec<String> = set.map(|(name, value)| format!("\"{name}\":{}", go_json(value))).collect();
        hex(&Sha256::digest(format!("{{{}}}", json.join(","))))
    }

    pub(super) fn to_cri(&self) -> v1::AuthConfig {
        v1::AuthConfig { username: self.username.clone(), password: self.password.clone(), ..Default::default() }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential(<redacted>, {:?})", self.source)
    }
}

/// In lower case.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Credentials by registry: `host[:port][/path]`, where labels of the host may be patterns.
#[derive(Debug, Default, Clone)]
pub(super) struct Keyring {
    /// In order of insertion; one registry may stand here many times.
    entries: Vec<(String, Credential)>,
}

impl Keyring {
    /// `registry` as docker config writes it: a scheme, and `/v1/` or `/v2/` after the host, mean nothing.
    pub(super) fn add(&mut self, registry: &str, credential: Credential) {
        let bare = registry.strip_prefix("https://").or_else(|| registry.strip_prefix("http://")).unwrap_or(registry);
        let bare = bare.split(['?', '#']).next().unwrap_or_default();
        let (host, path) = split_path(bare);
        let path = if path.starts_with("/v1/") || path.starts_with("/v2/") { &path[3..] } else { path };
        let key = if path == "/" { host.to_owned() } else { format!("{host}{path}") };
        self.entries.push((key, credential));
    }

    /// For an image's repository (`docker.io/library/nginx`): the most specific registry first, then in order of insertion.
    pub(super) fn lookup(&self, repository: &str) -> Vec<Credential> {
        let mut found: Vec<&(String, Credential)> =
            self.entries.iter().filter(|(key, _)| registry_matches(key, repository)).collect();
        found.sort_by(|(a, _), (b, _)| b.cmp(a));
        if found.is_empty() && is_default_registry(repository) {
            found = self.entries.iter().filter(|(key, _)| key == DEFAULT_REGISTRY).collect();
        }
        found.into_iter().map(|(_, credential)| credential.clone()).collect()
    }
}

fn split_path(text: &str) -> (&str, &str) {
    text.find('/').map_or((text, ""), |at| text.split_at(at))
}

/// Ports equal, as many labels each matching, and the path a prefix.
pub(super) fn registry_matches(key: &str, repository: &str) -> bool {
    let ((key_host, key_path), (host, path)) = (split_path(key), split_path(repository));
    let ((key_host, key_port), (host, port)) = (split_port(key_host), split_port(host));
    let (key_labels, labels): (Vec<_>, Vec<_>) = (key_host.split('.').collect(), host.split('.').collect());
    key_port == port
        && key_labels.len() == labels.len()
        && path.starts_with(key_path)
        && key_labels.iter().zip(labels).all(|(pattern, label)| glob::matches(pattern, label))
}

fn split_port(host: &str) -> (&str, &str) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') && (name.ends_with(']') || !name.contains(':')) => (name, port),
        _ => (host, ""),
    }
}

fn is_default_registry(repository: &str) -> bool {
    match repository.split_once('/') {
        Some(("", _)) => false,
        Some(("docker.io" | DEFAULT_REGISTRY, _)) | None => !repository.is_empty(),
        Some((first, _)) => !first.contains(['.', ':']),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring(keys: &[&str]) -> Keyring {
        let mut keyring = Keyring::default();
        for (at, key) in keys.iter().enumerate() {
            keyring.add(key, Credential { username: format!("{at}"), password: "hush".into(), ..Default::default() });
        }
        keyring
    }

    #[test]
    fn i05_matching() {
        for (key, repository, want) in [
            ("reg.io", "reg.io/a/b", true),
            ("https://reg.io/v1/", "reg.io/a", true),
            ("http://reg.io/v2/", "reg.io/a", true),
            ("reg.io/", "reg.io/a", true),
            ("reg.io/team", "reg.io/team/app", true),
            ("reg.io/team", "reg.io/other/app", false),
            ("reg.io", "reg.io:5000/a", false),
            ("reg.io:5000", "reg.io:5000/a", true),
            ("*.reg.io", "eu.reg.io/a", true),
            ("*.reg.io", "reg.io/a", false),
            ("*.reg.io", "x.eu.reg.io/a", false),
            ("*.*.io", "eu.reg.io/a", true),
            ("eu-*.reg.io", "eu-1.reg.io/a", true),
            ("docker.io", "docker.io/library/nginx", true),
            ("index.docker.io", "docker.io/library/nginx", true),
            ("https://index.docker.io/v1/", "docker.io/library/nginx", true),
            ("index.docker.io", "reg.io/nginx", false),
        ] {
            assert_eq!(keyring(&[key]).lookup(repository).len(), usize::from(want), "{key} {repository}");
        }
    }

    #[test]
    fn i05_the_most_specific_registry_is_tried_first() {
        let keyring = keyring(&["reg.io", "reg.io/team/app", "reg.io/team", "reg.io"]);
        let order: Vec<String> = keyring.lookup("reg.io/team/app").into_iter().map(|c| c.username).collect();
        assert_eq!(order, ["1", "2", "0", "3"]);
    }

    #[test]
    fn i05_debug_shows_no_secret() {
        assert!(!format!("{:?}", keyring(&["reg.io"])).contains("hush"));
    }

    #[test]
    fn i10_the_hash_is_the_go_kubelets() {
        let credential = |username: &str, password: &str, email: &str| Credential {
            username: username.into(),
            password: password.into(),
            email: email.into(),
            ..Default::default()
        };
        let sha256 = |json: &str| hex(&Sha256::digest(json));
        for (of, json) in [
            (credential("u", "p", ""), r#"{"username":"u","password":"p"}"#),
            (credential("u", "<&>", "e@x"), r#"{"username":"u","password":"\u003c\u0026\u003e","email":"e@x"}"#),
            (credential("", "", ""), "{}"),
        ] {
            assert_eq!(of.hash(), sha256(json));
        }
        let source = CredentialSource::Secret(Coordinates::default());
        assert_eq!(Credential { source, ..credential("u", "p", "") }.hash(), credential("u", "p", "").hash());
    }
}
