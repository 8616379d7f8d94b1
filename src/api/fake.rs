//! An apiserver in memory for tests: objects with resourceVersions, watches, faults. No sockets, so paused time works with it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::BoxError;

use super::ApiClients;

type Key = (String, String, String);
type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Cheap to clone; all clones are one server.
#[derive(Clone, Default)]
pub(crate) struct FakeApi(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    objects: BTreeMap<Key, Value>,
    version: u64,
    /// Watches from below this version get 410.
    compacted: u64,
    log: Vec<(u64, Key, Value)>,
    watchers: Vec<Watcher>,
    requests: Vec<String>,
    bodies: Vec<(String, Value)>,
    down: bool,
    /// `METHOD path-prefix` → (answers left, code, reason).
    refusals: Vec<(String, u32, u16, &'static str)>,
    /// Requests that begin so wait for this gate.
    gate: Option<(String, Arc<tokio::sync::Semaphore>)>,
    hidden: Vec<Key>,
}

struct Watcher {
    resource: String,
    namespace: Option<String>,
    name: Option<String>,
    stream: mpsc::UnboundedSender<Bytes>,
}

impl Watcher {
    fn wants(&self, key: &Key) -> bool {
        self.resource == key.0
            && self.namespace.as_ref().is_none_or(|n| *n == key.1)
            && self.name.as_ref().is_none_or(|n| *n == key.2)
    }
}

fn key(resource: &str, object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (resource.to_owned(), text("namespace"), text("name"))
}

impl FakeApi {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn clients(&self) -> ApiClients {
        let fake = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let fake = fake.clone();
            async move { fake.answer(request).await }
        });
        ApiClients::over(kube::Client::new(service, "default"))
    }

    /// Creates or replaces, and tells the watchers.
    pub(crate) fn put(&self, resource: &str, object: Value) {
        self.lock().put(resource, object, true);
    }

    /// As `put`, but no watcher hears of it: a lost event.
    pub(crate) fn put_silently(&self, resource: &str, object: Value) {
        self.lock().put(resource, object, false);
    }

    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str, tell: bool) {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        self.lock().remove(&key, tell);
    }

    pub(crate) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&(resource.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    /// The object exists, but lists leave it out.
    pub(crate) fn hide_from_lists(&self, resource: &str, namespace: &str, name: &str) {
        self.lock().hidden.push((resource.to_owned(), namespace.to_owned(), name.to_owned()));
    }

    pub(crate) fn set_down(&self, down: bool) {
        let mut state = self.lock();
        state.down = down;
        if down {
            state.watchers.clear();
        }
    }

    /// All watch connections end.
    pub(crate) fn break_watches(&self) {
        self.lock().watchers.clear();
    }

    /// Forgets history: a watch from any version up to now gets 410.
    pub(crate) fn compact(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.compacted = state.version;
    }

    /// As after an etcd restore: versions start again lower.
    pub(crate) fn restore_to(&self, version: u64) {
        let mut state = self.lock();
        state.version = version;
        state.compacted = 0;
        state.log.clear();
        state.watchers.clear();
        for object in state.objects.values_mut() {
            object["metadata"]["resourceVersion"] = json!(version.to_string());
        }
    }

    /// The next `times` requests that begin with `METHOD path` are answered with this code.
    pub(crate) fn refuse(&self, request: &str, times: u32, code: u16, reason: &'static str) {
        self.lock().refusals.push((request.to_owned(), times, code, reason));
    }

    /// Requests that begin so wait until a permit is added.
    pub(crate) fn hold(&self, request: &str) -> Arc<tokio::sync::Semaphore> {
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        self.lock().gate = Some((request.to_owned(), Arc::clone(&gate)));
        gate
    }

    pub(crate) fn requests(&self, prefix: &str) -> Vec<String> {
        self.lock().requests.iter().filter(|r| r.starts_with(prefix)).cloned().collect()
    }

    pub(crate) fn bodies(&self, prefix: &str) -> Vec<Value> {
        self.lock().bodies.iter().filter(|(r, _)| r.starts_with(prefix)).map(|(_, b)| b.clone()).collect()
    }

    pub(crate) fn watchers(&self, resource: &str) -> usize {
        let mut state = self.lock();
        state.watchers.retain(|w| !w.stream.is_closed());
        state.watchers.iter().filter(|w| w.resource == resource).count()
    }

    async fn answer(&self, request: Request<Body>) -> Result<Answer, BoxError> {
        let (parts, body) = request.into_parts();
        let uri = parts.uri.clone();
        let line = format!("{} {}", parts.method, uri.path_and_query().unwrap());
        let bytes = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let gate = {
            let mut state = self.lock();
            if state.down {
                return Err("connection refused".into());
            }
            state.requests.push(line.clone());
            if !body.is_null() {
                state.bodies.push((line.clone(), body.clone()));
            }
            state.gate.clone().filter(|(prefix, _)| line.starts_with(prefix)).map(|(_, gate)| gate)
        };
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        let mut state = self.lock();
        if state.down {
            return Err("connection reset".into());
        }
        if let Some(refusal) =
            state.refusals.iter_mut().find(|(prefix, times, ..)| *times > 0 && line.starts_with(prefix))
        {
            refusal.1 -= 1;
            return Ok(status(refusal.2, refusal.3, "refused by the test"));
        }
        Ok(state.serve(&parts.method, uri.path(), uri.query().unwrap_or_default(), &body))
    }
}

