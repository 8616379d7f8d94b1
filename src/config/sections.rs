//! The sections of a `KubeletConfiguration`: its fields that are objects of their own. Shapes and defaults alone.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

use super::go_duration::GoDuration;

/// What Go's `omitempty` leaves out.
pub(super) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Headers of `staticPodURL`. They may carry credentials, so `Debug` shows names alone.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StaticPodHeaders(pub BTreeMap<String, Vec<String>>);

impl fmt::Debug for StaticPodHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.keys().map(|name| (name, "<masked>"))).finish()
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Authentication {
    pub x509: X509Authentication,
    pub webhook: WebhookAuthentication,
    pub anonymous: AnonymousAuthentication,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct X509Authentication {
    /// CA bundle for client certificates; empty is off.
    #[serde(rename = "clientCAFile", skip_serializing_if = "is_zero")]
    pub client_ca_file: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct WebhookAuthentication {
    /// Ask TokenReview about bearer tokens.
    pub enabled: bool,
    /// How long an answer is kept.
    #[serde(rename = "cacheTTL")]
    pub cache_ttl: GoDuration,
}

impl Default for WebhookAuthentication {
    fn default() -> Self {
        Self { enabled: true, cache_ttl: GoDuration::from_secs(120) }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct AnonymousAuthentication {
    /// Let callers without credentials in as `system:anonymous`.
    pub enabled: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Authorization {
    /// `AlwaysAllow` or `Webhook` (SubjectAccessReview).
    #[serde(skip_serializing_if = "is_zero")]
    pub mode: String,
    pub webhook: WebhookAuthorization,
}

impl Default for Authorization {
    fn default() -> Self {
        Self { mode: "Webhook".to_owned(), webhook: WebhookAuthorization::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct WebhookAuthorization {
    /// How long a yes is kept.
    #[serde(rename = "cacheAuthorizedTTL")]
    pub cache_authorized_ttl: GoDuration,
    /// How long a no is kept.
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub cache_unauthorized_ttl: GoDuration,
}

impl Default for WebhookAuthorization {
    fn default() -> Self {
        Self { cache_authorized_ttl: GoDuration::from_secs(300), cache_unauthorized_ttl: GoDuration::from_secs(30) }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct MemorySwap {
    /// Empty (as `NoSwap`), `NoSwap` or `LimitedSwap`.
    #[serde(skip_serializing_if = "is_zero")]
    pub swap_behavior: String,
}

/// `LoggingConfiguration` of component-base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Logging {
    /// `text` or `json`.
    #[serde(skip_serializing_if = "is_zero")]
    pub format: String,
    /// The log is never buffered, so this changes nothing. A number is nanoseconds.
    #[serde(deserialize_with = "duration_or_nanos")]
    pub flush_frequency: GoDuration,
    /// klog's `-v`.
    pub verbosity: u32,
    /// Verbosity per file.
    #[serde(skip_serializing_if = "is_zero")]
    pub vmodule: Vec<VModuleItem>,
    pub options: LoggingFormatOptions,
}

impl Default for Logging {
    fn default() -> Self {
        Self {
            format: "text".to_owned(),
            flush_frequency: GoDuration::from_secs(5),
            verbosity: 0,
            vmodule: Vec::new(),
            options: LoggingFormatOptions::default(),
        }
    }
}

fn duration_or_nanos<'de, D: Deserializer<'de>>(deserializer: D) -> Result<GoDuration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Nanos(i64),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Nanos(nanos) => Ok(GoDuration::from_nanos(nanos)),
        Either::Text(text) => GoDuration::parse(&text).map_err(de::Error::custom),
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct VModuleItem {
    /// File name without `.go`, or a glob.
    pub file_pattern: String,
    pub verbosity: u32,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct LoggingFormatOptions {
    pub text: OutputRouting,
    pub json: OutputRouting,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputRouting {
    /// Information to stdout, errors to stderr (alpha).
    #[serde(skip_serializing_if = "is_zero")]
    pub split_stream: bool,
    /// A quantity of bytes (alpha).
    pub info_buffer_size: String,
}

impl Default for OutputRouting {
    fn default() -> Self {
        Self { split_stream: false, info_buffer_size: "0".to_owned() }
    }
}

/// Grace of the pods whose priority is at least `priority`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ShutdownGracePeriod {
    pub priority: i32,
    pub shutdown_grace_period_seconds: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct CrashLoopBackOff {
    /// Cap of the restart back-off, 1 s to 5 min. None when its gate is off.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_container_restart_period: Option<GoDuration>,
}

impl Default for CrashLoopBackOff {
    fn default() -> Self {
        Self { max_container_restart_period: Some(GoDuration::from_secs(300)) }
    }
}

/// Memory kept on one NUMA node.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MemoryReservation {
    pub numa_node: i32,
    /// `memory` or `hugepages-<size>` to a quantity.
    pub limits: BTreeMap<String, crate::quantity::Quantity>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Tracing {
    /// gRPC address of the collector; empty is `localhost:4317`.
    #[serde(skip_serializing_if = "is_zero")]
    pub endpoint: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    pub sampling_rate_per_million: Option<i32>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct UserNamespaces {
    /// Ids per pod, a multiple of 65536 (also what None means).
    #[serde(skip_serializing_if = "is_zero")]
    pub ids_per_pod: Option<i64>,
}
