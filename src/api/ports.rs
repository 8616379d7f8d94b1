//! What other rooms see of the apiserver.

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;
use jiff::Timestamp;

use crate::pods::{Pod, PodUid};

/// Why an object cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// Worded as upstream: `configmap "x" not found`.
    #[error("{kind} \"{name}\" not found")]
    NotFound { kind: &'static str, name: String },
    #[error("{kind} \"{name}\" is forbidden: {message}")]
    Forbidden { kind: &'static str, name: String, message: String },
    /// The apiserver did not answer, or with an error that may pass.
    #[error("{message}")]
    Unavailable { message: String },
}

/// A configMap's content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigMapData {
    pub data: BTreeMap<String, String>,
    pub binary_data: BTreeMap<String, Vec<u8>>,
    pub immutable: bool,
}

/// A secret's content. Its `Debug` shows key names only.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct SecretData {
    pub uid: String,
    pub type_: String,
    pub data: BTreeMap<String, Vec<u8>>,
    pub immutable: bool,
}

impl fmt::Debug for SecretData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretData").field("type_", &self.type_).field("keys", &self.data.keys()).finish()
    }
}

/// What a credential provider may learn of a service account (contract I-07).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceAccountData {
    pub uid: String,
    pub annotations: BTreeMap<String, String>,
}

/// As upstream words it in `runtimeclass.node.k8s.io "x" not found`.
pub(super) const RUNTIME_CLASS: &str = "runtimeclass.node.k8s.io";

/// What a RuntimeClass says to the node. Its overhead and scheduling parts are written into the pod by the apiserver.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeClassData {
    /// The CRI runtime handler's name.
    pub handler: String,
}

/// What a projected `serviceAccountToken` source asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenSpec {
    /// Empty: the apiserver's own audience.
    pub audience: String,
    pub expiration_seconds: i64,
}

/// A bound token. Its `Debug` never shows it.
#[derive(Clone)]
pub struct ServiceAccountToken {
    pub token: String,
    pub issued: Timestamp,
    pub expires: Timestamp,
}

impl fmt::Debug for ServiceAccountToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceAccountToken").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// One service as containers' environment needs it (contract P-51).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceEnv {
    pub namespace: String,
    pub name: String,
    pub cluster_ip: String,
    /// (name, protocol, port) in spec order.
    pub ports: Vec<(String, String, i32)>,
}

/// Objects that pods refer to: one shared watch per object, dropped with its last user (contract V-24, N-23).
#[async_trait]
pub trait ReferencedObjects: Send + Sync + 'static {
    /// Declares what this pod refers to (volumes, env, envFrom, imagePullSecrets, runtimeClassName): starts the fetches at once, in parallel, and the
    /// watches; a change wakes the pod with `Cause::Object`. Idempotent; call it again when the pod changed.
    fn track(&self, pod: &Pod);
    fn forget(&self, uid: &PodUid);

    /// The newest content known; waits for the first fetch. Only for objects that a tracked pod refers to.
    async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError>;
    async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<SecretData>, ApiError>;

    /// Only for the class of a tracked pod.
    async fn runtime_class(&self, name: &str) -> Result<Arc<RuntimeClassData>, ApiError> {
        Err(ApiError::NotFound { kind: RUNTIME_CLASS, name: name.to_owned() })
    }

    /// The CRI runtime handler that the pod asks for by its class; empty for the default one (contract P-61). Worded as upstream.
    async fn runtime_handler(&self, pod: &Pod) -> Result<String, ApiError> {
        let name = pod.spec().runtime_class_name.as_deref().unwrap_or_default();
        if name.is_empty() {
            return Ok(String::new());
        }
        match self.runtime_class(name).await {
            Ok(class) => Ok(class.handler.clone()),
            Err(error @ ApiError::NotFound { .. }) => Err(error),
            Err(error) => {
                Err(ApiError::Unavailable { message: format!("failed to lookup RuntimeClass {name}: {error}") })
            }
        }
    }

    /// A token bound to the pod (name and UID), cached and renewed at 80 % of its life or after 24 h (contract V-26).
    async fn service_account_token(&self, pod: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError>;

    /// Read from the apiserver each time. Only credential providers in service account mode ask.
    async fn service_account(&self, _namespace: &str, name: &str) -> Result<ServiceAccountData, ApiError> {
        Err(ApiError::NotFound { kind: "serviceaccounts", name: name.to_owned() })
    }

    /// The services of this namespace and `default/kubernetes`; `None` until the first complete list (contract P-51).
    fn services(&self, namespace: &str) -> Option<Vec<ServiceEnv>>;
}
