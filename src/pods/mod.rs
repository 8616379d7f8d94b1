//! Which pods this node should run: the desired side of the house.
//!
//! Sources (apiserver watch; later files and http) put whole pods into the one [`PodStore`]; the store wakes the worker of the
//! UID that changed. Nothing here knows the runtime, volumes or status. A [`Pod`] is shared by `Arc` and never changed.

mod identity;
mod pod;
pub mod sources;
mod store;

pub use identity::{ContainerKind, PodUid};
pub use pod::{ContainerRef, Pod, PodSource};
pub use store::{PodStore, StoreSnapshot};
