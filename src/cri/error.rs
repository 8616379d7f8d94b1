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
}

impl CriError {
    pub fn new(rpc: &'static str, code: Code, message: impl Into<String>) -> Self {
        Self { rpc, code, message: message.into() }
    }
    pub fn is_not_found(&self) -> bool {
        self.code == Code::NotFound
    }
    pub fn is_unimplemented(&self) -> bool {
        self.code == Code::Unimplemented
    }
    /// The call may have happened: a timeout or a broken connection. The target must be looked at afresh.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self.code, Code::DeadlineExceeded | Code::Unavailable | Code::Cancelled | Code::Unknown)
    }
}

impl fmt::Display for CriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rpc error: code = {:?} desc = {}", self.code, self.message)
    }
}
impl std::error::Error for CriError {}
