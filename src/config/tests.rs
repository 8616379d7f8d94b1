//! The layers together, from files in a temporary directory.

use std::fs;

use serde_json::json;

use super::fields::{FIELDS, take_unknown};
use super::*;

const META: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

fn host() -> HostFacts {
    HostFacts { hostname: "Node-A".to_owned(), cgroup: CgroupVersion::V2 }
}

struct Files {
    directory: tempfile::TempDir,
    flags: Flags,
}

impl Files {
    fn with_config(body: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.yaml");
        fs::write(&file, format!("{META}{body}")).unwrap();
        Self { directory, flags: Flags { config_file: Some(file), ..Flags::default() } }
    }

    fn drop_in(mut self, name: &str, text: &str) -> Self {
        let drop_ins = self.directory.path().join("conf.d");
        let file = drop_ins.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
        self.flags.config_directory = Some(drop_ins);
        self
    }

    fn load(&self, overrides: &[Override]) -> Result<Config, ConfigError> {
        Config::load(self.flags.clone(), overrides, &host())
    }
}

fn over(path: &'static str, value: Value) -> Override {
    Override { path, value }
}

#[test]
fn s05_flags_over_drop_ins_over_file_over_defaults() {
    let files = Files::with_config(
        "maxPods: 10\nport: 1000\nhealthzPort: 5\nfeatureGates: {EventedPLEG: false, CRIListStreaming: true}",
    )
    .drop_in("10-a.conf", &format!("{META}port: 2000\nhealthzPort: 6"));
    let gates = json!({"EventedPLEG": true});
    let config = files.load(&[over("port", json!(3000)), over("featureGates", gates)]).unwrap();
    let kubelet = &config.kubelet;
    assert_eq!((kubelet.max_pods, kubelet.port, kubelet.healthz_port, kubelet.event_burst), (10, 3000, 6, 100));
    assert!(config.feature_gates.enabled("EventedPLEG") && config.feature_gates.enabled("CRIListStreaming"));
    assert_eq!(config.node_name, "node-a");
}

#[test]
fn s05_without_config_the_legacy_defaults_count() {
    let config = Config::load(Flags::default(), &[], &host()).unwrap();
    let kubelet = &config.kubelet;
    assert!(kubelet.authentication.anonymous.enabled && !kubelet.authentication.webhook.enabled);
    assert_eq!((kubelet.authorization.mode.as_str(), kubelet.read_only_port), ("AlwaysAllow", 10255));
    assert!(config.is_standalone() && config.eviction_thresholds.is_empty());
    let config = Files::with_config("").load(&[]).unwrap();
    assert_eq!((config.kubelet.authorization.mode.as_str(), config.kubelet.read_only_port), ("Webhook", 0));
    assert_eq!(config.eviction_thresholds.len(), 5);
}

#[test]
fn s07_drop_ins_merge_in_lexical_order() {
    let files =
        Files::with_config("clusterDNS: [10.0.0.1, 10.0.0.2]\nevictionHard: {memory.available: 1Gi}\nmaxPods: 50")
            .drop_in("20-b.conf", &format!("{META}clusterDNS: [10.0.0.3]\nlogging: {{verbosity: 4}}"))
            .drop_in(
                "10-a.conf",
                &format!("{META}clusterDNS: [10.0.0.9]\nevictionHard: {{nodefs.available: 5%}}\nmaxPods: null"),
            )
            .drop_in("sub/30-c.conf", &format!("{META}logging: {{format: json}}"))
            .drop_in("40-ignored.yaml", "not: read");
    let kubelet = files.load(&[]).unwrap().kubelet;
    assert_eq!(kubelet.cluster_dns, ["10.0.0.3"]);
    assert_eq!(kubelet.eviction_hard.len(), 2);
    assert_eq!((kubelet.logging.verbosity, kubelet.logging.format.as_str()), (4, "json"));
    assert_eq!(kubelet.max_pods, 110);
}

#[test]
fn s07_a_drop_in_must_say_what_it_is() {
    let error = Files::with_config("").drop_in("a.conf", "port: 1").load(&[]).unwrap_err().to_string();
    assert!(
        error.starts_with("failed to merge kubelet configs: failed to walk through kubelet dropin directory "),
        "{error}"
    );
    assert!(error.contains(": failed to load kubelet dropin file, path: "), "{error}");
    assert!(error.ends_with("Object 'Kind' is missing"), "{error}");
}

