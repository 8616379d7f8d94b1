//! pod_worker

pub mod hooks;
