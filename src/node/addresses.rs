//! Which addresses the node reports (contract N-07, S-19).
//!
//! In: `--node-ip`, the host's interfaces and default routes, what the node's name resolves to. Out: `status.addresses`. The choice is
//! pure ([`select`]); [`Interfaces::read`] and [`default_routes`] are the only I/O, beside the DNS lookup that the caller makes.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use k8s_openapi::api::core::v1::NodeAddress;
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};

/// Addresses cannot be told. Worded as upstream, for the log and the status error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("failed to validate nodeIP: {0}")]
    NodeIp(String),
    #[error("failed to validate secondaryNodeIP: {0}")]
    SecondaryNodeIp(String),
    #[error("can't get ip address of node {node}. error: {reason}")]
    None { node: String, reason: String },
}

/// One network interface that is up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    pub loopback: bool,
    pub point_to_point: bool,
    /// In the kernel's order.
    pub addresses: Vec<IpAddr>,
}

/// The host's interfaces that are up, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interfaces(pub BTreeMap<String, Interface>);

impl Interfaces {
    pub fn read() -> io::Result<Self> {
        let mut found: BTreeMap<String, Interface> = BTreeMap::new();
        for entry in getifaddrs()?.filter(|e| e.flags.contains(InterfaceFlags::IFF_UP)) {
            let interface = found.entry(entry.interface_name).or_default();
            interface.loopback = entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
            interface.point_to_point = entry.flags.contains(InterfaceFlags::IFF_POINTOPOINT);
            let address = entry.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            });
            interface.addresses.extend(address);
        }
        Ok(Self(found))
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.0.values().any(|interface| interface.addresses.contains(&ip))
    }
}

/// A default route: address family and interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultRoute {
    pub v6: bool,
    pub interface: String,
}

/// The default routes of `/proc/net/route` and `/proc/net/ipv6_route`, IPv4 first.
pub fn default_routes(proc: &Path) -> Vec<DefaultRoute> {
    let read = |file: &str| fs::read_to_string(proc.join("net").join(file)).unwrap_or_default();
    let mut routes = parse_routes_v4(&read("route"));
    routes.extend(parse_routes_v6(&read("ipv6_route")));
    routes
}

fn parse_routes_v4(text: &str) -> Vec<DefaultRoute> {
    let fields = text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields
        .filter(|f| f.get(1) == Some(&"00000000"))
        .filter_map(|f| Some(DefaultRoute { v6: false, interface: (*f.first()?).to_owned() }))
        .collect()
}

/// A route without a gateway is the kernel's own null route on `lo`.
fn parse_routes_v6(text: &str) -> Vec<DefaultRoute> {
    let zero = |field: &str| field.len() == 32 && field.bytes().all(|b| b == b'0');
    let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields
        .filter(|f| f.first().is_some_and(|d| zero(d)) && f.get(4).is_some_and(|gateway| !zero(gateway)))
        .filter_map(|f| Some(DefaultRoute { v6: true, interface: (*f.get(9)?).to_owned() }))
        .collect()
}

/// Everything the choice is made from.
#[derive(Debug, Clone)]
pub struct AddressInputs<'a> {
    pub node_name: &'a str,
    /// `--node-ip`: none, one, or one per family. An unspecified one (`::`) only prefers its family.
    pub node_ips: &'a [IpAddr],
    /// `--cloud-provider=external`: addresses are the cloud controller's.
    pub external_cloud: bool,
    pub interfaces: &'a Interfaces,
    pub routes: &'a [DefaultRoute],
    /// What DNS or the hosts file says for the node's name.
    pub resolved: &'a [IpAddr],
    /// What the Node has now.
    pub current: &'a [NodeAddress],
}

/// `status.addresses`.
pub fn select(inputs: &AddressInputs<'_>) -> Result<Vec<NodeAddress>, AddressError> {
    let given = inputs.node_ips.first().copied();
    let primary = given.filter(|ip| !ip.is_unspecified());
    let secondary = inputs.node_ips.get(1).copied().filter(|ip| !ip.is_unspecified());
    if let Some(ip) = primary {
        validate(ip, inputs.interfaces).map_err(AddressError::NodeIp)?;
    }
    if let Some(ip) = secondary {
        validate(ip, inputs.interfaces).map_err(AddressError::SecondaryNodeIp)?;
    }
    if inputs.external_cloud {
        if !inputs.current.is_empty() {
            return Ok(inputs.current.to_vec());
        }
        if given.is_none() {
            return Ok(vec![address("Hostname", inputs.node_name)]);
        }
    }
    let ips = match (primary, secondary) {
        (Some(first), Some(second)) => vec![first, second],
        (Some(only), None) => vec![only],
        (None, _) => vec![choose(inputs, given)?],
    };
    let mut addresses: Vec<NodeAddress> = ips.iter().map(|ip| address("InternalIP", &ip.to_string())).collect();
    addresses.push(address("Hostname", inputs.node_name));
    Ok(addresses)
}

