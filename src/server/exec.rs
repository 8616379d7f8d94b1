//! `/exec/…`: the runtime makes a streaming URL, the request goes there, then bytes pass both ways untouched (contract E-07).
//!
//! SPDY and WebSocket are the runtime's business: nothing here understands them.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri, header, header::HeaderValue, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tonic::Code;

use super::{
    Call, ServerParts,
    connection::Peer,
    relay::relay,
    reply::{self, Reply},
    routes,
};
use crate::{
    cri::{CriError, RuntimeService, v1},
    pods::{Pod, PodUid},
};

/// Of a refusal's body, which is a sentence.
const REFUSAL_LIMIT: usize = 64 * 1024;
const DIAL: Duration = Duration::from_secs(10);
/// Upstream's seconds: for so long a runtime keeps a streaming URL that nobody comes for.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("60");

pub(super) async fn exec(parts: &ServerParts, mut call: Call) -> Reply {
    let (namespace, name, uid, container) = match call.arguments.as_slice() {
        [namespace, name, container] => (namespace, name, None, container),
        [namespace, name, uid, container] => (namespace, name, Some(uid), container),
        _ => return reply::not_found(),
    };
    let query = routes::query(call.request.uri());
    let streams = match Streams::from_query(&query) {
        Ok(streams) => streams,
        Err(message) => return reply::text(StatusCode::BAD_REQUEST, message),
    };
    let Some(pod) = parts.pods.find(namespace, name) else {
        return reply::text(StatusCode::NOT_FOUND, "pod does not exist");
    };
    let container_id = match running_container(&*parts.runtime, &pod, uid, container).await {
        Ok(Some(id)) => id,
        Ok(None) => return error(&format!("container not found ({container:?})")),
        Err(e) => return cri_error(&e),
    };
    let request = v1::ExecRequest {
        container_id,
        cmd: query.into_iter().filter(|(k, _)| k == "command").map(|(_, v)| v).collect(),
        tty: streams.tty,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    };
    let url = match parts.runtime.exec(request).await {
        Ok(url) => url,
        Err(e) => return cri_error(&e),
    };
    proxy(&url, &mut call).await
}

#[derive(Debug, PartialEq, Eq)]
struct Streams {
    tty: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Streams {
    fn from_query(query: &[(String, String)]) -> Result<Self, &'static str> {
        let first = |name: &str| query.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        let on = |name: &str| first(name) == Some("1");
        let tty = on("tty");
        // A terminal has one output.
        let streams = Self { tty, stdin: on("input"), stdout: on("output"), stderr: on("error") && !tty };
        if !streams.stdin && !streams.stdout && !streams.stderr {
            return Err("you must specify at least 1 of stdin, stdout, stderr");
        }
        Ok(streams)
    }
}

/// Asked of the runtime itself: an exec may come before anybody has told us of the container.
async fn running_container(
    runtime: &dyn RuntimeService,
    pod: &Pod,
    uid: Option<&String>,
    container: &str,
) -> Result<Option<String>, CriError> {
    const POD_UID: &str = "io.kubernetes.pod.uid";
    const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    let wanted: &PodUid = pod.uid();
    if uid.is_some_and(|uid| uid != wanted.as_str()) {
        return Ok(None);
    }
    let labels = [(POD_UID, wanted.as_str()), (CONTAINER_NAME, container)];
    let filter = v1::ContainerFilter {
        state: Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() }),
        label_selector: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect(),
        ..Default::default()
    };
    let containers = runtime.list_containers(Some(filter)).await?;
    Ok(containers.into_iter().max_by_key(|c| c.created_at).map(|c| c.id))
}

