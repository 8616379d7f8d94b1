//! Which feature gates are on. Names, stages and locks come from the table of Kubernetes 1.37; contract S-10, Appendix A.
//!
//! A map of names to on/off goes in, an immutable set of answers comes out. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::feature_gate_table::{DEPENDENCIES, GATES};

/// How far a feature has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Alpha,
    Beta,
    Ga,
    Deprecated,
}

/// One known gate.
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    pub name: &'static str,
    pub stage: Stage,
    pub default: bool,
    /// Only the default may be set.
    pub locked: bool,
}

/// Why a set of gates cannot be; worded as component-base's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureGateError {
    #[error("unrecognized feature gate: {0}")]
    Unrecognized(String),
    #[error("cannot set feature gate {name} to {wanted}, feature is locked to {default}")]
    Locked { name: String, wanted: bool, default: bool },
    #[error("{name} is enabled, but depends on features that are disabled: [{}]", .disabled.join(" "))]
    Dependency { name: &'static str, disabled: Vec<&'static str> },
}

/// The answer for each known gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureGates {
    enabled: BTreeMap<&'static str, bool>,
}

impl Default for FeatureGates {
    fn default() -> Self {
        Self { enabled: GATES.iter().map(|gate| (gate.name, gate.default)).collect() }
    }
}

impl FeatureGates {
    /// The defaults with `wanted` over them. `AllAlpha` and `AllBeta` reach the gates that `wanted` does not name.
    /// All errors are given, so that one start shows them all.
    pub fn from_map(wanted: &BTreeMap<String, bool>) -> Result<Self, Vec<FeatureGateError>> {
        let mut gates = Self::default();
        let mut errors = Vec::new();
        let mut named = BTreeSet::new();
        for (name, value) in wanted {
            match GATES.iter().find(|gate| gate.name == name) {
                None => errors.push(FeatureGateError::Unrecognized(name.clone())),
                Some(gate) if gate.locked && gate.default != *value => {
                    errors.push(FeatureGateError::Locked { name: name.clone(), wanted: *value, default: gate.default });
                }
                Some(gate) => {
                    gates.enabled.insert(gate.name, *value);
                    named.insert(gate.name);
                }
            }
        }
        for (all, stage) in [("AllAlpha", Stage::Alpha), ("AllBeta", Stage::Beta)] {
            let Some(value) = wanted.get(all) else { continue };
            for gate in GATES.iter().filter(|gate| gate.stage == stage && !named.contains(gate.name)) {
                gates.enabled.insert(gate.name, *value);
            }
        }
        if errors.is_empty() {
            errors = gates.unmet_dependencies();
        }
        if errors.is_empty() { Ok(gates) } else { Err(errors) }
    }

    fn unmet_dependencies(&self) -> Vec<FeatureGateError> {
        let mut errors = Vec::new();
        for (name, needs) in DEPENDENCIES.iter().filter(|(name, _)| self.enabled(name)) {
            let disabled: Vec<_> = needs.iter().copied().filter(|need| !self.enabled(need)).collect();
            if !disabled.is_empty() {
                errors.push(FeatureGateError::Dependency { name, disabled });
            }
        }
        errors
    }

    /// Whether the gate is on; a name nobody knows is off.
    pub fn enabled(&self, name: &str) -> bool {
        self.enabled.get(name).copied().unwrap_or(false)
    }

    /// Each gate with its stage and whether it is on, by name: for the `kubernetes_feature_enabled` metric.
    pub fn all(&self) -> impl Iterator<Item = (&'static Gate, bool)> + '_ {
        GATES.iter().map(|gate| (gate, self.enabled(gate.name)))
    }

    /// The lines `--help` prints under `--feature-gates`: alpha and beta gates, sorted.
    pub fn known_features() -> impl Iterator<Item = String> {
        GATES.iter().filter_map(|gate| {
            let stage = match gate.stage {
                Stage::Alpha => "ALPHA",
                Stage::Beta => "BETA",
                Stage::Ga | Stage::Deprecated => return None,
            };
            Some(format!("{}=true|false ({stage} - default={})", gate.name, gate.default))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gates(wanted: &[(&str, bool)]) -> Result<FeatureGates, Vec<FeatureGateError>> {
        FeatureGates::from_map(&wanted.iter().map(|(name, on)| ((*name).to_owned(), *on)).collect())
    }

    fn message(wanted: &[(&str, bool)]) -> String {
        gates(wanted).unwrap_err().iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn s10_errors_are_worded_as_upstream() {
        assert_eq!(message(&[("Nonsense", true)]), "unrecognized feature gate: Nonsense");
        assert_eq!(
            message(&[("NodeSwap", false)]),
            "cannot set feature gate NodeSwap to false, feature is locked to true"
        );
        assert_eq!(
            message(&[("ResourceHealthStatus", false), ("ResourceHealthStatusMessage", true)]),
            "ResourceHealthStatusMessage is enabled, but depends on features that are disabled: [ResourceHealthStatus]"
        );
    }

    #[test]
    fn s10_all_alpha_leaves_the_named_ones() {
        let on = gates(&[("AllAlpha", true), ("AllBeta", true), ("EventedPLEG", false)]).unwrap();
        assert!(on.enabled("CRIListStreaming") && !on.enabled("EventedPLEG"));
        assert!(!FeatureGates::default().enabled("CRIListStreaming"));
        assert!(gates(&[("NodeSwap", true)]).unwrap().enabled("NodeSwap"), "a locked gate may be set to its default");
    }

    #[test]
    fn table_is_sorted_without_doubles_and_its_dependencies_exist() {
        assert!(GATES.windows(2).all(|pair| pair[0].name < pair[1].name));
        for (name, needs) in DEPENDENCIES {
            for name in needs.iter().chain([name]) {
                assert!(GATES.iter().any(|gate| gate.name == *name), "{name}");
            }
        }
        assert!(FeatureGates::default().unmet_dependencies().is_empty());
    }
}
