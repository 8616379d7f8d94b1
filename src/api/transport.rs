//! One connection to the apiserver: HTTP/2 over TLS, with the credentials of the moment.
//!
//! In: requests with a path only. Out: responses with a streaming body. It adds the server's address, `Authorization` and
//! `User-Agent`, waits for the rate limit, falls back to HTTP/1.1 for a server without HTTP/2, and starts a new connection when
//! the credentials changed (the old one ends with its last stream). kube's own connector opens one TCP connection per watch.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header, request::Parts};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connection, HttpConnector},
    },
    rt::{TokioExecutor, TokioTimer},
};
use kube::client::Body;
use rustls_pki_types::ServerName;
use tower::{BoxError, Service};

use super::{
    credentials::{Credentials, Identity},
    limiter::RateLimiter,
    metrics::ApiMetrics,
};
use crate::time::{Clock, SystemClock};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection over which nothing comes back is given up after interval + timeout.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

/// What one [`Transport`] is for.
pub(super) struct TransportSettings {
    pub(super) user_agent: HeaderValue,
    pub(super) limiter: Option<Arc<RateLimiter>>,
    /// From sending to the response's header.
    pub(super) header_timeout: Duration,
    pub(super) metrics: Arc<ApiMetrics>,
}

/// A tower service for `kube::Client::new`. Clones share the connection.
#[derive(Clone)]
pub(super) struct Transport(Arc<Shared>);

struct Shared {
    credentials: Arc<Credentials>,
    settings: TransportSettings,
    http1: AtomicBool,
    link: ArcSwapOption<Link>,
}

struct Link {
    identity: u64,
    http1: bool,
    client: Client<Connector, Body>,
}

/// The request failed below HTTP. The text has the whole chain of causes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct TransportError(String);

impl Transport {
    pub(super) fn new(credentials: Arc<Credentials>, settings: TransportSettings) -> Self {
        let shared = Shared { credentials, settings, http1: AtomicBool::new(false), link: ArcSwapOption::empty() };
        Self(Arc::new(shared))
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<Incoming>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move { shared.send(request).await.map_err(Into::into) })
    }
}

impl Shared {
    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, TransportError> {
        let (parts, body) = request.into_parts();
        let host = self.credentials.target().server.authority().map_or("", |a| a.as_str());
        let begun = SystemClock.now().mono;
        if let Some(limiter) = &self.settings.limiter {
            limiter.acquire().await;
            self.settings.metrics.limited(host, parts.method.as_str(), SystemClock.now().mono - begun);
        }
        let begun = SystemClock.now().mono;
        let answer = self.send_now(&parts, body).await;
        let code = answer.as_ref().ok().map(|response| response.status().as_u16());
        self.settings.metrics.exchanged(host, parts.method.as_str(), code, SystemClock.now().mono - begun);
        answer
    }

    async fn send_now(&self, parts: &Parts, body: Body) -> Result<Response<Incoming>, TransportError> {
        let mut body = Some(body);
        // Two surprises are worth a second try at once: no HTTP/2 there, and credentials that were just replaced.
        for last in [false, true] {
            let spare = body.as_ref().and_then(Body::try_clone);
            let retry = spare.is_some() && !last;
            let mut attempt = Request::new(body.take().unwrap_or_else(Body::empty));
            *attempt.method_mut() = parts.method.clone();
            *attempt.headers_mut() = parts.headers.clone();
            match self.attempt(&parts.uri, attempt).await {
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED => {
                    self.credentials.rejected().await;
                    if !retry {
                        return Ok(response);
                    }
                }
                Err(error) if retry && self.is_http1_only(&*error) => {
                    self.http1.store(true, Ordering::Relaxed);
                    tracing::info!("the apiserver offers no HTTP/2, HTTP/1.1 is used");
                }
                Ok(response) => return Ok(response),
                Err(error) => return Err(TransportError(chain(&*error))),
            }
            body = spare;
        }
        Err(TransportError("no attempt was made".to_owned()))
    }

