//! Calls that change something at the runtime.

use std::future::Future;

use tokio_util::task::TaskTracker;
use tonic::Code;

use super::CriError;

/// Runs such a call to its end on the tracker, even when nobody waits for it any more: a cancelled call leaves reserved names behind in
/// containerd.
pub async fn to_its_end<T: Send + 'static>(
    mutations: &TaskTracker,
    call: impl Future<Output = Result<T, CriError>> + Send + 'static,
) -> Result<T, CriError> {
    match mutations.spawn(call).await {
        Ok(result) => result,
        Err(error) => Err(CriError::new("task", Code::Unknown, error.to_string())),
    }
}
