//! `$(VAR)` references in command, args, env values and subPathExpr (contract P-50).

use std::collections::{BTreeMap, BTreeSet};

/// Replaces `$(NAME)` by what `lookup` knows; an unknown name stays as written, `$$` is a literal `$`, an unclosed `$(` stays.
pub fn expand(input: &str, mut lookup: impl FnMut(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => out.extend(["$(", name, ")"]),
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// `subPathExpr` with the container's environment. A reference that is unset or empty is an error: `missing value for A, B`.
pub fn expand_sub_path(expression: &str, env: &BTreeMap<String, String>) -> Result<String, String> {
    let mut missing = BTreeSet::new();
    let path = expand(expression, |name| match env.get(name) {
        Some(value) if !value.is_empty() => Some(value.clone()),
        _ => {
            missing.insert(name.to_owned());
            Some(String::new())
        }
    });
    if missing.is_empty() {
        return Ok(path);
    }
    Err(format!("missing value for {}", missing.into_iter().collect::<Vec<_>>().join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p50_expansion_table() {
        let vars = BTreeMap::from([("A", "1"), ("B", "$(A)"), ("E", "")]);
        for (input, want) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"), // one pass only
            ("$(E)", ""),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$(MISSING)", "$(MISSING)"),
            ("$(A", "$(A"),
            ("$A", "$A"),
            ("$", "$"),
            ("a$", "a$"),
            ("$)", "$)"),
            ("$()", "$()"),
            ("$((A))", "$((A))"),
            ("$é$(A)", "$é1"),
            ("--f=$(A),$$", "--f=1,$"),
        ] {
            assert_eq!(expand(input, |n| vars.get(n).map(|v| (*v).to_owned())), want, "{input}");
        }
    }

    #[test]
    fn p50_sub_path_needs_every_value() {
        let env = BTreeMap::from([("A".to_owned(), "a".to_owned()), ("E".to_owned(), String::new())]);
        assert_eq!(expand_sub_path("x/$(A)", &env).unwrap(), "x/a");
        assert_eq!(expand_sub_path("$(Z)/$(A)/$(E)", &env).unwrap_err(), "missing value for E, Z");
    }

    proptest::proptest! {
        /// Unknown names leave the text as it is, but for `$$`; escaping every `$` gives the text back.
        #[test]
        fn p50_text_survives(text in "[$()aé ]{0,20}") {
            if !text.contains("$$") {
                proptest::prop_assert_eq!(expand(&text, |_| None), text.clone());
            }
            proptest::prop_assert_eq!(expand(&text.replace('$', "$$"), |_| Some("x".to_owned())), text);
        }
    }
}
