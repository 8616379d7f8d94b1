//! [`ReferencedObjects`] over the apiserver: the tables of configMaps and secrets, the token cache and the services, as one part.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{
    ApiError, ConfigMapData, ReferencedObjects, SecretData, ServiceAccountToken, ServiceEnv, TokenSpec,
    client::ApiClients, objects::Table, references::References, services::ServiceTable, tokens::TokenCache,
};
use crate::{
    pods::{Pod, PodUid},
    wake::WakeSink,
};

/// The one cache of referenced objects. Make it inside the runtime: it starts the watch of the services.
pub struct ObjectCache {
    config_maps: Table<ConfigMapData>,
    secrets: Table<SecretData>,
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
            config_maps: Table::new(clients.clone(), Arc::clone(wakes)),
            secrets: Table::new(clients.clone(), Arc::clone(wakes)),
            tokens: TokenCache::new(clients.clone(), Arc::clone(wakes)),
            services,
        }
    }
}

#[async_trait]
impl ReferencedObjects for ObjectCache {
    fn track(&self, pod: &Pod) {
        let references = References::of(pod);
        self.config_maps.track(pod.uid(), references.config_maps);
        self.secrets.track(pod.uid(), references.secrets);
    }

    fn forget(&self, uid: &PodUid) {
        self.config_maps.track(uid, BTreeSet::new());
        self.secrets.track(uid, BTreeSet::new());
        self.tokens.forget(uid);
    }

    async fn config_map(&self, namespace: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        self.config_maps.get(namespace, name).await
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        self.secrets.get(namespace, name).await
    }

    async fn service_account_token(&self, pod: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        self.tokens.token(pod, spec).await
    }

    fn services(&self, namespace: &str) -> Option<Vec<ServiceEnv>> {
        self.services.of_namespace(namespace)
    }
}
