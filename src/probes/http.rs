//! One GET over a connection of its own: for httpGet probes (contract B-03) and lifecycle hooks (P-29).
//!
//! No pool, no proxy, certificates not verified, redirects only on the same host name. The socket lingers 0 s, so that thousands
//! of probes leave no TIME_WAIT behind; whatever the peer wanted to say has been read by then.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use ::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1 as corev1;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use super::{
    kubernetes_minor, net_error,
    prober::{Outcome, ProbeError, resolve_port},
    schedule,
    url::{Scheme, Url},
};

/// No more than this of a response's body is read (contract B-03).
pub(crate) const BODY_LIMIT: usize = 10 * 1024;
const MAX_REDIRECTS: usize = 10;

/// What differs between a probe's and a hook's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Probe,
    Lifecycle,
}

impl Purpose {
    fn user_agent(self) -> String {
        let word = if self == Self::Probe { "probe" } else { "lifecycle" };
        format!("kube-{word}/{}", kubernetes_minor())
    }
}

/// A request that can be sent to more than one URL, as redirects and the hooks' fallback need it.
#[derive(Clone)]
pub(crate) struct Request {
    pub url: Url,
    headers: HeaderMap,
    /// Overrides the URL's authority in `Host`.
    host: Option<HeaderValue>,
    purpose: Purpose,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    /// At most [`BODY_LIMIT`] bytes.
    pub body: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum GetError {
    /// No response: `Get "http://…": dial tcp …: connect: connection refused`.
    #[error("Get {url:?}: {message}")]
    NoResponse { url: String, message: String },
    /// A plain HTTP server sits behind an https URL.
    #[error("Get {url:?}: http: server gave HTTP response to HTTPS client")]
    PlainHttp { url: String },
    /// The response's head came, its body did not.
    #[error("{message}")]
    Body { message: String },
}

impl Request {
    /// From an httpGet action. `pod_host` is used when the action names no host. `Err` says what is wrong with the action.
    pub fn new(
        action: &corev1::HTTPGetAction,
        container: &corev1::Container,
        pod_host: Option<IpAddr>,
        purpose: Purpose,
    ) -> Result<Self, String> {
        let host = match action.host.as_deref().filter(|h| !h.is_empty()) {
            Some(host) => host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            None => pod_host.ok_or("the pod has no IP address")?.to_string(),
        };
        let port = resolve_port(&action.port, container)?;
        let scheme = action.scheme.as_deref().unwrap_or_default();
        let url = Url::new(scheme, &host, port, action.path.as_deref().unwrap_or("/"))?;
        let (headers, host) = headers_of(action, purpose)?;
        Ok(Self { url, headers, host, purpose })
    }

    /// The same over plain HTTP, without credentials (contract P-29).
    pub fn downgraded(mut self) -> Self {
        self.url.scheme = Scheme::Http;
        self.headers.remove(header::AUTHORIZATION);
        self
    }
}

/// The request's headers and the override of `Host` (contract B-03).
fn headers_of(action: &corev1::HTTPGetAction, purpose: Purpose) -> Result<(HeaderMap, Option<HeaderValue>), String> {
    /// Written by the client from the request itself, whatever the action says.
    const OWN: [HeaderName; 4] = [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::TRAILER];
    let mut headers = HeaderMap::new();
    let mut host = None;
    for h in action.http_headers.iter().flatten() {
        let name: HeaderName =
            h.name.parse().map_err(|_| format!("net/http: invalid header field name {:?}", h.name))?;
        let value: HeaderValue =
            h.value.trim().parse().map_err(|_| format!("net/http: invalid header field value for {:?}", h.name))?;
        if name == header::HOST && host.is_none() && !value.is_empty() {
            host = Some(value);
        } else if !OWN.contains(&name) {
            headers.append(name, value);
        }
    }
    let agent = headers.get(header::USER_AGENT).cloned();
    match agent {
        None => set(&mut headers, header::USER_AGENT, &purpose.user_agent()),
        Some(first) if first.is_empty() => drop(headers.remove(header::USER_AGENT)),
        Some(first) => drop(headers.insert(header::USER_AGENT, first)),
    }
    if headers.get(header::ACCEPT).is_some_and(HeaderValue::is_empty) {
        headers.remove(header::ACCEPT);
    } else if !headers.contains_key(header::ACCEPT) {
        set(&mut headers, header::ACCEPT, "*/*");
    }
    match purpose {
        Purpose::Probe => set(&mut headers, header::CONNECTION, "close"),
        Purpose::Lifecycle if !headers.contains_key(header::ACCEPT_ENCODING) => {
            set(&mut headers, header::ACCEPT_ENCODING, "gzip");
        }
        Purpose::Lifecycle => {}
    }
    Ok((headers, host))
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        headers.insert(name, value);
    }
}

