//! projected volumes: several sources in one directory (contract V-26, P-63).
//!
//! In: the sources' objects and tokens, fetched in parallel. Out: one payload in source order, and when a token in it is to be
//! renewed. clusterTrustBundle and podCertificate sources are turned down for now.

use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ProjectedVolumeSource, ServiceAccountTokenProjection, VolumeProjection};

use super::{
    config_map, downward_api,
    key_projection::{DEFAULT_MODE, mode_bits},
    payload::{FileContent, Payload},
    secret,
    set_up_error::SetUpError,
};
use crate::{
    api::{ReferencedObjects, ServiceAccountToken, TokenSpec},
    node::NodeFacts,
    pods::Pod,
};

/// Longest time that a token is used, whatever its life.
const MAX_TOKEN_AGE: Duration = Duration::from_secs(24 * 60 * 60);
/// `expirationSeconds` when the API did not default it.
const DEFAULT_EXPIRATION: i64 = 60 * 60;

/// A payload, and when it must be made again even if nothing changes.
#[derive(Debug)]
pub(super) struct Projected {
    pub(super) payload: Payload,
    pub(super) renew_at: Option<Timestamp>,
}

pub(super) async fn collect(
    objects: &dyn ReferencedObjects,
    pod: &Pod,
    node: &NodeFacts,
    source: &ProjectedVolumeSource,
) -> Result<Projected, SetUpError> {
    let default_mode = mode_bits(source.default_mode, DEFAULT_MODE);
    let sources = source.sources.iter().flatten();
    let results = join_all(sources.map(|s| collect_one(objects, pod, node, s, default_mode))).await;
    let mut all = Projected { payload: Payload::default(), renew_at: None };
    let mut errors = Vec::new();
    for result in results {
        match result {
            Ok(one) => {
                all.payload.extend(one.payload);
                all.renew_at = all.renew_at.into_iter().chain(one.renew_at).min();
            }
            Err(error) => errors.push(error),
        }
    }
    SetUpError::all(errors).map_or(Ok(all), Err)
}

async fn collect_one(
    objects: &dyn ReferencedObjects,
    pod: &Pod,
    node: &NodeFacts,
    source: &VolumeProjection,
    mode: u32,
) -> Result<Projected, SetUpError> {
    let namespace = pod.namespace();
    let payload = if let Some(s) = &source.secret {
        secret::payload(objects, namespace, &s.name, s.items.as_deref(), mode, s.optional == Some(true)).await?
    } else if let Some(c) = &source.config_map {
        config_map::payload(objects, namespace, &c.name, c.items.as_deref(), mode, c.optional == Some(true)).await?
    } else if let Some(d) = &source.downward_api {
        downward_api::payload(d.items.as_deref().unwrap_or_default(), pod, node, mode)?
    } else if let Some(t) = &source.service_account_token {
        return token(objects, pod, t, mode).await;
    } else if source.cluster_trust_bundle.is_some() {
        return Err(SetUpError::terminal(
            "projected source clusterTrustBundle is not supported by this node agent yet",
        ));
    } else if source.pod_certificate.is_some() {
        return Err(SetUpError::terminal("projected source podCertificate is not supported by this node agent yet"));
    } else {
        Payload::default()
    };
    Ok(Projected { payload, renew_at: None })
}

async fn token(
    objects: &dyn ReferencedObjects,
    pod: &Pod,
    source: &ServiceAccountTokenProjection,
    default_mode: u32,
) -> Result<Projected, SetUpError> {
    let spec = TokenSpec {
        audience: source.audience.clone().unwrap_or_default(),
        expiration_seconds: source.expiration_seconds.unwrap_or(DEFAULT_EXPIRATION),
    };
    let token = objects.service_account_token(pod, &spec).await?;
    let renew_at = Some(renewal(&token));
    let user = common_run_as_user(pod);
    // With a group set, the group's read permission is added when ownership is set: 0640.
    let mode = if user.is_some() || fs_group(pod).is_some() { 0o600 } else { default_mode };
    let mut payload = Payload::default();
    payload.insert(&source.path, FileContent { data: token.token.into_bytes(), mode, user })?;
    Ok(Projected { payload, renew_at })
}

/// When a token is due for renewal: after 80 % of its life, or a day.
fn renewal(token: &ServiceAccountToken) -> Timestamp {
    let life = Duration::try_from(token.expires.duration_since(token.issued)).unwrap_or_default();
    token.issued.checked_add((life * 4 / 5).min(MAX_TOKEN_AGE)).unwrap_or(token.issued)
}

/// `spec.securityContext.fsGroup`.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    pod.spec().security_context.as_ref()?.fs_group.and_then(|g| u32::try_from(g).ok())
}

