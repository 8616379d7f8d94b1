//! configMap volumes and projected configMap sources (contract V-23).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::KeyToPath;

use super::{key_projection::KeyProjection, payload::Payload, set_up_error::SetUpError};
use crate::api::{ApiError, ConfigMapData, ReferencedObjects};

/// The files of a configMap. A missing one is an error, or no files when `optional`.
pub(super) async fn payload(
    objects: &dyn ReferencedObjects,
    namespace: &str,
    name: &str,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: bool,
) -> Result<Payload, SetUpError> {
    let object = match objects.config_map(namespace, name).await {
        Ok(object) => object,
        Err(ApiError::NotFound { .. }) if optional => Default::default(),
        Err(error) => return Err(error.into()),
    };
    let missing_key = "configmap references non-existent config key";
    KeyProjection { items: items.unwrap_or_default(), default_mode, optional, missing_key }.payload(&content(&object))
}

/// `data` and `binaryData` as one; for a key in both an item takes `data`, as upstream does, and the API forbids it anyway.
fn content(object: &ConfigMapData) -> BTreeMap<&str, &[u8]> {
    let binary = object.binary_data.iter().map(|(key, data)| (key.as_str(), data.as_slice()));
    let text = object.data.iter().map(|(key, data)| (key.as_str(), data.as_bytes()));
    binary.chain(text).collect()
}
