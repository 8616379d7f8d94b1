//! Which Kubernetes this node speaks as, and how it says so. Contract V-02, S-01, S-11. Constants alone.

/// The Kubernetes release whose node agent this is.
pub const KUBERNETES_VERSION: &str = "v1.37.1";
/// This program's own version.
pub const CRATE_VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit this was built from, when the build names it.
pub const COMMIT: &str = match option_env!("RKUBELET_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// `nodeInfo.kubeletVersion`: `v1.37.1+rkubelet.0.1.0`.
pub fn kubelet_version() -> String {
    format!("{KUBERNETES_VERSION}+rkubelet.{CRATE_VERSION}")
}

/// The line `--version` prints; kubeadm reads it.
pub fn version_line() -> String {
    format!("Kubernetes {}", kubelet_version())
}

/// Go's architecture name, as in images and node labels.
pub const fn architecture() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "amd64"
    } else if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        std::env::consts::ARCH
    }
}

/// The User-Agent of every request to the API server.
pub fn user_agent() -> String {
    format!("kubelet/{} (linux/{}) kubernetes/rkubelet", kubelet_version(), architecture())
}

/// The JSON of `version.Info`, as `/statusz` and `kubernetes_build_info` show it.
pub fn version_info() -> serde_json::Value {
    let (major, minor) = major_minor();
    serde_json::json!({
        "major": major,
        "minor": minor,
        "gitVersion": kubelet_version(),
        "gitCommit": COMMIT,
        "gitTreeState": "clean",
        "buildDate": BUILD_DATE,
        "goVersion": "none",
        "compiler": "rustc",
        "platform": platform(),
    })
}

/// The line `--version=raw` prints: Go's view of its `version.Info`.
pub fn version_raw() -> String {
    let (major, minor) = major_minor();
    format!(
        "version.Info{{Major:{major:?}, Minor:{minor:?}, EmulationMajor:\"\", EmulationMinor:\"\", \
         MinCompatibilityMajor:\"\", MinCompatibilityMinor:\"\", GitVersion:{:?}, GitCommit:{COMMIT:?}, \
         GitTreeState:\"clean\", BuildDate:{BUILD_DATE:?}, GoVersion:\"none\", Compiler:\"rustc\", Platform:{:?}}}",
        kubelet_version(),
        platform(),
    )
}

/// Builds are reproducible, so they carry no date.
const BUILD_DATE: &str = "1970-01-01T00:00:00Z";

fn platform() -> String {
    format!("linux/{}", architecture())
}

fn major_minor() -> (&'static str, &'static str) {
    let mut numbers = KUBERNETES_VERSION.trim_start_matches('v').split('.');
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kubeadm's `^\s*Kubernetes v((0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)([-\w.+]*))\s*$`, by hand.
    fn kubeadm_reads(line: &str) -> bool {
        let Some(version) = line.trim().strip_prefix("Kubernetes v") else { return false };
        let mut rest = version;
        for position in 0..3 {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let number = &rest[..end];
            if number.is_empty() || (number.len() > 1 && number.starts_with('0')) {
                return false;
            }
            rest = &rest[end..];
            if position < 2 {
                let Some(after) = rest.strip_prefix('.') else { return false };
                rest = after;
            }
        }
        rest.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
    }

    #[test]
    fn s01_kubeadm_reads_the_version_line() {
        assert_eq!(version_line(), format!("Kubernetes v1.37.1+rkubelet.{CRATE_VERSION}"));
        assert!(kubeadm_reads(&version_line()));
        assert!(!kubeadm_reads("Kubernetes 1.37.1") && !kubeadm_reads("Kubernetes v1.37.1 extra"));
    }

    #[test]
    fn s01_raw_version_is_gos_struct() {
        let raw = version_raw();
        assert!(raw.starts_with("version.Info{Major:\"1\", Minor:\"37\", EmulationMajor:\"\", "), "{raw}");
        assert!(raw.contains(", GitVersion:\"v1.37.1+rkubelet."), "{raw}");
    }

    #[test]
    fn s11_user_agent() {
        let expected =
            format!("kubelet/v1.37.1+rkubelet.{CRATE_VERSION} (linux/{}) kubernetes/rkubelet", architecture());
        assert_eq!(user_agent(), expected);
    }
}
