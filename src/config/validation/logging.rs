//! component-base's rules on logging, tracing and hidden metrics: their messages carry no prefix. Pure.

use super::super::feature_gates::FeatureGates;
use super::super::go_duration::GoDuration;
use super::super::sections::Logging;
use super::super::types::KubeletConfiguration;
use super::Violations;
use crate::cli::KUBERNETES_VERSION;

/// component-base's checks of `logging`; they come before all others.
pub(in super::super) fn validate_logging(logging: &Logging, gates: &FeatureGates) -> Vec<String> {
    let mut errors = Vec::new();
    let mut invalid = |fine: bool, message: String| {
        if !fine {
            errors.push(message);
        }
    };
    invalid(
        logging.flush_frequency > GoDuration::ZERO,
        format!("logging.flushFrequency: Invalid value: \"{}\": Must be greater than zero", logging.flush_frequency),
    );
    invalid(
        matches!(logging.format.as_str(), "text" | "json"),
        format!("logging.format: Invalid value: {:?}: Unsupported log format", logging.format),
    );
    let most = i32::MAX.unsigned_abs();
    invalid(
        logging.verbosity <= most,
        format!("logging.verbosity: Invalid value: {}: Must be <= {most}", logging.verbosity),
    );
    invalid(
        logging.vmodule.is_empty() || matches!(logging.format.as_str(), "" | "text"),
        "logging.vmodule: Forbidden: Only supported for text log format".to_owned(),
    );
    for (index, item) in logging.vmodule.iter().enumerate() {
        invalid(
            !item.file_pattern.is_empty(),
            format!("logging.vmodule[{index}]: Required value: File pattern must not be empty"),
        );
        invalid(
            !item.file_pattern.contains(['=', ',']),
            format!(
                "logging.vmodule[{index}]: Invalid value: {:?}: File pattern must not contain equal sign or comma",
                item.file_pattern
            ),
        );
    }
    for (format, routing) in [("text", &logging.options.text), ("json", &logging.options.json)] {
        for (unset, field) in
            [(!routing.split_stream, "splitStream"), (routing.info_buffer_size == "0", "infoBufferSize")]
        {
            invalid(
                unset || gates.enabled("LoggingAlphaOptions"),
                format!("logging.options.{format}.{field}: Forbidden: Feature LoggingAlphaOptions is disabled"),
            );
        }
    }
    errors
}

pub(super) fn check_tracing(c: &KubeletConfiguration, errors: &mut Violations) {
    let Some(tracing) = &c.tracing else { return };
    if let Some(rate) = tracing.sampling_rate_per_million {
        let path = "tracing.samplingRatePerMillion: Invalid value";
        errors.plain(rate >= 0, format!("{path}: {rate}: sampling rate must be positive"));
        errors.plain(
            rate <= 1_000_000,
            format!("{path}: {rate}: sampling rate per million must be less than or equal to one million"),
        );
    }
    let endpoint = tracing.endpoint.as_deref().unwrap_or_default();
    if let Some((scheme, _)) = endpoint.split_once("//") {
        let scheme = scheme.trim_end_matches(':');
        errors.plain(
            matches!(scheme, "dns" | "unix" | "unix-abstract"),
            format!(
                "tracing.endpoint: Invalid value: {endpoint:?}: unsupported scheme: {scheme}.  Options are none, dns, \
                 unix, or unix-abstract.  See https://github.com/grpc/grpc/blob/master/doc/naming.md"
            ),
        );
    }
}

/// Only the minor before this one may be asked for.
pub(super) fn check_hidden_metrics(c: &KubeletConfiguration, errors: &mut Violations) {
    let asked = c.show_hidden_metrics_for_version.as_str();
    let mut numbers = KUBERNETES_VERSION.trim_start_matches('v').split('.').map(|n| n.parse().unwrap_or(0_u32));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let previous = format!("{major}.{}", minor.saturating_sub(1));
    errors.plain(
        asked.is_empty() || asked == previous,
        format!(
            "invalid showHiddenMetricsForVersion: showHiddenMetricsForVersion: Invalid value: {asked:?}: must be omitted \
             or have the value '{previous}'; only the previous minor version is allowed"
        ),
    );
}
