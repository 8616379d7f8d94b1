//! Reading a log file: from where the last n lines begin, to its end, and on as it grows (contract L-03).
//!
//! Following waits for inotify events of the file's directory, so that rotation (rename, then create) is seen. That a container has
//! ended shows when its runtime closes the file; only then is the caller asked, with short pauses, until it agrees.

use std::{
    io::{self, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use inotify::{EventMask, Inotify, WatchMask};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
    sync::mpsc,
};

use super::record::{Decoder, Flow, LogOptions, UnknownFormat};

const READ_SIZE: usize = 64 * 1024;
/// The terminationMessagePolicy FallbackToLogsOnError shows so much (contract P-41's neighbour in the API: 2048 bytes, 80 lines).
const TERMINATION_BYTES: usize = 2048;
const TERMINATION_LINES: u64 = 80;
/// Between two questions whether the container still runs, once its log file was closed.
const CLOSED_RECHECK: Duration = Duration::from_millis(250);
/// So often at most: a file may also be closed to be opened again.
const CLOSED_QUESTIONS: u32 = 20;
/// A runtime that does not close the file when its container ends is asked so seldom.
const QUIET_RECHECK: Duration = Duration::from_secs(10);

/// Asks whether the container still runs. Errors of the asking count as "yes".
pub type StillRunning<'a> = &'a (dyn Fn() -> BoxFuture<'static, bool> + Send + Sync + 'a);

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Worded as upstream does; `kubectl logs` shows it.
    #[error("failed to try resolving symlinks in path {path:?}: {source}")]
    Resolve { path: PathBuf, source: io::Error },
    #[error("failed to open log file {path:?}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("failed to read log file {path:?}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("failed to watch directory {path:?}: {source}")]
    Watch { path: PathBuf, source: io::Error },
    #[error("{message}")]
    Format { message: String },
}

impl From<UnknownFormat> for LogError {
    fn from(e: UnknownFormat) -> Self {
        Self::Format { message: e.to_string() }
    }
}

/// Sends what `options` ask for of the log at `path`. Returns when that is all, when a followed container has ended, or when
/// nobody receives any more. Keeps one buffer of 64 KiB.
pub async fn read_logs(
    path: &Path,
    options: LogOptions,
    out: &mpsc::Sender<Bytes>,
    running: StillRunning<'_>,
) -> Result<(), LogError> {
    let resolved =
        tokio::fs::canonicalize(path).await.map_err(|source| LogError::Resolve { path: path.to_owned(), source })?;
    let mut reader = Reader::open(resolved, options).await?;
    if reader.drain(out).await? == Flow::Done {
        return Ok(());
    }
    if !options.follow {
        return reader.finish(out).await;
    }
    tokio::select! {
        followed = reader.follow(out, running) => followed,
        () = out.closed() => Ok(()),
    }
}

/// The last 80 lines of a log, at most 2048 bytes: the termination message of a failed container that wrote none
/// (`FallbackToLogsOnError`). An error is worded as the message, as upstream does.
pub async fn tail_for_termination(path: &Path) -> String {
    let options = LogOptions { tail_lines: Some(TERMINATION_LINES), ..LogOptions::default() };
    let (out, mut pieces) = mpsc::channel::<Bytes>(4);
    let running = || -> BoxFuture<'static, bool> { Box::pin(async { false }) };
    let mut tail: Vec<u8> = Vec::new();
    let collect = async {
        while let Some(piece) = pieces.recv().await {
            tail.extend_from_slice(&piece);
            let surplus = tail.len().saturating_sub(TERMINATION_BYTES);
            tail.drain(..surplus);
        }
    };
    let read = async {
        let result = read_logs(path, options, &out, &running).await;
        drop(out);
        result
    };
    let (result, ()) = tokio::join!(read, collect);
    match result {
        Ok(()) => String::from_utf8_lossy(&tail).into_owned(),
        Err(error) => format!("Error on reading termination message from logs: {error}"),
    }
}