/// One try of an httpGet probe.
pub(super) async fn attempt(
    action: &corev1::HTTPGetAction,
    container: &corev1::Container,
    pod_host: Option<IpAddr>,
    probe: &corev1::Probe,
) -> Result<Outcome, ProbeError> {
    let request = Request::new(action, container, pod_host, Purpose::Probe).map_err(ProbeError::unknown)?;
    match get(request, Some(schedule::timeout(probe))).await {
        Ok(answer) => Ok(judge(answer.status, &answer.body)),
        Err(GetError::Body { message }) => Err(ProbeError::failure(message)),
        Err(no_response) => Ok(Outcome::Failure(no_response.to_string())),
    }
}

/// 200–299 passes, a redirect that was not followed passes with a warning (contract B-03). The message never shows the body
/// of a failed probe.
fn judge(status: StatusCode, body: &[u8]) -> Outcome {
    match status.as_u16() {
        200..300 => Outcome::Success,
        300..400 => {
            Outcome::Warning(format!("Probe terminated redirects, Response body: {}", String::from_utf8_lossy(body)))
        }
        code => Outcome::Failure(format!("HTTP probe failed with statuscode: {code}")),
    }
}

/// Sends, follows redirects, reads the body. `timeout` covers all of it; `None` waits for ever.
pub(crate) async fn get(request: Request, timeout: Option<Duration>) -> Result<Answer, GetError> {
    #[allow(clippy::disallowed_methods)] // a deadline for a timer, not a time to decide by
    let deadline = timeout.map(|t| Instant::now() + t);
    let origin = request.url.host.clone();
    let mut request = request;
    for _ in 0..MAX_REDIRECTS {
        let url = request.url.to_string();
        let exchange = Exchange { request: &request, deadline };
        let (answer, location) = exchange.run().await?;
        let Some(location) = location.filter(|_| is_redirect(answer.status)) else { return Ok(answer) };
        let next = request.url.join(&location).map_err(|message| GetError::NoResponse { url, message })?;
        if next.host != origin {
            return Ok(answer);
        }
        if !location.starts_with(['/', '?']) {
            request.host = None;
        }
        request.url = next;
    }
    Err(GetError::NoResponse { url: request.url.to_string(), message: "stopped after 10 redirects".to_owned() })
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The two ends of a connection, for the words of its failures.
#[derive(Clone, Copy)]
struct Ends {
    local: Option<SocketAddr>,
    remote: SocketAddr,
}

impl Ends {
    fn broken(self, error: &hyper::Error) -> String {
        if error.is_incomplete_message() {
            "EOF".to_owned()
        } else {
            net_error::exchange(error, self.local, self.remote)
        }
    }
}

/// One request on one connection.
struct Exchange<'a> {
    request: &'a Request,
    deadline: Option<Instant>,
}

