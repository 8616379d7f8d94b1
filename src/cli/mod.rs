//! The command line: Go kubelet flags in, options and configuration overrides out; version and own process too.

mod version;

pub use version::{
    COMMIT, CRATE_VERSION, KUBERNETES_VERSION, architecture, kubelet_version, user_agent, version_info, version_line,
};
