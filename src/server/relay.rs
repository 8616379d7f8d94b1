//! Two connections made into one: bytes both ways until both have ended, or one has ended and the other stays silent, or nothing has
//! moved for hours.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    sync::Notify,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// `streamingConnectionIdleTimeout`, which is a constant upstream too as far as the runtime's streams go.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4 * 3600);
/// After one side has ended, the other may be silent for so long: it only has its last words to say.
const LINGER: Duration = Duration::from_secs(60);

/// Passes bytes both ways; closes both when it returns.
pub(super) async fn relay<A, B>(client: A, mut backend: B, cancel: &CancellationToken)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let progress = Arc::new(Progress::default());
    let mut client = Watched { inner: client, progress: Arc::clone(&progress) };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = progress.stalled() => tracing::debug!("exec: nothing moved; closing"),
        passed = copy_bidirectional(&mut client, &mut backend) => match passed {
            Ok((inwards, outwards)) => tracing::debug!(inwards, outwards, "exec: ended"),
            Err(error) => tracing::debug!(%error, "exec: broken off"),
        }
    }
}

#[derive(Default)]
struct Progress {
    moved: AtomicU64,
    one_ended: AtomicBool,
    ended: Notify,
}

impl Progress {
    fn moved(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    fn end(&self) {
        self.one_ended.store(true, Ordering::Relaxed);
        self.ended.notify_one();
    }

    async fn stalled(&self) {
        loop {
            let before = self.moved.load(Ordering::Relaxed);
            let patience = if self.one_ended.load(Ordering::Relaxed) { LINGER } else { IDLE_TIMEOUT };
            tokio::select! {
                () = sleep(patience) => if self.moved.load(Ordering::Relaxed) == before { return },
                () = self.ended.notified() => {}
            }
        }
    }
}

/// One side, with an eye on what passes through it. Every byte of both directions does.
struct Watched<S> {
    inner: S,
    progress: Arc<Progress>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            self.progress.end()
        } else {
            self.progress.moved()
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.progress.moved();
        Poll::Ready(Ok(written))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.inner).poll_shutdown(cx);
        if done.is_ready() {
            self.progress.end();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn e07_silence_ends_a_session_sooner_after_one_side_has_ended() {
        let clock = tokio::time::Instant::now;
        let (mut client, near) = duplex(64);
        let (far, mut backend) = duplex(64);
        let begun = clock();
        let task = tokio::spawn(async move { relay(near, far, &CancellationToken::new()).await });
        sleep(IDLE_TIMEOUT / 2).await;
        client.write_all(b"in").await.unwrap();
        let mut two = [0; 2];
        backend.read_exact(&mut two).await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(backend.read(&mut two).await.unwrap(), 0, "half a close is passed on");
        sleep(LINGER / 2).await;
        backend.write_all(b"out").await.unwrap();
        task.await.unwrap();
        let lasted = clock() - begun;
        assert!(lasted > IDLE_TIMEOUT / 2 + LINGER && lasted <= IDLE_TIMEOUT / 2 + 2 * LINGER, "{lasted:?}");
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"out");
    }

    #[tokio::test(start_paused = true)]
    async fn e07_silence_ends_a_session() {
        let (_client, near) = duplex(64);
        let (far, _backend) = duplex(64);
        let begun = tokio::time::Instant::now();
        relay(near, far, &CancellationToken::new()).await;
        assert!(begun.elapsed() >= IDLE_TIMEOUT);
    }
}