/// The annotation `alpha.kubernetes.io/provided-node-ip`, which only an external cloud wants.
pub fn provided_node_ip(node_ips: &[IpAddr], external_cloud: bool) -> Option<String> {
    let given: Vec<String> = node_ips.iter().filter(|ip| !ip.is_unspecified()).map(ToString::to_string).collect();
    let primary_given = node_ips.first().is_some_and(|ip| !ip.is_unspecified());
    (external_cloud && primary_given).then(|| given.join(","))
}

fn address(kind: &str, address: &str) -> NodeAddress {
    NodeAddress { type_: kind.to_owned(), address: address.to_owned() }
}

fn choose(inputs: &AddressInputs<'_>, given: Option<IpAddr>) -> Result<IpAddr, AddressError> {
    if let Ok(ip) = inputs.node_name.parse::<IpAddr>() {
        return Ok(ip);
    }
    let prefer_v4 = given.is_none_or(|ip| ip.is_ipv4());
    let usable: Vec<IpAddr> =
        inputs.resolved.iter().copied().filter(|ip| validate(*ip, inputs.interfaces).is_ok()).collect();
    let preferred = usable.iter().find(|ip| ip.is_ipv4() == prefer_v4).or_else(|| usable.first());
    if let Some(ip) = preferred {
        return Ok(*ip);
    }
    by_default_route(inputs, prefer_v4).ok_or_else(|| AddressError::None {
        node: inputs.node_name.to_owned(),
        reason: match inputs.routes.is_empty() {
            true => "no default routes found in \"/proc/net/route\" or \"/proc/net/ipv6_route\"".to_owned(),
            false => "unable to select an IP from default routes.".to_owned(),
        },
    })
}

/// The first global address of the default route's interface, else one on loopback: a router that numbers only loopback
/// (RFC 5549) has its node address there.
fn by_default_route(inputs: &AddressInputs<'_>, prefer_v4: bool) -> Option<IpAddr> {
    let families = if prefer_v4 { [false, true] } else { [true, false] };
    families.into_iter().find_map(|v6| {
        inputs.routes.iter().filter(|route| route.v6 == v6).find_map(|route| {
            let interface = inputs.interfaces.0.get(&route.interface);
            let loopbacks = inputs.interfaces.0.values().filter(|i| i.loopback);
            interface.into_iter().chain(loopbacks).find_map(|i| global_address(i, v6))
        })
    })
}

fn global_address(interface: &Interface, v6: bool) -> Option<IpAddr> {
    interface.addresses.iter().copied().find(|ip| ip.is_ipv6() == v6 && is_global_unicast(*ip))
}

/// As Go's `net.IP.IsGlobalUnicast`: private addresses count.
fn is_global_unicast(ip: IpAddr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_link_local(ip) || is_broadcast(ip))
}

fn is_broadcast(ip: IpAddr) -> bool {
    ip == IpAddr::V4(Ipv4Addr::BROADCAST)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => Ipv6Addr::is_unicast_link_local(&v6),
    }
}

