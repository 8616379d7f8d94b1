//! Variables that tell a container of services (contract P-51): `<SVC>_SERVICE_HOST`, `_PORT`, and the docker-link style.

use std::collections::BTreeMap;

use crate::api::ServiceEnv;

/// `kubernetes` of namespace `default` reaches every pod; the pod's own namespace wins over it, and comes with `enableServiceLinks`.
pub(super) fn service_env(services: &[ServiceEnv], namespace: &str, service_links: bool) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &ServiceEnv> = BTreeMap::new();
    for service in services.iter().filter(|s| has_cluster_ip(s)) {
        let master = service.namespace == "default" && service.name == "kubernetes";
        if master {
            chosen.entry(&service.name).or_insert(service);
        } else if service_links && service.namespace == namespace {
            chosen.insert(&service.name, service);
        }
    }
    chosen.into_values().flat_map(variables).collect()
}

fn has_cluster_ip(service: &ServiceEnv) -> bool {
    !service.cluster_ip.is_empty() && service.cluster_ip != "None" && !service.ports.is_empty()
}

fn variables(service: &ServiceEnv) -> Vec<(String, String)> {
    let prefix = variable_name(&service.name);
    let ip = &service.cluster_ip;
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
    let mut out = vec![(format!("{prefix}_SERVICE_HOST"), ip.clone())];
    for (at, (name, protocol, port)) in service.ports.iter().enumerate() {
        let protocol = if protocol.is_empty() { "TCP" } else { protocol };
        let url = format!("{}://{host}:{port}", protocol.to_lowercase());
        let link = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
        if at == 0 {
            out.push((format!("{prefix}_SERVICE_PORT"), port.to_string()));
            out.push((format!("{prefix}_PORT"), url.clone()));
        }
        if !name.is_empty() {
            out.push((format!("{prefix}_SERVICE_PORT_{}", variable_name(name)), port.to_string()));
        }
        out.push((format!("{link}_PROTO"), protocol.to_lowercase()));
        out.push((format!("{link}_PORT"), port.to_string()));
        out.push((format!("{link}_ADDR"), ip.clone()));
        out.push((link, url));
    }
    out
}

fn variable_name(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str, ip: &str, ports: &[(&str, &str, i32)]) -> ServiceEnv {
        let ports = ports.iter().map(|(n, p, port)| ((*n).to_owned(), (*p).to_owned(), *port)).collect();
        ServiceEnv { namespace: namespace.into(), name: name.into(), cluster_ip: ip.into(), ports }
    }

    fn kubernetes() -> ServiceEnv {
        service("default", "kubernetes", "10.96.0.1", &[("https", "TCP", 443)])
    }

    #[test]
    fn p51_the_master_service_reaches_every_pod() {
        let env = service_env(&[kubernetes(), service("ns", "db", "10.0.0.9", &[("", "TCP", 1)])], "ns", false);
        let want = [
            ("KUBERNETES_PORT", "tcp://10.96.0.1:443"),
            ("KUBERNETES_PORT_443_TCP", "tcp://10.96.0.1:443"),
            ("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1"),
            ("KUBERNETES_PORT_443_TCP_PORT", "443"),
            ("KUBERNETES_PORT_443_TCP_PROTO", "tcp"),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("KUBERNETES_SERVICE_PORT", "443"),
            ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
        ];
        assert_eq!(env, want.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    #[test]
    fn p51_service_links_of_the_own_namespace() {
        let services = [
            kubernetes(),
            service("ns", "my-db", "fd00::9", &[("a-b", "UDP", 53), ("m", "", 9)]),
            service("ns", "headless", "None", &[("x", "TCP", 1)]),
            service("other", "far", "10.0.0.3", &[("x", "TCP", 1)]),
        ];
        let env = service_env(&services, "ns", true);
        for (key, value) in [
            ("MY_DB_SERVICE_HOST", "fd00::9"),
            ("MY_DB_SERVICE_PORT", "53"),
            ("MY_DB_SERVICE_PORT_A_B", "53"),
            ("MY_DB_SERVICE_PORT_M", "9"),
            ("MY_DB_PORT", "udp://[fd00::9]:53"),
            ("MY_DB_PORT_53_UDP", "udp://[fd00::9]:53"),
            ("MY_DB_PORT_53_UDP_PROTO", "udp"),
            ("MY_DB_PORT_9_TCP", "tcp://[fd00::9]:9"),
        ] {
            assert_eq!(env.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert!(!env.keys().any(|k| k.starts_with("HEADLESS") || k.starts_with("FAR")));
    }

    #[test]
    fn p51_a_service_named_kubernetes_in_the_own_namespace_wins() {
        let own = service("ns", "kubernetes", "10.9.9.9", &[("", "TCP", 1)]);
        for services in [[kubernetes(), own.clone()], [own, kubernetes()]] {
            assert_eq!(service_env(&services, "ns", true)["KUBERNETES_SERVICE_HOST"], "10.9.9.9");
        }
    }
}
