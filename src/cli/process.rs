//! This process's own standing with the kernel: its OOM score and its limit of open files. Contract S-16.
//!
//! Writes /proc/self/oom_score_adj and sets RLIMIT_NOFILE. Best effort: what is not permitted is logged, not fatal.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::KubeletConfiguration;

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessSettings {
    /// -1000 to 1000.
    pub oom_score_adj: i32,
    /// Descriptors.
    pub max_open_files: u64,
}

impl From<&KubeletConfiguration> for ProcessSettings {
    fn from(kubelet: &KubeletConfiguration) -> Self {
        Self {
            oom_score_adj: kubelet.oom_score_adj,
            max_open_files: u64::try_from(kubelet.max_open_files).unwrap_or_default(),
        }
    }
}

/// Sets both. Losses are logged with what they mean for the node.
pub fn apply_process_settings(settings: ProcessSettings) {
    if let Err(error) = set_oom_score(Path::new("/proc/self/oom_score_adj"), settings.oom_score_adj) {
        tracing::warn!(
            wanted = settings.oom_score_adj,
            %error,
            "Setting oom_score_adj failed, the kernel may kill this process before pods when memory runs out"
        );
    }
    match set_open_files(settings.max_open_files) {
        Ok(limit) if limit < settings.max_open_files => {
            tracing::warn!(
                wanted = settings.max_open_files,
                limit,
                "The limit of open files is lower than maxOpenFiles"
            );
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(wanted = settings.max_open_files, %error, "Setting the limit of open files failed")
        }
    }
}

fn set_oom_score(path: &Path, score: i32) -> std::io::Result<()> {
    fs::write(path, score.to_string())
}

/// Sets the limit, or without the right to raise it the highest there is; returns what holds now.
fn set_open_files(wanted: u64) -> nix::Result<u64> {
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = wanted.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard)?;
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s16_score_is_written_as_decimal() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("oom_score_adj");
        set_oom_score(&file, -999).unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), "-999");
        assert!(set_oom_score(Path::new("/proc/self/nonexistent"), 0).is_err());
    }

    #[test]
    fn s16_the_limit_of_open_files_can_be_set_to_what_it_is() {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(set_open_files(soft), Ok(soft));
        assert_eq!(ProcessSettings::from(&KubeletConfiguration::default()).max_open_files, 1_000_000);
    }
}