impl Exchange<'_> {
    async fn run(&self) -> Result<(Answer, Option<String>), GetError> {
        let stream = self.awaiting_headers(self.dial()).await?;
        let remote = stream.peer_addr().map_err(|e| self.no_response(net_error::errno_text(&e)))?;
        let ends = Ends { local: stream.local_addr().ok(), remote };
        if self.request.url.scheme == Scheme::Http {
            return self.over_http1(stream, ends).await;
        }
        let tls = self.awaiting_headers(self.secure(stream)).await?;
        if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.over_http2(tls, ends).await
        } else {
            self.over_http1(tls, ends).await
        }
    }

    async fn over_http1<S>(&self, stream: S, ends: Ends) -> Result<(Answer, Option<String>), GetError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = hyper::client::conn::http1::Builder::new();
        let handshake = builder.title_case_headers(true).handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(|e| self.no_response(ends.broken(&e)))?;
        let mut connection = pin!(connection);
        let mut ended = false;
        let head = self.awaiting_headers(async {
            let sent = sender.send_request(self.message(Version::HTTP_11)?);
            driving(connection.as_mut(), &mut ended, sent).await.map_err(|e| self.no_response(ends.broken(&e)))
        });
        let (parts, body) = head.await?.into_parts();
        let body = driving(connection, &mut ended, self.read(body, ends)).await?;
        Ok(answer(parts, body))
    }

    async fn over_http2<S>(&self, stream: S, ends: Ends) -> Result<(Answer, Option<String>), GetError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut sender, connection) =
            self.awaiting_headers(async { handshake.await.map_err(|e| self.no_response(ends.broken(&e))) }).await?;
        let mut connection = pin!(connection);
        let mut ended = false;
        let head = self.awaiting_headers(async {
            let sent = sender.send_request(self.message(Version::HTTP_2)?);
            driving(connection.as_mut(), &mut ended, sent).await.map_err(|e| self.no_response(ends.broken(&e)))
        });
        let (parts, body) = head.await?.into_parts();
        let body = driving(connection, &mut ended, self.read(body, ends)).await?;
        Ok(answer(parts, body))
    }

    fn message(&self, version: Version) -> Result<::http::Request<Empty<Bytes>>, GetError> {
        let invalid = |e: &dyn std::fmt::Display| self.no_response(e.to_string());
        let Request { url, headers, host, .. } = self.request;
        let mut request = ::http::Request::new(Empty::new());
        *request.headers_mut() = headers.clone();
        if version == Version::HTTP_2 {
            request.headers_mut().remove(header::CONNECTION);
            let authority = host.as_ref().and_then(|h| h.to_str().ok()).map_or_else(|| url.authority(), str::to_owned);
            let uri = Uri::builder().scheme("https").authority(authority).path_and_query(url.target.as_str());
            *request.uri_mut() = uri.build().map_err(|e| invalid(&e))?;
        } else {
            let host = host.clone().map_or_else(|| url.authority().parse(), Ok).map_err(|e| invalid(&e))?;
            request.headers_mut().insert(header::HOST, host);
            *request.uri_mut() = url.target.parse().map_err(|e: ::http::uri::InvalidUri| invalid(&e))?;
        }
        Ok(request)
    }

    async fn read(&self, mut body: Incoming, ends: Ends) -> Result<Vec<u8>, GetError> {
        let mut bytes = Vec::new();
        let read = async {
            while bytes.len() < BODY_LIMIT {
                let Some(frame) = body.frame().await else { break };
                let frame = frame.map_err(|e| {
                    let broken = ends.broken(&e);
                    GetError::Body { message: if broken == "EOF" { "unexpected EOF".to_owned() } else { broken } }
                })?;
                if let Some(data) = frame.data_ref() {
                    bytes.extend_from_slice(&data[..data.len().min(BODY_LIMIT - bytes.len())]);
                }
            }
            Ok(())
        };
        let late = || GetError::Body {
            message: "context deadline exceeded (Client.Timeout or context cancellation while reading body)".to_owned(),
        };
        before(self.deadline, read).await.ok_or_else(late)??;
        Ok(bytes)
    }

    async fn dial(&self) -> Result<TcpStream, GetError> {
        let url = &self.request.url;
        let addresses: Vec<SocketAddr> = match url.host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, url.port())],
            Err(_) => match tokio::net::lookup_host((url.host.as_str(), url.port())).await {
                Ok(found) => found.collect(),
                Err(_) => Vec::new(),
            },
        };
        let mut last = net_error::lookup(&url.host);
        for address in addresses {
            match connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(e) => last = net_error::dial(address, &e),
            }
        }
        Err(self.no_response(last))
    }

    async fn secure(&self, stream: TcpStream) -> Result<tokio_rustls::client::TlsStream<FirstBytes>, GetError> {
        let name = ServerName::try_from(self.request.url.host.clone()).map_err(|e| self.no_response(e.to_string()))?;
        let config = unverified_tls(self.request.purpose).map_err(|e| self.no_response(format!("tls: {e}")))?;
        let connecting = tokio_rustls::TlsConnector::from(config).connect(name, FirstBytes::new(stream));
        connecting.into_fallible().await.map_err(|(error, stream)| {
            if stream.look_like_http() {
                GetError::PlainHttp { url: self.request.url.to_string() }
            } else if error.kind() == io::ErrorKind::UnexpectedEof {
                self.no_response("EOF".to_owned())
            } else {
                self.no_response(format!("tls: {}", net_error::errno_text(&error)))
            }
        })
    }

    fn no_response(&self, message: String) -> GetError {
        GetError::NoResponse { url: self.request.url.to_string(), message }
    }

    async fn awaiting_headers<T>(&self, work: impl Future<Output = Result<T, GetError>>) -> Result<T, GetError> {
        let late = || {
            self.no_response("context deadline exceeded (Client.Timeout exceeded while awaiting headers)".to_owned())
        };
        before(self.deadline, work).await.ok_or_else(late)?
    }
}

