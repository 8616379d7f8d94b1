//! What the pod worker sees of status publishing.

use k8s_openapi::api::core::v1::PodStatus;

use crate::pods::{Pod, PodUid};

/// Publishes statuses: newest wins, at most one request in flight per pod, equal ones are not sent (contract P-44).
pub trait StatusPublisher: Send + Sync + 'static {
    /// Takes the newest status. Returns its version: 1, 2, … per UID; the same version when nothing changed.
    fn offer(&self, pod: &Pod, status: PodStatus) -> u64;
    /// The newest version that the apiserver has acknowledged (or that cannot be written any more, because the pod is gone). 0: none.
    /// A wake with `Cause::Published` follows each change.
    fn acknowledged(&self, uid: &PodUid) -> u64;
    /// Sends `DELETE` with `gracePeriodSeconds: 0` and the UID as precondition (contract P-10), retried until the pod is gone.
    /// Idempotent. Call it only once the terminal status is acknowledged.
    fn delete(&self, pod: &Pod);
    fn forget(&self, uid: &PodUid);
}