struct Reader {
    path: PathBuf,
    file: File,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Reader {
    async fn open(path: PathBuf, options: LogOptions) -> Result<Self, LogError> {
        let mut file = open(&path).await?;
        let read = |source| LogError::Read { path: path.clone(), source };
        if let Some(lines) = options.tail_lines {
            let start = tail_start(&mut file, lines).await.map_err(read)?;
            file.seek(SeekFrom::Start(start)).await.map_err(read)?;
        }
        Ok(Self { path, file, decoder: Decoder::new(options), buffer: vec![0; READ_SIZE] })
    }

    /// Reads to the present end of the file.
    async fn drain(&mut self, out: &mpsc::Sender<Bytes>) -> Result<Flow, LogError> {
        loop {
            let read = self.file.read(&mut self.buffer).await;
            let n = read.map_err(|source| LogError::Read { path: self.path.clone(), source })?;
            if n == 0 {
                return Ok(Flow::More);
            }
            let mut text = Vec::new();
            let flow = self.decoder.push(&self.buffer[..n], &mut text)?;
            if !text.is_empty() && out.send(text.into()).await.is_err() {
                return Ok(Flow::Done);
            }
            if flow == Flow::Done {
                return Ok(Flow::Done);
            }
        }
    }

    async fn finish(&mut self, out: &mpsc::Sender<Bytes>) -> Result<(), LogError> {
        let mut text = Vec::new();
        self.decoder.finish(&mut text)?;
        if !text.is_empty() {
            // Nobody listening is no error.
            let _ = out.send(text.into()).await;
        }
        Ok(())
    }

    async fn follow(&mut self, out: &mpsc::Sender<Bytes>, running: StillRunning<'_>) -> Result<(), LogError> {
        let directory = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        let name = self.path.file_name().unwrap_or_default().to_owned();
        let watch = |source| LogError::Watch { path: directory.clone(), source };
        let inotify = Inotify::init().map_err(watch)?;
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE;
        inotify.watches().add(&directory, mask).map_err(watch)?;
        let mut events = inotify.into_event_stream([0; 4096]).map_err(watch)?;
        // It may have been rotated, or have ended, before the watch began.
        self.reopen_if_replaced(out).await?;
        let mut questions = 1;
        loop {
            // Asked before reading: what a container wrote before it ended is in the file by then.
            let ended = questions > 0 && !running().await;
            if self.drain(out).await? == Flow::Done || ended {
                return Ok(());
            }
            questions -= questions.min(1);
            let patience = if questions > 0 { CLOSED_RECHECK } else { QUIET_RECHECK };
            let Ok(event) = tokio::time::timeout(patience, next_of(&mut events, &name)).await else {
                questions = questions.max(1);
                self.reopen_if_replaced(out).await?;
                continue;
            };
            let seen = event.map_err(watch)?;
            if seen.intersects(EventMask::CREATE | EventMask::MOVED_TO) {
                self.reopen_if_replaced(out).await?;
            }
            questions = if seen.contains(EventMask::CLOSE_WRITE) { CLOSED_QUESTIONS } else { 0 };
        }
    }

    /// Goes on with the file at the path if it is another one than the one that is open: a rotation.
    async fn reopen_if_replaced(&mut self, out: &mpsc::Sender<Bytes>) -> Result<(), LogError> {
        let identity = |m: &std::fs::Metadata| (m.dev(), m.ino());
        let at_path = tokio::fs::metadata(&self.path).await.ok().as_ref().map(identity);
        let held = self.file.metadata().await.ok().as_ref().map(identity);
        if at_path.is_some() && at_path != held { self.reopen(out).await } else { Ok(()) }
    }

    /// Rotation: the rest of the old file first, then the new one from its beginning.
    async fn reopen(&mut self, out: &mpsc::Sender<Bytes>) -> Result<(), LogError> {
        self.drain(out).await?;
        match open(&self.path).await {
            Ok(file) => {
                self.file = file;
                self.decoder.restart();
                Ok(())
            }
            // Gone again: whatever comes next will be told by an event.
            Err(LogError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(other) => Err(other),
        }
    }
}

async fn open(path: &Path) -> Result<File, LogError> {
    File::open(path).await.map_err(|source| LogError::Open { path: path.to_owned(), source })
}

/// The next event about that file.
async fn next_of(
    events: &mut inotify::EventStream<[u8; 4096]>,
    name: &std::ffi::OsStr,
) -> Result<EventMask, io::Error> {
    loop {
        match events.next().await {
            Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => return Ok(EventMask::CLOSE_WRITE),
            Some(Ok(event)) if event.name.as_deref() == Some(name) => return Ok(event.mask),
            Some(Ok(_)) => {}
            Some(Err(e)) => return Err(e),
            None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        }
    }
}

/// Where the last `lines` complete lines begin. An unfinished last line is not counted, but it is behind that point.
async fn tail_start(file: &mut File, lines: u64) -> io::Result<u64> {
    const BLOCK: u64 = 8 * 1024;
    let mut end = file.seek(SeekFrom::End(0)).await?;
    let mut found = 0;
    let mut block = Vec::with_capacity(BLOCK as usize);
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start)).await?;
        block.clear();
        (&mut *file).take(end - start).read_to_end(&mut block).await?;
        for (at, _) in block.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            found += 1;
            if found > lines {
                return Ok(start + at as u64 + 1);
            }
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        io::Write,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };

    use super::*;

    fn line(text: &str) -> String {
        format!("2016-10-06T00:17:09Z stdout F {text}\n")
    }

    async fn read(path: &Path, options: LogOptions) -> Result<String, LogError> {
        let (out, mut pieces) = mpsc::channel::<Bytes>(100);
        let running = || -> BoxFuture<'static, bool> { Box::pin(async { false }) };
        read_logs(path, options, &out, &running).await?;
        drop(out);
        let mut all = Vec::new();
        while let Some(piece) = pieces.recv().await {
            all.extend_from_slice(&piece);
        }
        Ok(String::from_utf8(all).unwrap())
    }

    #[tokio::test]
    async fn l03_tail_counts_lines_from_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text: String = (0..2000).map(|i| line(&i.to_string())).collect();
        fs::write(&path, text + "2016-10-06T00:17:09Z stdout F rest").unwrap();
        let tail = |n| LogOptions { tail_lines: Some(n), ..LogOptions::default() };
        assert_eq!(read(&path, tail(2)).await.unwrap(), "1998\n1999\n");
        assert_eq!(read(&path, tail(0)).await.unwrap(), "");
        assert_eq!(read(&path, tail(1500)).await.unwrap().lines().next(), Some("500"));
        assert!(read(&path, tail(5000)).await.unwrap().ends_with("1999\nrest"));
    }

    #[tokio::test]
    async fn l03_missing_file_is_named() {
        let error = read(Path::new("/nonexistent/0.log"), LogOptions::default()).await.unwrap_err();
        assert!(error.to_string().starts_with("failed to try resolving symlinks in path \"/nonexistent/0.log\": "));
    }

    #[tokio::test]
    async fn termination_fallback_is_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, (0..100).map(|i| line(&i.to_string())).collect::<String>()).unwrap();
        let tail = tail_for_termination(&path).await;
        assert_eq!((tail.lines().count(), tail.lines().next()), (80, Some("20")));
        fs::write(&path, (0..100).map(|_| line(&"x".repeat(100))).collect::<String>()).unwrap();
        assert_eq!(tail_for_termination(&path).await.len(), 2048);
        assert!(tail_for_termination(Path::new("/nonexistent")).await.starts_with("Error on reading termination"));
    }

    #[tokio::test]
    async fn l03_follow_sees_growth_rotation_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        file.write_all(line("first").as_bytes()).unwrap();
        let alive = Arc::new(AtomicBool::new(true));
        let (out, mut pieces) = mpsc::channel::<Bytes>(10);
        let task = tokio::spawn({
            let (path, alive) = (path.clone(), alive.clone());
            async move {
                let running = || -> BoxFuture<'static, bool> {
                    let alive = alive.clone();
                    Box::pin(async move { alive.load(Ordering::SeqCst) })
                };
                let options = LogOptions { follow: true, ..LogOptions::default() };
                read_logs(&path, options, &out, &running).await
            }
        });
        assert_eq!(pieces.recv().await.unwrap(), "first\n");
        let (begin, end) = (line("second"), String::from("third\n"));
        file.write_all(begin.as_bytes()).unwrap();
        assert_eq!(pieces.recv().await.unwrap(), "second\n");
        file.write_all(b"2016-10-06T00:17:09Z stdout F ").unwrap();
        file.write_all(end.as_bytes()).unwrap();
        assert_eq!(pieces.recv().await.unwrap(), "third\n");

        fs::rename(&path, dir.path().join("0.log.20260101")).unwrap();
        file.write_all(line("late").as_bytes()).unwrap();
        let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        file.write_all(line("fourth").as_bytes()).unwrap();
        assert_eq!(pieces.recv().await.unwrap(), "late\n", "the old file is read to its end");
        assert_eq!(pieces.recv().await.unwrap(), "fourth\n");

        file.write_all(line("last").as_bytes()).unwrap();
        alive.store(false, Ordering::SeqCst);
        drop(file);
        assert_eq!(pieces.recv().await.unwrap(), "last\n");
        assert_eq!(pieces.recv().await, None);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn l03_a_rotation_before_the_watch_began_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, line("old")).unwrap();
        let mut reader =
            Reader::open(path.clone(), LogOptions { follow: true, ..LogOptions::default() }).await.unwrap();
        fs::rename(&path, dir.path().join("0.log.20260101")).unwrap();
        fs::write(&path, line("new")).unwrap();
        let (out, mut pieces) = mpsc::channel::<Bytes>(10);
        let running = || -> BoxFuture<'static, bool> { Box::pin(async { false }) };
        reader.follow(&out, &running).await.unwrap();
        assert_eq!(pieces.recv().await.unwrap(), "old\n");
        assert_eq!(pieces.recv().await.unwrap(), "new\n");
    }

    #[tokio::test]
    async fn l03_follow_ends_when_nobody_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, line("x")).unwrap();
        let (out, pieces) = mpsc::channel::<Bytes>(10);
        drop(pieces);
        let running = || -> BoxFuture<'static, bool> { Box::pin(async { true }) };
        let options = LogOptions { follow: true, ..LogOptions::default() };
        read_logs(&path, options, &out, &running).await.unwrap();
    }
}
