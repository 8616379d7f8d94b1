//! The heart: one worker per pod UID, from first sight to clean-up.
//!
//! A worker sleeps until it is woken, reads a [`PodView`](view::PodView), asks the pure [`decide`](decide::decide) what to do, publishes the status, and
//! lets [`execute`] carry out the actions. It keeps no state that it could look up; what it must remember is
//! [`History`](view::History). Touches the runtime, volumes, images and cgroups through their ports only.

pub mod actions;
pub mod backoff;
mod counts;
pub mod decide;
pub mod execute;
mod gate_width;
mod going_down;
pub mod hooks;
pub mod registry;
mod resize;
mod resize_action;
pub mod restart;
pub mod restart_all;
mod start_container;
pub mod start_gate;
pub mod start_order;
mod stop;
pub mod view;
mod worker;

pub use counts::PodCounts;
pub use registry::{PodWorkers, WorkerParts, WorkerSettings, WorkerWakes};
pub use start_gate::StartGate;

#[cfg(test)]
mod decide_tests;
#[cfg(test)]
mod resize_tests;
#[cfg(test)]
mod world;
