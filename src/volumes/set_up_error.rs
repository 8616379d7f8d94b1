//! Why one volume cannot be set up, before its name is known to the message.

use std::{io, path::Path};

use super::{VolumeError, VolumeErrorClass, payload::InvalidPath};
use crate::api::ApiError;

/// The part of a [`VolumeError`] that a kind knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct SetUpError {
    pub(super) class: VolumeErrorClass,
    pub(super) message: String,
}

impl SetUpError {
    pub(super) fn retry(message: impl Into<String>) -> Self {
        Self { class: VolumeErrorClass::Retry, message: message.into() }
    }

    pub(super) fn terminal(message: impl Into<String>) -> Self {
        Self { class: VolumeErrorClass::Terminal, message: message.into() }
    }

    pub(super) fn io(doing: &str, path: &Path, error: &io::Error) -> Self {
        Self::retry(format!("{doing} {}: {}", path.display(), describe(error)))
    }

    /// Several failures of one volume as one, worded as upstream's aggregate: a single one as it is, more as `[a, b]`.
    pub(super) fn all(errors: Vec<Self>) -> Option<Self> {
        let mut messages: Vec<&str> = Vec::new();
        for error in &errors {
            if !messages.contains(&error.message.as_str()) {
                messages.push(&error.message);
            }
        }
        let message = match messages.as_slice() {
            [] => return None,
            [one] => (*one).to_owned(),
            many => format!("[{}]", many.join(", ")),
        };
        let retry = errors.iter().any(|e| e.class == VolumeErrorClass::Retry);
        Some(if retry { Self::retry(message) } else { Self::terminal(message) })
    }

    /// As events and the pod worker see it.
    pub(super) fn of_volume(self, volume: &str) -> VolumeError {
        let message = format!("MountVolume.SetUp failed for volume {volume:?} : {}", self.message);
        VolumeError { volume: volume.to_owned(), class: self.class, message }
    }
}

impl From<InvalidPath> for SetUpError {
    fn from(error: InvalidPath) -> Self {
        Self::terminal(error.to_string())
    }
}

impl From<ApiError> for SetUpError {
    fn from(error: ApiError) -> Self {
        Self::retry(error.to_string())
    }
}

/// The kernel's words alone, in lower case as Go prints them: no `(os error 2)`.
pub(super) fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_lowercase(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aggregates_read_as_upstreams() {
        let retry = |m: &str| SetUpError::retry(m);
        assert_eq!(SetUpError::all(Vec::new()), None);
        assert_eq!(SetUpError::all(vec![retry("a")]), Some(retry("a")));
        assert_eq!(SetUpError::all(vec![retry("a"), SetUpError::terminal("b"), retry("a")]), Some(retry("[a, b]")));
        assert_eq!(SetUpError::all(vec![SetUpError::terminal("b")]), Some(SetUpError::terminal("b")));
    }

    #[test]
    fn v23_a_missing_object_is_worded_as_upstream() {
        let missing = ApiError::NotFound { kind: "configmap", name: "y".into() };
        let error = SetUpError::from(missing).of_volume("v");
        assert_eq!(error.message, "MountVolume.SetUp failed for volume \"v\" : configmap \"y\" not found");
        assert_eq!(error.class, VolumeErrorClass::Retry);
    }
}
