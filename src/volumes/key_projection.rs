//! From an object's keys to files: all of them, or the listed `items` (contract V-23). Shared by configMap and secret volumes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::KeyToPath;

use super::{
    payload::{FileContent, Payload},
    set_up_error::SetUpError,
};

/// `defaultMode` when the API did not default it.
pub(super) const DEFAULT_MODE: u32 = 0o644;

/// How a volume source asks for an object's keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyProjection<'a> {
    /// Every key at its own name when empty.
    pub(super) items: &'a [KeyToPath],
    pub(super) default_mode: u32,
    /// Missing keys are left out.
    pub(super) optional: bool,
    /// What a missing key is called in the error: the key's name follows.
    pub(super) missing_key: &'static str,
}

impl KeyProjection<'_> {
    pub(super) fn payload(&self, content: &BTreeMap<&str, &[u8]>) -> Result<Payload, SetUpError> {
        let mut payload = Payload::default();
        let file = |data: &[u8], mode: u32| FileContent { data: data.to_vec(), mode, user: None };
        if self.items.is_empty() {
            for (key, data) in content {
                payload.insert(key, file(data, self.default_mode))?;
            }
        }
        for item in self.items {
            match content.get(item.key.as_str()) {
                Some(data) => payload.insert(&item.path, file(data, mode_bits(item.mode, self.default_mode)))?,
                None if self.optional => {}
                // The key may be added to the object.
                None => return Err(SetUpError::retry(format!("{}: {}", self.missing_key, item.key))),
            }
        }
        Ok(payload)
    }
}

/// A mode of the API as permission bits.
pub(super) fn mode_bits(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|m| u32::try_from(m).ok()).map_or(default, |m| m & 0o7777)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str, path: &str, mode: Option<i32>) -> KeyToPath {
        KeyToPath { key: key.into(), path: path.into(), mode, ..Default::default() }
    }
    fn project(items: &[KeyToPath], optional: bool) -> Result<Vec<(String, u32)>, String> {
        let content = BTreeMap::from([("a", b"1".as_slice()), ("b", b"2")]);
        let missing_key = "configmap references non-existent config key";
        KeyProjection { items, default_mode: 0o644, optional, missing_key }
            .payload(&content)
            .map(|p| p.files().map(|(path, f)| (path.to_owned(), f.mode)).collect())
            .map_err(|e| e.message)
    }

    #[test]
    fn v23_items_paths_and_modes() {
        assert_eq!(project(&[], false).unwrap(), [("a".into(), 0o644), ("b".into(), 0o644)]);
        let items = [item("b", "x/y", Some(0o400)), item("a", "z", None)];
        assert_eq!(project(&items, false).unwrap(), [("x/y".into(), 0o400), ("z".into(), 0o644)]);
    }

    #[test]
    fn v23_missing_keys() {
        let items = [item("nope", "x", None), item("a", "a", None)];
        assert_eq!(project(&items, false).unwrap_err(), "configmap references non-existent config key: nope");
        assert_eq!(project(&items, true).unwrap(), [("a".into(), 0o644)]);
    }

    #[test]
    fn v23_hostile_item_paths() {
        assert_eq!(
            project(&[item("a", "../x", None)], false).unwrap_err(),
            "invalid path: must not contain '..': ../x"
        );
        assert_eq!(project(&[item("a", "/x", None)], false).unwrap_err(), "invalid path: must be relative path: /x");
    }
}
