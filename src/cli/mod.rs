//! The command line: Go kubelet flags in, options and configuration overrides out; version and own process too.
//!
//! `main` gives the arguments to [`parse`], prints what a [`Command`] asks for, or turns [`Options`] into the
//! configuration. Contract S-01, S-03, S-04, S-11, S-16, S-18 to S-20, 1.4.

mod flags;
mod help;
mod parse;
mod process;
mod values;
mod version;

pub use help::help_text;
pub use parse::{CliError, Command, Options, parse};
pub use process::{ProcessSettings, apply_process_settings};
pub use version::{
    COMMIT, CRATE_VERSION, KUBERNETES_VERSION, architecture, kubelet_version, user_agent, version_info, version_line,
    version_raw,
};
