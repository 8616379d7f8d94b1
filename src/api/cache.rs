//! [`ReferencedObjects`] over the apiserver: the tables of configMaps, secrets and RuntimeClasses, the token cache and the services, as one part.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use async_trait::async_trait;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    ApiError, ConfigMapData, ReferencedObjects, RuntimeClassData, SecretData, ServiceAccountData, ServiceAccountToken,
    ServiceEnv, TokenSpec, client::ApiClients, objects::Table, references::References, rest, services::ServiceTable,
    tokens::TokenCache,
};
use crate::{
    pods::{Pod, PodUid},
    wake::WakeSink,
};

/// The one cache of referenced objects. Make it inside the runtime: it starts the watch of the services.
pub struct ObjectCache {
    clients: ApiClients,
    config_maps: Table<ConfigMapData>,
    secrets: Table<SecretData>,
    runtime_classes: Table<RuntimeClassData>,
    tokens: TokenCache,
    services: Arc<ServiceTable>,
}

impl ObjectCache {
    /// `cancel` ends the watch of the services; other watches end with their pods or with this value.
    pub fn start(clients: &ApiClients, wakes: &Arc<dyn WakeSink>, cancel: CancellationToken) -> Self {
        let services = Arc::new(ServiceTable::default());
        let following = Arc::clone(&services).follow(clients.clone(), Arc::clone(wakes));
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = following => {}
            }
        });
        Self {
            clients: clients.clone(),
            config_maps: Table::new(clients.clone(), Arc::clone(wakes)),
            secrets: Table::new(clients.clone(), Arc::clone(wakes)),
            runtime_classes: Table::new(clients.clone(), Arc::clone(wakes)),
            tokens: TokenCache::new(clients.clone(), Arc::clone(wakes)),
            services,
        }
    }
}

#[derive(Deserialize)]
struct ServiceAccountWire {
    metadata: ServiceAccountMeta,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ServiceAccountMeta {
    uid: String,
    annotations: Option<BTreeMap<String, String>>,
}

#[async_trait]
impl ReferencedObjects for ObjectCache {
    fn track(&self, pod: &Pod) {
        let references = References::of(pod);
        self.config_maps.track(pod.uid(), references.config_maps);
        self.secrets.track(pod.uid(), references.secrets);
        self.runtime_classes.track(pod.uid(), references.runtime_classes);
    }

    fn forget(&self, uid: &PodUid) {
        self.config_maps.track(uid, BTreeSet::new());
        self.secrets.track(uid, BTreeSet::new());
        self.runtime_classes.track(uid, BTreeSet::new());
        self.tokens.forget(uid);
    }

    async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        self.config_maps.get(namespace, name).await
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        self.secrets.get(namespace, name).await
    }

    async fn runtime_class(&self, name: &str) -> Result<Arc<RuntimeClassData>, ApiError> {
        self.runtime_classes.get("", name).await
    }

    async fn service_account_token(&self, pod: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        self.tokens.token(pod, spec).await
    }

    async fn service_account(&self, namespace: &str, name: &str) -> Result<ServiceAccountData, ApiError> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}");
        let answer = rest::get(&self.clients.general, &path).await;
        match answer.and_then(|bytes| rest::decode::<ServiceAccountWire>("ServiceAccount", &bytes, false)) {
            Ok(ServiceAccountWire { metadata }) => {
                Ok(ServiceAccountData { uid: metadata.uid, annotations: metadata.annotations.unwrap_or_default() })
            }
            Err(error) if error.is_not_found() => {
                Err(ApiError::NotFound { kind: "serviceaccounts", name: name.to_owned() })
            }
            Err(error) => Err(ApiError::Unavailable { message: error.to_string() }),
        }
    }

    fn services(&self, namespace: &str) -> Option<Vec<ServiceEnv>> {
        self.services.of_namespace(namespace)
    }
}
