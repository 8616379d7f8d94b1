//! Accepting connections and speaking HTTP/1.1 or HTTP/2 on them, with the limits of Go's server (contract E-24) and a bound on their number.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    body::{Frame, Incoming, SizeHint},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Doors,
    reply::{Body, Reply},
    tls::ServingKeys,
};

/// At once per door; more clients wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// A connection without a request is closed after this, and one whose request head does not arrive whole.
const IDLE: Duration = Duration::from_secs(90);
const MAX_HEADER_BYTES: usize = 1 << 20;
/// A peer that does not get through the handshake until then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// After a failed accept (no file descriptors left, mostly), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// HTTP/2 peers are pinged, so that dead ones go.
const H2_PING: Duration = Duration::from_secs(30);
/// What is being answered may end within this when the connection is to close.
const DRAIN: Duration = Duration::from_secs(1);

/// The other end of a connection. While a clone lives, the connection counts against the bound.
#[derive(Clone)]
pub(crate) struct Peer {
    pub address: SocketAddr,
    /// Cancelled when the server stops.
    pub stopping: CancellationToken,
    _slot: Arc<OwnedSemaphorePermit>,
}

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
            let handshake = timeout(HANDSHAKE, tokio_rustls::TlsAcceptor::from(config).accept(stream));
            let shaken = tokio::select! {
                () = peer.stopping.cancelled() => return,
                shaken = handshake => shaken,
            };
            let stream = match shaken {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(peer = %peer.address, %error, "TLS handshake error"),
                Err(_) => return tracing::debug!(peer = %peer.address, "TLS handshake timed out"),
            };
            let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificates: Arc<[CertificateDer<'static>]> = shown.to_vec().into();
            let answer = |request, peer| {
                let (doors, certificates) = (doors.clone(), certificates.clone());
                async move { doors.answer(request, peer, &certificates).await }
            };
            speak(stream, peer, answer).await;
        }
    })
    .await;
}

/// The accept loop of both doors. A connection ends by itself when its peer's `stopping` is cancelled.
pub(super) async fn accept<F, C>(listener: TcpListener, cancel: CancellationToken, mut connection: F)
where
    F: FnMut(TcpStream, Peer) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, slot))
        };
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = next => accepted,
        };
        match accepted {
            Some((Ok((stream, address)), slot)) => {
                // Log lines and keystrokes are small and must not wait for each other.
                let _ = stream.set_nodelay(true);
                let peer = Peer { address, stopping: cancel.clone(), _slot: Arc::new(slot) };
                connections.spawn(connection(stream, peer));
            }
            Some((Err(error), _)) => {
                tracing::warn!(%error, "accepting a connection failed");
                sleep(ACCEPT_PAUSE).await;
            }
            None => break,
        }
    }
    drop(listener);
    connections.close();
    let _ = timeout(2 * DRAIN, connections.wait()).await;
}

/// Serves one connection to its end: the peer's, an idle one's, or the server's.
pub(super) async fn speak<S, A, R>(stream: S, peer: Peer, answer: A)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(hyper::Request<Incoming>, Peer) -> R,
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
    let in_flight = Arc::new(watch::Sender::new(0));
    let idle = idle(in_flight.subscribe());
    let (address, stopping) = (peer.address, peer.stopping.clone());
    let service = service_fn(move |request| {
        let under_way = UnderWay::begin(&in_flight);
        let answer = answer(request, peer.clone());
        async move { Ok::<_, Infallible>(answer.await.map(|body| UntilSent { body, _under_way: under_way })) }
    });
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let closing = async {
        tokio::select! {
            () = idle => {}
            () = stopping.cancelled() => {}
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %address, %error, "connection ended");
    }
}

/// Returns when no request was under way for the idle time. Never, once the connection has let go of its service.
async fn idle(mut in_flight: watch::Receiver<usize>) {
    loop {
        if in_flight.wait_for(|n| *n == 0).await.is_err() {
            return std::future::pending().await;
        }
        tokio::select! {
            () = sleep(IDLE) => return,
            changed = in_flight.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}

/// One request, from its head to the last byte of its answer.
struct UnderWay(Arc<watch::Sender<usize>>);

impl UnderWay {
    fn begin(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|n| *n += 1);
        Self(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// An answer's body that keeps its request counted until it is sent or given up. It says its length as before: the head needs it.
struct UntilSent {
    body: Body,
    _under_way: UnderWay,
}

impl hyper::body::Body for UntilSent {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn e24_idle_begins_anew_with_each_request() {
        let begun = tokio::time::Instant::now();
        let count = Arc::new(watch::Sender::new(0));
        let ended = tokio::spawn(idle(count.subscribe()));
        sleep(IDLE / 2).await;
        let request = UnderWay::begin(&count);
        sleep(10 * IDLE).await;
        assert!(!ended.is_finished(), "a request under way, however long, is not idleness");
        drop(request);
        ended.await.unwrap();
        assert!(begun.elapsed() >= 11 * IDLE + IDLE / 2);
    }
}
