//! LIST, then WATCH from its resourceVersion, for ever: the one way this agent follows a collection or a single object.
//!
//! In: a path and a field selector. Out: calls to a [`Reflect`]. A dropped watch resumes where it was; 410 lists again; an outage
//! is ridden out with doubling back-off and jitter. Lists never go back in time unless the cluster itself did: a relist asks
//! for at least the highest resourceVersion seen, and only if no apiserver can have it, a quorum list is taken as it is.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    client::ApiClients,
    limiter::Backoff,
    rest::{self, Bare, RestError, WatchEvent},
};
use crate::time::{Clock, SystemClock};

/// A watch that lived this long was healthy: the next failure starts the back-off anew.
const HEALTHY: Duration = Duration::from_secs(10);

/// What to follow.
#[derive(Debug, Clone)]
pub(crate) struct Collection {
    /// `/api/v1/pods`, `/api/v1/namespaces/x/secrets`.
    pub(crate) path: String,
    /// `spec.nodeName=n`.
    pub(crate) field_selector: String,
    /// For errors and logs: `pods`.
    pub(crate) kind: &'static str,
    /// Content may be secret: decoding errors show positions only.
    pub(crate) quiet: bool,
    /// List again, instead of resuming, when a watch broke off: after an etcd restore a watch from a version of the future stays
    /// silent, and that must not hide pods. Costs a list per lost connection.
    pub(crate) relist_on_loss: bool,
}

/// Whether to go on following.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follow {
    On,
    Stop,
}

/// Where what was followed goes.
#[async_trait]
pub(crate) trait Reflect<K>: Send {
    /// A complete list. `unreadable` objects exist too, but cannot be decoded.
    async fn listed(&mut self, items: Vec<K>, unreadable: Vec<Bare>) -> Follow;
    async fn present(&mut self, object: K) -> Follow;
    async fn deleted(&mut self, object: K) -> Follow;
    /// An attempt failed and will be repeated.
    fn failed(&mut self, _: &RestError) {}
}

#[derive(Deserialize)]
#[serde(bound = "K: DeserializeOwned")]
struct List<K> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    items: Vec<K>,
}

/// Go writes an empty list as `null`.
fn nullable<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct ListMeta {
    resource_version: String,
}

/// Why a watch ended.
enum Ended {
    Stopped,
    /// At the timeout it was given.
    TimedOut,
    /// The connection or the apiserver went away.
    Lost(RestError),
    /// The apiserver no longer has the events since then.
    Expired,
    Refused(RestError),
}

/// Follows until [`Follow::Stop`]; drop the future to end earlier. `known`: a resourceVersion that the caller has seen of this
/// collection; the first list is then at least as new, otherwise it is a quorum list.
pub(crate) async fn run<K: DeserializeOwned + Send>(
    clients: &ApiClients,
    collection: &Collection,
    known: Option<String>,
    reflect: &mut dyn Reflect<K>,
) {
    let mut follower = Follower { clients, collection, highest: known, backoff: Backoff::new() };
    let mut resume: Option<String> = None;
    let mut expired_before = false;
    loop {
        let from = match resume.take() {
            Some(version) => version,
            None => match follower.list(reflect).await {
                Ok((version, Follow::On)) => version,
                Ok((_, Follow::Stop)) => return,
                Err(error) => {
                    follower.pause(reflect, &error).await;
                    continue;
                }
            },
        };
        let mut at = from;
        let opened = SystemClock.now().mono;
        let ended = follower.watch(&mut at, reflect).await;
        let lived = SystemClock.now().mono - opened;
        if lived >= HEALTHY {
            follower.backoff.reset();
        }
        follower.saw(&at);
        match ended {
            Ended::Stopped => return,
            // Once is routine. Again right after a list means that listing does not help, and must not become a storm.
            Ended::Expired if expired_before && lived < HEALTHY => {
                let error = RestError::Transport("the watch expires at once".to_owned());
                follower.pause(reflect, &error).await;
            }
            Ended::Expired => {
                expired_before = true;
                continue;
            }
            Ended::TimedOut => resume = Some(at),
            Ended::Lost(error) => {
                follower.pause(reflect, &error).await;
                resume = Some(at).filter(|_| !collection.relist_on_loss);
            }
            Ended::Refused(error) => {
                follower.pause(reflect, &error).await;
                resume = Some(at).filter(|_| matches!(error.code(), Some(429 | 502 | 503)));
            }
        }
        expired_before = false;
    }
}

struct Follower<'a> {
    clients: &'a ApiClients,
    collection: &'a Collection,
    highest: Option<String>,
    backoff: Backoff,
}