fn error(message: &str) -> Reply {
    reply::text(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn cri_error(error: &CriError) -> Reply {
    let status = match error.code {
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut reply = reply::text(status, &error.to_string());
    if status == StatusCode::TOO_MANY_REQUESTS {
        reply.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    }
    reply
}

/// Sends the upgrade on to `url` and joins both connections.
pub(super) async fn proxy(url: &str, call: &mut Call) -> Reply {
    if !wants_upgrade(call.request.headers()) {
        return error("Upgrade request required\n");
    }
    let answered = match forward(url, &call.request, call.peer.address).await {
        Ok(answered) => answered,
        Err(message) => return error(&format!("{message}\n")),
    };
    let status = answered.status();
    if status == StatusCode::SWITCHING_PROTOCOLS {
        let mut reply = Response::new(reply::full(Bytes::new()));
        *reply.status_mut() = status;
        *reply.headers_mut() = answered.headers().clone();
        let (ours, theirs) = (hyper::upgrade::on(&mut call.request), hyper::upgrade::on(answered));
        tokio::spawn(join(ours, theirs, call.peer.clone()));
        return reply;
    }
    if status.as_u16() < 400 {
        return error(&format!("invalid upgrade response: status code {}\n", status.as_u16()));
    }
    let (parts, body) = answered.into_parts();
    let body = Limited::new(body, REFUSAL_LIMIT).collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let mut reply = Response::new(reply::full(body));
    *reply.status_mut() = status;
    if let Some(content_type) = parts.headers.get(header::CONTENT_TYPE) {
        reply.headers_mut().insert(header::CONTENT_TYPE, content_type.clone());
    }
    reply
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CONNECTION).into_iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|v| v.trim().eq_ignore_ascii_case("upgrade"))
}

/// The runtime's answer to the caller's request.
async fn forward<B>(
    url: &str,
    request: &Request<B>,
    peer: SocketAddr,
) -> Result<Response<hyper::body::Incoming>, String> {
    let uri: Uri = url.parse().map_err(|e| format!("streaming URL of the runtime: {e}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("streaming URL of the runtime: unsupported scheme {:?}", uri.scheme_str().unwrap_or("")));
    }
    let host = uri.host().ok_or("streaming URL of the runtime: no host")?.trim_matches(['[', ']']);
    let dialled = timeout(DIAL, TcpStream::connect((host, uri.port_u16().unwrap_or(80)))).await;
    let dialled = dialled.map_err(|_| "error dialing backend: i/o timeout".to_owned())?;
    let stream = dialled.map_err(|e| format!("error dialing backend: {e}"))?;
    // Keystrokes are small.
    let _ = stream.set_nodelay(true);
    let handshake = hyper::client::conn::http1::Builder::new().title_case_headers(true).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "streaming connection to the runtime ended");
        }
    });
    let outgoing = forwarded(&uri, request.method(), request.headers(), peer).map_err(|e| e.to_string())?;
    sender.send_request(outgoing).await.map_err(|e| e.to_string())
}

fn forwarded(
    uri: &Uri,
    method: &Method,
    headers: &HeaderMap,
    peer: SocketAddr,
) -> Result<Request<Empty<Bytes>>, hyper::http::Error> {
    const FORWARDED_FOR: &str = "x-forwarded-for";
    let target = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::builder().method(method).uri(target).body(Empty::new())?;
    *request.headers_mut() = headers.clone();
    let before = headers.get_all(FORWARDED_FOR).into_iter().filter_map(|v| v.to_str().ok());
    let chain: Vec<String> = before.map(str::to_owned).chain([peer.ip().to_canonical().to_string()]).collect();
    request.headers_mut().insert(FORWARDED_FOR, chain.join(", ").parse()?);
    Ok(request)
}

/// The session: it counts as a connection for as long as it lasts, and ends with the server.
async fn join(ours: OnUpgrade, theirs: OnUpgrade, peer: Peer) {
    let both = tokio::select! {
        () = peer.stopping.cancelled() => return,
        both = async { tokio::try_join!(ours, theirs) } => both,
    };
    match both {
        Ok((ours, theirs)) => relay(TokioIo::new(ours), TokioIo::new(theirs), &peer.stopping).await,
        Err(error) => tracing::debug!(%error, "upgrade failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e07_streams_from_the_query() {
        let ask = |query: &str| Streams::from_query(&routes::query(&format!("/x?{query}").parse().unwrap()));
        let streams = |tty, stdin, stdout, stderr| Ok(Streams { tty, stdin, stdout, stderr });
        assert_eq!(ask("input=1&output=1&error=1"), streams(false, true, true, true));
        assert_eq!(ask("output=1&error=1&tty=1"), streams(true, false, true, false));
        assert_eq!(ask("output=true"), Err("you must specify at least 1 of stdin, stdout, stderr"));
    }

    #[test]
    fn e07_upgrade_is_noticed() {
        let headers = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONNECTION, value.parse().unwrap());
            headers
        };
        assert!(wants_upgrade(&headers("Upgrade")) && wants_upgrade(&headers("keep-alive, upgrade")));
        assert!(!wants_upgrade(&headers("keep-alive")) && !wants_upgrade(&HeaderMap::new()));
    }
}