fn status(code: u16, reason: &str, message: &str) -> Answer {
    let body = json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message});
    respond(code, &body)
}

fn respond(code: u16, body: &Value) -> Answer {
    Response::builder().status(code).body(Full::new(Bytes::from(body.to_string())).boxed_unsync()).unwrap()
}

fn line(kind: &str, object: &Value) -> Bytes {
    Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
}

/// Strategic merge, as far as a pod's status needs it.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (field, value) in fields.iter().filter(|(f, _)| !f.starts_with('$')) {
        let merge_key = match field.as_str() {
            "conditions" => Some("type"),
            "podIPs" | "hostIPs" => Some("ip"),
            _ => None,
        };
        match (merge_key, value) {
            (_, Value::Null) => {
                target.as_object_mut().unwrap().remove(field);
            }
            (Some(key), Value::Array(items)) => {
                let mut list = target[field].as_array().cloned().unwrap_or_default();
                for item in items {
                    let at = list.iter().position(|have| have[key] == item[key]);
                    match (item["$patch"] == "delete", at) {
                        (true, Some(at)) => drop(list.remove(at)),
                        (true, None) => {}
                        (false, Some(at)) => merge(&mut list[at], item),
                        (false, None) => list.push(item.clone()),
                    }
                }
                target[field] = json!(list);
            }
            (None, Value::Object(_)) => merge(&mut target[field], value),
            (_, other) => target[field] = other.clone(),
        }
    }
}

impl State {
    fn put(&mut self, resource: &str, mut object: Value, tell: bool) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = key(resource, &object);
        let kind = if self.objects.insert(key.clone(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        if tell {
            self.tell(kind, &key, object.clone());
        }
        object
    }

    fn remove(&mut self, key: &Key, tell: bool) {
        if let Some(mut object) = self.objects.remove(key) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            if tell {
                self.tell("DELETED", key, object);
            }
        }
    }

    fn tell(&mut self, kind: &str, key: &Key, object: Value) {
        for watcher in self.watchers.iter().filter(|w| w.wants(key)) {
            watcher.stream.send(line(kind, &object)).ok();
        }
        self.log.push((self.version, key.clone(), json!({"type": kind, "object": object})));
    }

