//! The symlinks that log agents read: `/var/log/containers/<pod>_<namespace>_<container>-<containerID>.log` (contract L-01).

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// A file name on ext4 has no more bytes.
const NAME_LIMIT: usize = 255;

/// Where the link of a container is. `directory` is `/var/log/containers`.
pub fn link_path(directory: &Path, namespace: &str, pod: &str, container: &str, container_id: &str) -> PathBuf {
    const SUFFIX: &str = ".log";
    let mut name = format!("{pod}_{namespace}_{container}-{container_id}");
    // Names and IDs are ASCII; the loop is for what should never come.
    let mut end = name.len().min(NAME_LIMIT - SUFFIX.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    directory.join(name + SUFFIX)
}

/// Points the link at the container's log file, replacing an older link of that name. Makes the directory when it is missing.
pub fn create_link(link: &Path, log_file: &Path) -> io::Result<()> {
    if let Some(directory) = link.parent() {
        fs::create_dir_all(directory)?;
    }
    match symlink(log_file, link) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            if fs::read_link(link).is_ok_and(|target| target == log_file) {
                return Ok(());
            }
            fs::remove_file(link)?;
            symlink(log_file, link)
        }
        done => done,
    }
}

/// Removes the link; one that is not there is fine.
pub fn remove_link(link: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Removes a container's log, what it was rotated to (`<n>.log.<time>`, compressed or not), and its link.
fn remove_logs(log_file: &Path, link: Option<&Path>) -> io::Result<()> {
    if let Some(link) = link {
        remove_link(link)?;
    }
    let (Some(directory), Some(name)) = (log_file.parent(), log_file.file_name()) else { return Ok(()) };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(name.as_encoded_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// [`remove_logs`] off the async threads. A failure is only logged: what is left goes with the pod's directory.
pub async fn remove_logs_of(container_id: &str, log_file: PathBuf, link: Option<PathBuf>) {
    let removed = tokio::task::spawn_blocking(move || remove_logs(&log_file, link.as_deref())).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(container = container_id, %error, "Removing container logs failed");
    }
}

/// How many runs of a container its log directory knows of: one more than the largest `<n>` of `<n>.log…` (contract P-23). 0 when there
/// is no directory.
pub fn runs_logged(directory: &Path) -> io::Result<u32> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut runs = 0;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.split_once(".log")).and_then(|(n, rest)| {
            let digits = n.bytes().all(|b| b.is_ascii_digit()) && (rest.is_empty() || rest.starts_with('.'));
            n.parse::<u32>().ok().filter(|_| digits)
        });
        if let Some(number) = number
            && !entry.file_type()?.is_dir()
        {
            runs = runs.max(number.saturating_add(1));
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p23_the_log_directory_knows_how_often_a_container_ran() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("c");
        assert_eq!(runs_logged(&logs).unwrap(), 0);
        fs::create_dir(&logs).unwrap();
        assert_eq!(runs_logged(&logs).unwrap(), 0);
        for (name, runs) in [
            ("x.log", 0),
            ("+7.log", 0),
            ("0.log", 1),
            ("3.log.20260101-000000.gz", 4),
            ("2.log", 4),
            ("9.logs", 4),
            ("notes", 4),
        ] {
            fs::write(logs.join(name), "").unwrap();
            assert_eq!(runs_logged(&logs).unwrap(), runs, "{name}");
        }
        fs::create_dir(logs.join("11.log")).unwrap();
        assert_eq!(runs_logged(&logs).unwrap(), 4);
    }

    #[test]
    fn l01_link_is_named_made_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let links = dir.path().join("containers");
        let link = link_path(&links, "ns", "pod", "ctr", "0123456789");
        assert!(link.ends_with("containers/pod_ns_ctr-0123456789.log"));
        create_link(&link, Path::new("/var/log/pods/a/0.log")).unwrap();
        create_link(&link, Path::new("/var/log/pods/a/0.log")).unwrap();
        create_link(&link, Path::new("/var/log/pods/a/1.log")).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/var/log/pods/a/1.log"));
        remove_link(&link).unwrap();
        remove_link(&link).unwrap();
        assert!(fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn l04_a_removed_container_leaves_no_log_rotated_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("1.log");
        for name in ["1.log", "1.log.20261121-101500", "1.log.20261121-101400.gz", "0.log"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        remove_logs(&log, None).unwrap();
        remove_logs(&dir.path().join("gone/0.log"), Some(&dir.path().join("no.link"))).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["0.log"]);
    }

    #[test]
    fn l01_long_names_are_cut() {
        let link = link_path(Path::new("/l"), &"n".repeat(63), &"p".repeat(253), "c", &"d".repeat(64));
        let name = link.file_name().unwrap().to_str().unwrap();
        assert_eq!(name.len(), 255);
        assert!(name.ends_with(".log"));
    }
}
