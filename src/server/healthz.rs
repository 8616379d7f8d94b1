//! `/healthz`: a bare ping on 10248, the deeper checks on 10250 (contract E-02, E-03).

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use hyper::StatusCode;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    Call, ServerParts, connection,
    reply::{self, Reply},
    routes,
};

/// After a bind that failed, as upstream.
const REBIND: Duration = Duration::from_secs(5);

type Check = (&'static str, Result<(), String>);

/// Serves `/healthz` in plaintext until `cancel`: kubeadm waits for its `ok`. An address in use is tried again for ever.
pub async fn serve_healthz(address: SocketAddr, cancel: CancellationToken) {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => tracing::error!(%address, %error, "Failed to start healthz server"),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(REBIND) => {}
        }
    };
    let answer = |request: hyper::Request<hyper::body::Incoming>, _| async move {
        let ping = [("ping", Ok(()))];
        match request.uri().path() {
            "/healthz" => all(&ping, &routes::query(request.uri())),
            "/healthz/ping" => one(&ping, "ping"),
            _ => reply::not_found(),
        }
    };
    connection::accept(listener, cancel, move |stream, peer| connection::speak(stream, peer, answer)).await;
}

/// 10250's `/healthz` and `/healthz/{check}`.
pub(super) fn node(parts: &ServerParts, call: &Call) -> Reply {
    let checks = [("ping", Ok(())), ("log", Ok(())), ("syncloop", (parts.sync_loop)())];
    match call.arguments.first() {
        None => all(&checks, &routes::query(call.request.uri())),
        Some(name) => one(&checks, name),
    }
}

fn one(checks: &[Check], name: &str) -> Reply {
    let mut reply = match checks.iter().find(|(n, _)| *n == name) {
        Some((_, Ok(()))) => reply::text(StatusCode::OK, "ok"),
        Some((_, Err(why))) => {
            reply::text(StatusCode::INTERNAL_SERVER_ERROR, &format!("internal server error: {why}\n"))
        }
        None => return reply::text(StatusCode::NOT_FOUND, "404: Page Not Found"),
    };
    reply::nosniff(&mut reply);
    reply
}

fn excluded(query: &[(String, String)]) -> impl Iterator<Item = &str> {
    query.iter().filter(|(k, _)| k == "exclude").map(|(_, v)| v.as_str())
}

/// `ok`, or with `?verbose` or a failure the list of checks. `?exclude=name` leaves a check out.
fn all(checks: &[Check], query: &[(String, String)]) -> Reply {
    let mut listing = String::new();
    let mut healthy = true;
    for (name, result) in checks {
        let excluded = excluded(query).any(|excluded| excluded == *name);
        let line = match result {
            _ if excluded => format!("[+]{name} excluded: ok\n"),
            Ok(()) => format!("[+]{name} ok\n"),
            Err(_) => {
                healthy = false;
                format!("[-]{name} failed: reason withheld\n")
            }
        };
        listing.push_str(&line);
    }
    let unknown: BTreeSet<&str> = excluded(query).filter(|name| !checks.iter().any(|(n, _)| n == name)).collect();
    if !unknown.is_empty() {
        let quoted: Vec<String> = unknown.into_iter().map(|name| format!("{name:?}")).collect();
        let names = quoted.join(",");
        listing += &format!("warn: some health checks cannot be excluded: no matches for {names}\n");
    }
    let verbose = query.iter().any(|(k, _)| k == "verbose");
    let mut reply = match (healthy, verbose) {
        (true, false) => reply::text(StatusCode::OK, "ok"),
        (true, true) => reply::text(StatusCode::OK, &format!("{listing}healthz check passed\n")),
        (false, _) => reply::text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{listing}healthz check failed\n")),
    };
    reply::nosniff(&mut reply);
    reply
}