    fn serve(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> Answer {
        let parts: Vec<&str> =
            path.trim_start_matches("/api/v1/").trim_start_matches("/apis/node.k8s.io/v1/").split('/').collect();
        let (namespace, resource, rest) = match parts.as_slice() {
            ["namespaces", namespace, resource, rest @ ..] => (Some((*namespace).to_owned()), *resource, rest),
            [resource, rest @ ..] => (None, *resource, rest),
            [] => return status(404, "NotFound", "no such path"),
        };
        let named = |name: &str| (resource.to_owned(), namespace.clone().unwrap_or_default(), name.to_owned());
        match (method.as_str(), rest) {
            ("GET", []) => self.collection(resource, namespace, query),
            ("GET", [name]) => match self.objects.get(&named(name)) {
                Some(object) => respond(200, object),
                None => status(404, "NotFound", &format!("{resource} \"{name}\" not found")),
            },
            ("PATCH", [name, ..]) => {
                let Some(mut object) = self.objects.get(&named(name)).cloned() else {
                    return status(404, "NotFound", &format!("{resource} \"{name}\" not found"));
                };
                let uid = &body["metadata"]["uid"];
                if !uid.is_null() && *uid != object["metadata"]["uid"] {
                    return status(422, "Invalid", "metadata.uid: field is immutable");
                }
                merge(&mut object, body);
                respond(200, &self.put(resource, object, true))
            }
            ("DELETE", [name]) => match self.objects.get(&named(name)) {
                None => status(404, "NotFound", "not found"),
                Some(object) if object["metadata"]["uid"] != body["preconditions"]["uid"] => {
                    status(409, "Conflict", "the UID in the precondition differs")
                }
                Some(_) => {
                    self.remove(&named(name), true);
                    respond(200, &json!({"kind": "Status", "status": "Success"}))
                }
            },
            ("POST", [_, "token"]) => {
                let seconds = body["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
                let now = crate::time::Clock::now(&crate::time::SystemClock).wall;
                let expires = now.checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap();
                let answer = json!({"spec": body["spec"], "status":
                    {"token": format!("token-{}", self.requests.len()), "expirationTimestamp": expires.to_string()}});
                respond(201, &answer)
            }
            ("POST", []) => {
                let mut object = body.clone();
                object["metadata"]["namespace"] = json!(namespace);
                respond(201, &self.put(resource, object, true))
            }
            _ => status(405, "MethodNotAllowed", "not in this fake"),
        }
    }

    fn collection(&mut self, resource: &str, namespace: Option<String>, query: &str) -> Answer {
        let value = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(&format!("{name}=")))
                .map(|v| v.replace("%3D", "=").replace("%2C", ","))
        };
        let selector = value("fieldSelector").unwrap_or_default();
        let name = selector.split(',').find_map(|s| s.strip_prefix("metadata.name=")).map(str::to_owned);
        let from: u64 = value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        let (stream, receiver) = mpsc::unbounded_channel::<Bytes>();
        let watcher = Watcher { resource: resource.to_owned(), namespace, name, stream };
        if value("watch").is_none() {
            if from > self.version {
                return status(504, "Timeout", "Too large resource version: newer than this server's");
            }
            let items: Vec<&Value> = self
                .objects
                .iter()
                .filter(|(k, _)| watcher.wants(k) && !self.hidden.contains(k))
                .map(|(_, v)| v)
                .collect();
            return respond(200, &json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items}));
        }
        if from < self.compacted {
            return status(410, "Expired", "too old resource version");
        }
        for (version, key, event) in &self.log {
            if *version > from && watcher.wants(key) {
                watcher.stream.send(Bytes::from(format!("{event}\n"))).ok();
            }
        }
        self.watchers.push(watcher);
        let frames =
            tokio_stream::wrappers::UnboundedReceiverStream::new(receiver).map(|b| Ok::<_, Infallible>(Frame::data(b)));
        Response::builder().status(200).body(StreamBody::new(frames).boxed_unsync()).unwrap()
    }
}

/// Waits, in paused time, until something is so; panics after ten virtual minutes.
pub(crate) async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..60_000 {
        if so() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// Counts wakes per pod and cause.
#[derive(Default)]
pub(crate) struct CountingWakes(Mutex<BTreeMap<(String, &'static str), usize>>);

impl CountingWakes {
    pub(crate) fn count(&self, uid: &str, cause: crate::wake::Cause) -> usize {
        self.0.lock().unwrap().get(&(uid.to_owned(), cause.as_str())).copied().unwrap_or(0)
    }
}

impl crate::wake::WakeSink for CountingWakes {
    fn wake(&self, uid: &crate::pods::PodUid, cause: crate::wake::Cause) {
        *self.0.lock().unwrap().entry((uid.to_string(), cause.as_str())).or_default() += 1;
    }
    fn wake_all(&self, cause: crate::wake::Cause) {
        self.wake(&"*".into(), cause);
    }
}
