//! From configuration files to one JSON object: YAML 1.1 as Go reads it, strict first, drop-ins merged over it.
//!
//! Bytes of `--config` and the `.conf` files of `--config-dir` go in; a JSON object of known fields, without nulls,
//! and the warnings that strict decoding gave come out. Contract S-05 to S-08. Reads files, nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};
use serde_saphyr::DuplicateKeyPolicy;

use super::fields::{self, FIELDS, Unset};
use super::go_duration::GoDuration;
use super::types::KubeletConfiguration;

pub(super) const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
pub(super) const KIND: &str = "KubeletConfiguration";

/// Paths that a file may give relative to itself (contract S-08).
const RELATIVE_PATHS: [&str; 7] = [
    "staticPodPath",
    "authentication.x509.clientCAFile",
    "tlsCertFile",
    "tlsPrivateKeyFile",
    "resolvConf",
    "volumePluginDir",
    "podLogsDir",
];

/// Hard eviction thresholds of a file that names none.
const DEFAULT_EVICTION_HARD: [(&str, &str); 5] = [
    ("memory.available", "100Mi"),
    ("nodefs.available", "10%"),
    ("nodefs.inodesFree", "5%"),
    ("imagefs.available", "15%"),
    ("imagefs.inodesFree", "5%"),
];

/// Why a file does not give a configuration. The caller adds the path.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("failed to read kubelet config file {path:?}, error: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("kubelet config file {0:?} was empty")]
    Empty(PathBuf),
    #[error("failed to decode: {0}")]
    Yaml(String),
    #[error("failed to decode: Object '{0}' is missing")]
    NoTypeMeta(&'static str),
    #[error("failed to decode: no kind {kind:?} is registered for version {version:?}")]
    WrongKind { kind: String, version: String },
    #[error("failed to decode: {field}: {reason}")]
    Field { field: String, reason: String },
    #[error("failed to walk through kubelet dropin directory {path:?}: {source}")]
    Walk { path: PathBuf, source: std::io::Error },
    #[error(
        "failed to walk through kubelet dropin directory {directory:?}: failed to load kubelet dropin file, path: \
         {path}, error: {source}",
        path = .path.display()
    )]
    DropIn { directory: PathBuf, path: PathBuf, source: Box<DecodeError> },
}

/// A configuration on its way: known fields alone, and what was wrong but not fatal.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub object: Value,
    pub warnings: Vec<String>,
}

/// Reads `--config`: relative paths made absolute, defaults that depend on other fields filled in.
pub(super) fn load_file(path: &Path) -> Result<Decoded, DecodeError> {
    let mut decoded = decode(&read(path)?)?;
    decoded.object = with_dependent_defaults(decoded.object);
    let directory = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    resolve_relative_paths(&mut decoded.object, &std::path::absolute(&directory).unwrap_or(directory));
    let merge = decoded.object.get("mergeDefaultEvictionSettings") == Some(&Value::Bool(true));
    match decoded.object.get_mut("evictionHard").and_then(Value::as_object_mut) {
        None => fields::set(&mut decoded.object, "evictionHard", json!(BTreeMap::from(DEFAULT_EVICTION_HARD))),
        Some(thresholds) if merge => {
            for (signal, threshold) in DEFAULT_EVICTION_HARD {
                thresholds.entry(signal).or_insert_with(|| json!(threshold));
            }
        }
        Some(_) => {}
    }
    Ok(decoded)
}

fn read(path: &Path) -> Result<String, DecodeError> {
    let text = fs::read_to_string(path).map_err(|source| DecodeError::Read { path: path.to_owned(), source })?;
    if text.is_empty() { Err(DecodeError::Empty(path.to_owned())) } else { Ok(text) }
}

/// Strict first; unknown and doubled fields become warnings, all else is an error.
pub(super) fn decode(text: &str) -> Result<Decoded, DecodeError> {
    let mut strict_errors = Vec::new();
    let mut object = match parse_yaml(text, DuplicateKeyPolicy::Error) {
        Ok(object) => object,
        Err(strict) => {
            let lenient = parse_yaml(text, DuplicateKeyPolicy::LastWins).map_err(DecodeError::Yaml)?;
            strict_errors.push(strict);
            lenient
        }
    };
    take_type_meta(&mut object)?;
    strict_errors.extend(unknown_field_errors(&fields::take_unknown(&mut object)));
    drop_nulls(&mut object);
    typed(&with_dependent_defaults(object.clone()))?;
    Ok(Decoded { object, warnings: lenient_warning(&strict_errors).into_iter().collect() })
}

