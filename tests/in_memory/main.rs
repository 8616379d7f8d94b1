//! The whole node but its edges, in one process and in virtual time: no root, no network.

// Tests may stop at what cannot be: these are not reached by any input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod rig;

mod admission;
mod containers;
mod lifecycle;
mod many_pods;
mod resize;
mod soak;
