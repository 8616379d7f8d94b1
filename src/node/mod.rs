//! The node object: registration, status, conditions, the lease and CSINode (contract section 2).
//!
//! In: facts of this machine (from `/proc`, `/sys`, the file system), of the runtime (CRI Status) and of the agent. Out: the Node,
//! its Lease, its CSINode at the apiserver, [`NodeFacts`] for the rooms that need them, and the event of an out-of-memory kill outside of containers.
//!
//! `sensors` reads the machine, `runtime_state` the runtime; `status` makes the Node from both (pure), `publisher` writes it, `watch_node` reads
//! it back. The lease has a thread of its own.

mod addresses;
mod agent;
mod call_error;
mod capacity;
mod conditions;
mod csinode;
mod facts;
#[cfg(test)]
mod fake_api;
pub mod host;
mod images;
mod lease;
mod machine;
mod oom_watcher;
mod patch;
mod pod_cidr;
mod pressure;
mod publisher;
mod registration;
mod runtime_state;
mod sensors;
mod settings;
mod signals;
mod status;
pub mod tunables;
mod watch_node;

pub use agent::{NodeAgent, NodeHandles, NodeParts};
pub use capacity::{PodSlots, Reservations};
pub use facts::NodeFacts;
pub use machine::{FileSystem, HostPaths, HugePages, Machine, MachineError, file_system};
pub use oom_watcher::watch_oom_kills;
pub use pressure::{Observation, Observations, Pressure};
pub use publisher::HealthCheck;
pub use runtime_state::{Handshake, RuntimeHandler, RuntimeState, handshake};
pub use settings::NodeSettings;
pub use signals::{SignalReading, SignalSources};
pub use watch_node::ReadNode;