/// The user that every container of the pod runs as, if the spec says one for all.
fn common_run_as_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec();
    let of_pod = spec.security_context.as_ref().and_then(|s| s.run_as_user);
    let containers = pod.containers().map(|c| c.spec.security_context.as_ref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.security_context.as_ref());
    let mut users = containers.chain(ephemeral).map(|s| s.and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{api::ApiError, volumes::fixtures};

    fn source(sources: serde_json::Value) -> ProjectedVolumeSource {
        serde_json::from_value(json!({"defaultMode": 0o644, "sources": sources})).unwrap()
    }

    #[test]
    fn v26_common_user() {
        for (spec, user) in [
            (json!({"containers": [{"name": "a"}]}), None),
            (json!({"containers": [{"name": "a"}], "securityContext": {"runAsUser": 7}}), Some(7)),
            (
                json!({"containers": [{"name": "a", "securityContext": {"runAsUser": 8}}, {"name": "b"}],
                "securityContext": {"runAsUser": 7}}),
                None,
            ),
            (
                json!({"containers": [{"name": "a", "securityContext": {"runAsUser": 8}}],
                "initContainers": [{"name": "i", "securityContext": {"runAsUser": 8}}]}),
                Some(8),
            ),
            (
                json!({"containers": [{"name": "a", "securityContext": {"runAsUser": 8}}],
                "initContainers": [{"name": "i"}]}),
                None,
            ),
        ] {
            assert_eq!(common_run_as_user(&fixtures::pod(json!({"spec": spec.clone()}))), user, "{spec}");
        }
    }

    #[tokio::test]
    async fn v26_token_mode_owner_and_renewal() {
        for (security, mode, user) in [
            (json!({}), 0o644, None),
            (json!({"runAsUser": 1000}), 0o600, Some(1000)),
            (json!({"fsGroup": 20}), 0o600, None),
        ] {
            let pod = fixtures::pod(json!({"spec": {"containers": [{"name": "c"}], "securityContext": security}}));
            let objects = fixtures::Objects::default();
            let sources =
                json!([{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607, "audience": "a"}}]);
            let got = collect(&objects, &pod, &NodeFacts::default(), &source(sources)).await.unwrap();
            let file = got.payload.get("token").unwrap();
            assert_eq!((file.mode, file.user), (mode, user));
            assert_eq!(file.data, b"token-1-a");
            let age = got.renew_at.unwrap().duration_since(fixtures::issued());
            assert_eq!(age.as_millis(), 3_607_000 * 4 / 5);
        }
    }

    #[test]
    fn v26_long_lived_tokens_are_renewed_daily() {
        let issued = fixtures::issued();
        let expires = issued.checked_add(Duration::from_secs(30 * 86_400)).unwrap();
        let token = ServiceAccountToken { token: String::new(), issued, expires };
        assert_eq!(renewal(&token).duration_since(issued).as_secs(), 86_400);
    }

    #[tokio::test]
    async fn v26_all_failing_sources_are_named_and_retried() {
        let objects = fixtures::Objects::default();
        objects.fail_tokens(ApiError::Unavailable { message: "failed to fetch token: connection refused".into() });
        let pod = fixtures::pod(json!({"spec": {"containers": []}}));
        let sources = json!([
            {"configMap": {"name": "missing"}},
            {"configMap": {"name": "missing", "optional": true}},
            {"secret": {"name": "gone"}},
            {"serviceAccountToken": {"path": "t"}},
            {"clusterTrustBundle": {"path": "x"}},
        ]);
        let error = collect(&objects, &pod, &NodeFacts::default(), &source(sources)).await.unwrap_err();
        assert_eq!(
            error.message,
            "[configmap \"missing\" not found, secret \"gone\" not found, failed to fetch token: connection refused, \
             projected source clusterTrustBundle is not supported by this node agent yet]"
        );
        assert_eq!(error.class, crate::volumes::VolumeErrorClass::Retry);
    }

    #[tokio::test]
    async fn p63_kube_api_access_has_token_ca_and_namespace() {
        let objects = fixtures::Objects::default();
        objects.set_config_map("kube-root-ca.crt", &[("ca.crt", "PEM")]);
        let pod = fixtures::pod(json!({"spec": {"containers": []}}));
        let sources = json!([
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]);
        let got = collect(&objects, &pod, &NodeFacts::default(), &source(sources)).await.unwrap();
        let names: Vec<_> = got.payload.files().map(|(path, _)| path).collect();
        assert_eq!(names, ["ca.crt", "namespace", "token"]);
        assert_eq!(got.payload.get("namespace").unwrap().data, b"ns");
    }
}
