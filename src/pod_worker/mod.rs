//! pod_worker
