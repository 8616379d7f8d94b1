//! Names of things: the UID of a pod and the kind of a container.

use std::{borrow::Borrow, fmt, sync::Arc};

/// `metadata.uid` of a pod (for a static pod: of the manifest, not of its mirror). Cheap to clone; the key of every map.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Arc<str>);

impl PodUid {
    pub fn new(uid: impl Into<Arc<str>>) -> Self {
        Self(uid.into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl From<&str> for PodUid {
    fn from(s: &str) -> Self {
        Self(s.into())
    }
}
impl Borrow<str> for PodUid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The four lists a container can stand in. A sidecar is an init container with `restartPolicy: Always` (contract P-21).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ContainerKind {
    Init,
    Sidecar,
    Main,
    Ephemeral,
}

impl ContainerKind {
    /// The list's name in an event's fieldPath: `spec.<list>{name}` (contract P-45).
    pub fn field(self) -> &'static str {
        match self {
            Self::Init | Self::Sidecar => "initContainers",
            Self::Main => "containers",
            Self::Ephemeral => "ephemeralContainers",
        }
    }
}
