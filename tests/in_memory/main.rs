//! The whole node but its edges, in one process and in virtual time: no root, no network.

mod rig;

mod lifecycle;
mod many_pods;