fn answer(parts: ::http::response::Parts, body: Vec<u8>) -> (Answer, Option<String>) {
    let location = parts.headers.get(header::LOCATION).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    (Answer { status: parts.status, body }, location.filter(|l| !l.is_empty()))
}

/// `None` when the deadline came first.
async fn before<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// Polls the connection beside `work`, so that no task outlives the exchange.
async fn driving<T>(connection: Pin<&mut impl Future>, ended: &mut bool, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    if !*ended {
        tokio::select! {
            biased;
            out = &mut work => return out,
            _ = connection => *ended = true,
        }
    }
    work.await
}

/// A connection for one exchange, which a reset ends.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    let stream = socket.connect(address).await?;
    // Both are best effort. Without the first the connection stays in TIME_WAIT for a minute, without the second a small
    // write may wait for the acknowledgement of the one before, which the peer may delay by 40 ms.
    let _ = stream.set_zero_linger();
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// The TLS setup of probes and hooks: any certificate is good. Probes also offer HTTP/2, hooks do not (as upstream).
fn unverified_tls(purpose: Purpose) -> Result<Arc<ClientConfig>, rustls::Error> {
    static PROBE: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    static LIFECYCLE: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let (cell, alpn): (_, &[&[u8]]) = match purpose {
        Purpose::Probe => (&PROBE, &[b"h2", b"http/1.1"]),
        Purpose::Lifecycle => (&LIFECYCLE, &[]),
    };
    if let Some(config) = cell.get() {
        return Ok(config.clone());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let schemes = provider.signature_verification_algorithms.supported_schemes();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(schemes)))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(cell.get_or_init(|| Arc::new(config)).clone())
}

/// Accepts every certificate: a probe asks whether something answers, not who (contract B-03).
#[derive(Debug)]
struct AnyCertificate(Vec<SignatureScheme>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

/// A TCP stream that remembers how the peer's side began: a plain HTTP server shows itself so.
struct FirstBytes {
    stream: TcpStream,
    first: Vec<u8>,
}

impl FirstBytes {
    const KEPT: usize = 5;

    fn new(stream: TcpStream) -> Self {
        Self { stream, first: Vec::new() }
    }
    fn look_like_http(&self) -> bool {
        self.first == b"HTTP/"
    }
}

impl AsyncRead for FirstBytes {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let start = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let missing = Self::KEPT - self.first.len();
        if missing > 0 {
            let new = &buf.filled()[start..];
            let taken = new.len().min(missing);
            self.first.extend_from_slice(&new[..taken]);
        }
        polled
    }
}

impl AsyncWrite for FirstBytes {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
