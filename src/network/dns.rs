//! The resolver of a pod (contract P-56): from dnsPolicy, dnsConfig, the cluster's DNS and the node's `resolv.conf` to CRI's `DnsConfig`.

use std::{
    collections::HashSet,
    net::IpAddr,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::PodDNSConfig;
use protocols::cri::v1;

use super::NetworkError;
use crate::pods::Pod;

/// resolv.conf(5) and API validation: how many nameservers count.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
/// Characters of the whole search line, blanks included.
const MAX_SEARCH_LINE: usize = 2048;
/// A longer search path aborts glibc's resolver.
const MAX_SEARCH: usize = 253;
/// How much of the node's `resolv.conf` is read.
const MAX_FILE_BYTES: usize = 10 << 20;
const CLUSTER_OPTIONS: [&str; 1] = ["ndots:5"];

/// What the node's configuration says about DNS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DnsSettings {
    /// `clusterDNS`.
    pub cluster_dns: Vec<IpAddr>,
    /// `clusterDomain`; may be empty.
    pub cluster_domain: String,
    /// `resolvConf`: the node's resolver file. `None` when the setting is the empty string: pods with the node's DNS then get the
    /// loopback resolver.
    pub resolv_conf: Option<PathBuf>,
}

/// A `resolv.conf` as far as it matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvConf {
    pub nameservers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Why the node's `resolv.conf` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolvConfError {
    #[error("open {path}: {message}")]
    Read { path: String, message: String },
    #[error("Encountered error while parsing resolv conf file. Error: nameserver list is empty ")]
    NameserverEmpty,
}

/// Something the user should hear of; the pod runs all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsWarning {
    /// Event `DNSConfigForming` on the pod.
    Forming(String),
    /// Event `MissingClusterDNS`, with one text for the node and one for the pod.
    MissingClusterDns { node: String, pod: String },
}

/// A pod's resolver with what was wrong on the way.
#[derive(Debug, Clone, PartialEq)]
pub struct PodDns {
    pub config: v1::DnsConfig,
    pub warnings: Vec<DnsWarning>,
}

impl ResolvConf {
    /// Reads the file of the settings; none set means empty.
    pub fn read(path: Option<&Path>) -> Result<Self, ResolvConfError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let failed = |e: std::io::Error| ResolvConfError::Read {
            path: path.display().to_string(),
            message: match e.kind() {
                std::io::ErrorKind::NotFound => "no such file or directory".to_owned(),
                _ => e.to_string(),
            },
        };
        let content = std::fs::read(path).map_err(failed)?;
        let content = content.get(..MAX_FILE_BYTES).unwrap_or(&content);
        Self::parse(&String::from_utf8_lossy(content))
    }

    /// Nameservers add up, the last `search` wins, a later option replaces an earlier one of the same name.
    pub fn parse(content: &str) -> Result<Self, ResolvConfError> {
        let mut conf = Self::default();
        let mut nameserver_missing = false;
        for line in content.lines() {
            let mut fields = line.split_whitespace();
            match fields.next() {
                Some("nameserver") => match fields.next() {
                    Some(address) => conf.nameservers.push(address.to_owned()),
                    None => nameserver_missing = true,
                },
                Some("search") => {
                    let searches = fields.filter(|s| *s != ".").map(|s| s.strip_suffix('.').unwrap_or(s).to_owned());
                    conf.searches = searches.collect();
                }
                Some("options") => fields.for_each(|option| set_option(&mut conf.options, option)),
                _ => {}
            }
        }
        if nameserver_missing { Err(ResolvConfError::NameserverEmpty) } else { Ok(conf) }
    }

    /// The first limit of pods' resolvers that the node's own file breaks: the node event `CheckLimitsForResolvConf`.
    pub fn over_limit(&self, path: &Path, cluster_domain: &str) -> Option<String> {
        let path = path.display();
        let limit = if cluster_domain.is_empty() { MAX_SEARCHES } else { MAX_SEARCHES - 3 };
        if self.searches.len() > limit {
            return Some(format!(
                "Resolv.conf file '{path}' contains search line consisting of more than {limit} domains!"
            ));
        }
        if self.searches.iter().any(|s| s.len() > MAX_SEARCH) {
            return Some(format!(
                "Resolv.conf file \"{path}\" contains a search path which length is more than allowed {MAX_SEARCH} chars!"
            ));
        }
        (self.searches.join(" ").len() > MAX_SEARCH_LINE).then(|| {
            format!("Resolv.conf file '{path}' contains search line which length is more than allowed {MAX_SEARCH_LINE} chars!")
        })
    }
}

