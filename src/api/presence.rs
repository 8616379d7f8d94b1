//! Whether a pod still exists: asked before anything is done because it seems to be gone.

use serde::Deserialize;

use super::rest::{self, Bare, RestError};
use crate::pods::{Pod, PodUid};

/// What the apiserver says about one UID.
#[derive(Debug)]
pub(crate) enum Presence {
    Present,
    /// No pod of this name, or one with another UID.
    Gone,
    Unknown(RestError),
}

#[derive(Deserialize)]
struct Bares {
    items: Option<Vec<Bare>>,
}

/// A GET, which etcd answers. The node authorizer refuses it (403) for a pod that it has already forgotten, and allows a list
/// that is limited to this node's pods; so that list decides then.
pub(crate) async fn of_pod(client: &kube::Client, pod: &Pod) -> Presence {
    let (namespace, name) = (pod.namespace(), pod.name());
    let same = |uid: &str| if pod.uid() == &PodUid::from(uid) { Presence::Present } else { Presence::Gone };
    let answer = rest::get(client, &format!("/api/v1/namespaces/{namespace}/pods/{name}")).await;
    match answer.and_then(|bytes| rest::decode::<Bare>("pod", &bytes, false)) {
        Ok(bare) => return same(&bare.metadata.uid),
        Err(error) if error.is_not_found() => return Presence::Gone,
        Err(error) if error.is_forbidden() => {}
        Err(error) => return Presence::Unknown(error),
    }
    let node = pod.spec().node_name.as_deref().unwrap_or_default();
    let selector = rest::query_value(&format!("spec.nodeName={node},metadata.name={name}"));
    let answer = rest::get(client, &format!("/api/v1/namespaces/{namespace}/pods?fieldSelector={selector}")).await;
    match answer.and_then(|bytes| rest::decode::<Bares>("pods", &bytes, false)) {
        Ok(list) => match list.items.unwrap_or_default().first() {
            Some(bare) => same(&bare.metadata.uid),
            None => Presence::Gone,
        },
        Err(error) => Presence::Unknown(error),
    }
}
