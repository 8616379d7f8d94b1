//! `Debug` for messages that hold secrets: keys and sizes, never values.

use std::fmt;

use crate::cri::v1::{AuthConfig, ContainerConfig, ContainerStatusResponse, KeyValue};

/// Whether a secret is set, without saying what it is.
fn shade(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { "<redacted>" }
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &shade(&self.username))
            .field("password", &shade(&self.password))
            .field("auth", &shade(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shade(&self.identity_token))
            .field("registry_token", &shade(&self.registry_token))
            .finish()
    }
}

impl fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=<{} bytes>", self.key, self.value.len())
    }
}

/// Command and arguments are counted only: `$(VAR)` expansion puts environment values into them.
impl fmt::Debug for ContainerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerConfig")
            .field("metadata", &self.metadata)
            .field("image", &self.image)
            .field("command_len", &self.command.len())
            .field("args_len", &self.args.len())
            .field("envs", &self.envs)
            .field("mounts", &self.mounts)
            .field("labels", &self.labels)
            .field("log_path", &self.log_path)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ContainerStatusResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerStatusResponse")
            .field("status", &self.status)
            .field("info_keys", &self.info.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use crate::cri::v1::{AuthConfig, ContainerConfig, CreateContainerRequest, KeyValue, PullImageRequest};

    #[test]
    fn debug_shows_no_credentials_env_values_or_arguments() {
        let auth = AuthConfig {
            username: "hush-user".into(),
            password: "hush-password".into(),
            auth: "hush-auth".into(),
            identity_token: "hush-id".into(),
            registry_token: "hush-reg".into(),
            server_address: "registry.example".into(),
        };
        let pull = PullImageRequest { auth: Some(auth), ..Default::default() };
        let create = CreateContainerRequest {
            config: Some(ContainerConfig {
                envs: vec![KeyValue { key: "TOKEN".into(), value: b"hush-env".to_vec() }],
                command: vec!["hush-command".into()],
                args: vec!["hush-arg".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        let shown = format!("{pull:?} {create:?}");
        assert!(!shown.contains("hush"), "{shown}");
        assert!(shown.contains("registry.example") && shown.contains("TOKEN=<8 bytes>"), "{shown}");
    }
}