impl DnsSettings {
    /// What is wrong with the node's own resolver file, or with how it breaks the limits of pods' resolvers: the message of the node event
    /// `CheckLimitsForResolvConf`.
    pub fn host_warning(&self) -> Option<String> {
        let path = self.resolv_conf.as_deref()?;
        match ResolvConf::read(Some(path)) {
            Ok(conf) => conf.over_limit(path, &self.cluster_domain),
            Err(error) => Some(error.to_string()),
        }
    }

    /// The resolver for a pod. Reads the node's `resolv.conf`, as it may change any time.
    pub fn pod_dns(&self, pod: &Pod, node_ips: &[IpAddr]) -> Result<PodDns, NetworkError> {
        let host =
            ResolvConf::read(self.resolv_conf.as_deref()).map_err(|error| NetworkError::new(error.to_string()))?;
        Ok(self.pod_dns_from(host, pod, node_ips))
    }

    /// The same with the node's `resolv.conf` given.
    pub fn pod_dns_from(&self, host: ResolvConf, pod: &Pod, node_ips: &[IpAddr]) -> PodDns {
        let mut warnings = Vec::new();
        let mut conf = match policy(pod) {
            Policy::None => ResolvConf::default(),
            Policy::Cluster if !self.cluster_dns.is_empty() => self.cluster(host, pod.namespace()),
            Policy::Cluster => {
                warnings.push(missing_cluster_dns(pod));
                self.node(host, node_ips)
            }
            Policy::Node => self.node(host, node_ips),
        };
        if let Some(extra) = &pod.spec().dns_config {
            conf.add(extra);
        }
        warnings.extend(fit_nameservers(&mut conf.nameservers));
        warnings.extend(fit_searches(&mut conf.searches));
        let config = v1::DnsConfig { servers: conf.nameservers, searches: conf.searches, options: conf.options };
        PodDns { config, warnings }
    }

    fn cluster(&self, host: ResolvConf, namespace: &str) -> ResolvConf {
        let domain = &self.cluster_domain;
        let searches = if domain.is_empty() {
            host.searches
        } else {
            let own = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
            own.into_iter().chain(host.searches).collect()
        };
        ResolvConf {
            nameservers: self.cluster_dns.iter().map(IpAddr::to_string).collect(),
            searches: if domain.is_empty() { searches } else { distinct(searches) },
            options: CLUSTER_OPTIONS.map(str::to_owned).to_vec(),
        }
    }

    fn node(&self, mut host: ResolvConf, node_ips: &[IpAddr]) -> ResolvConf {
        if self.resolv_conf.is_none() {
            host.nameservers =
                node_ips.iter().map(|ip| if ip.is_ipv6() { "::1" } else { "127.0.0.1" }.to_owned()).collect();
            if host.nameservers.is_empty() {
                host.nameservers.push("127.0.0.1".to_owned());
            }
            host.searches = vec![".".to_owned()];
        }
        host
    }
}

impl ResolvConf {
    /// `spec.dnsConfig` on top: lists join without duplicates, its options replace.
    fn add(&mut self, extra: &PodDNSConfig) {
        let join = |list: &mut Vec<String>, more: &Option<Vec<String>>| {
            *list = distinct(list.drain(..).chain(more.iter().flatten().cloned()).collect());
        };
        join(&mut self.nameservers, &extra.nameservers);
        join(&mut self.searches, &extra.searches);
        for option in extra.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            match option.value.as_deref() {
                Some(value) if !value.is_empty() => set_option(&mut self.options, &format!("{name}:{value}")),
                _ => set_option(&mut self.options, name),
            }
        }
    }
}

