//! The apiserver of the soak, in memory and without sockets: objects, lists, watches, status patches, deletion; and what goes wrong with them.
//!
//! It stands behind the agent's own HTTP client, so that list, watch, back-off, patch and DELETE are the real ones. Seen from here: the phase of
//! a pod whose phase was terminal never changes; a patch that would is noted.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::client::Body;
use rkubelet::{api::ApiClients, time::Clock};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::BoxError;

type Key = (String, String, String);
type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;

/// Watches from before the oldest of so many events get 410.
const LOG: usize = 1000;
/// Where all pods of the soak live.
pub const NAMESPACE: &str = "ns";

/// Cheap to clone; all clones are one server.
#[derive(Clone)]
pub struct Apiserver(Arc<Mutex<State>>);

struct State {
    clock: Arc<dyn Clock>,
    objects: BTreeMap<Key, Value>,
    version: u64,
    compacted: u64,
    log: VecDeque<(u64, Key, Bytes)>,
    watchers: Vec<Watcher>,
    next_watcher: u64,
    cut_off: bool,
    latency: Duration,
    /// `METHOD path-prefix`, answers left, code, reason.
    refusals: Vec<(String, u32, u16, &'static str)>,
    left_terminal: Vec<String>,
    requests: u64,
}

struct Watcher {
    id: u64,
    resource: String,
    namespace: Option<String>,
    name: Option<String>,
    stream: mpsc::UnboundedSender<Result<Bytes, ()>>,
}

impl Watcher {
    fn wants(&self, key: &Key) -> bool {
        self.resource == key.0
            && self.namespace.as_ref().is_none_or(|n| *n == key.1)
            && self.name.as_ref().is_none_or(|n| *n == key.2)
    }
}

pub fn terminal(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

impl Apiserver {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Mutex::new(State {
            clock,
            objects: BTreeMap::new(),
            version: 1,
            compacted: 0,
            log: VecDeque::new(),
            watchers: Vec::new(),
            next_watcher: 0,
            cut_off: false,
            latency: Duration::from_millis(3),
            refusals: Vec::new(),
            left_terminal: Vec::new(),
            requests: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn clients(&self) -> ApiClients {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { server.answer(request).await }
        });
        ApiClients::over(kube::Client::new(service, "default"))
    }

    // ---- what the cluster's users do ----

    pub fn create(&self, resource: &str, mut object: Value) {
        let mut state = self.lock();
        object["metadata"]["creationTimestamp"] = json!(state.clock.now().api_time().0.to_string());
        state.put(resource, object);
    }

    pub fn pods(&self) -> Vec<Value> {
        self.lock().objects.iter().filter(|(key, _)| key.0 == "pods").map(|(_, pod)| pod.clone()).collect()
    }

    /// Changes a pod's spec or metadata; a changed spec raises the generation.
    pub fn update(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.lock();
        let Some(mut pod) = state.objects.get(&pod_key(name)).cloned() else { return };
        let spec = pod["spec"].clone();
        change(&mut pod);
        if pod["spec"] != spec {
            let generation = pod["metadata"]["generation"].as_i64().unwrap_or(1);
            pod["metadata"]["generation"] = json!(generation + 1);
        }
        state.put("pods", pod);
    }

    /// As a user's DELETE: the pod stays until its node lets go, unless it has ended, or `grace` is 0.
    pub fn delete(&self, name: &str, grace: u64) {
        let mut state = self.lock();
        let key = pod_key(name);
        let Some(mut pod) = state.objects.get(&key).cloned() else { return };
        if grace == 0 || terminal(&pod) {
            return state.remove(&key);
        }
        let earlier = pod["metadata"]["deletionGracePeriodSeconds"].as_u64();
        if earlier.is_some_and(|earlier| earlier <= grace) {
            return;
        }
        let at = state.clock.now().wall + Duration::from_secs(grace);
        pod["metadata"]["deletionTimestamp"] = json!(rkubelet::time::api_time(at).0.to_string());
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        state.put("pods", pod);
    }

    /// As a PATCH of the status, from whoever writes past the agent's publisher.
    pub fn write_status(&self, name: &str, body: &Value) {
        let mut state = self.lock();
        if let Some(pod) = state.objects.get(&pod_key(name)).cloned() {
            state.patch_status(pod, body);
        }
    }

    // ---- what goes wrong ----

    /// The node cannot reach the server: requests fail, watches break. Users go on.
    pub fn cut_off(&self, cut_off: bool) {
        let mut state = self.lock();
        state.cut_off = cut_off;
        if cut_off {
            state.break_watches();
        }
    }

    pub fn break_watches(&self) {
        self.lock().break_watches();
    }

    /// History is forgotten and watches break: the next watch gets 410.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.compacted = state.version;
        state.log.clear();
        state.break_watches();
    }

    pub fn refuse(&self, request: &str, times: u32, code: u16, reason: &'static str) {
        self.lock().refusals.push((request.to_owned(), times, code, reason));
    }

    pub fn latency(&self, latency: Duration) {
        self.lock().latency = latency;
    }

    pub fn heal(&self) {
        let mut state = self.lock();
        state.cut_off = false;
        state.refusals.clear();
        state.latency = Duration::from_millis(3);
    }

    // ---- what was seen ----

    /// Patches that took a pod out of a terminal phase, since the last call.
    pub fn take_left_terminal(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().left_terminal)
    }

