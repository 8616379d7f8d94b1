//! What an API-backed volume shall contain: relative paths and the files at them.
//!
//! In: names from the pod spec or the keys of an object. Out: a payload whose every path is safe to create below the volume
//! (contract V-23), or the error that upstream words.

use std::{collections::BTreeMap, fmt};

/// Longest path of a file in a volume, in bytes.
const MAX_PATH: usize = 4096;
/// Longest single name, in bytes.
const MAX_NAME: usize = 255;

/// One file to be written. Its `Debug` never shows the content.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct FileContent {
    pub(super) data: Vec<u8>,
    /// Permission bits.
    pub(super) mode: u32,
    /// Owner; the agent's user when `None`.
    pub(super) user: Option<u32>,
}

impl fmt::Debug for FileContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, mode {:o}, user {:?}", self.data.len(), self.mode, self.user)
    }
}

/// A path that must not be created in a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid path: {0}")]
pub(super) struct InvalidPath(String);

/// Clean relative path → file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Payload(BTreeMap<String, FileContent>);

impl Payload {
    /// A later file replaces an earlier one at the same path, as the sources of a projected volume do.
    pub(super) fn insert(&mut self, path: &str, file: FileContent) -> Result<(), InvalidPath> {
        validate(path)?;
        self.0.insert(clean(path), file);
        Ok(())
    }

    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &FileContent)> {
        self.0.iter().map(|(path, file)| (path.as_str(), file))
    }

    pub(super) fn get(&self, path: &str) -> Option<&FileContent> {
        self.0.get(path)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The names that a user sees at the top of the volume, each with the owner of the first file below it.
    pub(super) fn top_level(&self) -> BTreeMap<&str, Option<u32>> {
        let mut names = BTreeMap::new();
        for (path, file) in &self.0 {
            names.entry(path.split('/').next().unwrap_or(path)).or_insert(file.user);
        }
        names
    }
}

fn validate(path: &str) -> Result<(), InvalidPath> {
    let invalid = |why: String| Err(InvalidPath(why));
    if path.is_empty() {
        return invalid(format!("must not be empty: {path:?}"));
    }
    if path.starts_with('/') {
        return invalid(format!("must be relative path: {path}"));
    }
    if path.len() > MAX_PATH {
        return invalid(format!("must be less than or equal to {MAX_PATH} characters"));
    }
    for name in path.split('/') {
        if name == ".." {
            return invalid(format!("must not contain '..': {path}"));
        }
        if name.len() > MAX_NAME {
            return invalid(format!("filenames must be less than or equal to {MAX_NAME} characters"));
        }
    }
    // Names that start so are the writer's own.
    if path.starts_with("..") {
        return invalid(format!("must not start with '..': {path}"));
    }
    if path.contains('\0') || clean(path).is_empty() {
        return invalid(format!("must name a file: {path:?}"));
    }
    Ok(())
}

/// Drops empty and `.` components.
fn clean(path: &str) -> String {
    path.split('/').filter(|name| !name.is_empty() && *name != ".").collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(path: &str) -> Result<Payload, String> {
        let mut payload = Payload::default();
        payload
            .insert(path, FileContent { data: Vec::new(), mode: 0o644, user: None })
            .map(|()| payload)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn v23_invalid_paths_are_worded_as_upstream() {
        for (path, message) in [
            ("", "invalid path: must not be empty: \"\""),
            ("/etc/passwd", "invalid path: must be relative path: /etc/passwd"),
            ("a/../b", "invalid path: must not contain '..': a/../b"),
            ("..", "invalid path: must not contain '..': .."),
            ("..data", "invalid path: must not start with '..': ..data"),
            ("...", "invalid path: must not start with '..': ..."),
            ("..data/x", "invalid path: must not start with '..': ..data/x"),
        ] {
            assert_eq!(insert(path).unwrap_err(), message, "{path:?}");
        }
        assert_eq!(
            insert(&"n".repeat(256)).unwrap_err(),
            "invalid path: filenames must be less than or equal to 255 characters"
        );
        assert_eq!(
            insert(&"a/".repeat(2049)).unwrap_err(),
            "invalid path: must be less than or equal to 4096 characters"
        );
        assert!(insert(".").is_err());
        assert!(insert("a\0b").is_err());
    }

    #[test]
    fn v23_paths_are_cleaned() {
        for (path, cleaned) in [("a", "a"), ("a//b", "a/b"), ("./a/./b/", "a/b"), ("a/..b", "a/..b"), (".x", ".x")] {
            let payload = insert(path).unwrap();
            assert_eq!(payload.files().next().unwrap().0, cleaned);
        }
    }

    #[test]
    fn debug_shows_no_content() {
        let mut payload = Payload::default();
        payload.insert("k", FileContent { data: b"hunter2".to_vec(), mode: 0o600, user: None }).unwrap();
        assert!(!format!("{payload:?}").contains("hunter2"));
    }
}
