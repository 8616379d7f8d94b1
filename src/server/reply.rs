//! Responses in the shapes that upstream's server gives them.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Method, Response, StatusCode, header};

pub(super) type Body = BoxBody<Bytes, Infallible>;
pub(super) type Reply = Response<Body>;

pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// Plain text, as it stands.
pub(super) fn text(status: StatusCode, message: &str) -> Reply {
    with_type(status, "text/plain; charset=utf-8", message.to_owned())
}

pub(super) fn with_type(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(full(body));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    reply
}

/// Go's answer to a path that nobody serves.
pub(super) fn not_found() -> Reply {
    let mut reply = text(StatusCode::NOT_FOUND, "404 page not found\n");
    nosniff(&mut reply);
    reply
}

pub(super) fn nosniff(reply: &mut Reply) {
    reply.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
}

pub(super) fn method_not_allowed(allowed: &[Method]) -> Reply {
    let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
    let allowed: Vec<&str> = allowed.iter().map(Method::as_str).collect();
    if let Ok(value) = allowed.join(", ").parse() {
        reply.headers_mut().insert(header::ALLOW, value);
    }
    reply
}

pub(super) fn metrics(text: String) -> Reply {
    with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}
