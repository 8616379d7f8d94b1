//! ConfigMaps and secrets that pods refer to: one shared entry and one single-object watch each (contract V-24, N-23).
//!
//! In: pods to track. Out: the newest content as an `Arc`, and wakes with `Cause::Object` when it changed. Life of an entry: the first
//! pod that refers to it starts a plain GET (lowest latency, answered by etcd), then a LIST no older than that answer and a WATCH
//! from there; an immutable object gets no watch; the last pod's going drops all of it.
//!
//! Freshness: a pod that begins to refer to a cached object must not see less than a GET would give now, as upstream promises at
//! registration. So each new user starts a GET, and readers wait for it. If the apiserver does not answer that GET, the cached
//! content serves: fail-static.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::ByteString;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ApiError, ConfigMapData, RuntimeClassData, SecretData,
    client::ApiClients,
    list_watch::{self, Collection, Follow, Reflect},
    ports::RUNTIME_CLASS,
    rest::{self, Bare, BareMeta, RestError},
};
use crate::{
    pods::PodUid,
    wake::{Cause, WakeSink},
};

/// The node authorizer learns of a new pod a moment after the agent does: a 403 within about this many tries is not final.
const FORBIDDEN_TRIES: u32 = 5;
const FORBIDDEN_PAUSE: Duration = Duration::from_millis(150);

/// `namespace` (empty for what has none), `name`.
pub(super) type ObjectKey = (String, String);

