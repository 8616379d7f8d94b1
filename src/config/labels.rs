//! The rules for label keys, label values and taints, and which `kubernetes.io` labels a node may give itself.
//!
//! Text in, messages out (apimachinery's wording). Contract N-03. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Taint;

const NAME_FORMAT: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const NAME_RULE: &str =
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
const NAME_EXAMPLES: &str = "(e.g. 'MyName',  or 'my.name',  or '123-abc', ";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";

/// Labels in the `kubernetes.io` namespaces that a node may set on itself.
const NODE_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
const NODE_LABEL_PREFIXES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// What is wrong with a label key (a "qualified name"); empty when nothing.
pub fn label_key_errors(key: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let mut parts = key.split('/');
    let name = match (parts.next(), parts.next(), parts.next()) {
        (Some(prefix), Some(name), None) => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".to_owned());
            } else {
                errors.extend(subdomain_errors(prefix).into_iter().map(|error| format!("prefix part {error}")));
            }
            name
        }
        (Some(name), None, _) => name,
        _ => {
            return vec![format!(
                "a valid label key {NAME_RULE} {NAME_EXAMPLES}regex used for validation is '{NAME_FORMAT}') with an \
                 optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        errors.push("name part must be no more than 63 bytes".to_owned());
    }
    if !is_name(name) {
        errors.push(format!("name part {NAME_RULE} {NAME_EXAMPLES}regex used for validation is '{NAME_FORMAT}')"));
    }
    errors
}

/// What is wrong with a label value; empty when nothing.
pub fn label_value_errors(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 63 {
        errors.push("must be no more than 63 bytes".to_owned());
    }
    if !value.is_empty() && !is_name(value) {
        errors.push(format!(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
             start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
             validation is '({NAME_FORMAT})?')"
        ));
    }
    errors
}

fn is_name(name: &str) -> bool {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    alphanumeric(name.chars().next())
        && alphanumeric(name.chars().next_back())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn subdomain_errors(name: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if name.len() > 253 {
        errors.push("must be no more than 253 bytes".to_owned());
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if !name.split('.').all(label) {
        errors.push(SUBDOMAIN.to_owned());
    }
    errors
}

/// Checks `--node-labels` (contract N-03).
pub fn validate_node_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    let unknown: Vec<&str> =
        labels.keys().map(String::as_str).filter(|key| is_kubernetes_label(key) && !is_node_label(key)).collect();
    if !unknown.is_empty() {
        return Err(format!(
            "unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [{}]\n--node-labels in the \
             'kubernetes.io' namespace must begin with an allowed prefix ({}) or be in the specifically allowed set ({})",
            unknown.join(" "),
            NODE_LABEL_PREFIXES.join(", "),
            NODE_LABELS.join(", "),
        ));
    }
    let invalid: Vec<String> = labels
        .iter()
        .flat_map(|(key, value)| [(key, label_key_errors(key)), (value, label_value_errors(value))])
        .filter(|(_, errors)| !errors.is_empty())
        .map(|(text, errors)| format!("'{text}' - {}", errors.join(", ")))
        .collect();
    if invalid.is_empty() { Ok(()) } else { Err(format!("invalid node labels: {}", invalid.join("; "))) }
}

fn namespace(key: &str) -> &str {
    key.split_once('/').map_or("", |(namespace, _)| namespace)
}

fn within(namespace: &str, domain: &str) -> bool {
    namespace.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn is_kubernetes_label(key: &str) -> bool {
    ["kubernetes.io", "k8s.io"].iter().any(|domain| within(namespace(key), domain))
}

fn is_node_label(key: &str) -> bool {
    NODE_LABELS.contains(&key) || NODE_LABEL_PREFIXES.iter().any(|prefix| within(namespace(key), prefix))
}

/// Parses `key[=value]:effect`, or a bare `key`, as `--register-with-taints` takes it.
pub fn parse_taint(text: &str) -> Result<Taint, String> {
    let invalid = |errors: &[String]| {
        let detail = if errors.is_empty() { String::new() } else { format!(", {}", errors.join("; ")) };
        format!("invalid taint spec: {text}{detail}")
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (key, value, effect) = match parts[..] {
        [key] => (key, None, ""),
        [pair, effect] => {
            check_effect(effect)?;
            match pair.split('=').collect::<Vec<_>>()[..] {
                [key] => (key, None, effect),
                [key, value] => (key, Some(value), effect),
                _ => return Err(invalid(&[])),
            }
        }
        _ => return Err(invalid(&[])),
    };
    let errors = label_value_errors(value.unwrap_or_default());
    if !errors.is_empty() {
        return Err(invalid(&errors));
    }
    let errors = label_key_errors(key);
    if !errors.is_empty() {
        return Err(invalid(&errors));
    }
    let value = value.filter(|value| !value.is_empty()).map(str::to_owned);
    Ok(Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None })
}

fn check_effect(effect: &str) -> Result<(), String> {
    if matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
        return Ok(());
    }
    Err(format!("invalid taint effect: {effect}, unsupported taint effect"))
}

/// Whether a taint of the configuration is well formed.
pub fn is_valid_taint(taint: &Taint) -> bool {
    label_key_errors(&taint.key).is_empty()
        && taint.value.as_deref().is_none_or(|value| label_value_errors(value).is_empty())
        && (taint.effect.is_empty() || check_effect(&taint.effect).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn n03_only_known_kubernetes_labels() {
        let fine = labels(&[
            ("topology.kubernetes.io/zone", "a"),
            ("node.kubernetes.io/anything", ""),
            ("x.kubelet.kubernetes.io/y", "1"),
            ("example.com/role", "web"),
            ("plain", "v"),
        ]);
        assert_eq!(validate_node_labels(&fine), Ok(()));
        let error = validate_node_labels(&labels(&[("node-role.kubernetes.io/worker", ""), ("a.k8s.io/b", "")]));
        assert!(error.unwrap_err().starts_with(
            "unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: \
                 [a.k8s.io/b node-role.kubernetes.io/worker]\n"
        ));
    }

    #[test]
    fn n03_malformed_labels_name_the_text() {
        for (key, value, at_fault) in
            [("a/b/c", "", "a/b/c"), ("Upper.Case/x", "", "Upper.Case/x"), ("k", "-bad", "-bad"), ("", "v", "")]
        {
            let error = validate_node_labels(&labels(&[(key, value)])).unwrap_err();
            assert!(error.starts_with(&format!("invalid node labels: '{at_fault}' - ")), "{error}");
        }
    }

    #[test]
    fn taints_parse_as_upstream() {
        let taint = parse_taint("dedicated=gpu:NoSchedule").unwrap();
        assert_eq!(
            (taint.key.as_str(), taint.value.as_deref(), taint.effect.as_str()),
            ("dedicated", Some("gpu"), "NoSchedule")
        );
        assert_eq!(parse_taint("node-role.kubernetes.io/control-plane=:NoSchedule").unwrap().value, None);
        assert_eq!(parse_taint("a=b=c:NoSchedule").unwrap_err(), "invalid taint spec: a=b=c:NoSchedule");
        assert_eq!(parse_taint("a:Never").unwrap_err(), "invalid taint effect: Never, unsupported taint effect");
        assert!(parse_taint("-a:NoExecute").unwrap_err().starts_with("invalid taint spec: -a:NoExecute, name part "));
    }
}
