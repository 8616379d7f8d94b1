//! Port mappings of a sandbox (contract P-57): the runtime hands them to CNI's portmap, which opens the host ports.

use std::{collections::HashSet, net::IpAddr};

use k8s_openapi::api::core::v1::ContainerPort;
use protocols::cri::v1;

use crate::pods::Pod;

/// Every port of the main containers, as upstream passes them: also those without a host port, which the runtime skips.
/// Within one container a name, or the same address, port and protocol, counts once.
pub fn port_mappings(pod: &Pod) -> Vec<v1::PortMapping> {
    let mut mappings = Vec::new();
    for container in pod.main_containers() {
        let mut seen = HashSet::new();
        for port in container.spec.ports.iter().flatten() {
            if seen.insert(key(port)) {
                mappings.push(mapping(port));
            } else {
                tracing::warn!(pod = %pod.described(), container = container.name(), port = port.container_port, "port is defined more than once");
            }
        }
    }
    mappings
}

fn key(port: &ContainerPort) -> String {
    match port.name.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => {
            let host_ip = port.host_ip.as_deref().unwrap_or_default();
            let family = match host_ip.parse::<IpAddr>() {
                _ if host_ip.is_empty() => "any",
                Ok(IpAddr::V6(_)) => "v6",
                _ => "v4",
            };
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            format!("{family}-{protocol}-{host_ip}:{}:{}", port.container_port, port.host_port.unwrap_or(0))
        }
    }
}

fn mapping(port: &ContainerPort) -> v1::PortMapping {
    let protocol = match port.protocol.as_deref() {
        Some("UDP") => v1::Protocol::Udp,
        Some("SCTP") => v1::Protocol::Sctp,
        _ => v1::Protocol::Tcp,
    };
    v1::PortMapping {
        protocol: protocol.into(),
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::pod;

    #[test]
    fn p57_ports_by_container_without_duplicates() {
        let pod = pod(r#"{"initContainers":[{"name":"i","ports":[{"containerPort":1,"hostPort":1}]}],
                "containers":[
                {"name":"a","ports":[{"containerPort":80,"hostPort":8080,"protocol":"TCP"},
                                     {"containerPort":80,"hostPort":8080,"protocol":"TCP"},
                                     {"containerPort":80,"hostPort":8080,"protocol":"UDP"},
                                     {"containerPort":80,"hostPort":8080,"hostIP":"127.0.0.1"},
                                     {"name":"x","containerPort":1},{"name":"x","containerPort":2}]},
                {"name":"b","ports":[{"containerPort":80,"hostPort":8080,"protocol":"SCTP"}]}]}"#);
        let got: Vec<_> =
            port_mappings(&pod).into_iter().map(|m| (m.container_port, m.host_port, m.protocol, m.host_ip)).collect();
        let want = [(80, 8080, 0, ""), (80, 8080, 1, ""), (80, 8080, 0, "127.0.0.1"), (1, 0, 0, ""), (80, 8080, 2, "")];
        assert_eq!(got, want.map(|(c, h, p, ip)| (c, h, p, ip.to_owned())));
    }
}
