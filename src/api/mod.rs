//! The apiserver: kubeconfig and clients (general, events, heartbeat), watches of referenced objects, the event recorder.
//!
//! In: what other rooms ask for by name. Out: objects shared by `Arc`, wakes when one changed. Only this room and
//! `pod_status::publisher` and `node` send requests to the apiserver.

mod ports;

pub use ports::{ApiError, ConfigMapData, ReferencedObjects, SecretData, ServiceAccountToken, ServiceEnv, TokenSpec};
