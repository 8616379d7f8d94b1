//! `fileKeyRef` (contract P-53): one variable from a file of `NAME='value'` lines in an emptyDir.
//!
//! The file is written by a container, so it is not trusted: its path is resolved below the volume with symlinks confined to it,
//! and its size is bounded.

use std::{fs::File, io::Read, os::fd::OwnedFd, path::Path};

use nix::{
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

/// More than API validation lets a whole environment be; a file beyond it is refused.
const MAX_BYTES: u64 = 1 << 20;

/// Why the file gives no value. Never holds content of the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EnvFileError {
    #[error("failed to open environment variable file {path:?}: {message}")]
    Open { path: String, message: String },
    #[error("environment variable file is larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("invalid environment variable format at line {line}: {what}")]
    Format { line: usize, what: &'static str },
}

/// The file's text; `path` is taken relative to `volume`, whose inside it cannot leave.
pub(super) fn read(volume: &Path, path: &str) -> Result<String, EnvFileError> {
    let failed = |message: String| EnvFileError::Open { path: volume.join(path).display().to_string(), message };
    let open = |dir: &OwnedFd| {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        openat2(dir, path, how)
    };
    let dir =
        nix::fcntl::openat(AT_FDCWD, volume, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let file = File::from(dir.and_then(|dir| open(&dir)).map_err(|errno| failed(errno.desc().to_owned()))?);
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err(failed("not a regular file".to_owned()));
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > MAX_BYTES { Err(EnvFileError::TooLarge) } else { Ok(text) }
}

/// The value of `key`; `None` when it is not there. A value stands in single quotes, may span lines, and is taken literally.
pub(super) fn find(text: &str, key: &str) -> Result<Option<String>, EnvFileError> {
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    while let Some((line, content)) = lines.next() {
        let wrong = |what| EnvFileError::Format { line, what };
        let content = content.trim_start_matches([' ', '\t']);
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let (name, value) = content.split_once('=').ok_or_else(|| wrong("missing '='"))?;
        if name.trim_end_matches([' ', '\t']).is_empty() {
            return Err(wrong("empty variable name"));
        }
        if name.ends_with([' ', '\t']) {
            return Err(wrong("whitespace before '=' is not allowed"));
        }
        if value.starts_with([' ', '\t']) {
            if name == key {
                return Ok(None); // a shell reads this as an empty assignment
            }
            continue;
        }
        let mut rest = value.strip_prefix('\'').ok_or_else(|| wrong("value must be enclosed in single quotes"))?;
        let mut collected = String::new();
        let after = loop {
            match rest.split_once('\'') {
                Some((end, after)) => {
                    collected.push_str(end);
                    break after;
                }
                None => {
                    collected.push_str(rest);
                    collected.push('\n');
                    rest = lines.next().ok_or_else(|| wrong("unclosed single quote"))?.1;
                }
            }
        };
        let after = after.trim_start_matches([' ', '\t']);
        if !after.is_empty() && !after.starts_with('#') {
            return Err(wrong("unexpected content after closing quote"));
        }
        if name == key {
            return Ok(Some(collected));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p53_lines() {
        let text = "# note\n\n  A='1'\nB='two\nlines' # why\nC= 'x'\nD=''\n";
        for (key, want) in [("A", Some("1")), ("B", Some("two\nlines")), ("C", None), ("D", Some("")), ("E", None)] {
            assert_eq!(find(text, key).unwrap().as_deref(), want, "{key}");
        }
        for (text, what) in [
            ("A", "missing '='"),
            ("='x'", "empty variable name"),
            ("A ='x'", "whitespace before '=' is not allowed"),
            ("A=x", "value must be enclosed in single quotes"),
            ("A='x' y", "unexpected content after closing quote"),
            ("A='x", "unclosed single quote"),
        ] {
            assert_eq!(find(text, "Z"), Err(EnvFileError::Format { line: 1, what }), "{text}");
        }
    }

    #[test]
    fn p53_a_symlink_cannot_leave_the_volume() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "K='s'").unwrap();
        let volume = tempfile::tempdir().unwrap();
        std::fs::write(volume.path().join("env"), "K='v'").unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), volume.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/env", volume.path().join("inner")).unwrap();
        assert_eq!(read(volume.path(), "env").unwrap(), "K='v'");
        assert_eq!(read(volume.path(), "inner").unwrap(), "K='v'");
        assert!(read(volume.path(), "link").is_err());
        assert!(read(volume.path(), "../x").is_err());
        assert!(read(volume.path(), ".").is_err());
    }
}
