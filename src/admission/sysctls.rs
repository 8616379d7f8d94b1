//! Which sysctls a pod may set: the safe ones of this kernel and those that the configuration allows (contract A-06, P-60). Pure.
//!
//! A sysctl must belong to a namespace, and the pod must not share that namespace with the host. Names are compared with `.` as
//! separator; a name whose first separator is `/` is turned round.

use std::{borrow::Cow, collections::BTreeMap};

use super::Rejection;
use crate::pods::Pod;

const MAX_LENGTH: usize = 253;
const PATTERN: &str = r"([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\./])*([a-z0-9][-_a-z0-9]*)?[a-z0-9*]";

/// Name, and the first kernel whose network namespaces have their own (0.0: all).
const SAFE: [(&str, (u32, u32)); 14] = [
    ("kernel.shm_rmid_forced", (0, 0)),
    ("net.ipv4.ip_local_port_range", (0, 0)),
    ("net.ipv4.tcp_syncookies", (0, 0)),
    ("net.ipv4.ping_group_range", (0, 0)),
    ("net.ipv4.ip_unprivileged_port_start", (0, 0)),
    ("net.ipv4.ip_local_reserved_ports", (3, 16)),
    ("net.ipv4.tcp_keepalive_time", (4, 5)),
    ("net.ipv4.tcp_fin_timeout", (4, 6)),
    ("net.ipv4.tcp_keepalive_intvl", (4, 5)),
    ("net.ipv4.tcp_keepalive_probes", (4, 5)),
    ("net.ipv4.tcp_rmem", (4, 15)),
    ("net.ipv4.tcp_wmem", (4, 15)),
    ("net.ipv4.tcp_slow_start_after_idle", (4, 15)),
    ("net.ipv4.tcp_notsent_lowat", (4, 6)),
];

