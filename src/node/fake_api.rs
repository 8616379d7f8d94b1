//! An apiserver in memory for the tests of this room: objects by path, a log of requests.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};

#[derive(Clone, Default)]
pub(super) struct FakeApi(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    requests: Vec<String>,
    /// The next so many requests get this answer.
    failures: Vec<(StatusCode, u32)>,
    version: u64,
}

impl FakeApi {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    pub(super) fn put(&self, path: &str, object: Value) {
        self.lock().store(path, object);
    }
    pub(super) fn get(&self, path: &str) -> Option<Value> {
        self.lock().objects.get(path).cloned()
    }
    pub(super) fn fail(&self, status: StatusCode, times: u32) {
        self.lock().failures.push((status, times));
    }
    /// `METHOD path`, in order.
    pub(super) fn requests(&self) -> Vec<String> {
        self.lock().requests.clone()
    }
    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let bytes = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let (status, answer) = self.lock().handle(&method, &path, body);
        let text = serde_json::to_vec(&answer).unwrap_or_default();
        Response::builder().status(status).body(Body::from(text)).unwrap()
    }
}

impl State {
    fn store(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    fn handle(&mut self, method: &Method, path: &str, body: Value) -> (StatusCode, Value) {
        self.requests.push(format!("{method} {path}"));
        if let Some((status, times)) = self.failures.first_mut().filter(|(_, times)| *times > 0) {
            let status = *status;
            *times -= 1;
            if *times == 0 {
                self.failures.remove(0);
            }
            return failure(status);
        }
        let object = path.strip_suffix("/status").unwrap_or(path);
        match *method {
            Method::GET => {
                self.objects.get(object).map_or_else(|| failure(StatusCode::NOT_FOUND), |o| (StatusCode::OK, o.clone()))
            }
            Method::POST => {
                let path = format!("{object}/{}", body["metadata"]["name"].as_str().unwrap_or_default());
                match self.objects.contains_key(&path) {
                    true => failure(StatusCode::CONFLICT),
                    false => {
                        let mut created = body;
                        created["metadata"]["uid"] = json!("made-by-the-fake");
                        (StatusCode::CREATED, self.store(&path, created))
                    }
                }
            }
            Method::PUT => (StatusCode::OK, self.store(object, body)),
            Method::DELETE => {
                self.objects.remove(object);
                (StatusCode::OK, json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}))
            }
            Method::PATCH => match self.objects.get(object).cloned() {
                Some(mut stored) => {
                    merge(&mut stored, body);
                    (StatusCode::OK, self.store(object, stored))
                }
                None => failure(StatusCode::NOT_FOUND),
            },
            _ => failure(StatusCode::METHOD_NOT_ALLOWED),
        }
    }
}

fn failure(status: StatusCode) -> (StatusCode, Value) {
    let code = status.as_u16();
    let reason = match status {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::CONFLICT => "Conflict",
        _ => "InternalError",
    };
    (
        status,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "message": status.canonical_reason(), "reason": reason}),
    )
}

/// Enough of a strategic merge for a Node: maps merge, conditions merge by type, other lists are replaced.
fn merge(stored: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *stored = patch;
        return;
    };
    if !stored.is_object() {
        *stored = json!({});
    }
    for (name, value) in patch.into_iter().filter(|(name, _)| !name.starts_with('$')) {
        match value {
            Value::Null => {
                stored.as_object_mut().unwrap().remove(&name);
            }
            Value::Array(items) if name == "conditions" => merge_conditions(&mut stored["conditions"], items),
            Value::Array(items) => {
                stored[name] = items.into_iter().filter(|i| i.get("$patch").is_none()).collect::<Vec<_>>().into();
            }
            other => merge(&mut stored[name], other),
        }
    }
}

fn merge_conditions(stored: &mut Value, items: Vec<Value>) {
    let mut list = stored.as_array().cloned().unwrap_or_default();
    for item in items {
        match list.iter_mut().find(|c| c["type"] == item["type"]) {
            Some(condition) => merge(condition, item),
            None => list.push(item),
        }
    }
    *stored = Value::Array(list);
}