/// A kind of object that pods refer to by name.
pub(super) trait Tracked: PartialEq + Send + Sync + Sized + 'static {
    /// The JSON shape; managedFields and annotations are not even read.
    type Wire: DeserializeOwned + Send + Into<(BareMeta, Self)>;
    /// As upstream words it in `configmap "x" not found`.
    const KIND: &'static str;
    const RESOURCE: &'static str;
    const QUIET: bool;
    fn immutable(&self) -> bool;
    /// The path of the collection.
    fn collection(namespace: &str) -> String {
        format!("/api/v1/namespaces/{namespace}/{}", Self::RESOURCE)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConfigMapWire {
    #[serde(default)]
    metadata: BareMeta,
    data: Option<BTreeMap<String, String>>,
    binary_data: Option<BTreeMap<String, ByteString>>,
    immutable: Option<bool>,
}

impl From<ConfigMapWire> for (BareMeta, ConfigMapData) {
    fn from(wire: ConfigMapWire) -> Self {
        let binary_data = wire.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect();
        let data = ConfigMapData {
            data: wire.data.unwrap_or_default(),
            binary_data,
            immutable: wire.immutable.unwrap_or(false),
        };
        (wire.metadata, data)
    }
}

impl Tracked for ConfigMapData {
    type Wire = ConfigMapWire;
    const KIND: &'static str = "configmap";
    const RESOURCE: &'static str = "configmaps";
    const QUIET: bool = false;
    fn immutable(&self) -> bool {
        self.immutable
    }
}

#[derive(Deserialize)]
pub(super) struct SecretWire {
    #[serde(default)]
    metadata: BareMeta,
    #[serde(rename = "type", default)]
    type_: String,
    data: Option<BTreeMap<String, ByteString>>,
    immutable: Option<bool>,
}

impl From<SecretWire> for (BareMeta, SecretData) {
    fn from(wire: SecretWire) -> Self {
        let data = wire.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect();
        let (uid, immutable) = (wire.metadata.uid.clone(), wire.immutable.unwrap_or(false));
        (wire.metadata, SecretData { uid, type_: wire.type_, data, immutable })
    }
}

impl Tracked for SecretData {
    type Wire = SecretWire;
    const KIND: &'static str = "secret";
    const RESOURCE: &'static str = "secrets";
    const QUIET: bool = true;
    fn immutable(&self) -> bool {
        self.immutable
    }
}

#[derive(Deserialize)]
pub(super) struct RuntimeClassWire {
    #[serde(default)]
    metadata: BareMeta,
    #[serde(default)]
    handler: String,
}

impl From<RuntimeClassWire> for (BareMeta, RuntimeClassData) {
    fn from(wire: RuntimeClassWire) -> Self {
        (wire.metadata, RuntimeClassData { handler: wire.handler })
    }
}

impl Tracked for RuntimeClassData {
    type Wire = RuntimeClassWire;
    const KIND: &'static str = RUNTIME_CLASS;
    const RESOURCE: &'static str = "runtimeclasses";
    const QUIET: bool = false;
    /// `handler` cannot be changed, but the class can be deleted and made again.
    fn immutable(&self) -> bool {
        false
    }
    fn collection(_: &str) -> String {
        "/apis/node.k8s.io/v1/runtimeclasses".to_owned()
    }
}

/// What is known of one object.
enum Content<T> {
    Pending,
    Found(Arc<T>),
    Missing,
    Failed(RestError),
}

struct State<T> {
    content: Content<T>,
    /// resourceVersion of the content, 0 when there is none.
    version: u64,
    /// Counts every application, so that a slow GET can tell that it was overtaken.
    applied: u64,
    /// GETs under way whose answer readers wait for.
    refreshing: u32,
    watching: bool,
}

struct Entry<T> {
    key: ObjectKey,
    state: watch::Sender<State<T>>,
    users: Mutex<HashSet<PodUid>>,
    cancel: CancellationToken,
}

impl<T> Entry<T> {
    fn users(&self) -> MutexGuard<'_, HashSet<PodUid>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all entries of a table share.
struct Context {
    clients: ApiClients,
    wakes: Arc<dyn WakeSink>,
}

/// All tracked objects of one kind.
pub(super) struct Table<T: Tracked> {
    context: Arc<Context>,
    index: Mutex<Index<T>>,
}

struct Index<T> {
    /// The guard ends an entry's tasks when it leaves the table.
    entries: HashMap<ObjectKey, (Arc<Entry<T>>, DropGuard)>,
    pods: HashMap<PodUid, BTreeSet<ObjectKey>>,
}

impl<T: Tracked> Table<T> {
    pub(super) fn new(clients: ApiClients, wakes: Arc<dyn WakeSink>) -> Self {
        let index = Index { entries: HashMap::new(), pods: HashMap::new() };
        Self { context: Arc::new(Context { clients, wakes }), index: Mutex::new(index) }
    }

    fn index(&self) -> MutexGuard<'_, Index<T>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what a pod refers to; empty forgets the pod. Starts fetches, waits for nothing.
    pub(super) fn track(&self, uid: &PodUid, wanted: BTreeSet<ObjectKey>) {
        let mut index = self.index();
        let before = index.pods.remove(uid).unwrap_or_default();
        for key in before.difference(&wanted) {
            let unused = index.entries.get(key).is_some_and(|(entry, _)| {
                let mut users = entry.users();
                users.remove(uid);
                users.is_empty()
            });
            if unused {
                index.entries.remove(key);
            }
        }
        for key in wanted.difference(&before) {
            let (entry, _) = index.entries.entry(key.clone()).or_insert_with(|| {
                let cancel = CancellationToken::new();
                let state = State { content: Content::Pending, version: 0, applied: 0, refreshing: 0, watching: false };
                let entry = Entry {
                    key: key.clone(),
                    state: watch::Sender::new(state),
                    users: Mutex::default(),
                    cancel: cancel.clone(),
                };
                (Arc::new(entry), cancel.drop_guard())
            });
            entry.users().insert(uid.clone());
            entry.state.send_modify(|state| state.refreshing += 1);
            tokio::spawn(keep(Arc::clone(&self.context), Arc::clone(entry)));
        }
        if !wanted.is_empty() {
            index.pods.insert(uid.clone(), wanted);
        }
    }

    /// The content, once every GET that a tracked pod is owed has been answered.
    pub(super) async fn get(&self, namespace: &str, name: &str) -> Result<Arc<T>, ApiError> {
        let key = (namespace.to_owned(), name.to_owned());
        let entry = self.index().entries.get(&key).map(|(entry, _)| Arc::clone(entry));
        let Some(entry) = entry else {
            let message = format!("{} \"{namespace}/{name}\" is not registered", T::KIND);
            return Err(ApiError::Unavailable { message });
        };
        let mut receiver = entry.state.subscribe();
        let settled = |s: &State<T>| s.refreshing == 0 && !matches!(s.content, Content::Pending);
        let state = tokio::select! {
            state = receiver.wait_for(settled) => state,
            () = entry.cancel.cancelled() => {
                let message = format!("{} \"{namespace}/{name}\" is no longer referred to", T::KIND);
                return Err(ApiError::Unavailable { message });
            }
        };
        let Ok(state) = state else {
            return Err(ApiError::Unavailable { message: format!("{} cache ended", T::KIND) });
        };
        match &state.content {
            Content::Found(object) => Ok(Arc::clone(object)),
            Content::Missing | Content::Pending => Err(ApiError::NotFound { kind: T::KIND, name: name.to_owned() }),
            Content::Failed(error) if error.is_forbidden() => {
                Err(ApiError::Forbidden { kind: T::KIND, name: name.to_owned(), message: error.to_string() })
            }
            Content::Failed(error) => {
                let message = format!("failed to fetch {} \"{namespace}/{name}\": {error}", T::KIND);
                Err(ApiError::Unavailable { message })
            }
        }
    }
}

/// One task per (entry, new user): fetch, then watch if nobody does yet.
async fn keep<T: Tracked>(context: Arc<Context>, entry: Arc<Entry<T>>) {
    let cancel = entry.cancel.clone();
    let work = async {
        let version = refresh(&context, &entry).await;
        watch_if_due(&context, &entry, version).await;
    };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = work => {}
    }
}

/// The GET that a new user is owed. Returns the resourceVersion it saw.
async fn refresh<T: Tracked>(context: &Context, entry: &Entry<T>) -> Option<String> {
    let mut forbidden = 0;
    let seen = loop {
        let before = entry.state.borrow().applied;
        let (namespace, name) = &entry.key;
        let path = format!("{}/{name}", T::collection(namespace));
        let answer = match rest::get(&context.clients.general, &path).await {
            Ok(bytes) => rest::decode::<T::Wire>(T::KIND, &bytes, T::QUIET).map(|wire| Some(wire.into())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some((meta, object))) => {
                apply_present(context, entry, &meta, object);
                break Some(meta.resource_version);
            }
            // The watch said something meanwhile: ask again rather than undo it.
            Ok(None) if entry.state.borrow().applied != before => {}
            Ok(None) => {
                apply(context, entry, Content::Missing, 0);
                break None;
            }
            Err(error) if error.is_forbidden() && forbidden < FORBIDDEN_TRIES => {
                forbidden += 1;
                tokio::time::sleep(FORBIDDEN_PAUSE).await;
            }
            Err(error) => {
                apply_failure(context, entry, &error);
                break None;
            }
        }
    };
    entry.state.send_modify(|state| state.refreshing -= 1);
    seen
}

async fn watch_if_due<T: Tracked>(context: &Context, entry: &Entry<T>, version: Option<String>) {
    let mut mine = false;
    entry.state.send_if_modified(|state| {
        let settled = matches!(&state.content, Content::Found(object) if object.immutable());
        mine = !settled && !state.watching;
        state.watching |= mine;
        false
    });
    if !mine {
        return;
    }
    let (namespace, name) = &entry.key;
    let collection = Collection {
        path: T::collection(namespace),
        field_selector: format!("metadata.name={name}"),
        kind: T::RESOURCE,
        quiet: T::QUIET,
        relist_on_loss: false,
    };
    let mut reflect = EntryReflect { context, entry };
    list_watch::run::<T::Wire>(&context.clients, &collection, version, &mut reflect).await;
    entry.state.send_if_modified(|state| {
        state.watching = false;
        false
    });
}

struct EntryReflect<'a, T: Tracked> {
    context: &'a Context,
    entry: &'a Entry<T>,
}

