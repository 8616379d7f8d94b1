//! A container's termination message (contract P-35): the file it may write, its mount, and what is read back.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::Container;
use protocols::cri::v1;

use super::{ContainerAnnotations, TerminationMessagePolicy, labels::termination_message_path};
use crate::pods::PodUid;

/// How much of the file counts: its end.
pub const MAX_MESSAGE_BYTES: u64 = 4096;
/// With FallbackToLogsOnError: at most this much of the end of the log.
pub const MAX_LOG_BYTES: usize = 2048;
pub const MAX_LOG_LINES: usize = 80;
/// All messages of one pod together; each container has an equal part.
pub const MAX_POD_BYTES: usize = 12 * 1024;

/// `<root>/pods/<uid>/containers/<name>`.
pub fn container_directory(root_dir: &Path, uid: &PodUid, container: &str) -> PathBuf {
    root_dir.join("pods").join(uid.as_str()).join("containers").join(container)
}

/// Creates the file for one run of a container, empty and writable by any user inside, and returns its mount. `None` when
/// the container has no `terminationMessagePath`.
pub fn create(root_dir: &Path, uid: &PodUid, container: &Container) -> io::Result<Option<v1::Mount>> {
    let inside = termination_message_path(container);
    if inside.is_empty() {
        return Ok(None);
    }
    let dir = container_directory(root_dir, uid, &container.name);
    fs::create_dir_all(&dir)?;
    // A name of its own for every run, so that a restarted container's message is not mixed with the last one's.
    let path = dir.join(format!("{:08x}", rand::random::<u32>()));
    OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o666))?;
    let container_path = if inside.starts_with('/') { inside.to_owned() } else { format!("/{inside}") };
    Ok(Some(v1::Mount { container_path, host_path: path.display().to_string(), ..Default::default() }))
}

/// What the runtime said about an exited container, as far as its message needs it.
#[derive(Debug, Clone, Copy)]
pub struct Exit<'a> {
    pub code: i32,
    /// The runtime's reason and message.
    pub reason: &'a str,
    pub message: &'a str,
    pub mounts: &'a [v1::Mount],
}

/// The message for the container's Terminated state: the runtime's, then the container's own. `log_tail` gives the end of its
/// log (at most [`MAX_LOG_LINES`] lines); it is called only when the policy asks for it.
pub fn message(exit: Exit<'_>, annotations: &ContainerAnnotations, log_tail: impl FnOnce() -> String) -> String {
    let fallback = annotations.termination_message_policy == TerminationMessagePolicy::FallbackToLogsOnError
        && exit.code != 0
        && exit.reason != "ContainerCannotRun";
    let own = match written(exit.mounts, &annotations.termination_message_path) {
        Written::Text(text) if !text.is_empty() => text,
        Written::Failed(why) => why,
        Written::Text(_) | Written::Nothing if fallback => last_bytes(&log_tail(), MAX_LOG_BYTES).to_owned(),
        Written::Text(_) | Written::Nothing => String::new(),
    };
    match (exit.message, own.as_str()) {
        (runtime, "") => runtime.to_owned(),
        ("", own) => own.to_owned(),
        (runtime, own) => format!("{runtime}: {own}"),
    }
}

/// A pod's messages share [`MAX_POD_BYTES`]: cuts one to its part, at a character's edge.
pub fn cut_to_share(message: &str, containers_in_pod: usize) -> &str {
    let share = MAX_POD_BYTES / containers_in_pod.max(1);
    if message.len() <= share {
        return message;
    }
    let end = (0..=share).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
    &message[..end]
}

enum Written {
    Text(String),
    /// No file: none was mounted, or it is gone.
    Nothing,
    Failed(String),
}

