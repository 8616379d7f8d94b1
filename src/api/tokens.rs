//! Service account tokens by TokenRequest, bound to the pod (contract V-26, N-23).
//!
//! In: a pod and what its projected volume asks for. Out: a token, from the cache while it is young. A token is renewed at 80 % of
//! its life or after 24 h, whichever is first; at that moment the pod is woken, so that its volume is written anew. When a renewal
//! fails, the old token serves until it expires.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::Method;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ApiError, ServiceAccountToken, TokenSpec,
    client::ApiClients,
    rest::{self, RestError},
};
use crate::{
    pods::{Pod, PodUid},
    time::{Clock, SystemClock},
    wake::{Cause, WakeSink},
};

const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);
const MAX_JITTER: Duration = Duration::from_secs(10);

type TokenKey = (String, TokenSpec);

/// One token and the timer of its renewal. The inner lock makes one request out of many simultaneous ones.
#[derive(Default)]
struct Slot(tokio::sync::Mutex<Option<Cached>>);

struct Cached {
    token: ServiceAccountToken,
    renew_at: Timestamp,
}

struct PodTokens {
    slots: HashMap<TokenKey, Arc<Slot>>,
    cancel: CancellationToken,
    _ends_timers: DropGuard,
}

pub(super) struct TokenCache {
    clients: ApiClients,
    wakes: Arc<dyn WakeSink>,
    pods: Mutex<HashMap<PodUid, PodTokens>>,
}

/// When a token is to be replaced: at 80 % of its life, or at 24 h of age, less a jitter that spreads the requests of many pods.
fn renew_at(token: &ServiceAccountToken, jitter: Duration) -> Timestamp {
    let life = (token.expires.as_second() - token.issued.as_second()).max(0) as u64;
    let after = Duration::from_secs(life * 4 / 5).min(MAX_AGE).saturating_sub(jitter);
    token.issued.checked_add(after).unwrap_or(token.issued)
}

impl TokenCache {
    pub(super) fn new(clients: ApiClients, wakes: Arc<dyn WakeSink>) -> Self {
        Self { clients, wakes, pods: Mutex::default() }
    }

    pub(super) fn forget(&self, uid: &PodUid) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    pub(super) async fn token(&self, pod: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        let account = pod.spec().service_account_name.clone().filter(|n| !n.is_empty());
        let account = account.unwrap_or_else(|| "default".to_owned());
        let (slot, cancel) = self.slot(pod.uid(), (account.clone(), spec.clone()));
        let mut cached = slot.0.lock().await;
        let now = SystemClock.now().wall;
        if let Some(cached) = cached.as_ref()
            && now < cached.renew_at
        {
            return Ok(cached.token.clone());
        }
        match self.request(pod, &account, spec).await {
            Ok(token) => {
                let renew_at = renew_at(&token, MAX_JITTER.mul_f64(rand::random_range(0.0..1.0)));
                self.wake_at(pod.uid(), renew_at, cancel);
                *cached = Some(Cached { token: token.clone(), renew_at });
                Ok(token)
            }
            Err(error) => match cached.as_ref() {
                None => Err(ApiError::Unavailable { message: format!("failed to fetch token: {error}") }),
                Some(old) if old.token.expires <= SystemClock.now().wall => {
                    let message = format!("token of pod {} expired and refresh failed: {error}", pod.described());
                    Err(ApiError::Unavailable { message })
                }
                Some(old) => {
                    tracing::warn!(pod = %pod.described(), %error, "service account token was not renewed, the old one is used");
                    Ok(old.token.clone())
                }
            },
        }
    }

    fn slot(&self, uid: &PodUid, key: TokenKey) -> (Arc<Slot>, CancellationToken) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let pod = pods.entry(uid.clone()).or_insert_with(|| {
            let cancel = CancellationToken::new();
            PodTokens { slots: HashMap::new(), cancel: cancel.clone(), _ends_timers: cancel.drop_guard() }
        });
        (Arc::clone(pod.slots.entry(key).or_default()), pod.cancel.clone())
    }

    fn wake_at(&self, uid: &PodUid, at: Timestamp, cancel: CancellationToken) {
        let wait = at.duration_since(SystemClock.now().wall);
        let wait = Duration::try_from(wait).unwrap_or_default();
        let (uid, wakes) = (uid.clone(), Arc::clone(&self.wakes));
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(wait) => wakes.wake(&uid, Cause::Object),
            }
        });
    }

    async fn request(&self, pod: &Pod, account: &str, spec: &TokenSpec) -> Result<ServiceAccountToken, RestError> {
        let audiences = Some(spec.audience.clone()).filter(|a| !a.is_empty()).map(|a| vec![a]);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences,
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(pod.name().to_owned()),
                    uid: Some(pod.uid().as_str().to_owned()),
                }),
                expiration_seconds: Some(spec.expiration_seconds),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let body = serde_json::to_vec(&request).map_err(|e| RestError::Transport(e.to_string()))?;
        let path = format!("/api/v1/namespaces/{}/serviceaccounts/{account}/token", pod.namespace());
        let bytes = rest::call(&self.clients.general, Method::POST, &path, rest::JSON, body).await?;
        let answer: TokenRequest = rest::decode("TokenRequest", &bytes, true)?;
        let status = answer.status.unwrap_or_default();
        let (Some(token), Some(expires)) = (status.token, status.expiration_timestamp) else {
            return Err(RestError::Decode { what: "TokenRequest", problem: "status is incomplete".to_owned() });
        };
        let life = answer.spec.and_then(|s| s.expiration_seconds).unwrap_or(spec.expiration_seconds).max(0);
        // Counted back from the expiry: the apiserver's clock decides, not ours.
        let issued = expires.0.checked_sub(Duration::from_secs(life as u64)).unwrap_or(expires.0);
        Ok(ServiceAccountToken { token, issued, expires: expires.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v26_renewal_is_at_80_percent_or_24_hours() {
        let issued = Timestamp::from_second(1_000_000).unwrap();
        for (life, expected) in [(3607, 2885), (600, 480), (86_400, 69_120), (7 * 86_400, 86_400)] {
            let expires = issued.checked_add(Duration::from_secs(life)).unwrap();
            let token = ServiceAccountToken { token: "t".to_owned(), issued, expires };
            assert_eq!(renew_at(&token, Duration::ZERO).as_second() - 1_000_000, expected, "life {life}");
            assert_eq!(renew_at(&token, MAX_JITTER).as_second() - 1_000_000, expected - 10);
        }
    }
}