    pub fn requests(&self) -> u64 {
        self.lock().requests
    }

    async fn answer(&self, request: Request<Body>) -> Result<Answer, BoxError> {
        let (parts, body) = request.into_parts();
        let line = format!("{} {}", parts.method, parts.uri.path());
        let bytes = body.collect().await?.to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let latency = {
            let mut state = self.lock();
            state.requests += 1;
            if state.cut_off {
                return Err("connection refused".into());
            }
            state.latency
        };
        tokio::time::sleep(latency).await;
        let mut state = self.lock();
        if state.cut_off {
            return Err("connection reset".into());
        }
        let refusal = state.refusals.iter_mut().find(|(prefix, ..)| line.starts_with(prefix.as_str()));
        if let Some(refusal) = refusal {
            refusal.1 -= 1;
            let (_, left, code, reason) = refusal.clone();
            if left == 0 {
                state.refusals.retain(|(_, left, ..)| *left > 0);
            }
            return Ok(status(code, reason, "refused by the soak"));
        }
        let (answer, ends) = state.serve(&parts.method, parts.uri.path(), parts.uri.query().unwrap_or_default(), &body);
        drop(state);
        if let Some((id, after)) = ends {
            let server = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                server.lock().watchers.retain(|w| w.id != id);
            });
        }
        Ok(answer)
    }
}

fn pod_key(name: &str) -> Key {
    ("pods".to_owned(), NAMESPACE.to_owned(), name.to_owned())
}

fn status(code: u16, reason: &str, message: &str) -> Answer {
    respond(code, &json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}))
}

fn respond(code: u16, body: &Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never: Infallible| match never {});
    Response::builder().status(code).body(body.boxed_unsync()).unwrap()
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
            (Some(key), Value::Array(items)) => merge_list(&mut target[field], items, key),
            (None, Value::Object(_)) => merge(&mut target[field], value),
            (_, other) => target[field] = other.clone(),
        }
    }
}

fn merge_list(target: &mut Value, items: &[Value], key: &str) {
    let mut list = target.as_array().cloned().unwrap_or_default();
    for item in items {
        let at = list.iter().position(|have| have[key] == item[key]);
        match (item["$patch"] == "delete", at) {
            (true, Some(at)) => drop(list.remove(at)),
            (true, None) => {}
            (false, Some(at)) => merge(&mut list[at], item),
            (false, None) => list.push(item.clone()),
        }
    }
    *target = json!(list);
}

impl State {
    fn break_watches(&mut self) {
        for watcher in self.watchers.drain(..) {
            watcher.stream.send(Err(())).ok();
        }
    }

