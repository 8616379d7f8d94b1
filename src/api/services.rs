//! The cluster's services, as far as containers' environment needs them (contract N-24, P-51).
//!
//! In: one watch of all services with a cluster IP. Out: per namespace a sorted list. Kept small: name, address, ports.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use serde::Deserialize;

use super::{
    ServiceEnv,
    client::ApiClients,
    list_watch::{self, Collection, Follow, Reflect},
    rest::{Bare, BareMeta},
};
use crate::wake::{Cause, WakeSink};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceWire {
    #[serde(default)]
    metadata: BareMeta,
    #[serde(default)]
    spec: SpecWire,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SpecWire {
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    ports: Option<Vec<PortWire>>,
}

#[derive(Deserialize)]
struct PortWire {
    #[serde(default)]
    name: String,
    #[serde(default = "tcp")]
    protocol: String,
    port: i32,
}

fn tcp() -> String {
    "TCP".to_owned()
}

impl ServiceWire {
    fn key(&self) -> (String, String) {
        (self.metadata.namespace.clone(), self.metadata.name.clone())
    }

    /// `None` for a headless or external service: it has no variables.
    fn env(self) -> Option<ServiceEnv> {
        if matches!(self.spec.cluster_ip.as_str(), "" | "None") {
            return None;
        }
        let ports = self.spec.ports.unwrap_or_default().into_iter().map(|p| (p.name, p.protocol, p.port)).collect();
        Some(ServiceEnv {
            namespace: self.metadata.namespace,
            name: self.metadata.name,
            cluster_ip: self.spec.cluster_ip,
            ports,
        })
    }
}

#[derive(Default)]
pub(super) struct ServiceTable {
    /// `None` until the first complete list.
    known: Mutex<Option<BTreeMap<(String, String), ServiceEnv>>>,
}

impl ServiceTable {
    /// The namespace's services and `default/kubernetes`, by name.
    pub(super) fn of_namespace(&self, namespace: &str) -> Option<Vec<ServiceEnv>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.as_ref()?;
        let own = known.range((namespace.to_owned(), String::new())..).take_while(|((ns, _), _)| ns == namespace);
        let mut list: Vec<ServiceEnv> = own.map(|(_, service)| service.clone()).collect();
        if namespace != "default"
            && let Some(kubernetes) = known.get(&("default".to_owned(), "kubernetes".to_owned()))
        {
            list.push(kubernetes.clone());
        }
        Some(list)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<(String, String), ServiceEnv>)) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(known.get_or_insert_default());
    }

    /// Follows the services until dropped.
    pub(super) async fn follow(self: Arc<Self>, clients: ApiClients, wakes: Arc<dyn WakeSink>) {
        let collection = Collection {
            path: "/api/v1/services".to_owned(),
            field_selector: "spec.clusterIP!=None".to_owned(),
            kind: "services",
            quiet: false,
            relist_on_loss: false,
        };
        let mut reflect = ServiceReflect { table: self, wakes, listed: false };
        list_watch::run::<ServiceWire>(&clients, &collection, None, &mut reflect).await;
    }
}

struct ServiceReflect {
    table: Arc<ServiceTable>,
    wakes: Arc<dyn WakeSink>,
    listed: bool,
}

#[async_trait]
impl Reflect<ServiceWire> for ServiceReflect {
    async fn listed(&mut self, items: Vec<ServiceWire>, _: Vec<Bare>) -> Follow {
        let fresh = items.into_iter().filter_map(|s| Some((s.key(), s.env()?))).collect();
        self.table.change(|known| *known = fresh);
        // Pods may have waited for the first list; later changes never touch running containers.
        if !std::mem::replace(&mut self.listed, true) {
            self.wakes.wake_all(Cause::Object);
        }
        Follow::On
    }

    async fn present(&mut self, service: ServiceWire) -> Follow {
        let key = service.key();
        self.table.change(|known| match service.env() {
            Some(env) => {
                known.insert(key, env);
            }
            None => {
                known.remove(&key);
            }
        });
        Follow::On
    }

    async fn deleted(&mut self, service: ServiceWire) -> Follow {
        self.table.change(|known| {
            known.remove(&service.key());
        });
        Follow::On
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn p51_own_namespace_and_the_kubernetes_service_once_listed() {
        let table = Arc::new(ServiceTable::default());
        assert_eq!(table.of_namespace("a"), None);
        let mut reflect =
            ServiceReflect { table: Arc::clone(&table), wakes: Arc::new(crate::wake::NoWakes), listed: false };
        let service = |ns: &str, name: &str, ip: &str| -> ServiceWire {
            serde_json::from_value(serde_json::json!({
                "metadata": {"namespace": ns, "name": name}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}
            }))
            .unwrap()
        };
        let items = vec![
            service("a", "web", "10.0.0.2"),
            service("a", "headless", "None"),
            service("ab", "other", "10.0.0.3"),
            service("default", "kubernetes", "10.0.0.1"),
            service("default", "db", "10.0.0.4"),
        ];
        reflect.listed(items, Vec::new()).await;
        let names =
            |ns: &str| table.of_namespace(ns).unwrap().iter().map(|s| s.name.clone()).collect::<Vec<_>>().join(" ");
        assert_eq!(names("a"), "web kubernetes");
        assert_eq!(names("default"), "db kubernetes");
        assert_eq!(names("empty"), "kubernetes");
        assert_eq!(table.of_namespace("a").unwrap()[0].ports, [(String::new(), "TCP".to_owned(), 80)]);
        reflect.deleted(service("a", "web", "10.0.0.2")).await;
        assert_eq!(names("a"), "kubernetes");
    }
}