fn unknown_field_errors(paths: &[String]) -> Vec<String> {
    paths.iter().map(|path| format!("unknown field {path:?}")).collect()
}

fn lenient_warning(strict_errors: &[String]) -> Option<String> {
    let errors = (!strict_errors.is_empty()).then(|| strict_errors.join(", "))?;
    Some(format!("Using lenient decoding as strict decoding failed: strict decoding error: {errors}"))
}

/// YAML 1.1 scalars as Go reads them (dependencies 5.1): `0644` is octal, `yes` is true.
fn parse_yaml(text: &str, duplicate_keys: DuplicateKeyPolicy) -> Result<Value, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true, duplicate_keys: duplicate_keys };
    serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())
}

fn take_type_meta(object: &mut Value) -> Result<(), DecodeError> {
    let Value::Object(map) = object else {
        return Err(DecodeError::NoTypeMeta("Kind"));
    };
    let mut take = |name: &str| match map.remove(name) {
        Some(Value::String(text)) if !text.is_empty() => Some(text),
        _ => None,
    };
    let (kind, version) = (take("kind"), take("apiVersion"));
    let kind = kind.ok_or(DecodeError::NoTypeMeta("Kind"))?;
    let version = version.ok_or(DecodeError::NoTypeMeta("apiVersion"))?;
    if (kind.as_str(), version.as_str()) == (KIND, API_VERSION) {
        return Ok(());
    }
    Err(DecodeError::WrongKind { kind, version })
}

fn drop_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, child| !child.is_null());
        map.values_mut().for_each(drop_nulls);
    }
}

/// Takes out the values that count as unset, and fills the defaults that depend on other fields.
pub(super) fn with_dependent_defaults(mut object: Value) -> Value {
    for field in FIELDS {
        let unset = match (field.unset, fields::get(&object, field.path)) {
            (Unset::Zero, Some(value)) => *value == json!(0) || *value == json!(""),
            (Unset::ZeroDuration, Some(Value::String(text))) => GoDuration::parse(text) == Ok(GoDuration::ZERO),
            (Unset::ZeroDuration, Some(value)) => *value == json!(0),
            _ => false,
        };
        if unset {
            fields::remove(&mut object, field.path);
        }
    }
    let Value::Object(map) = &mut object else { return object };
    if let Some(update) = map.get("nodeStatusUpdateFrequency").cloned() {
        map.entry("nodeStatusReportFrequency").or_insert(update);
    }
    if map.get("maxParallelImagePulls").and_then(Value::as_i64).is_some_and(|pulls| pulls >= 2) {
        map.entry("serializeImagePulls").or_insert(json!(false));
    }
    if map.get("podPidsLimit").and_then(Value::as_i64).is_some_and(|limit| limit < 0) {
        map.insert("podPidsLimit".to_owned(), json!(-1));
    }
    without_gated_defaults(map);
    object
}

/// Two defaults exist only while their gate is on.
fn without_gated_defaults(map: &mut Map<String, Value>) {
    let off =
        |map: &Map<String, Value>, gate: &str| map.get("featureGates").and_then(|g| g.get(gate)) == Some(&json!(false));
    if off(map, "KubeletCrashLoopBackOffMax") {
        map.entry("crashLoopBackOff").or_insert(json!({ "maxContainerRestartPeriod": null }));
    }
    if off(map, "KubeletEnsureSecretPulledImages") {
        map.entry("imagePullCredentialsVerificationPolicy").or_insert(json!(""));
    }
}

