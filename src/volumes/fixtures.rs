//! Pods and objects for this room's tests.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    api::{ApiError, ConfigMapData, ReferencedObjects, SecretData, ServiceAccountToken, ServiceEnv, TokenSpec},
    pods::{Pod, PodSource, PodUid},
};

/// A pod `ns/p` with UID `u1`; `overrides` has `metadata` and `spec` fields to add.
pub(super) fn pod(overrides: Value) -> Pod {
    let mut object = json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u1"}, "spec": {"containers": []}});
    for part in ["metadata", "spec"] {
        if let Some(fields) = overrides[part].as_object() {
            for (key, value) in fields {
                object[part][key] = value.clone();
            }
        }
    }
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, issued()).unwrap()
}

/// When every token of [`Objects`] was issued.
pub(super) fn issued() -> Timestamp {
    "2026-11-21T10:00:00Z".parse().unwrap()
}

/// Objects in memory. Tokens read `token-<n>-<audience>`, n counting requests.
#[derive(Default)]
pub(super) struct Objects {
    config_maps: Mutex<BTreeMap<String, Arc<ConfigMapData>>>,
    secrets: Mutex<BTreeMap<String, Arc<SecretData>>>,
    token_failure: Mutex<Option<ApiError>>,
    tokens: AtomicU64,
    gate: Mutex<Option<Arc<Gate>>>,
}

/// Holds back answers about configMaps until it is opened.
pub(super) struct Gate {
    reached: tokio::sync::Semaphore,
    open: tokio::sync::Semaphore,
}

impl Gate {
    /// Returns when someone waits for an answer.
    pub(super) async fn reached(&self) {
        let _ = self.reached.acquire().await.unwrap();
    }
    pub(super) fn open(&self) {
        self.open.add_permits(1000);
    }
}

impl Objects {
    pub(super) fn hold(&self) -> Arc<Gate> {
        let gate = Arc::new(Gate { reached: tokio::sync::Semaphore::new(0), open: tokio::sync::Semaphore::new(0) });
        *self.gate.lock().unwrap() = Some(gate.clone());
        gate
    }

    pub(super) fn set_config_map(&self, name: &str, data: &[(&str, &str)]) {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let object = ConfigMapData { data, ..Default::default() };
        self.config_maps.lock().unwrap().insert(name.to_owned(), Arc::new(object));
    }
    pub(super) fn remove_config_map(&self, name: &str) {
        self.config_maps.lock().unwrap().remove(name);
    }
    pub(super) fn set_secret(&self, name: &str, data: &[(&str, &[u8])]) {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), v.to_vec())).collect();
        self.secrets.lock().unwrap().insert(name.to_owned(), Arc::new(SecretData { data, ..Default::default() }));
    }
    pub(super) fn fail_tokens(&self, error: ApiError) {
        *self.token_failure.lock().unwrap() = Some(error);
    }
}

#[async_trait]
impl ReferencedObjects for Objects {
    fn track(&self, _: &Pod) {}
    fn forget(&self, _: &PodUid) {}

    async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        let gate = self.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.reached.add_permits(1);
            let _ = gate.open.acquire().await.unwrap();
        }
        let found = self.config_maps.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| ApiError::NotFound { kind: "configmap", name: name.to_owned() })
    }
    async fn secret(&self, _: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        let found = self.secrets.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| ApiError::NotFound { kind: "secret", name: name.to_owned() })
    }
    async fn service_account_token(&self, _: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        let failure = self.token_failure.lock().unwrap().clone();
        if let Some(error) = failure {
            return Err(error);
        }
        let count = self.tokens.fetch_add(1, Ordering::Relaxed) + 1;
        let life = Duration::from_secs(spec.expiration_seconds.unsigned_abs());
        let expires = issued().checked_add(life).unwrap();
        Ok(ServiceAccountToken { token: format!("token-{count}-{}", spec.audience), issued: issued(), expires })
    }
    fn services(&self, _: &str) -> Option<Vec<ServiceEnv>> {
        None
    }
}