impl<T: Tracked> EntryReflect<'_, T> {
    fn set(&self, wire: T::Wire) -> Follow {
        let (meta, object) = wire.into();
        let immutable = object.immutable();
        apply_present(self.context, self.entry, &meta, object);
        if immutable { Follow::Stop } else { Follow::On }
    }
}

#[async_trait]
impl<T: Tracked> Reflect<T::Wire> for EntryReflect<'_, T> {
    async fn listed(&mut self, items: Vec<T::Wire>, unreadable: Vec<Bare>) -> Follow {
        // A list is complete knowledge: its version counts even when it is lower (an etcd restore).
        self.entry.state.send_if_modified(|state| {
            state.version = 0;
            false
        });
        match items.into_iter().next() {
            Some(wire) => self.set(wire),
            None if unreadable.is_empty() => {
                apply(self.context, self.entry, Content::Missing, 0);
                Follow::On
            }
            None => {
                let error = RestError::Decode { what: T::KIND, problem: "not shown".to_owned() };
                apply_failure(self.context, self.entry, &error);
                Follow::On
            }
        }
    }

    async fn present(&mut self, wire: T::Wire) -> Follow {
        self.set(wire)
    }

    async fn deleted(&mut self, wire: T::Wire) -> Follow {
        let (meta, _): (BareMeta, T) = wire.into();
        let version = rest::version_number(&meta.resource_version).unwrap_or(0);
        if version >= self.entry.state.borrow().version {
            apply(self.context, self.entry, Content::Missing, 0);
        }
        Follow::On
    }

    fn failed(&mut self, error: &RestError) {
        apply_failure(self.context, self.entry, error);
    }
}

/// Takes an object unless something newer is known.
fn apply_present<T: Tracked>(context: &Context, entry: &Entry<T>, meta: &BareMeta, object: T) {
    let version = rest::version_number(&meta.resource_version).unwrap_or(0);
    if version < entry.state.borrow().version {
        return;
    }
    apply(context, entry, Content::Found(Arc::new(object)), version);
}

/// A failure never replaces content: what was read stays true until the apiserver says otherwise.
fn apply_failure<T: Tracked>(context: &Context, entry: &Entry<T>, error: &RestError) {
    if matches!(entry.state.borrow().content, Content::Pending | Content::Failed(_)) {
        apply(context, entry, Content::Failed(error.clone()), 0);
    }
}

/// Publishes, then wakes the users if the content is another one.
fn apply<T: Tracked>(context: &Context, entry: &Entry<T>, content: Content<T>, version: u64) {
    let mut changed = false;
    entry.state.send_modify(|state| {
        changed = match (&state.content, &content) {
            (Content::Found(old), Content::Found(new)) => old != new,
            (Content::Missing, Content::Missing) | (Content::Failed(_), Content::Failed(_)) => false,
            _ => true,
        };
        state.applied += 1;
        state.version = version;
        if changed || matches!(content, Content::Failed(_)) {
            state.content = content;
        }
    });
    if changed {
        let users: Vec<PodUid> = entry.users().iter().cloned().collect();
        for uid in users {
            context.wakes.wake(&uid, Cause::Object);
        }
    }
}
