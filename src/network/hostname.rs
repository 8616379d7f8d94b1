//! A pod's host name and domain (contract P-55).

use super::NetworkError;
use crate::pods::Pod;

/// The kernel's limit for a host name, without the closing zero.
const MAX_HOSTNAME: usize = 63;
/// The kernel's `nodename`, which holds a whole FQDN.
const MAX_FQDN: usize = 64;

/// The names of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodHostname {
    /// Without domain: for the hosts file.
    pub hostname: String,
    /// `<subdomain>.<namespace>.svc.<cluster domain>`, or empty.
    pub domain: String,
    /// What the sandbox gets as its host name: the FQDN with `setHostnameAsFQDN`. Empty for a host-network pod, which has the node's.
    pub kernel: String,
}

/// Names of a pod from `hostnameOverride`, `hostname`, `subdomain`, `setHostnameAsFQDN`.
pub fn pod_hostname(pod: &Pod, cluster_domain: &str) -> Result<PodHostname, NetworkError> {
    let (hostname, domain) = hostname_and_domain(pod, cluster_domain)?;
    let kernel = if pod.host_network() {
        String::new()
    } else if !domain.is_empty() && pod.spec().set_hostname_as_fqdn == Some(true) {
        fqdn(&hostname, &domain)?
    } else {
        hostname.clone()
    };
    Ok(PodHostname { hostname, domain, kernel })
}

fn hostname_and_domain(pod: &Pod, cluster_domain: &str) -> Result<(String, String), NetworkError> {
    let spec = pod.spec();
    if let Some(name) = &spec.hostname_override {
        check_subdomain(name).map_err(|why| {
            NetworkError::new(format!("pod HostnameOverride {name:?} is not a valid DNS subdomain: {why}"))
        })?;
        return Ok((truncate(pod.name(), name)?, String::new()));
    }
    let hostname = match spec.hostname.as_deref() {
        Some(name) if !name.is_empty() => {
            check_label(name)
                .map_err(|why| NetworkError::new(format!("pod Hostname {name:?} is not a valid DNS label: {why}")))?;
            name
        }
        _ => pod.name(),
    };
    let hostname = truncate(pod.name(), hostname)?;
    let domain = match spec.subdomain.as_deref() {
        Some(name) if !name.is_empty() => {
            check_label(name)
                .map_err(|why| NetworkError::new(format!("pod Subdomain {name:?} is not a valid DNS label: {why}")))?;
            format!("{name}.{}.svc.{cluster_domain}", pod.namespace())
        }
        _ => String::new(),
    };
    Ok((hostname, domain))
}

fn fqdn(hostname: &str, domain: &str) -> Result<String, NetworkError> {
    let fqdn = format!("{hostname}.{domain}");
    if fqdn.len() > MAX_FQDN {
        return Err(NetworkError::new(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {fqdn} is too long \
             ({MAX_FQDN} characters is the max, {} characters requested)",
            fqdn.len()
        )));
    }
    Ok(fqdn)
}

/// At most 63 characters, and none of `-` and `.` left at the end.
fn truncate(pod_name: &str, hostname: &str) -> Result<String, NetworkError> {
    if hostname.len() <= MAX_HOSTNAME {
        return Ok(hostname.to_owned());
    }
    let cut = hostname.char_indices().take_while(|(at, c)| at + c.len_utf8() <= MAX_HOSTNAME).map(|(_, c)| c);
    let cut: String = cut.collect();
    let cut = cut.trim_end_matches(['-', '.']);
    if cut.is_empty() {
        return Err(NetworkError::new(format!("hostname for pod {pod_name:?} was invalid: {hostname:?}")));
    }
    tracing::warn!(pod = pod_name, hostname = cut, "host name was too long and is truncated");
    Ok(cut.to_owned())
}

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
                     end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
                     '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
                         start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
                         '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";

fn is_label(name: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
}

fn check_label(name: &str) -> Result<(), String> {
    let too_long = (name.len() > MAX_HOSTNAME).then(|| "must be no more than 63 characters".to_owned());
    let malformed = (!is_label(name)).then(|| LABEL.to_owned());
    complain([too_long, malformed])
}

fn check_subdomain(name: &str) -> Result<(), String> {
    let too_long = (name.len() > 253).then(|| "must be no more than 253 characters".to_owned());
    let malformed = (!name.split('.').all(is_label)).then(|| SUBDOMAIN.to_owned());
    complain([too_long, malformed])
}

fn complain(faults: [Option<String>; 2]) -> Result<(), String> {
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    if faults.is_empty() { Ok(()) } else { Err(faults.join(";")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::{named_pod, pod};

    #[test]
    fn p55_names_from_the_spec() {
        let domain = "cluster.local";
        for (spec, hostname, in_domain, kernel) in [
            ("{}", "p", "", "p"),
            (r#"{"hostname":"h"}"#, "h", "", "h"),
            (r#"{"hostname":"h","subdomain":"s"}"#, "h", "s.ns.svc.cluster.local", "h"),
            (
                r#"{"subdomain":"s","setHostnameAsFQDN":true}"#,
                "p",
                "s.ns.svc.cluster.local",
                "p.s.ns.svc.cluster.local",
            ),
            (r#"{"setHostnameAsFQDN":true}"#, "p", "", "p"),
            (r#"{"hostnameOverride":"a.b.c","hostname":"h","subdomain":"s"}"#, "a.b.c", "", "a.b.c"),
            (r#"{"hostNetwork":true}"#, "p", "", ""),
        ] {
            let got = pod_hostname(&pod(spec), domain).unwrap();
            assert_eq!(
                (got.hostname.as_str(), got.domain.as_str(), got.kernel.as_str()),
                (hostname, in_domain, kernel),
                "{spec}"
            );
        }
    }

    #[test]
    fn p55_long_names_are_cut_at_63_without_a_dash_at_the_end() {
        let name = format!("{}-{}", "a".repeat(62), "b".repeat(20));
        assert_eq!(pod_hostname(&named_pod(&name, "{}"), "d").unwrap().hostname, "a".repeat(62));
        let name = "c".repeat(70);
        assert_eq!(pod_hostname(&named_pod(&name, "{}"), "d").unwrap().kernel, "c".repeat(63));
    }

    #[test]
    fn p55_an_fqdn_over_64_characters_fails() {
        let name = "n".repeat(50);
        let pod = named_pod(&name, r#"{"subdomain":"s","setHostnameAsFQDN":true}"#);
        let error = pod_hostname(&pod, "cluster.local").unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN {name}.s.ns.svc.cluster.local is too long (64 characters is the max, 73 characters requested)"
            )
        );
    }

    #[test]
    fn p55_invalid_names_are_named() {
        let error = pod_hostname(&pod(r#"{"hostname":"A_b"}"#), "d").unwrap_err().to_string();
        assert!(
            error.starts_with("pod Hostname \"A_b\" is not a valid DNS label: a lowercase RFC 1123 label"),
            "{error}"
        );
        assert!(pod_hostname(&pod(r#"{"subdomain":"a.b"}"#), "d").is_err());
        assert!(pod_hostname(&pod(r#"{"hostnameOverride":"-a"}"#), "d").is_err());
    }
}
