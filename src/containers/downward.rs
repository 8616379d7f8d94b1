//! The downward API (contract P-52): what `fieldRef` and `resourceFieldRef` say of a pod and its containers.

use std::{collections::BTreeMap, fmt::Write as _};

use k8s_openapi::{
    api::core::v1::{Container, ResourceFieldSelector},
    apimachinery::pkg::api::resource::Quantity as ApiQuantity,
};

use super::ConfigError;
use crate::{pods::Pod, quantity::Quantity};

/// `metadata.name`, `.namespace`, `.uid`, `.labels`, `.annotations`, `.labels['k']`, `.annotations['k']`. A missing key is empty.
pub fn pod_field(pod: &Pod, path: &str) -> Result<String, ConfigError> {
    if let Some((map, key)) = path.strip_suffix("']").and_then(|p| p.split_once("['")) {
        let map = match map {
            "metadata.labels" => pod.labels(),
            "metadata.annotations" => pod.annotations(),
            _ => return Err(ConfigError::container(format!("field label does not support subscript: {path}"))),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    match path {
        "metadata.name" => Ok(pod.name().to_owned()),
        "metadata.namespace" => Ok(pod.namespace().to_owned()),
        "metadata.uid" => Ok(pod.uid().to_string()),
        "metadata.labels" => Ok(format_map(pod.labels())),
        "metadata.annotations" => Ok(format_map(pod.annotations())),
        _ => Err(ConfigError::container(format!("field label not supported: {path}"))),
    }
}

/// A map as files and variables show it: `key="value"` lines in key order, the value quoted as Go does.
pub fn format_map(map: &BTreeMap<String, String>) -> String {
    let lines: Vec<String> = map.iter().map(|(key, value)| format!("{key}={}", go_quote(value))).collect();
    lines.join("\n")
}

/// Quotes as Go's `strconv.Quote`: printable Unicode stays, the rest is escaped.
fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x0b' => out.push_str("\\v"),
            c if is_printable(c) => out.push(c),
            // Writing to a String cannot fail.
            c if u32::from(c) < 0x80 => drop(write!(out, "\\x{:02x}", u32::from(c))),
            c if u32::from(c) < 0x10000 => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => drop(write!(out, "\\U{:08x}", u32::from(c))),
        }
    }
    out.push('"');
    out
}

/// Letters, marks, numbers, punctuation, symbols and the ASCII space. Rust's own escaping draws the same line for a character
/// that is not the first of its string (as the first it would also escape combining marks).
fn is_printable(c: char) -> bool {
    match c {
        ' '..='~' => true,
        c if c.is_ascii() => false,
        c => {
            let mut after_letter = String::from("a");
            after_letter.push(c);
            after_letter.escape_debug().count() == 2
        }
    }
}

/// `resourceFieldRef`: the amount in `divisor`s, rounded up. An unset limit of cpu, memory or ephemeral-storage reads as the
/// pod's own limit, else the node's `allocatable`; `own` is the container that asks when the selector names none.
pub fn resource_field(
    pod: &Pod,
    own: &Container,
    selector: &ResourceFieldSelector,
    allocatable: &BTreeMap<String, String>,
) -> Result<String, ConfigError> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let (container, defaulted) = match named {
        None => (own, true),
        Some(name) => {
            let found =
                pod.main_containers().map(|c| (c.spec, true)).chain(pod.init_containers().map(|c| (c.spec, false)));
            found
                .into_iter()
                .find(|(c, _)| c.name == name)
                .ok_or_else(|| ConfigError::container(format!("container {name} not found")))?
        }
    };
    let amounts = container.resources.as_ref();
    let unsupported = || ConfigError::container(format!("unsupported container resource : {}", selector.resource));
    let (side, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    if !matches!(resource, "cpu" | "memory" | "ephemeral-storage") && !resource.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let amount = match side {
        "limits" => match quantity(amounts.and_then(|r| r.limits.as_ref()), resource)? {
            limit if limit.is_zero() && defaulted && !resource.starts_with("hugepages-") => {
                default_limit(pod, resource, allocatable)?
            }
            limit => limit,
        },
        "requests" => quantity(amounts.and_then(|r| r.requests.as_ref()), resource)?,
        _ => return Err(unsupported()),
    };
    let divisor = match &selector.divisor {
        Some(divisor) => parse(divisor)?,
        None => Quantity::ZERO,
    };
    Ok(in_divisors(resource, &amount, &divisor).to_string())
}

fn default_limit(pod: &Pod, resource: &str, allocatable: &BTreeMap<String, String>) -> Result<Quantity, ConfigError> {
    let Some(node) = allocatable.get(resource) else { return Ok(Quantity::ZERO) };
    if resource != "ephemeral-storage" {
        let pod_level = quantity(pod.spec().resources.as_ref().and_then(|r| r.limits.as_ref()), resource)?;
        if !pod_level.is_zero() {
            return Ok(pod_level);
        }
    }
    parse(&ApiQuantity(node.clone()))
}

/// CPU is counted in thousandths, the rest in whole units: both sides are rounded up to that first, as upstream does.
fn in_divisors(resource: &str, amount: &Quantity, divisor: &Quantity) -> i64 {
    let one = Quantity::from_units(1);
    let divisor = if divisor.is_zero() { &one } else { divisor };
    let (amount, divisor) = match resource {
        "cpu" => (amount.milli_value(), divisor.milli_value()),
        _ => (amount.value(), divisor.value()),
    };
    Quantity::from_units(amount).ceil_div(&Quantity::from_units(divisor))
}

