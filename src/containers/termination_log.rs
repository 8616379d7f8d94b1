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
