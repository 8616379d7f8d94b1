//! One error for every CRI call, worded as upstream words it: `rpc error: code = NotFound desc = …`.

use std::fmt;

use tonic::Code;

/// A failed CRI call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CriError {
    /// The RPC's name, `RunPodSandbox`.
    pub rpc: &'static str,
    pub code: Code,
    pub message: String,
    /// Upstream shows these without `rpc error: …`: answers it cannot use, and a pull's errors of code Unknown.
    bare: bool,
}

impl CriError {
    pub fn new(rpc: &'static str, code: Code, message: impl Into<String>) -> Self {
        Self { rpc, code, message: message.into(), bare: false }
    }
    /// The runtime answered with something that cannot be used.
    pub fn malformed(rpc: &'static str, message: impl Into<String>) -> Self {
        Self { rpc, code: Code::Internal, message: message.into(), bare: true }
    }
    /// The same error, shown as its message alone.
    pub fn bare(self) -> Self {
        Self { bare: true, ..self }
    }
    pub fn is_not_found(&self) -> bool {
        self.code == Code::NotFound
    }
    pub fn is_unimplemented(&self) -> bool {
        self.code == Code::Unimplemented
    }
    /// The call may have happened: a timeout or a broken connection. The target must be looked at afresh.
    ///
    /// Code Unknown is not among them: it is what a runtime says when it has done its work and failed (any plain Go error).
    pub fn outcome_unknown(&self) -> bool {
        matches!(self.code, Code::DeadlineExceeded | Code::Unavailable | Code::Cancelled)
    }
}

/// The code as Go's gRPC writes it: differs from ours in `OK` and `Canceled`.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

impl fmt::Display for CriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bare {
            return f.write_str(&self.message);
        }
        write!(f, "rpc error: code = {} desc = {}", code_name(self.code), self.message)
    }
}
impl std::error::Error for CriError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_worded_as_go_words_them() {
        let cancelled = CriError::new("ExecSync", Code::Cancelled, "context canceled");
        assert_eq!(cancelled.to_string(), "rpc error: code = Canceled desc = context canceled");
        assert!(cancelled.outcome_unknown());
        let unknown = CriError::new("StartContainer", Code::Unknown, "failed to create containerd task");
        assert_eq!(unknown.to_string(), "rpc error: code = Unknown desc = failed to create containerd task");
        assert!(!unknown.outcome_unknown());
        assert_eq!(unknown.bare().to_string(), "failed to create containerd task");
    }
}