/// A bad entry of `allowedUnsafeSysctls`. Worded as upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SysctlError {
    #[error("sysctl {0:?} must have at most {MAX_LENGTH} characters and match regex {PATTERN}")]
    Pattern(String),
    #[error("the sysctls {0:?} are not known to be namespaced")]
    NotNamespaced(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Namespace {
    Ipc,
    Net,
    Uts,
    User,
}

impl Namespace {
    fn of(sysctl: &str) -> Option<Self> {
        const IPC: [&str; 10] = [
            "kernel.sem",
            "kernel.shmall",
            "kernel.shmmax",
            "kernel.shmmni",
            "kernel.shm_rmid_forced",
            "kernel.shm",
            "kernel.msgmax",
            "kernel.msgmnb",
            "kernel.msgmni",
            "kernel.msg",
        ];
        match sysctl {
            "kernel.domainname" => Some(Self::Uts),
            name if IPC.contains(&name) || name.starts_with("fs.mqueue.") => Some(Self::Ipc),
            name if name.starts_with("net.") => Some(Self::Net),
            name if name.starts_with("user.") => Some(Self::User),
            _ => None,
        }
    }

    /// The pod is in the host's namespace of this kind, by what word.
    fn shared(self, pod: &Pod) -> Option<&'static str> {
        let spec = pod.spec();
        match self {
            Self::Ipc if spec.host_ipc == Some(true) => Some("IPC"),
            Self::Net if pod.host_network() => Some("Net"),
            Self::User if spec.host_users != Some(false) => Some("User"),
            _ => None,
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct SysctlAllowlist {
    names: BTreeMap<String, Namespace>,
    /// Entries that end in `*`, without it.
    prefixes: BTreeMap<String, Namespace>,
}

impl SysctlAllowlist {
    /// The safe sysctls of this kernel (`6.12.3-…`) and `allowed`: names, or prefixes that end in `*`.
    pub fn new(kernel: &str, allowed: &[String]) -> Result<Self, SysctlError> {
        let running = kernel_version(kernel);
        let mut list = Self::default();
        for (name, since) in SAFE {
            if running >= since {
                list.add(name)?;
            } else {
                tracing::info!(kernel, sysctl = name, "The kernel is too old for this sysctl to be safe");
            }
        }
        for entry in allowed {
            list.add(entry)?;
        }
        Ok(list)
    }

    fn add(&mut self, entry: &str) -> Result<(), SysctlError> {
        if !well_formed(entry) {
            return Err(SysctlError::Pattern(entry.to_owned()));
        }
        let name = normal(entry);
        let (name, prefix) = match name.split_once('*') {
            Some((before, _)) => (before.to_owned(), true),
            None => (name.into_owned(), false),
        };
        let namespace = Namespace::of(&name).ok_or_else(|| SysctlError::NotNamespaced(name.clone()))?;
        let list = if prefix { &mut self.prefixes } else { &mut self.names };
        list.insert(name, namespace);
        Ok(())
    }

    /// The first sysctl of the pod that it may not set.
    pub(super) fn check(&self, pod: &Pod) -> Result<(), Rejection> {
        let sysctls = pod.spec().security_context.as_ref().and_then(|c| c.sysctls.as_deref()).unwrap_or_default();
        for sysctl in sysctls {
            let name = normal(&sysctl.name);
            let problem = match self.namespace(&name).map(|namespace| namespace.shared(pod)) {
                Some(None) => continue,
                Some(Some(shared)) => format!("{name:?} not allowed with host {shared} enabled"),
                None => format!("{name:?} not allowlisted"),
            };
            return Err(Rejection::new("SysctlForbidden", format!("forbidden sysctl: {problem}")));
        }
        Ok(())
    }

    fn namespace(&self, name: &str) -> Option<Namespace> {
        let by_prefix = || self.prefixes.iter().find(|(prefix, _)| name.starts_with(prefix.as_str()));
        self.names.get(name).or_else(|| by_prefix().map(|(_, namespace)| namespace)).copied()
    }
}

/// Major and minor; 0.0 when it cannot be told.
fn kernel_version(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// `net/ipv4/conf/eth0.1/x` is `net.ipv4.conf.eth0/1.x`.
fn normal(name: &str) -> Cow<'_, str> {
    if name.find(['.', '/']).is_none_or(|first| name[first..].starts_with('.')) {
        return Cow::Borrowed(name);
    }
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    name.chars().map(swapped).collect()
}

/// [`PATTERN`], by hand.
fn well_formed(entry: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'_');
    let end = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut segments: Vec<&[u8]> = entry.as_bytes().split(|c| matches!(c, b'.' | b'/')).collect();
    let Some(last) = segments.pop() else { return false };
    let segment = |s: &[u8]| s.first().is_some_and(|c| end(*c)) && s.last().is_some_and(|c| end(*c));
    let whole = segments.iter().all(|s| segment(s) && s.iter().all(|c| inner(*c)));
    let tail = match last {
        [] => false,
        [only] => end(*only) || *only == b'*',
        [first, middle @ .., last] => end(*first) && middle.iter().all(|c| inner(*c)) && (end(*last) || *last == b'*'),
    };
    entry.len() <= MAX_LENGTH && whole && tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::fixtures::pod;

    fn reason(list: &SysctlAllowlist, name: &str, more: serde_json::Value) -> Option<String> {
        let mut spec =
            serde_json::json!({"containers": [], "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        list.check(&pod(spec)).err().map(|r| format!("{}: {}", r.reason, r.message))
    }

    #[test]
    fn a06_p60_safe_and_allowed_sysctls_pass_and_others_are_named() {
        let none = serde_json::json!({});
        let allowed = ["kernel.msg*", "net.core.somaxconn", "net/ipv4/conf/*"].map(str::to_owned);
        let list = SysctlAllowlist::new("6.12.3-generic", &allowed).unwrap();
        for name in [
            "kernel.shm_rmid_forced",
            "net.ipv4.tcp_rmem",
            "net/ipv4/tcp_rmem",
            "net.ipv4.tcp_notsent_lowat",
            "net.core.somaxconn",
            "kernel.msgmax",
            "net/ipv4/conf/eth0.1/rp_filter",
        ] {
            assert_eq!(reason(&list, name, none.clone()), None, "{name}");
        }
        let forbidden = |name: &str| Some(format!("SysctlForbidden: forbidden sysctl: {name:?} not allowlisted"));
        assert_eq!(reason(&list, "kernel.shmmax", none.clone()), forbidden("kernel.shmmax"));
        assert_eq!(reason(&list, "vm/swappiness", none), forbidden("vm.swappiness"));
    }

    #[test]
    fn a06_a_namespace_shared_with_the_host_forbids() {
        let list = SysctlAllowlist::new("6.12", &["user.max_user_namespaces".to_owned()]).unwrap();
        let host = |name: &str, more| reason(&list, name, more).unwrap_or_default();
        assert_eq!(
            host("net.ipv4.tcp_rmem", serde_json::json!({"hostNetwork": true})),
            "SysctlForbidden: forbidden sysctl: \"net.ipv4.tcp_rmem\" not allowed with host Net enabled"
        );
        assert_eq!(
            host("kernel.shm_rmid_forced", serde_json::json!({"hostIPC": true})),
            "SysctlForbidden: forbidden sysctl: \"kernel.shm_rmid_forced\" not allowed with host IPC enabled"
        );
        assert!(host("user.max_user_namespaces", serde_json::json!({})).ends_with("with host User enabled"));
        assert_eq!(host("user.max_user_namespaces", serde_json::json!({"hostUsers": false})), "");
    }

    #[test]
    fn p60_old_kernels_have_fewer_safe_sysctls() {
        let none = || serde_json::json!({});
        let list = SysctlAllowlist::new("4.14.0", &[]).unwrap();
        assert!(reason(&list, "net.ipv4.tcp_rmem", none()).is_some());
        assert!(reason(&list, "net.ipv4.tcp_fin_timeout", none()).is_none());
    }

    #[test]
    fn p60_a_bad_entry_of_the_configuration_is_named() {
        let error = |entry: &str| SysctlAllowlist::new("6.1", &[entry.to_owned()]).unwrap_err().to_string();
        assert_eq!(error("vm.swappiness"), "the sysctls \"vm.swappiness\" are not known to be namespaced");
        assert!(error("Net.x").starts_with("sysctl \"Net.x\" must have at most 253 characters and match regex "));
        for bad in ["", "net..x", "net.*.x", "-net.x", "net.x-"] {
            assert!(error(bad).contains("must have at most"), "{bad}");
        }
    }
}
