//! Which credentials are tried for an image, and in which order (contract I-05).

use std::fmt;

use protocols::cri::v1;

use super::glob;

const DEFAULT_REGISTRY: &str = "index.docker.io";

/// One login. Its `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Credential {
    pub(super) username: String,
    pub(super) password: String,
}

impl Credential {
    pub(super) fn to_cri(&self) -> v1::AuthConfig {
        v1::AuthConfig { username: self.username.clone(), password: self.password.clone(), ..Default::default() }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(<redacted>)")
    }
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
fn registry_matches(key: &str, repository: &str) -> bool {
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
            keyring.add(key, Credential { username: format!("{at}"), password: "hush".into() });
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
}