/// The object as a configuration, defaults filled. An error names the field at fault.
pub(super) fn typed(object: &Value) -> Result<KubeletConfiguration, DecodeError> {
    serde_json::from_value(object.clone()).map_err(|error| {
        let at_fault = FIELDS
            .iter()
            .map(|field| field.path.split_once('[').map_or(field.path, |(list, _)| list))
            .find_map(|path| {
                let mut alone = json!({});
                fields::set(&mut alone, path, fields::get(object, path)?.clone());
                serde_json::from_value::<KubeletConfiguration>(alone).err().map(|error| (path, error))
            });
        match at_fault {
            Some((path, error)) => DecodeError::Field { field: path.to_owned(), reason: error.to_string() },
            None => DecodeError::Yaml(error.to_string()),
        }
    })
}

fn resolve_relative_paths(object: &mut Value, root: &Path) {
    for field in RELATIVE_PATHS {
        let Some(Value::String(text)) = fields::get(object, field) else { continue };
        if !text.is_empty() && !Path::new(text).is_absolute() {
            let absolute = clean(&root.join(text));
            fields::set(object, field, json!(absolute));
        }
    }
}

/// Go's `filepath.Clean` of an absolute path: no `.`, no `..`, no doubled slash. Looks at the text alone.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// Merges each `.conf` file below `directory`, in lexical order, over `base` (a full configuration).
pub(super) fn merge_drop_ins(base: &mut Decoded, directory: &Path) -> Result<(), DecodeError> {
    for path in drop_ins(directory)? {
        let mut patch = read(&path).and_then(|text| decode_drop_in(&text)).map_err(|source| DecodeError::DropIn {
            directory: directory.to_owned(),
            path: path.clone(),
            source: Box::new(source),
        })?;
        let unknown = fields::take_unknown(&mut patch);
        base.warnings
            .extend(lenient_warning(&unknown_field_errors(&unknown)).map(|w| format!("{}: {w}", path.display())));
        merge_patch(&mut base.object, patch);
    }
    base.object = with_dependent_defaults(std::mem::take(&mut base.object));
    Ok(())
}

fn decode_drop_in(text: &str) -> Result<Value, DecodeError> {
    let mut patch = parse_yaml(text, DuplicateKeyPolicy::Error).map_err(DecodeError::Yaml)?;
    take_type_meta(&mut patch)?;
    Ok(patch)
}

/// All `.conf` files below `directory`, in the order Go walks: lexical within each directory.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, DecodeError> {
    let failed = |source| DecodeError::Walk { path: directory.to_owned(), source };
    let mut entries = fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            found.extend(drop_ins(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "conf") || entry.file_name() == ".conf" {
            found.push(path);
        }
    }
    Ok(found)
}