fn written(mounts: &[v1::Mount], inside: &str) -> Written {
    let inside = if inside.starts_with('/') || inside.is_empty() { inside.to_owned() } else { format!("/{inside}") };
    let Some(mount) = mounts.iter().find(|m| !inside.is_empty() && m.container_path == inside) else {
        return Written::Nothing;
    };
    match read_end(Path::new(&mount.host_path)) {
        Ok(text) => Written::Text(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Written::Nothing,
        Err(error) => Written::Failed(format!("Error on reading termination log {}: {error}", mount.host_path)),
    }
}

/// The end of a regular file; bytes that are not UTF-8 are replaced. Never follows a link, never waits on a pipe.
fn read_end(path: &Path) -> io::Result<String> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    file.seek(SeekFrom::Start(metadata.len().saturating_sub(MAX_MESSAGE_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(MAX_MESSAGE_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn last_bytes(text: &str, limit: usize) -> &str {
    let from = text.len().saturating_sub(limit);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    &text[from..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(path: Option<&str>) -> Container {
        Container { name: "c".into(), termination_message_path: path.map(str::to_owned), ..Default::default() }
    }

    fn annotations(policy: TerminationMessagePolicy) -> ContainerAnnotations {
        ContainerAnnotations {
            termination_message_path: "/dev/termination-log".into(),
            termination_message_policy: policy,
            ..Default::default()
        }
    }

    #[test]
    fn p35_a_file_of_its_own_for_every_run_writable_by_all() {
        let root = tempfile::tempdir().unwrap();
        let uid = PodUid::from("u");
        let first = create(root.path(), &uid, &container(None)).unwrap().unwrap();
        assert_eq!(first.container_path, "/dev/termination-log");
        let path = Path::new(&first.host_path);
        assert_eq!(path.parent().unwrap(), root.path().join("pods/u/containers/c"));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.len() == 8 && name.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o666);
        let second = create(root.path(), &uid, &container(Some("rel/path"))).unwrap().unwrap();
        assert_ne!(first.host_path, second.host_path);
        assert_eq!(second.container_path, "/rel/path");
        assert_eq!(create(root.path(), &uid, &container(Some(""))).unwrap(), None);
    }

    #[test]
    fn p35_message_table() {
        let root = tempfile::tempdir().unwrap();
        let mount = create(root.path(), &PodUid::from("u"), &container(None)).unwrap().unwrap();
        let gone = v1::Mount { host_path: "/nowhere/x".into(), ..mount.clone() };
        use TerminationMessagePolicy::{FallbackToLogsOnError as Logs, File};
        for (content, mounts, policy, code, reason, runtime, want) in [
            ("DONE", vec![mount.clone()], File, 0, "Completed", "", "DONE"),
            ("DONE", vec![mount.clone()], File, 1, "Error", "oops", "oops: DONE"),
            ("", vec![mount.clone()], File, 1, "Error", "", ""),
            ("", vec![mount.clone()], Logs, 0, "Completed", "", ""),
            ("", vec![mount.clone()], Logs, 1, "Error", "", "log end"),
            ("own", vec![mount.clone()], Logs, 1, "Error", "", "own"),
            ("", vec![mount.clone()], Logs, 1, "ContainerCannotRun", "why", "why"),
            ("", vec![gone.clone()], Logs, 1, "Error", "", "log end"),
            ("", vec![gone], File, 1, "Error", "m", "m"),
            ("", vec![], Logs, 2, "Error", "", "log end"),
        ] {
            fs::write(&mount.host_path, content).unwrap();
            let exit = Exit { code, reason, message: runtime, mounts: &mounts };
            let got = message(exit, &annotations(policy), || "log end".to_owned());
            assert_eq!(got, want, "{content:?} {policy:?} {code} {reason}");
        }
    }

    #[test]
    fn p35_limits() {
        let root = tempfile::tempdir().unwrap();
        let mount = create(root.path(), &PodUid::from("u"), &container(None)).unwrap().unwrap();
        fs::write(&mount.host_path, format!("{}{}", "a".repeat(10), "b".repeat(4096))).unwrap();
        let mounts = [mount.clone()];
        let exit = Exit { code: 1, reason: "Error", message: "", mounts: &mounts };
        let policy = TerminationMessagePolicy::FallbackToLogsOnError;
        assert_eq!(message(exit, &annotations(policy), String::new), "b".repeat(4096));
        fs::write(&mount.host_path, "").unwrap();
        let log = format!("x{}", "é".repeat(1024));
        assert_eq!(message(exit, &annotations(policy), || log.clone()), "é".repeat(1024));
        assert_eq!(cut_to_share(&"m".repeat(4096), 4).len(), 3072);
        assert_eq!(cut_to_share(&"m".repeat(4096), 1).len(), 4096);
        assert_eq!(cut_to_share(&"é".repeat(3000), 5).len(), 2456);
    }

    #[test]
    fn p35_a_link_is_never_followed() {
        let root = tempfile::tempdir().unwrap();
        let mount = create(root.path(), &PodUid::from("u"), &container(None)).unwrap().unwrap();
        fs::remove_file(&mount.host_path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &mount.host_path).unwrap();
        let mounts = [mount];
        let exit = Exit { code: 0, reason: "Completed", message: "", mounts: &mounts };
        let got = message(exit, &annotations(TerminationMessagePolicy::File), String::new);
        assert!(got.starts_with("Error on reading termination log "), "{got}");
    }
}
