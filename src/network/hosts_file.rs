//! The pod's `/etc/hosts` (contract P-54): rendered from its addresses, names and aliases, written to `pods/<uid>/etc-hosts`.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{Container, HostAlias};
use protocols::cri::v1;

use super::{NetworkError, PodHostname};
use crate::pods::{Pod, PodUid};

/// Where containers see it, and where the node's own is.
pub const ETC_HOSTS: &str = "/etc/hosts";
const HEADER: &str = "# Kubernetes-managed hosts file.\n";
const HOST_NETWORK_HEADER: &str = "# Kubernetes-managed hosts file (host network).\n";
const LOOPBACK: &str = "127.0.0.1\tlocalhost\n\
                        ::1\tlocalhost ip6-localhost ip6-loopback\n\
                        fe00::0\tip6-localnet\n\
                        fe00::0\tip6-mcastprefix\n\
                        fe00::1\tip6-allnodes\n\
                        fe00::2\tip6-allrouters\n";

/// `<root>/pods/<uid>/etc-hosts`.
pub fn hosts_file_path(root_dir: &Path, uid: &PodUid) -> PathBuf {
    root_dir.join("pods").join(uid.as_str()).join("etc-hosts")
}

/// What goes into a hosts file.
#[derive(Debug, Clone, Copy)]
pub enum HostsFile<'a> {
    /// A pod with its own network.
    Pod { ips: &'a [IpAddr], names: &'a PodHostname },
    /// A host-network pod: the node's own file, as text.
    Node { content: &'a str },
}

impl HostsFile<'_> {
    pub fn render(self, aliases: &[HostAlias]) -> String {
        let mut text = match self {
            Self::Pod { ips, names } => {
                let mut text = format!("{HEADER}{LOOPBACK}");
                let PodHostname { hostname, domain, .. } = names;
                for ip in ips {
                    let _ = match domain.as_str() {
                        "" => writeln!(text, "{ip}\t{hostname}"),
                        domain => writeln!(text, "{ip}\t{hostname}.{domain}\t{hostname}"),
                    };
                }
                text
            }
            Self::Node { content } => format!("{HOST_NETWORK_HEADER}{content}"),
        };
        if !aliases.is_empty() {
            text.push_str("\n# Entries added by HostAliases.\n");
            for alias in aliases {
                let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"));
            }
        }
        text
    }
}

/// Writes the pod's hosts file and returns its mount, or `None` when the container mounts `/etc/hosts` itself, or the pod
/// has no address yet. Existing content is written in place: running containers have this inode mounted.
pub fn hosts_mount(
    root_dir: &Path,
    pod: &Pod,
    container: &Container,
    pod_ips: &[IpAddr],
    names: &PodHostname,
) -> Result<Option<v1::Mount>, NetworkError> {
    let mounts_own = container.volume_mounts.iter().flatten().any(|m| m.mount_path == ETC_HOSTS);
    if mounts_own || (pod_ips.is_empty() && !pod.host_network()) {
        return Ok(None);
    }
    let aliases = pod.spec().host_aliases.as_deref().unwrap_or_default();
    let content = if pod.host_network() {
        let node = fs::read(ETC_HOSTS).map_err(|e| failed(Path::new(ETC_HOSTS), &e))?;
        HostsFile::Node { content: &String::from_utf8_lossy(&node) }.render(aliases)
    } else {
        HostsFile::Pod { ips: pod_ips, names }.render(aliases)
    };
    let path = hosts_file_path(root_dir, pod.uid());
    write(&path, &content).map_err(|e| failed(&path, &e))?;
    Ok(Some(v1::Mount {
        container_path: ETC_HOSTS.to_owned(),
        host_path: path.display().to_string(),
        readonly: false,
        selinux_relabel: true,
        ..Default::default()
    }))
}

/// A new file appears whole (written beside, then renamed); an existing one keeps its inode, and is left alone when it already
/// says the same, so that a restarted container's neighbours never see it half written.
fn write(path: &Path, content: &str) -> std::io::Result<()> {
    match fs::read(path) {
        Ok(existing) if existing == content.as_bytes() => {
            return fs::set_permissions(path, fs::Permissions::from_mode(0o644));
        }
        Ok(_) => fs::write(path, content)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(Path::new("/"));
            let mut file = tempfile::Builder::new().prefix(".etc-hosts").tempfile_in(dir)?;
            file.write_all(content.as_bytes())?;
            file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
            file.persist(path).map_err(|e| e.error)?;
        }
        Err(e) => return Err(e),
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

fn failed(path: &Path, error: &std::io::Error) -> NetworkError {
    NetworkError::new(format!("hosts file {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::pod;

    fn names(domain: &str) -> PodHostname {
        PodHostname { hostname: "h".into(), domain: domain.into(), kernel: "h".into() }
    }

    #[test]
    fn p54_content_to_the_letter() {
        let ips: [IpAddr; 2] = ["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()];
        let aliases = [HostAlias { ip: "1.2.3.4".into(), hostnames: Some(vec!["a".into(), "b.c".into()]) }];
        assert_eq!(
            HostsFile::Pod { ips: &ips, names: &names("s.ns.svc.d") }.render(&aliases),
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n10.1.2.3\th.s.ns.svc.d\th\nfd00::3\th.s.ns.svc.d\th\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb.c\n"
        );
        assert!(HostsFile::Pod { ips: &ips, names: &names("") }.render(&[]).ends_with("\n10.1.2.3\th\nfd00::3\th\n"));
        assert_eq!(
            HostsFile::Node { content: "9.9.9.9\tx\n" }.render(&[]),
            "# Kubernetes-managed hosts file (host network).\n9.9.9.9\tx\n"
        );
    }

    #[test]
    fn p54_written_0644_with_its_mount_and_the_inode_kept() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let pod = pod("{}");
        fs::create_dir_all(root.path().join("pods/uid-1")).unwrap();
        let container = pod.main_containers().next().unwrap().spec;
        let mount =
            hosts_mount(root.path(), &pod, container, &["10.0.0.1".parse().unwrap()], &names("")).unwrap().unwrap();
        let path = root.path().join("pods/uid-1/etc-hosts");
        assert_eq!((mount.container_path.as_str(), mount.host_path.as_str()), ("/etc/hosts", path.to_str().unwrap()));
        assert!(!mount.readonly && mount.selinux_relabel);
        let before = fs::metadata(&path).unwrap();
        assert_eq!(before.mode() & 0o777, 0o644);
        hosts_mount(root.path(), &pod, container, &["10.0.0.2".parse().unwrap()], &names("")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), before.ino());
        assert!(fs::read_to_string(&path).unwrap().contains("10.0.0.2\th"));
    }

    #[test]
    fn p54_no_mount_when_the_user_mounts_it_or_no_address_is_known() {
        let root = tempfile::tempdir().unwrap();
        let own = pod(r#"{"containers":[{"name":"c","volumeMounts":[{"name":"v","mountPath":"/etc/hosts"}]}]}"#);
        let ip = ["10.0.0.1".parse().unwrap()];
        let first = |p: &Pod| p.main_containers().next().unwrap().spec.clone();
        assert_eq!(hosts_mount(root.path(), &own, &first(&own), &ip, &names("")).unwrap(), None);
        let pod = pod("{}");
        assert_eq!(hosts_mount(root.path(), &pod, &first(&pod), &[], &names("")).unwrap(), None);
    }
}
