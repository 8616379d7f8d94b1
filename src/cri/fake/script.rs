//! What a test tells the fake runtime to do, and what the fake tells of its calls.

use std::time::Duration;

use jiff::Timestamp;
use tonic::Code;

/// What goes wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Fails after the latency; nothing was done.
    Error { code: Code, message: String },
    /// Does nothing until released, then goes on as usual.
    Hang,
    /// Is done, but the answer is lost: Unavailable.
    DoneButLost,
    /// DeadlineExceeded after this long; `done` says whether it had taken effect.
    Deadline { after: Duration, done: bool },
}

impl Fault {
    /// A plain error of the runtime, code Unknown.
    pub fn error(message: &str) -> Self {
        Self::Error { code: Code::Unknown, message: message.to_owned() }
    }
}

/// How long a container runs when nobody stops it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    Forever,
    For { lasting: Duration, code: i32 },
}

/// What a container does at SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTerm {
    /// Exits after this long with this code.
    Exits { after: Duration, code: i32 },
    /// Runs on until SIGKILL.
    Ignores,
}

/// One start of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    pub run: Run,
    pub on_term: OnTerm,
    /// StartContainer fails with this message; the container is then Exited with 128, StartError.
    pub start_error: Option<String>,
}

impl Script {
    /// Runs until it is told to stop, then exits at once with 0.
    pub fn forever() -> Self {
        Self { run: Run::Forever, on_term: OnTerm::Exits { after: Duration::ZERO, code: 0 }, start_error: None }
    }
    pub fn exits(lasting: Duration, code: i32) -> Self {
        Self { run: Run::For { lasting, code }, ..Self::forever() }
    }
    pub fn ignores_term() -> Self {
        Self { on_term: OnTerm::Ignores, ..Self::forever() }
    }
    pub fn term_after(after: Duration, code: i32) -> Self {
        Self { on_term: OnTerm::Exits { after, code }, ..Self::forever() }
    }
    pub fn start_fails(message: &str) -> Self {
        Self { start_error: Some(message.to_owned()), ..Self::forever() }
    }
}

/// What `ExecSync` does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecScript {
    pub after: Duration,
    pub exit_code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// What happens with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageScript {
    Present,
    Pullable { after: Duration },
    Fails { code: Code, message: String },
}

/// How events travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Events {
    /// To the subscriber, at once; kept for the next one while nobody listens.
    #[default]
    Delivered,
    Lost,
    Duplicated,
    Delayed(Duration),
    /// The runtime has no event stream.
    Unimplemented,
}

/// One call as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub rpc: &'static str,
    /// All it is about: IDs, the pod's UID and name, the container's name, the image; in no special order.
    pub about: Vec<String>,
    pub at: Timestamp,
}
