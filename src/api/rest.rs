//! Single requests and watch streams, with errors that say what to do next.
//!
//! In: a client and a path. Out: decoded objects, or a [`RestError`]. kube's own `request` logs the text of an answer it cannot
//! decode, which for a Secret must never happen; this module decodes by itself and shows positions, not content.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{Method, Request, Response, header};
use http_body_util::BodyExt;
use kube::{Client, client::Body};
use serde::{Deserialize, de::DeserializeOwned};

use super::transport;

/// A whole request with its answer, watches excepted.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const JSON: &str = "application/json";
pub(crate) const STRATEGIC_MERGE: &str = "application/strategic-merge-patch+json";

#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum RestError {
    /// The apiserver's own words.
    #[error("{message}")]
    Status { code: u16, reason: String, message: String, retry_after: Option<Duration> },
    /// Nothing usable came back.
    #[error("{0}")]
    Transport(String),
    /// Position only: the content may be secret.
    #[error("{what} cannot be decoded: {problem}")]
    Decode { what: &'static str, problem: String },
}

impl RestError {
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            Self::Status { code, .. } => Some(*code),
            _ => None,
        }
    }
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }
    pub(crate) fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
    pub(crate) fn is_forbidden(&self) -> bool {
        self.code() == Some(403)
    }
    /// The resourceVersion asked for is too old: list again.
    pub(crate) fn is_expired(&self) -> bool {
        matches!(self, Self::Status { code, reason, .. } if *code == 410 || reason == "Expired" || reason == "Gone")
    }
    /// The resourceVersion asked for is one this apiserver has not reached, or (after an etcd restore) never will.
    pub(crate) fn is_too_large_version(&self) -> bool {
        matches!(self, Self::Status { code: 504 | 500, message, .. } if message.contains("Too large resource version"))
    }
    /// The same request can never succeed.
    pub(crate) fn is_rejected(&self) -> bool {
        matches!(self.code(), Some(code) if (400..500).contains(&code) && !matches!(code, 401 | 408 | 429))
    }
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// `metav1.Status`, as far as it is read.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct StatusBody {
    code: u16,
    reason: String,
    message: String,
    details: Option<StatusDetails>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct StatusDetails {
    retry_after_seconds: Option<u64>,
}

impl StatusBody {
    fn into_error(self, code: u16) -> RestError {
        let retry_after = self.details.and_then(|d| d.retry_after_seconds).map(Duration::from_secs);
        let message = if self.message.is_empty() { format!("the server answered {code}") } else { self.message };
        RestError::Status { code, reason: self.reason, message, retry_after }
    }
}

fn decode_error(what: &'static str, error: &serde_json::Error, quiet: bool) -> RestError {
    let problem = if quiet {
        format!("{:?} error at line {} column {}", error.classify(), error.line(), error.column())
    } else {
        error.to_string()
    };
    RestError::Decode { what, problem }
}

/// Decodes an answer. `quiet` for content that may be secret.
pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8], quiet: bool) -> Result<T, RestError> {
    serde_json::from_slice(bytes).map_err(|e| decode_error(what, &e, quiet))
}

async fn open(
    client: &Client,
    method: Method,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<Response<Body>, RestError> {
    let mut request = Request::builder().method(method).uri(path).header(header::ACCEPT, JSON);
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, content_type);
    }
    let request = request.body(Body::from(body)).map_err(|e| RestError::Transport(e.to_string()))?;
    let response = client.send(request).await.map_err(|e| match e {
        kube::Error::Service(e) => RestError::Transport(transport::chain(&*e)),
        e => RestError::Transport(transport::chain(&e)),
    })?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = response.headers().get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
    let text = collect(response.into_body()).await.unwrap_or_default();
    let said: StatusBody = serde_json::from_slice(&text).unwrap_or_default();
    let mut error = said.into_error(status.as_u16());
    if let RestError::Status { retry_after, .. } = &mut error {
        *retry_after = retry_after.or(after.map(Duration::from_secs));
    }
    Err(error)
}

async fn collect(body: Body) -> Result<Bytes, RestError> {
    Ok(body.collect().await.map_err(|e| RestError::Transport(transport::chain(&e)))?.to_bytes())
}

