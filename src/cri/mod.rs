//! The container runtime: CRI v1 client, its event stream, and the one truth of what runs.
//!
//! In: gRPC over the runtime's unix socket. Out: typed calls ([`RuntimeService`], [`ImageService`]), and the [`RuntimeStore`]
//! that wakes a pod's worker when what runs has changed. Nothing here knows desired pods.

mod calls;
mod client;
mod containerd_events;
mod entry;
mod error;
mod events;
#[doc(hidden)]
pub mod fake;
#[cfg(test)]
pub(crate) mod fixtures;
mod metrics;
mod mutation;
mod observed;
mod ports;
mod store;
mod translate;
#[cfg(test)]
mod wire_tests;

pub use client::{CriClient, EndpointError};
pub use containerd_events::follow_oom;
pub use error::CriError;
pub use events::{FollowSettings, follow};
pub use metrics::CriMetrics;
pub use mutation::to_its_end;
pub use observed::{Container, ContainerState, OOM_KILLED, PodRuntime, Sandbox, Seq};
pub use ports::{ContainerEventStream, ImageService, RuntimeService};
pub use protocols::cri::v1;
pub use store::{PlegError, Relisted, RuntimeStore};
pub use translate::{CONTAINER_NAME_LABEL, POD_UID_LABEL};
#[cfg(test)]
pub(crate) use translate::{container, sandbox};