pub(super) fn quantity(list: Option<&BTreeMap<String, ApiQuantity>>, resource: &str) -> Result<Quantity, ConfigError> {
    list.and_then(|list| list.get(resource)).map_or(Ok(Quantity::ZERO), parse)
}

fn parse(quantity: &ApiQuantity) -> Result<Quantity, ConfigError> {
    Quantity::parse(&quantity.0).map_err(|error| ConfigError::container(error.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::containers::tests::{pod, pod_with};

    #[test]
    fn p52_metadata_fields() {
        let pod = pod_with(
            json!({"name": "p", "namespace": "ns", "uid": "u", "labels": {"b": "2\n\"", "a": "1"}, "annotations": {"x.y/z": "v"}}),
            "{}",
        );
        for (path, want) in [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u"),
            ("metadata.labels['a']", "1"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['x.y/z']", "v"),
            ("metadata.labels", "a=\"1\"\nb=\"2\\n\\\"\""),
        ] {
            assert_eq!(pod_field(&pod, path).unwrap(), want, "{path}");
        }
        assert_eq!(pod_field(&pod, "spec.x").unwrap_err().message, "field label not supported: spec.x");
        assert_eq!(
            pod_field(&pod, "spec.x['a']").unwrap_err().message,
            "field label does not support subscript: spec.x['a']"
        );
    }

    #[test]
    fn p52_values_are_quoted_as_go_quotes() {
        for (text, quoted) in [
            ("plain", "\"plain\""),
            ("tab\tnul\0del\x7f", "\"tab\\tnul\\x00del\\x7f\""),
            ("back\\slash", "\"back\\\\slash\""),
            ("grün ☃ 日本 e\u{301}", "\"grün ☃ 日本 e\u{301}\""),
            ("nbsp\u{a0}zwj\u{200d}", "\"nbsp\\u00a0zwj\\u200d\""),
            ("\u{e0001}", "\"\\U000e0001\""),
            ("it's", "\"it's\""),
        ] {
            assert_eq!(go_quote(text), quoted);
        }
    }

    #[test]
    fn p52_resources_with_divisor_and_defaults() {
        let pod = pod(
            r#"{"containers":[{"name":"c","resources":{"limits":{"cpu":"1500m","memory":"100Mi","hugepages-2Mi":"4Mi"},"requests":{"cpu":"1","memory":"1"}}},{"name":"d"}],
                "initContainers":[{"name":"i"}]}"#,
        );
        let allocatable = BTreeMap::from(
            [("cpu", "4"), ("memory", "8Gi"), ("ephemeral-storage", "10Gi")].map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        let own = pod.container("c").unwrap().spec;
        for (container, resource, divisor, want) in [
            ("", "limits.cpu", None, "2"),
            ("", "limits.cpu", Some("1m"), "1500"),
            ("", "limits.cpu", Some("0"), "2"),
            ("", "limits.memory", None, "104857600"),
            ("", "limits.memory", Some("1Mi"), "100"),
            ("", "limits.memory", Some("3Mi"), "34"),
            ("", "requests.memory", Some("1Mi"), "1"),
            ("", "requests.cpu", None, "1"),
            ("", "requests.ephemeral-storage", None, "0"),
            ("", "limits.ephemeral-storage", Some("1Gi"), "10"),
            ("", "limits.hugepages-2Mi", Some("1Mi"), "4"),
            ("", "limits.hugepages-1Gi", None, "0"),
            ("d", "limits.cpu", None, "4"),
            ("d", "limits.memory", Some("1Gi"), "8"),
            ("i", "limits.cpu", None, "0"),
        ] {
            let selector = ResourceFieldSelector {
                container_name: Some(container.into()),
                divisor: divisor.map(|d: &str| ApiQuantity(d.into())),
                resource: resource.into(),
            };
            let got = resource_field(&pod, own, &selector, &allocatable).unwrap();
            assert_eq!(got, want, "{container} {resource} {divisor:?}");
        }
        let selector = |c: &str, r: &str| ResourceFieldSelector {
            container_name: Some(c.into()),
            divisor: None,
            resource: r.into(),
        };
        let error = |c, r| resource_field(&pod, own, &selector(c, r), &allocatable).unwrap_err().message;
        assert_eq!(error("x", "limits.cpu"), "container x not found");
        assert_eq!(error("", "limits.gpu"), "unsupported container resource : limits.gpu");
    }

    #[test]
    fn p52_the_pods_own_limit_stands_in_before_the_nodes() {
        let pod = pod(r#"{"resources":{"limits":{"cpu":"2","memory":"1Gi"}}}"#);
        let allocatable = BTreeMap::from([("cpu".to_owned(), "4".to_owned())]);
        let own = pod.container("c").unwrap().spec;
        let field = |resource: &str| {
            let selector = ResourceFieldSelector { container_name: None, divisor: None, resource: resource.into() };
            resource_field(&pod, own, &selector, &allocatable).unwrap()
        };
        assert_eq!(field("limits.cpu"), "2");
        assert_eq!(field("limits.memory"), "0"); // not allocatable here: no default at all
    }
}