/// Sends one request and reads its whole answer.
pub(crate) async fn call(
    client: &Client,
    method: Method,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<Bytes, RestError> {
    let exchange = async { collect(open(client, method, path, content_type, body).await?.into_body()).await };
    match tokio::time::timeout(DEADLINE, exchange).await {
        Ok(answer) => answer,
        Err(_) => Err(RestError::Transport(format!("no complete answer within {} s", DEADLINE.as_secs()))),
    }
}

pub(crate) async fn get(client: &Client, path: &str) -> Result<Bytes, RestError> {
    call(client, Method::GET, path, JSON, Vec::new()).await
}

/// The lines of a watch.
pub(crate) struct WatchStream {
    body: Body,
    buffer: BytesMut,
    /// Bytes of `buffer` already searched for a line's end.
    searched: usize,
}

/// Starts a watch; the apiserver's refusal (410 for one) comes back as an error.
pub(crate) async fn watch(client: &Client, path: &str) -> Result<WatchStream, RestError> {
    let response = open(client, Method::GET, path, JSON, Vec::new()).await?;
    Ok(WatchStream { body: response.into_body(), buffer: BytesMut::new(), searched: 0 })
}

impl WatchStream {
    /// The next line; `None` when the apiserver ended the watch.
    pub(crate) async fn line(&mut self) -> Result<Option<Bytes>, RestError> {
        loop {
            if let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.searched + at).freeze();
                self.buffer.advance(1);
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(e)) => return Err(RestError::Transport(transport::chain(&e))),
            }
        }
    }
}

/// One decoded line of a watch.
#[derive(Debug)]
pub(crate) enum WatchEvent<K> {
    /// Added or modified.
    Present(K),
    Deleted(K),
    Bookmark,
    /// This object cannot be read; the others go on.
    Undecodable {
        object: String,
        problem: String,
    },
}

/// The metadata that every object has, read when nothing else of it can be.
#[derive(Deserialize, Default, Debug, Clone)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct BareMeta {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) resource_version: String,
}

#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Bare {
    pub(crate) metadata: BareMeta,
}

impl BareMeta {
    pub(crate) fn described(&self) -> String {
        format!("{}/{} (uid {})", self.namespace, self.name, self.uid)
    }
}

#[derive(Deserialize)]
struct EventKind {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct EventObject<K> {
    object: K,
}

/// Decodes one line; an `ERROR` event becomes an error.
pub(crate) fn decode_event<K: DeserializeOwned>(line: &[u8], quiet: bool) -> Result<WatchEvent<K>, RestError> {
    let what = "watch event";
    let kind = decode::<EventKind>(what, line, quiet)?.kind;
    match kind.as_str() {
        "BOOKMARK" => Ok(WatchEvent::Bookmark),
        "ERROR" => {
            let said: EventObject<StatusBody> = decode(what, line, quiet)?;
            let code = said.object.code;
            Err(said.object.into_error(code))
        }
        "ADDED" | "MODIFIED" | "DELETED" => match serde_json::from_slice::<EventObject<K>>(line) {
            Ok(event) if kind == "DELETED" => Ok(WatchEvent::Deleted(event.object)),
            Ok(event) => Ok(WatchEvent::Present(event.object)),
            Err(error) => {
                let bare: EventObject<Bare> = decode(what, line, quiet)?;
                let RestError::Decode { problem, .. } = decode_error(what, &error, quiet) else {
                    return Err(RestError::Transport(error.to_string()));
                };
                Ok(WatchEvent::Undecodable { object: bare.object.metadata.described(), problem })
            }
        },
        other => Err(RestError::Decode { what, problem: format!("unknown type {other:?}") }),
    }
}

/// Percent-encodes a query value.
pub(crate) fn query_value(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 8);
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// resourceVersions compare as numbers (since Kubernetes 1.35 by contract, before in fact).
pub(crate) fn version_number(resource_version: &str) -> Option<u64> {
    resource_version.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undecodable_object_is_named_and_a_secret_one_not_quoted() {
        let line = br#"{"type":"ADDED","object":{"metadata":{"name":"a","namespace":"n","uid":"u","resourceVersion":"7"},"data":"s3cret"}}"#;
        #[derive(Deserialize, Debug)]
        struct Strict {
            #[serde(rename = "data")]
            _data: std::collections::BTreeMap<String, String>,
        }
        match decode_event::<Strict>(line, true).unwrap() {
            WatchEvent::Undecodable { object, problem } => {
                assert_eq!(object, "n/a (uid u)");
                assert!(!problem.contains("s3cret") && problem.contains("column"), "{problem}");
            }
            other => panic!("{other:?}"),
        }
        let shown = format!("{:?}", decode_event::<Strict>(line, false).unwrap());
        assert!(shown.contains("s3cret"), "the loud form helps with objects that hold no secret: {shown}");
    }

    #[test]
    fn error_events_carry_their_status() {
        let line = br#"{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}"#;
        let error = decode_event::<Bare>(line, false).unwrap_err();
        assert!(error.is_expired());
        assert_eq!(error.to_string(), "too old");
    }

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(query_value("spec.nodeName=n-1,x!=None"), "spec.nodeName%3Dn-1%2Cx%21%3DNone");
    }
}