fn validate(ip: IpAddr, interfaces: &Interfaces) -> Result<(), String> {
    let refused = match () {
        () if ip.is_loopback() => "nodeIP can't be loopback address",
        () if ip.is_multicast() => "nodeIP can't be a multicast address",
        () if is_link_local(ip) => "nodeIP can't be a link-local unicast address",
        () if ip.is_unspecified() => "nodeIP can't be an all zeros address",
        () if interfaces.has(ip) => return Ok(()),
        () => return Err(format!("node IP: \"{ip}\" not found in the host's network interfaces")),
    };
    Err(refused.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn interfaces() -> Interfaces {
        let interface = |loopback, addresses: &[&str]| Interface {
            loopback,
            point_to_point: false,
            addresses: addresses.iter().map(|a| ip(a)).collect(),
        };
        Interfaces(
            [
                ("lo".to_owned(), interface(true, &["127.0.0.1", "::1"])),
                ("eth0".to_owned(), interface(false, &["192.0.2.2", "fe80::1", "2001:db8::2"])),
                ("eth1".to_owned(), interface(false, &["10.0.0.5"])),
            ]
            .into(),
        )
    }

    struct Case {
        name: &'static str,
        node_ips: Vec<IpAddr>,
        resolved: Vec<IpAddr>,
        external_cloud: bool,
        current: Vec<NodeAddress>,
        routes: Vec<DefaultRoute>,
    }

    fn case() -> Case {
        let route = |v6| DefaultRoute { v6, interface: "eth0".to_owned() };
        Case {
            name: "node1",
            node_ips: vec![],
            resolved: vec![],
            external_cloud: false,
            current: vec![],
            routes: vec![route(false), route(true)],
        }
    }

    fn run(case: &Case) -> Result<String, String> {
        let interfaces = interfaces();
        let addresses = select(&AddressInputs {
            node_name: case.name,
            node_ips: &case.node_ips,
            external_cloud: case.external_cloud,
            interfaces: &interfaces,
            routes: &case.routes,
            resolved: &case.resolved,
            current: &case.current,
        });
        let text = |list: Vec<NodeAddress>| {
            list.iter().map(|a| format!("{}={}", a.type_, a.address)).collect::<Vec<_>>().join(" ")
        };
        addresses.map(text).map_err(|e| e.to_string())
    }

    #[test]
    fn n07_node_ip_then_name_then_default_route() {
        let found = |c: Case| run(&c).unwrap();
        assert_eq!(found(case()), "InternalIP=192.0.2.2 Hostname=node1");
        let named = Case { resolved: vec![ip("127.0.1.1"), ip("203.0.113.9"), ip("10.0.0.5")], ..case() };
        assert_eq!(found(named), "InternalIP=10.0.0.5 Hostname=node1", "only addresses of this host count");
        let given = Case { node_ips: vec![ip("10.0.0.5")], resolved: vec![ip("192.0.2.2")], ..case() };
        assert_eq!(found(given), "InternalIP=10.0.0.5 Hostname=node1");
        let literal = Case { name: "198.51.100.7", ..case() };
        assert_eq!(found(literal), "InternalIP=198.51.100.7 Hostname=198.51.100.7");
    }

    #[test]
    fn n07_dual_stack_keeps_the_order_of_node_ip() {
        let pair = Case { node_ips: vec![ip("2001:db8::2"), ip("192.0.2.2")], ..case() };
        assert_eq!(run(&pair).unwrap(), "InternalIP=2001:db8::2 InternalIP=192.0.2.2 Hostname=node1");
        let prefer_v6 = Case { node_ips: vec![ip("::")], ..case() };
        assert_eq!(run(&prefer_v6).unwrap(), "InternalIP=2001:db8::2 Hostname=node1");
        let named = Case { node_ips: vec![ip("::")], resolved: vec![ip("10.0.0.5")], ..case() };
        assert_eq!(run(&named).unwrap(), "InternalIP=10.0.0.5 Hostname=node1", "the other family is better than none");
    }

    #[test]
    fn s19_a_foreign_node_ip_is_refused() {
        let foreign = Case { node_ips: vec![ip("203.0.113.1")], ..case() };
        assert_eq!(
            run(&foreign).unwrap_err(),
            "failed to validate nodeIP: node IP: \"203.0.113.1\" not found in the host's network interfaces"
        );
        let second = Case { node_ips: vec![ip("10.0.0.5"), ip("fe80::1")], ..case() };
        assert_eq!(
            run(&second).unwrap_err(),
            "failed to validate secondaryNodeIP: nodeIP can't be a link-local unicast address"
        );
    }

    #[test]
    fn n07_no_route_no_name_is_an_error() {
        let lost = Case { routes: vec![], ..case() };
        assert!(run(&lost).unwrap_err().starts_with("can't get ip address of node node1. error: no default routes"));
    }

    #[test]
    fn n07_external_cloud_owns_the_addresses() {
        let empty = Case { external_cloud: true, ..case() };
        assert_eq!(run(&empty).unwrap(), "Hostname=node1");
        let kept = Case { external_cloud: true, current: vec![address("ExternalIP", "203.0.113.1")], ..case() };
        assert_eq!(run(&kept).unwrap(), "ExternalIP=203.0.113.1");
        assert_eq!(provided_node_ip(&[ip("10.0.0.5")], true).as_deref(), Some("10.0.0.5"));
        assert_eq!(
            provided_node_ip(&[ip("10.0.0.5"), ip("2001:db8::2")], true).as_deref(),
            Some("10.0.0.5,2001:db8::2")
        );
        assert_eq!(provided_node_ip(&[ip("10.0.0.5")], false), None);
        assert_eq!(provided_node_ip(&[ip("::")], true), None);
    }

    #[test]
    fn routes_are_parsed() {
        let v4 = "Iface\tDestination\tGateway\tFlags\neth0\t00000000\t010200C0\t0003\neth0\t000200C0\t00000000\t0001\n";
        assert_eq!(parse_routes_v4(v4), [DefaultRoute { v6: false, interface: "eth0".into() }]);
        let zero = "0".repeat(32);
        let gateway = "20010db8000000000000000000000001";
        let v6 = format!(
            "{zero} 00 {zero} 00 {gateway} 400 1 0 3 eth0\n{zero} 00 {zero} 00 {zero} ffffffff 1 0 200200 lo\n"
        );
        assert_eq!(parse_routes_v6(&v6), [DefaultRoute { v6: true, interface: "eth0".into() }]);
    }

    #[test]
    fn the_interfaces_of_this_host_can_be_read() {
        assert!(Interfaces::read().unwrap().0.values().any(|i| i.loopback));
    }
}