enum Policy {
    None,
    Cluster,
    Node,
}

fn policy(pod: &Pod) -> Policy {
    match pod.spec().dns_policy.as_deref() {
        Some("None") => Policy::None,
        Some("Default") => Policy::Node,
        Some("ClusterFirstWithHostNet") => Policy::Cluster,
        Some("ClusterFirst") | None if pod.host_network() => Policy::Node,
        // The API allows no other value; an unknown one is taken as upstream takes it.
        _ => Policy::Cluster,
    }
}

fn missing_cluster_dns(pod: &Pod) -> DnsWarning {
    let node = "kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. \
                Falling back to \"Default\" policy."
        .to_owned();
    let pod = format!("pod: {:?}. {node}", pod.described());
    DnsWarning::MissingClusterDns { node, pod }
}

fn set_option(options: &mut Vec<String>, option: &str) {
    let name = |o: &str| o.split(':').next().unwrap_or_default().to_owned();
    match options.iter_mut().find(|o| name(o) == name(option)) {
        Some(existing) => *existing = option.to_owned(),
        None => options.push(option.to_owned()),
    }
}

fn distinct(list: Vec<String>) -> Vec<String> {
    let mut seen = HashSet::new();
    list.into_iter().filter(|item| seen.insert(item.clone())).collect()
}

fn fit_nameservers(servers: &mut Vec<String>) -> Option<DnsWarning> {
    (servers.len() > MAX_NAMESERVERS).then(|| {
        servers.truncate(MAX_NAMESERVERS);
        DnsWarning::Forming(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            servers.join(" ")
        ))
    })
}

