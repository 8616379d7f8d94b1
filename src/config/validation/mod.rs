//! What a configuration must keep to before the node starts: Appendix F of the contract, in upstream's words.
//!
//! A configuration, the gates and the cgroup version go in; every violation comes out in upstream's order, so that one
//! start shows them all. Pure.

mod limits;
mod logging;
mod resources;

use std::ops::RangeInclusive;

use super::CgroupVersion;
use super::feature_gates::FeatureGates;
use super::types::KubeletConfiguration;

pub(super) use logging::validate_logging;
pub use resources::parse_cpu_set;

const PREFIX: &str = "invalid configuration: ";

/// All violations, in upstream's order; empty when the configuration is fine.
pub(super) fn validate(c: &KubeletConfiguration, gates: &FeatureGates, cgroup: CgroupVersion) -> Vec<String> {
    let mut errors = Violations::default();
    limits::check_lease_to_cfs(c, gates, &mut errors);
    limits::check_image_gc(c, gates, &mut errors);
    limits::check_limits(c, &mut errors);
    limits::check_start(c, gates, &mut errors);
    limits::check_taints(c, &mut errors);
    limits::check_topology(c, &mut errors);
    resources::check_shutdown(c, gates, &mut errors);
    resources::check_swap_and_backoff(c, gates, &mut errors);
    resources::check_node_allocatable(c, &mut errors);
    resources::check_hairpin(c, &mut errors);
    limits::check_pull_policy(c, gates, &mut errors);
    resources::check_reserved(c, &mut errors);
    resources::check_host(c, cgroup, &mut errors);
    logging::check_hidden_metrics(c, &mut errors);
    logging::check_tracing(c, &mut errors);
    resources::check_memory_qos(c, gates, &mut errors);
    resources::check_server_and_logs(c, &mut errors);
    errors.0
}

#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    /// Notes the message, with upstream's prefix, unless `fine`.
    fn require(&mut self, fine: bool, message: impl FnOnce() -> String) {
        if !fine {
            self.0.push(format!("{PREFIX}{}", message()));
        }
    }

    /// Notes the message as it is unless `fine`.
    fn plain(&mut self, fine: bool, message: String) {
        if !fine {
            self.0.push(message);
        }
    }

    fn not_negative(&mut self, value: i64, name: &str) {
        self.require(value >= 0, || format!("{name} {value} must not be a negative number"));
    }

    fn within(&mut self, value: i32, range: RangeInclusive<i32>, name: &str) {
        self.require(range.contains(&value), || {
            format!("{name} {value} must be between {} and {}, inclusive", range.start(), range.end())
        });
    }
}

#[cfg(test)]
mod tests;
