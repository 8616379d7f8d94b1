//! pod_status
