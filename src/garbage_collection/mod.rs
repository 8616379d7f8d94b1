//! What nobody needs any more on the node, but images (contract R-27): dead containers beyond the limits, sandboxes that were replaced, and
//! whatever is left of pods that are gone, be it at the runtime, under `<root>/pods`, in the cgroup tree or in the logs.
//!
//! In: the desired pods, what the runtime runs, directory lists. Out: RemoveContainer and RemovePodSandbox of what has ended, removed log
//! directories and links, and wakes: a pod that is gone is taken down by its own worker, never here. Nothing is concluded before
//! every source was heard and the runtime was listed. Once a minute, first as soon as that is so.

mod collector;
mod dead_containers;
mod leftover_logs;

pub use collector::{Collector, CollectorParts};
pub use dead_containers::Limits;
