//! The apiserver: kubeconfig and clients (general, events, heartbeat), watches of referenced objects, the event recorder.
//!
//! In: what other rooms ask for by name. Out: objects shared by `Arc`, wakes when one changed. Only this room and
//! `pod_status::publisher` and `node` send requests to the apiserver.

mod cache;
mod client;
mod correlator;
mod credentials;
#[cfg(test)]
pub(crate) mod fake;
mod kubeconfig;
mod limiter;
pub(crate) mod list_watch;
mod metrics;
mod objects;
mod ports;
pub(crate) mod presence;
mod recorder;
mod references;
pub(crate) mod rest;
mod services;
#[cfg(test)]
mod tests;
mod tokens;
mod transport;
#[cfg(test)]
mod transport_tests;

pub use cache::ObjectCache;
pub use client::{ApiClients, ApiSettings, WatchSlot};
pub use kubeconfig::ApiSetupError;
pub(crate) use limiter::Backoff;
pub use ports::{
    ApiError, ConfigMapData, ReferencedObjects, RuntimeClassData, SecretData, ServiceAccountData, ServiceAccountToken,
    ServiceEnv, TokenSpec,
};
pub use recorder::EventRecorder;
