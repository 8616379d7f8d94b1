//! The container hash (contract P-26): a running container whose hash differs from its spec's is replaced.
//!
//! The value must equal the Go kubelet's to the bit, or every container restarts when the agents are swapped.

use std::fmt::Write as _;

use k8s_openapi::api::core::v1::Container;

const FNV_OFFSET: u32 = 0x811c_9dc5;
const FNV_PRIME: u32 = 0x0100_0193;

/// FNV-1a-32 over the printed bytes of the JSON of name and image: the only fields whose change means another container.
/// Written in lower-case hex to annotation `io.kubernetes.container.hash`.
pub fn container_hash(container: &Container) -> u32 {
    let json = format!(
        r#"{{"image":{},"name":{}}}"#,
        go_json(container.image.as_deref().unwrap_or_default()),
        go_json(&container.name)
    );
    let mut printed = String::with_capacity(json.len() * 4 + 12);
    printed.push_str("([]uint8)[");
    for (at, byte) in json.bytes().enumerate() {
        let _ = write!(printed, "{}{byte}", if at == 0 { "" } else { " " });
    }
    printed.push(']');
    printed.bytes().fold(FNV_OFFSET, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(FNV_PRIME))
}

/// A JSON string as Go writes it: `<`, `>`, `&` and the two Unicode line separators escaped.
pub(crate) fn go_json(text: &str) -> String {
    serde_json::Value::from(text)
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p26_golden_hashes_of_the_go_kubelet() {
        for (name, image, want) in [("test_container", "foo/image:v1", 0x8e45_cbd0_u32), ("foo", "bar", 0x11a6_d6d6)] {
            let container = Container { name: name.into(), image: Some(image.into()), ..Default::default() };
            assert_eq!(format!("{:x}", container_hash(&container)), format!("{want:x}"), "{name} {image}");
        }
    }

    #[test]
    fn p26_only_name_and_image_count() {
        let base = Container { name: "c".into(), image: Some("i".into()), ..Default::default() };
        let changed = Container { args: Some(vec!["x".into()]), ..base.clone() };
        assert_eq!(container_hash(&base), container_hash(&changed));
        let other = Container { image: Some("j".into()), ..base.clone() };
        assert_ne!(container_hash(&base), container_hash(&other));
        assert_eq!(go_json("a<b>&\u{2028}"), r#""a\u003cb\u003e\u0026\u2028""#);
    }
}