/// JSON merge patch (RFC 7386): null removes, objects merge, all else replaces.
fn merge_patch(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(&name);
        } else {
            merge_patch(target.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Decoded, DecodeError> {
        decode(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{body}"))
    }

    fn configuration(body: &str) -> KubeletConfiguration {
        typed(&with_dependent_defaults(parse(body).unwrap().object)).unwrap()
    }

    #[test]
    fn s06_wrong_kind_or_version_is_fatal() {
        for (text, message) in [
            ("port: 1", "failed to decode: Object 'Kind' is missing"),
            ("kind: KubeletConfiguration", "failed to decode: Object 'apiVersion' is missing"),
            ("kind: Pod\napiVersion: v1", "failed to decode: no kind \"Pod\" is registered for version \"v1\""),
        ] {
            assert_eq!(decode(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn s06_unknown_and_doubled_fields_are_warnings() {
        let decoded = parse("port: 1\nport: 2\nfuture: 1\nauthentication: {webhook: {new: 1}}").unwrap();
        assert_eq!(decoded.object["port"], 2);
        let [warning] = &decoded.warnings[..] else { panic!("{:?}", decoded.warnings) };
        assert!(
            warning.starts_with("Using lenient decoding as strict decoding failed: strict decoding error: "),
            "{warning}"
        );
        for part in ["duplicate", "unknown field \"future\"", "unknown field \"authentication.webhook.new\""] {
            assert!(warning.contains(part), "{warning}");
        }
    }

    #[test]
    fn s06_a_wrong_type_names_its_field() {
        for (body, field) in [
            ("port: many", "port"),
            ("authentication: {webhook: {cacheTTL: 5}}", "authentication.webhook.cacheTTL"),
            ("syncFrequency: 1d", "syncFrequency"),
            ("kubeReserved: {cpu: 1}", "kubeReserved"),
            ("reservedMemory: [{numaNode: 0, limits: {memory: lots}}]", "reservedMemory"),
        ] {
            let error = parse(body).unwrap_err().to_string();
            assert!(error.starts_with(&format!("failed to decode: {field}: ")), "{error}");
        }
    }

    #[test]
    fn yaml_1_1_scalars() {
        let read = configuration("enableServer: off\nfailSwapOn: no\nmaxOpenFiles: 0644\nclusterDomain: \"no\"");
        assert!(!read.enable_server && !read.fail_swap_on);
        assert_eq!((read.max_open_files, read.cluster_domain.as_str()), (420, "no"));
        assert_eq!(
            typed(
                &decode(r#"{"kind":"KubeletConfiguration","apiVersion":"kubelet.config.k8s.io/v1beta1","port":1}"#)
                    .unwrap()
                    .object
            )
            .unwrap()
            .port,
            1
        );
    }

    #[test]
    fn zero_and_null_mean_the_default_where_go_has_no_pointer() {
        let read = configuration(
            "port: 0\nsyncFrequency: 0s\naddress: ''\nmaxPods: null\nhealthzPort: 0\nregistryPullQPS: 0\n\
             resolvConf: ''\nlogging: {flushFrequency: 0}\nauthentication: {webhook: {cacheTTL: '0'}}\n\
             cpuCFSQuotaPeriod: 0s\npodPidsLimit: -7",
        );
        let default = KubeletConfiguration::default();
        assert_eq!(read.port, default.port);
        assert_eq!(read.sync_frequency, default.sync_frequency);
        assert_eq!(read.address, default.address);
        assert_eq!(read.max_pods, default.max_pods);
        assert_eq!(read.logging, default.logging);
        assert_eq!(read.authentication, default.authentication);
        assert_eq!((read.healthz_port, read.registry_pull_qps, read.pod_pids_limit), (0, 0, -1));
        assert_eq!((read.resolv_conf.as_str(), read.cpu_cfs_quota_period), ("", GoDuration::ZERO));
    }

    #[test]
    fn defaults_that_depend_on_other_fields() {
        assert_eq!(configuration("").node_status_report_frequency, GoDuration::from_secs(300));
        let read = configuration("nodeStatusUpdateFrequency: 7s\nmaxParallelImagePulls: 4");
        assert_eq!(read.node_status_report_frequency, GoDuration::from_secs(7));
        assert!(!read.serialize_image_pulls);
        assert!(configuration("maxParallelImagePulls: 1").serialize_image_pulls);
        let gated =
            configuration("featureGates: {KubeletCrashLoopBackOffMax: false, KubeletEnsureSecretPulledImages: false}");
        assert_eq!(gated.crash_loop_backoff.max_container_restart_period, None);
        assert_eq!(gated.image_pull_credentials_verification_policy, "");
    }

    #[test]
    fn s08_paths_are_relative_to_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubelet.yaml");
        fs::write(&file, format!("apiVersion: {API_VERSION}\nkind: {KIND}\nstaticPodPath: ../manifests\nresolvConf: /etc/r\nauthentication: {{x509: {{clientCAFile: pki/./ca.crt}}}}")).unwrap();
        let object = load_file(&file).unwrap().object;
        let expected = directory.path().parent().unwrap().join("manifests");
        assert_eq!(object["staticPodPath"], json!(expected));
        assert_eq!(object["resolvConf"], "/etc/r");
        assert_eq!(object["authentication"]["x509"]["clientCAFile"], json!(directory.path().join("pki/ca.crt")));
        assert_eq!(object["evictionHard"]["memory.available"], "100Mi");
    }

    #[test]
    fn an_empty_or_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("empty");
        fs::write(&file, "").unwrap();
        assert_eq!(load_file(&file).unwrap_err().to_string(), format!("kubelet config file {file:?} was empty"));
        let missing = load_file(&directory.path().join("none")).unwrap_err().to_string();
        assert!(missing.starts_with("failed to read kubelet config file "), "{missing}");
    }

    proptest::proptest! {
        #[test]
        fn any_text_decodes_or_errs(body in "[-a-zA-Z0-9:{}\\[\\],'\"&*#|> \n]{0,80}") {
            let _ = parse(&body);
        }
    }
}