    async fn attempt(&self, path: &Uri, mut request: Request<Body>) -> Result<Response<Incoming>, BoxError> {
        let (identity, authorization) = self.credentials.current().await?;
        let link = self.link(&identity)?;
        *request.uri_mut() = absolute(&self.credentials.target().server, path)?;
        let headers = request.headers_mut();
        headers.insert(header::USER_AGENT, self.settings.user_agent.clone());
        if let Some(authorization) = authorization {
            headers.insert(header::AUTHORIZATION, authorization);
        }
        match tokio::time::timeout(self.settings.header_timeout, link.client.request(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => {
                // Perhaps the connection is dead and nobody knows yet: the next request opens another one.
                self.link.store(None);
                let seconds = self.settings.header_timeout.as_secs_f32();
                Err(format!("{}: no answer within {seconds} s", self.credentials.target().server).into())
            }
        }
    }

    fn is_http1_only(&self, error: &(dyn StdError + 'static)) -> bool {
        let mut cause = Some(error);
        while let Some(e) = cause {
            if e.is::<NoHttp2>() {
                return true;
            }
            cause = e.source();
        }
        false
    }

    fn link(&self, identity: &Identity) -> Result<Arc<Link>, BoxError> {
        let http1 = self.http1.load(Ordering::Relaxed) || self.credentials.target().server.scheme_str() == Some("http");
        if let Some(link) = self.link.load_full()
            && link.identity == identity.number
            && link.http1 == http1
        {
            return Ok(link);
        }
        let link = Arc::new(Link { identity: identity.number, http1, client: self.client(identity, http1)? });
        self.link.store(Some(Arc::clone(&link)));
        Ok(link)
    }

    fn client(&self, identity: &Identity, http1: bool) -> Result<Client<Connector, Body>, BoxError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(PING_INTERVAL));
        let mut builder = HttpsConnectorBuilder::new().with_tls_config((*identity.tls).clone()).https_or_http();
        if let Some(name) = &self.credentials.target().tls_server_name {
            let name = ServerName::try_from(name.clone())?;
            builder = builder.with_server_name_resolver(hyper_rustls::FixedServerNameResolver::new(name));
        }
        let https = if http1 {
            builder.enable_http1().wrap_connector(tcp)
        } else {
            builder.enable_http1().enable_http2().wrap_connector(tcp)
        };
        let mut client = Client::builder(TokioExecutor::new());
        client.timer(TokioTimer::new()).pool_timer(TokioTimer::new());
        if !http1 {
            client.http2_only(true).http2_keep_alive_interval(PING_INTERVAL).http2_keep_alive_timeout(PING_TIMEOUT);
        }
        Ok(client.build(Connector { inner: https, require_http2: !http1 }))
    }
}

/// The server's address with the request's path behind the server's own path.
fn absolute(server: &Uri, path: &Uri) -> Result<Uri, http::Error> {
    let prefix = server.path().trim_end_matches('/');
    let path = path.path_and_query().map_or("/", |p| p.as_str());
    let mut builder = Uri::builder().path_and_query(format!("{prefix}{path}"));
    if let Some(scheme) = server.scheme() {
        builder = builder.scheme(scheme.clone());
    }
    if let Some(authority) = server.authority() {
        builder = builder.authority(authority.clone());
    }
    builder.build()
}

/// `error: cause: cause`, without repeating a cause that its error already quotes.
pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let said = e.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = e.source();
    }
    text
}

#[derive(Debug, thiserror::Error)]
#[error("the server offers no HTTP/2")]
struct NoHttp2;

/// Refuses a connection on which HTTP/2 was not negotiated, when it is required: hyper would speak it regardless.
#[derive(Clone)]
struct Connector {
    inner: HttpsConnector<HttpConnector>,
    require_http2: bool,
}

impl Service<Uri> for Connector {
    type Response = <HttpsConnector<HttpConnector> as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.inner.call(uri);
        let require_http2 = self.require_http2;
        Box::pin(async move {
            let io = connecting.await?;
            if require_http2 && !io.connected().is_negotiated_h2() {
                return Err(NoHttp2.into());
            }
            Ok(io)
        })
    }
}