    fn put(&mut self, resource: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = (resource.to_owned(), text("namespace"), text("name"));
        let kind = if self.objects.insert(key.clone(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        self.tell(kind, key, &object);
        object
    }

    fn remove(&mut self, key: &Key) {
        if let Some(mut object) = self.objects.remove(key) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.tell("DELETED", key.clone(), &object);
        }
    }

    fn tell(&mut self, kind: &str, key: Key, object: &Value) {
        let line = Bytes::from(format!("{}\n", json!({"type": kind, "object": object})));
        for watcher in self.watchers.iter().filter(|w| w.wants(&key)) {
            watcher.stream.send(Ok(line.clone())).ok();
        }
        self.log.push_back((self.version, key, line));
        if self.log.len() > LOG
            && let Some((version, ..)) = self.log.pop_front()
        {
            self.compacted = self.compacted.max(version);
        }
    }

    /// The answer, and for a watch its ID and when it ends.
    fn serve(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> (Answer, Option<(u64, Duration)>) {
        let parts: Vec<&str> =
            path.trim_start_matches("/api/v1/").trim_start_matches("/apis/node.k8s.io/v1/").split('/').collect();
        let (namespace, resource, rest) = match parts.as_slice() {
            ["namespaces", namespace, resource, rest @ ..] => (Some((*namespace).to_owned()), *resource, rest),
            [resource, rest @ ..] => (None, *resource, rest),
            [] => return (status(404, "NotFound", "no such path"), None),
        };
        if (method.as_str(), rest) == ("GET", &[]) {
            return self.collection(resource, namespace, query);
        }
        if resource == "events" {
            return (respond(201, body), None);
        }
        let name = rest.first().copied().unwrap_or_default();
        let key = (resource.to_owned(), namespace.unwrap_or_default(), name.to_owned());
        let Some(object) = self.objects.get(&key).cloned() else {
            return (status(404, "NotFound", &format!("{resource} \"{name}\" not found")), None);
        };
        let answer = match (method.as_str(), rest) {
            ("GET", [_]) => respond(200, &object),
            ("PATCH", [_, "status"]) => self.patch_status(object, body),
            ("DELETE", [_]) if object["metadata"]["uid"] != body["preconditions"]["uid"] => {
                status(409, "Conflict", "the UID in the precondition differs")
            }
            ("DELETE", [_]) => {
                self.remove(&key);
                respond(200, &json!({"kind": "Status", "status": "Success"}))
            }
            _ => status(405, "MethodNotAllowed", "not in this server"),
        };
        (answer, None)
    }

    fn patch_status(&mut self, mut object: Value, body: &Value) -> Answer {
        let uid = &body["metadata"]["uid"];
        if !uid.is_null() && *uid != object["metadata"]["uid"] {
            return status(422, "Invalid", "metadata.uid: field is immutable");
        }
        let (was_terminal, before) = (terminal(&object), object["status"]["phase"].clone());
        merge(&mut object["status"], &body["status"]);
        let after = &object["status"]["phase"];
        if was_terminal && *after != before {
            self.left_terminal.push(format!("pod {}: phase {before} became {after}", object["metadata"]["name"]));
        }
        let object = self.put("pods", object);
        respond(200, &object)
    }

    fn collection(
        &mut self,
        resource: &str,
        namespace: Option<String>,
        query: &str,
    ) -> (Answer, Option<(u64, Duration)>) {
        let value = |name: &str| {
            let found = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            found.map(|v| v.replace("%3D", "=").replace("%2C", ","))
        };
        let selector = value("fieldSelector").unwrap_or_default();
        let name = selector.split(',').find_map(|s| s.strip_prefix("metadata.name=")).map(str::to_owned);
        let from: u64 = value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        let (stream, receiver) = mpsc::unbounded_channel::<Result<Bytes, ()>>();
        self.next_watcher += 1;
        let watcher = Watcher { id: self.next_watcher, resource: resource.to_owned(), namespace, name, stream };
        if value("watch").is_none() {
            let items: Vec<&Value> = self.objects.iter().filter(|(k, _)| watcher.wants(k)).map(|(_, v)| v).collect();
            let list = json!({"metadata": {"resourceVersion": self.version.to_string()}, "items": items});
            return (respond(200, &list), None);
        }
        if from < self.compacted {
            return (status(410, "Expired", "too old resource version"), None);
        }
        for (version, key, line) in &self.log {
            if *version > from && watcher.wants(key) {
                watcher.stream.send(Ok(line.clone())).ok();
            }
        }
        let timeout = value("timeoutSeconds").and_then(|v| v.parse().ok()).unwrap_or(300);
        let ends = Some((watcher.id, Duration::from_secs(timeout)));
        self.watchers.retain(|w| !w.stream.is_closed());
        self.watchers.push(watcher);
        // A broken watch ends the body with an error, as a lost connection does.
        let frames = tokio_stream::wrappers::UnboundedReceiverStream::new(receiver);
        let frames = frames.map(|line| line.map(Frame::data).map_err(|()| BoxError::from("connection lost")));
        let response = Response::builder().status(200).body(StreamBody::new(frames).boxed_unsync()).unwrap();
        (response, ends)
    }
}