#[test]
fn s09_violations_are_aggregated() {
    let files = Files::with_config("port: -1\nmaxPods: -1");
    let path = files.flags.config_file.clone().unwrap();
    assert_eq!(
        files.load(&[]).unwrap_err().to_string(),
        format!(
            "failed to validate kubelet configuration, error: [invalid configuration: maxPods (--max-pods) -1 must not be \
             a negative number, invalid configuration: port (--port) -1 must be between 1 and 65535, inclusive], path: {}",
            path.display()
        )
    );
}

#[test]
fn s10_unknown_gate_is_fatal_from_file_and_flag() {
    let message = "failed to set feature gates from initial flags-based config: unrecognized feature gate: Nope";
    let from_file = Files::with_config("featureGates: {Nope: true}").load(&[]).unwrap_err();
    assert_eq!(from_file.to_string(), message);
    let from_flag = Files::with_config("").load(&[over("featureGates", json!({"Nope": true}))]).unwrap_err();
    assert_eq!(from_flag.to_string(), message);
}

#[test]
fn s06_unknown_fields_only_warn() {
    let config = Files::with_config("fromTheFuture: 1").load(&[]).unwrap();
    assert_eq!(
        config.warnings,
        ["Using lenient decoding as strict decoding failed: strict decoding error: unknown field \"fromTheFuture\""]
    );
}

#[test]
fn reservations_and_thresholds_that_do_not_parse_are_fatal() {
    for (body, message) in [
        ("systemReserved: {gpu: '1'}", "--system-reserved value failed to parse: cannot reserve \"gpu\" resource"),
        ("evictionHard: {nonsense: '1'}", "unsupported eviction signal nonsense"),
    ] {
        assert_eq!(Files::with_config(body).load(&[]).unwrap_err().to_string(), message);
    }
}

#[test]
fn a_flag_may_set_an_explicit_zero() {
    let config = Files::with_config("").load(&[over("eventBurst", json!(0))]).unwrap();
    assert_eq!(config.kubelet.event_burst, 0);
}

/// A real kubelet's answer, read back as a configuration, gives itself.
#[test]
fn configz_has_the_form_of_the_go_kubelet() {
    let text = include_str!("../../tests/data/configz-1.37.json");
    let expected: Value = serde_json::from_str(text).unwrap();
    let files = Files::with_config("");
    fs::write(files.flags.config_file.as_ref().unwrap(), expected["kubeletconfig"].to_string()).unwrap();
    let config = files.load(&[]).unwrap();
    assert_eq!(config.configz(), expected);
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn field_table_and_type_name_the_same_fields() {
    let mut every = serde_json::to_value(KubeletConfiguration::default()).unwrap();
    assert_eq!(take_unknown(&mut every), [""; 0]);
    let error = serde_json::from_value::<KubeletConfiguration>(json!({"?": 1})).unwrap_err().to_string();
    let of_type: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
    let mut of_table: Vec<&str> = FIELDS.iter().map(|field| field.path.split(['.', '[']).next().unwrap()).collect();
    of_table.dedup();
    assert_eq!(of_type, of_table);
}

#[test]
fn fields_without_effect_are_named_when_set() {
    let mut kubelet = KubeletConfiguration::default();
    assert_eq!(ineffective_fields(&kubelet), [""; 0]);
    kubelet.max_pods = 5;
    kubelet.protect_kernel_defaults = true;
    kubelet.authorization.mode = "AlwaysAllow".to_owned();
    kubelet.tracing = Some(Tracing { sampling_rate_per_million: Some(1), endpoint: None });
    assert_eq!(
        ineffective_fields(&kubelet),
        ["authorization.mode", "protectKernelDefaults", "tracing.samplingRatePerMillion"]
    );
}

#[test]
fn headers_of_the_static_pod_url_stay_out_of_debug() {
    let headers = StaticPodHeaders(BTreeMap::from([("Authorization".to_owned(), vec!["Bearer secret".to_owned()])]));
    assert_eq!(format!("{headers:?}"), "{\"Authorization\": \"<masked>\"}");
}
