//! secret volumes and projected secret sources (contract V-23). Their files live on a tmpfs.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::KeyToPath;

use super::{key_projection::KeyProjection, payload::Payload, set_up_error::SetUpError};
use crate::api::{ApiError, ReferencedObjects};

/// The files of a secret. A missing one is an error, or no files when `optional`.
pub(super) async fn payload(
    objects: &dyn ReferencedObjects,
    namespace: &str,
    name: &str,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: bool,
) -> Result<Payload, SetUpError> {
    let object = match objects.secret(namespace, name).await {
        Ok(object) => object,
        Err(ApiError::NotFound { .. }) if optional => Default::default(),
        Err(error) => return Err(error.into()),
    };
    let content: BTreeMap<&str, &[u8]> = object.data.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
    let missing_key = "references non-existent secret key";
    KeyProjection { items: items.unwrap_or_default(), default_mode, optional, missing_key }.payload(&content)
}
