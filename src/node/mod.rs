//! The node object: registration, status, conditions, the lease and CSINode (contract section 2).
//!
//! In: facts of this machine (from `/proc`, `/sys`, the file system), of the runtime (CRI Status) and of the agent. Out: the Node,
//! its Lease, its CSINode at the apiserver, and [`NodeFacts`] for the rooms that need them.

mod facts;

pub use facts::NodeFacts;
