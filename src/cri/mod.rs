//! The container runtime: CRI v1 client, its event stream, and the one truth of what runs.
//!
//! In: gRPC over the runtime's unix socket. Out: typed calls ([`RuntimeService`], [`ImageService`]), and the [`RuntimeStore`]
//! that wakes a pod's worker when what runs has changed. Nothing here knows desired pods.

mod error;
mod ports;
mod store;

pub use error::CriError;
pub use ports::{ContainerEventStream, ImageService, RuntimeService};
pub use protocols::cri::v1;
pub use store::{Container, ContainerState, PodRuntime, RuntimeStore, Sandbox, Seq};
