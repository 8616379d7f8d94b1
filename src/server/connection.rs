//! Accepting connections and speaking HTTP/1.1 or HTTP/2 on them, with the limits of Go's server (contract E-24).

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use super::{Doors, reply::Reply, tls::ServingKeys};

/// A kept-alive connection without a request is closed after this.
const IDLE: Duration = Duration::from_secs(90);
const MAX_HEADER_BYTES: usize = 1 << 20;
/// A peer that does not get through the handshake until then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// After a failed accept (no file descriptors left, mostly), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// HTTP/2 peers are pinged, so that dead ones go.
const H2_PING: Duration = Duration::from_secs(30);

/// 10250: each connection in a task of its own until `cancel`.
pub(super) async fn accept_tls(
    listener: TcpListener,
    keys: Arc<ServingKeys>,
    doors: Arc<Doors>,
    cancel: CancellationToken,
) {
    accept(listener, cancel, move |stream, peer| {
        let (config, doors) = (keys.current(), doors.clone());
        async move {
            let handshake = tokio_rustls::TlsAcceptor::from(config).accept(stream);
            let stream = match tokio::time::timeout(HANDSHAKE, handshake).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake error"),
                Err(_) => return tracing::debug!(%peer, "TLS handshake timed out"),
            };
            let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificates: Arc<[CertificateDer<'static>]> = shown.to_vec().into();
            let answer = move |request| {
                let (doors, certificates) = (doors.clone(), certificates.clone());
                async move { doors.answer(request, peer, &certificates).await }
            };
            speak(stream, answer).await;
        }
    })
    .await;
}

/// The accept loop of both doors.
pub(super) async fn accept<F, C>(listener: TcpListener, cancel: CancellationToken, mut connection: F)
where
    F: FnMut(TcpStream, SocketAddr) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted: io::Result<(TcpStream, SocketAddr)> = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let serving = connection(stream, peer);
                let cancelled = cancel.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        () = cancelled.cancelled() => {}
                        () = serving => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection to its end.
pub(super) async fn speak<S, A, R>(stream: S, answer: A)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(hyper::Request<Incoming>) -> R + Send + Clone + 'static,
    R: Future<Output = Reply> + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(MAX_HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_BYTES as u32)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(IDLE);
    let service = service_fn(move |request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "connection ended");
    }
}