fn fit_searches(searches: &mut Vec<String>) -> Option<DnsWarning> {
    let asked = searches.len();
    searches.truncate(MAX_SEARCHES);
    searches.retain(|search| search.len() <= MAX_SEARCH);
    while searches.join(" ").len() > MAX_SEARCH_LINE {
        searches.pop();
    }
    (searches.len() < asked).then(|| {
        DnsWarning::Forming(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            searches.join(" ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::pod;

    fn settings() -> DnsSettings {
        DnsSettings {
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            resolv_conf: Some("/etc/resolv.conf".into()),
        }
    }

    fn host() -> ResolvConf {
        ResolvConf::parse(
            "# c\nnameserver 1.1.1.1\nsearch old\nsearch example.com. . b.org\noptions ndots:2 rotate\noptions ndots:3",
        )
        .unwrap()
    }

    #[test]
    fn p56_resolv_conf_is_parsed_as_the_resolver_does() {
        let conf = host();
        assert_eq!(conf.nameservers, ["1.1.1.1"]);
        assert_eq!(conf.searches, ["example.com", "b.org"]);
        assert_eq!(conf.options, ["ndots:3", "rotate"]);
        assert_eq!(ResolvConf::parse("nameserver"), Err(ResolvConfError::NameserverEmpty));
    }

    #[test]
    fn p56_policies() {
        let node_ips: [IpAddr; 1] = ["192.168.0.2".parse().unwrap()];
        let cluster = (
            vec!["10.96.0.10"],
            vec!["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com", "b.org"],
            vec!["ndots:5"],
        );
        let node = (vec!["1.1.1.1"], vec!["example.com", "b.org"], vec!["ndots:3", "rotate"]);
        for (spec, want) in [
            ("{}", &cluster),
            (r#"{"dnsPolicy":"ClusterFirst"}"#, &cluster),
            (r#"{"dnsPolicy":"ClusterFirst","hostNetwork":true}"#, &node),
            (r#"{"dnsPolicy":"ClusterFirstWithHostNet","hostNetwork":true}"#, &cluster),
            (r#"{"dnsPolicy":"Default"}"#, &node),
        ] {
            let got = settings().pod_dns_from(host(), &pod(spec), &node_ips);
            assert_eq!(got.warnings, [], "{spec}");
            assert_eq!(
                (got.config.servers, got.config.searches, got.config.options),
                (own(&want.0), own(&want.1), own(&want.2)),
                "{spec}"
            );
        }
    }

    fn own(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn p56_none_takes_only_dns_config() {
        let pod = pod(
            r#"{"dnsPolicy":"None","dnsConfig":{"nameservers":["9.9.9.9"],"searches":["a.b"],"options":[{"name":"ndots","value":"2"},{"name":"edns0"}]}}"#,
        );
        let config = settings().pod_dns_from(host(), &pod, &[]).config;
        assert_eq!(config.servers, ["9.9.9.9"]);
        assert_eq!(config.searches, ["a.b"]);
        assert_eq!(config.options, ["ndots:2", "edns0"]);
    }

    #[test]
    fn p56_dns_config_merges_without_duplicates_and_replaces_options() {
        let pod = pod(
            r#"{"dnsConfig":{"nameservers":["10.96.0.10","9.9.9.9"],"searches":["cluster.local","x.y"],"options":[{"name":"ndots","value":"1"}]}}"#,
        );
        let config = settings().pod_dns_from(ResolvConf::default(), &pod, &[]).config;
        assert_eq!(config.servers, ["10.96.0.10", "9.9.9.9"]);
        assert_eq!(config.searches, ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "x.y"]);
        assert_eq!(config.options, ["ndots:1"]);
    }

    #[test]
    fn p56_without_cluster_dns_falls_back_and_says_so() {
        let settings = DnsSettings { cluster_dns: vec![], ..settings() };
        let got = settings.pod_dns_from(host(), &pod("{}"), &[]);
        assert_eq!(got.config.servers, ["1.1.1.1"]);
        let [DnsWarning::MissingClusterDns { node, pod }] = &got.warnings[..] else { panic!("{:?}", got.warnings) };
        assert_eq!(
            node,
            "kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. Falling back to \"Default\" policy."
        );
        assert_eq!(pod, &format!("pod: \"p_ns(uid-1)\". {node}"));
    }

    #[test]
    fn p56_empty_resolv_conf_setting_means_loopback() {
        let settings = DnsSettings { resolv_conf: None, ..settings() };
        let ips: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let config = settings.pod_dns_from(ResolvConf::default(), &pod(r#"{"dnsPolicy":"Default"}"#), &ips).config;
        assert_eq!(config.servers, ["127.0.0.1", "::1"]);
        assert_eq!(config.searches, ["."]);
    }

    #[test]
    fn p56_limits_cut_and_warn() {
        let mut servers = own(&["1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4"]);
        let DnsWarning::Forming(text) = fit_nameservers(&mut servers).unwrap() else { panic!() };
        assert_eq!(
            text,
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: 1.1.1.1 2.2.2.2 3.3.3.3"
        );

        let mut many: Vec<String> = (0..33).map(|n| format!("d{n}")).collect();
        assert!(fit_searches(&mut many).is_some());
        assert_eq!(many.len(), 32);

        let mut long = vec!["a".repeat(254), "ok".into()];
        assert!(fit_searches(&mut long).is_some());
        assert_eq!(long, ["ok"]);

        let mut wide: Vec<String> = (0..20).map(|_| "b".repeat(200)).collect();
        assert!(fit_searches(&mut wide).is_some());
        assert_eq!(wide.join(" ").len(), 2009);

        let mut fits: Vec<String> = (0..32).map(|n| format!("d{n}")).collect();
        assert_eq!(fit_searches(&mut fits), None);
    }

    #[test]
    fn p56_node_file_over_the_limit() {
        let conf = ResolvConf { searches: (0..30).map(|n| format!("d{n}")).collect(), ..Default::default() };
        let path = Path::new("/etc/resolv.conf");
        assert_eq!(
            conf.over_limit(path, "cluster.local").unwrap(),
            "Resolv.conf file '/etc/resolv.conf' contains search line consisting of more than 29 domains!"
        );
        assert_eq!(conf.over_limit(path, ""), None);
    }
}