impl Follower<'_> {
    fn saw(&mut self, version: &str) {
        let newer = match (&self.highest, rest::version_number(version)) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(old), Some(new)) => rest::version_number(old).is_none_or(|old| new > old),
        };
        if newer {
            self.highest = Some(version.to_owned());
        }
    }

    async fn pause<K>(&mut self, reflect: &mut dyn Reflect<K>, error: &RestError) {
        reflect.failed(error);
        let delay = self.backoff.delay(error.retry_after());
        tracing::debug!(kind = self.collection.kind, path = %self.collection.path, %error, ?delay, "following failed");
        tokio::time::sleep(delay).await;
    }

    async fn list<K: DeserializeOwned>(&mut self, reflect: &mut dyn Reflect<K>) -> Result<(String, Follow), RestError> {
        let (mut version, items, unreadable) = match self.list_once::<K>(self.highest.clone()).await {
            Ok(list) => list,
            Err(error) if self.highest.is_some() && error.is_too_large_version() => self.list_quorum().await?,
            Err(error) => return Err(error),
        };
        let (mut items, mut unreadable) = (items, unreadable);
        if self.is_behind(&version) {
            (version, items, unreadable) = self.list_quorum().await?;
        }
        // Whatever a quorum list says is how it is now, also after an etcd restore.
        self.highest = Some(version.clone());
        let follow = reflect.listed(items, unreadable).await;
        Ok((version, follow))
    }

    async fn list_quorum<K: DeserializeOwned>(&self) -> Result<(String, Vec<K>, Vec<Bare>), RestError> {
        tracing::info!(kind = self.collection.kind, highest = ?self.highest, "list is behind what was seen: asking for a quorum list");
        self.list_once(None).await
    }

    fn is_behind(&self, version: &str) -> bool {
        match (&self.highest, rest::version_number(version)) {
            (Some(highest), Some(version)) => rest::version_number(highest).is_some_and(|highest| version < highest),
            _ => false,
        }
    }

    async fn list_once<K: DeserializeOwned>(
        &self,
        at_least: Option<String>,
    ) -> Result<(String, Vec<K>, Vec<Bare>), RestError> {
        let mut path =
            format!("{}?fieldSelector={}", self.collection.path, rest::query_value(&self.collection.field_selector));
        if let Some(version) = at_least {
            path.push_str(&format!(
                "&resourceVersion={}&resourceVersionMatch=NotOlderThan",
                rest::query_value(&version)
            ));
        }
        let bytes = rest::get(&self.clients.general, &path).await?;
        if let Ok(list) = serde_json::from_slice::<List<K>>(&bytes) {
            return Ok((list.metadata.resource_version, list.items, Vec::new()));
        }
        // Rare and slow: one object spoils the list, so each is tried alone.
        let quiet = self.collection.quiet;
        let list: List<serde_json::Value> = rest::decode(self.collection.kind, &bytes, quiet)?;
        let (mut items, mut unreadable) = (Vec::new(), Vec::new());
        for value in list.items {
            let bare: Bare = Bare::deserialize(&value).unwrap_or_default();
            match serde_json::from_value::<K>(value) {
                Ok(item) => items.push(item),
                Err(error) => {
                    let problem = if quiet { "not shown".to_owned() } else { error.to_string() };
                    tracing::error!(kind = self.collection.kind, object = %bare.metadata.described(), problem, "object cannot be decoded");
                    unreadable.push(bare);
                }
            }
        }
        Ok((list.metadata.resource_version, items, unreadable))
    }

    /// Watches from `at`, which follows the events.
    async fn watch<K: DeserializeOwned + Send>(&self, at: &mut String, reflect: &mut dyn Reflect<K>) -> Ended {
        let slot = self.clients.watch_slot();
        let lifetime = Duration::from_secs(rand::random_range(300..600));
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&timeoutSeconds={}&fieldSelector={}&resourceVersion={}",
            self.collection.path,
            lifetime.as_secs(),
            rest::query_value(&self.collection.field_selector),
            rest::query_value(at),
        );
        let opened = SystemClock.now().mono;
        let followed = self.follow_stream(&slot.client, &path, at, reflect);
        // The apiserver ends a watch at its timeout; one that stays silent beyond that is dead.
        match tokio::time::timeout(lifetime + Duration::from_secs(30), followed).await {
            Ok(Ended::TimedOut) if SystemClock.now().mono - opened < lifetime - Duration::from_secs(5) => {
                Ended::Lost(RestError::Transport("the watch ended early".to_owned()))
            }
            Ok(ended) => ended,
            Err(_) => Ended::Lost(RestError::Transport("the watch went silent".to_owned())),
        }
    }

    async fn follow_stream<K: DeserializeOwned + Send>(
        &self,
        client: &kube::Client,
        path: &str,
        at: &mut String,
        reflect: &mut dyn Reflect<K>,
    ) -> Ended {
        let ended = |error: RestError| match &error {
            e if e.is_expired() || e.is_too_large_version() => Ended::Expired,
            RestError::Transport(_) => Ended::Lost(error),
            _ => Ended::Refused(error),
        };
        let mut stream = match rest::watch(client, path).await {
            Ok(stream) => stream,
            Err(error) => return ended(error),
        };
        loop {
            let line = match stream.line().await {
                Ok(Some(line)) => line,
                Ok(None) => return Ended::TimedOut,
                Err(error) => return ended(error),
            };
            let version = match serde_json::from_slice::<Versioned>(&line) {
                Ok(versioned) => versioned.object.metadata.resource_version,
                Err(_) => String::new(),
            };
            let follow = match rest::decode_event::<K>(&line, self.collection.quiet) {
                Ok(WatchEvent::Present(object)) => reflect.present(object).await,
                Ok(WatchEvent::Deleted(object)) => reflect.deleted(object).await,
                Ok(WatchEvent::Bookmark) => Follow::On,
                Ok(WatchEvent::Undecodable { object, problem }) => {
                    tracing::error!(kind = self.collection.kind, object, problem, "object cannot be decoded");
                    Follow::On
                }
                Err(error) => return ended(error),
            };
            if !version.is_empty() {
                *at = version;
            }
            if follow == Follow::Stop {
                return Ended::Stopped;
            }
        }
    }
}

#[derive(Deserialize)]
struct Versioned {
    object: Bare,
}
