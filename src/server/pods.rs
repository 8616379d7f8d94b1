//! `GET /pods`: the pods that this agent has, as a PodList (contract E-04).

use hyper::StatusCode;
use serde_json::json;

use super::{
    StatusOf,
    reply::{self, Reply},
};
use crate::pods::Pod;

/// API pods show the status that the API last had, static pods the one that this agent made.
pub(super) fn list(pods: &[Pod], status: &StatusOf) -> Reply {
    let items: Vec<_> = pods
        .iter()
        .map(|pod| {
            let made = if pod.is_static() { status(pod.uid()) } else { None };
            let status = made.unwrap_or_else(|| pod.api_status().clone());
            json!({ "metadata": pod.metadata(), "spec": pod.spec(), "status": status })
        })
        .collect();
    let list = json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items });
    reply::with_type(StatusCode::OK, "application/json", list.to_string())
}
