//! A request to the apiserver that failed, in the server's own words: they end up in logs and in the Ready condition.

use std::error::Error;

/// Shows the server's message, or the transport's whole chain of causes.
#[derive(Debug, thiserror::Error)]
#[error("{}", words(.0))]
pub(super) struct CallError(#[from] kube::Error);

impl CallError {
    /// HTTP status of the answer; 0 when there was none.
    pub(super) fn code(&self) -> u16 {
        match &self.0 {
            kube::Error::Api(status) => status.code,
            _ => 0,
        }
    }
}

fn words(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return status.message.clone();
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
