//! `CredentialProviderConfig` (contract I-07): one file, or a directory of them merged in order of name. Read once, at the start; a fault
//! ends the start with a message that names the file or the field.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;
use serde_saphyr::DuplicateKeyPolicy;
use sha2::{Digest, Sha256};

use super::super::credentials::hex;
use crate::config::{GoDuration, label_key_errors};

const GROUP: &str = "kubelet.config.k8s.io";
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];
const KIND: &str = "CredentialProviderConfig";
/// The only version whose plugins take service account tokens.
pub(super) const PLUGIN_V1: &str = "credentialprovider.kubelet.k8s.io/v1";
const PLUGIN_VERSIONS: [&str; 3] =
    [PLUGIN_V1, "credentialprovider.kubelet.k8s.io/v1alpha1", "credentialprovider.kubelet.k8s.io/v1beta1"];
const CACHE_TYPES: [&str; 2] = ["ServiceAccount", "Token"];

/// Why there are no credential providers although some are configured.
#[derive(Debug, thiserror::Error)]
pub enum ProviderConfigError {
    #[error("credential provider config path is empty")]
    NoPath,
    #[error("plugin binary directory {0} did not exist")]
    NoDirectory(String),
    #[error("error inspecting binary directory {path}: {source}")]
    Directory { path: String, source: std::io::Error },
    #[error("unable to access path {path:?}: {source}")]
    Access { path: PathBuf, source: std::io::Error },
    #[error("no configuration files found in directory {0:?}")]
    Empty(PathBuf),
    #[error("unable to read file {path:?}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("error decoding config {path:?}: {reason}")]
    Decode { path: PathBuf, reason: String },
    #[error("duplicate provider name {0:?} found in configuration file(s)")]
    Duplicate(String),
    #[error("failed to validate credential provider config: {0}")]
    Invalid(Faults),
    #[error("plugin binary executable {0} did not exist")]
    NoProgram(String),
    #[error("error inspecting binary executable {path}: {reason}", path = .path.display())]
    Program { path: PathBuf, reason: String },
}

/// One fault as it is, several in brackets.
#[derive(Debug)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [one] => f.write_str(one),
            many => write!(f, "[{}]", many.join(", ")),
        }
    }
}

/// One provider, as it is configured.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in super::super) struct ProviderConfig {
    /// Also the file name of the program.
    #[serde(default)]
    pub(in super::super) name: String,
    #[serde(default)]
    pub(in super::super) match_images: Vec<String>,
    /// When an answer does not say how long it holds. Always there after validation.
    #[serde(default)]
    pub(in super::super) default_cache_duration: Option<GoDuration>,
    #[serde(default)]
    pub(in super::super) api_version: String,
    #[serde(default)]
    pub(in super::super) args: Vec<String>,
    #[serde(default)]
    pub(in super::super) env: Vec<EnvVar>,
    #[serde(default)]
    pub(in super::super) token_attributes: Option<TokenAttributes>,
}

/// Its value may be a secret, so it has no `Debug` of its own.
#[derive(Clone, Deserialize)]
pub(in super::super) struct EnvVar {
    #[serde(default)]
    pub(in super::super) name: String,
    #[serde(default)]
    pub(in super::super) value: String,
}

impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=<redacted>", self.name)
    }
}

/// Service account mode.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in super::super) struct TokenAttributes {
    #[serde(default)]
    pub(in super::super) service_account_token_audience: String,
    #[serde(default)]
    pub(in super::super) cache_type: String,
    #[serde(default)]
    pub(in super::super) require_service_account: Option<bool>,
    #[serde(default)]
    pub(in super::super) required_service_account_annotation_keys: Vec<String>,
    #[serde(default)]
    pub(in super::super) optional_service_account_annotation_keys: Vec<String>,
}

/// Everything configured, validated.
#[derive(Debug)]
pub(in super::super) struct ProvidersConfig {
    pub(in super::super) providers: Vec<ProviderConfig>,
    /// `sha256:…` over the files, for the metric.
    pub(in super::super) hash: String,
}

/// Reads a file, or the `.json`, `.yaml` and `.yml` files of a directory. `token_mode`: gate KubeletServiceAccountTokenForCredentialProviders.
pub(in super::super) fn read(path: &Path, token_mode: bool) -> Result<ProvidersConfig, ProviderConfigError> {
    if path.as_os_str().is_empty() {
        return Err(ProviderConfigError::NoPath);
    }
    let mut hasher = Sha256::new();
    let (mut providers, mut names) = (Vec::new(), BTreeSet::new());
    for file in files(path)? {
        let bytes = fs::read(&file).map_err(|source| ProviderConfigError::Read { path: file.clone(), source })?;
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(&bytes);
        let decoded = decode(&bytes).map_err(|reason| ProviderConfigError::Decode { path: file, reason })?;
        for provider in decoded {
            if !names.insert(provider.name.clone()) {
                return Err(ProviderConfigError::Duplicate(provider.name));
            }
            providers.push(provider);
        }
    }
    let faults = validate(&providers, token_mode);
    if !faults.is_empty() {
        return Err(ProviderConfigError::Invalid(Faults(faults)));
    }
    Ok(ProvidersConfig { providers, hash: format!("sha256:{}", hex(&hasher.finalize())) })
}

fn files(path: &Path) -> Result<Vec<PathBuf>, ProviderConfigError> {
    let access = |source| ProviderConfigError::Access { path: path.to_owned(), source };
    if !fs::metadata(path).map_err(access)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let configuration = |path: &PathBuf| {
        let known = path.extension().is_some_and(|e| e == "json" || e == "yaml" || e == "yml");
        known && !path.is_dir()
    };
    let entries = fs::read_dir(path).map_err(access)?.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(configuration).collect();
    files.sort();
    if files.is_empty() { Err(ProviderConfigError::Empty(path.to_owned())) } else { Ok(files) }
}

/// Strict: unknown and doubled fields are errors.
fn decode(bytes: &[u8]) -> Result<Vec<ProviderConfig>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())?;
    let options = serde_saphyr::options! { legacy_octal_numbers: true, duplicate_keys: DuplicateKeyPolicy::Error };
    let mut object: Value = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())?;
    drop_nulls(&mut object);
    let version = check_type(&object)?;
    let unknown = unknown_fields(&object, version);
    if !unknown.is_empty() {
        let unknown: Vec<String> = unknown.iter().map(|path| format!("unknown field {path:?}")).collect();
        return Err(format!("strict decoding error: {}", unknown.join(", ")));
    }
    let list = match object.get_mut("providers").map(Value::take) {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => return Err("providers: expected a list".to_owned()),
    };
    let typed = list
        .into_iter()
        .enumerate()
        .map(|(at, provider)| serde_json::from_value(provider).map_err(|error| format!("providers[{at}]: {error}")));
    typed.collect()
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, child| !child.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The version, without the group.
fn check_type(object: &Value) -> Result<&str, String> {
    let text = |name: &str| object.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let kind = text("kind").ok_or("Object 'Kind' is missing")?;
    let version = text("apiVersion").ok_or("Object 'apiVersion' is missing")?;
    match version.split_once('/') {
        Some((GROUP, version)) if VERSIONS.contains(&version) && kind == KIND => Ok(version),
        Some((GROUP, _)) if kind != KIND => Err(format!("failed to decode {kind:?} (wrong Kind)")),
        _ => Err(format!("no kind {kind:?} is registered for version {version:?}")),
    }
}

fn unknown_fields(object: &Value, version: &str) -> Vec<String> {
    const TOP: &[&str] = &["kind", "apiVersion", "providers"];
    const PROVIDER: &[&str] =
        &["name", "matchImages", "defaultCacheDuration", "apiVersion", "args", "env", "tokenAttributes"];
    const ENV: &[&str] = &["name", "value"];
    const TOKEN: &[&str] = &[
        "serviceAccountTokenAudience",
        "cacheType",
        "requireServiceAccount",
        "requiredServiceAccountAnnotationKeys",
        "optionalServiceAccountAnnotationKeys",
    ];
    // Only the newest version has service account mode.
    let provider_fields = if version == "v1" { PROVIDER } else { &PROVIDER[..PROVIDER.len() - 1] };
    let mut unknown = Vec::new();
    let mut check = |value: &Value, known: &[&str], at: &str| {
        let keys = value.as_object().into_iter().flat_map(|map| map.keys());
        unknown.extend(keys.filter(|key| !known.contains(&key.as_str())).map(|key| format!("{at}{key}")));
    };
    check(object, TOP, "");
    for (at, provider) in list(object.get("providers")).iter().enumerate() {
        check(provider, provider_fields, &format!("providers[{at}]."));
        for (nth, env) in list(provider.get("env")).iter().enumerate() {
            check(env, ENV, &format!("providers[{at}].env[{nth}]."));
        }
        if let Some(token) = provider.get("tokenAttributes") {
            check(token, TOKEN, &format!("providers[{at}].tokenAttributes."));
        }
    }
    unknown
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn required(field: &str, why: &str) -> String {
    if why.is_empty() { format!("{field}: Required value") } else { format!("{field}: Required value: {why}") }
}

fn not_supported(field: &str, value: &str, known: &[&str]) -> String {
    let known: Vec<String> = known.iter().map(|k| format!("{k:?}")).collect();
    format!("{field}: Unsupported value: {value:?}: supported values: {}", known.join(", "))
}

/// All faults, worded as upstream.
fn validate(providers: &[ProviderConfig], token_mode: bool) -> Vec<String> {
    let mut faults = Vec::new();
    if providers.is_empty() {
        faults.push(required("providers", "at least 1 item in plugins is required"));
    }
    for provider in providers {
        let name = &provider.name;
        for (wrong, why) in [
            (name.contains('/'), "provider name cannot contain '/'"),
            (name.contains(' '), "provider name cannot contain spaces"),
            (name == ".", "provider name cannot be '.'"),
            (name == "..", "provider name cannot be '..'"),
        ] {
            if wrong {
                faults.push(format!("providers.name: Invalid value: {name:?}: {why}"));
            }
        }
        match provider.api_version.as_str() {
            "" => faults.push(required("providers.apiVersion", "")),
            version if PLUGIN_VERSIONS.contains(&version) => {}
            version => faults.push(not_supported("providers.apiVersion", version, &PLUGIN_VERSIONS)),
        }
        if provider.match_images.is_empty() {
            faults.push(required("providers.matchImages", "at least 1 item in matchImages is required"));
        }
        for pattern in &provider.match_images {
            if let Err(why) = check_pattern(pattern) {
                let value = format!("providers.matchImages: Invalid value: {pattern:?}");
                faults.push(format!("{value}: match image is invalid: {why}"));
            }
        }
        match provider.default_cache_duration {
            None => faults.push(required("providers.defaultCacheDuration", "")),
            Some(duration) if duration.is_negative() => faults.push(format!(
                "providers.defaultCacheDuration: Invalid value: \"{duration}\": must be greater than or equal to 0"
            )),
            Some(_) => {}
        }
        if let Some(attributes) = &provider.token_attributes {
            faults.extend(token_faults(attributes, &provider.api_version, token_mode));
        }
    }
    faults
}

fn token_faults(attributes: &TokenAttributes, api_version: &str, token_mode: bool) -> Vec<String> {
    const PATH: &str = "providers.tokenAttributes";
    let mut faults = Vec::new();
    if !token_mode {
        faults.push(format!(
            "{PATH}: Forbidden: tokenAttributes is not supported when KubeletServiceAccountTokenForCredentialProviders \
             feature gate is disabled"
        ));
    }
    if attributes.service_account_token_audience.is_empty() {
        faults.push(required(&format!("{PATH}.serviceAccountTokenAudience"), ""));
    }
    if attributes.require_service_account.is_none() {
        faults.push(required(&format!("{PATH}.requireServiceAccount"), ""));
    }
    if api_version != PLUGIN_V1 {
        faults.push(format!("{PATH}: Forbidden: tokenAttributes is only supported for {PLUGIN_V1} API version"));
    }
    let (needed, wished) =
        (&attributes.required_service_account_annotation_keys, &attributes.optional_service_account_annotation_keys);
    if attributes.require_service_account == Some(false) && !needed.is_empty() {
        faults.push(format!(
            "{PATH}.requiredServiceAccountAnnotationKeys: Forbidden: requireServiceAccount cannot be false when \
             requiredServiceAccountAnnotationKeys is set"
        ));
    }
    for (field, keys) in
        [("requiredServiceAccountAnnotationKeys", needed), ("optionalServiceAccountAnnotationKeys", wished)]
    {
        let mut seen = BTreeSet::new();
        for key in keys {
            for why in label_key_errors(&key.to_lowercase()) {
                faults.push(format!("{PATH}.{field}: Invalid value: {key:?}: {why}"));
            }
            if !seen.insert(key) {
                faults.push(format!("{PATH}.{field}: Duplicate value: {key:?}"));
            }
        }
    }
    let both: BTreeSet<&String> = needed.iter().filter(|key| wished.contains(key)).collect();
    if !both.is_empty() {
        let both: Vec<String> = both.iter().map(|key| format!("{key:?}")).collect();
        faults.push(format!(
            "{PATH}: Invalid value: [{}]: annotation keys cannot be both required and optional",
            both.join(",")
        ));
    }
    match attributes.cache_type.as_str() {
        "" => faults.push(required(
            &format!("{PATH}.cacheType"),
            &format!(
                "cacheType is required to be set when tokenAttributes is specified. Supported values are: {}",
                CACHE_TYPES.join(", ")
            ),
        )),
        known if CACHE_TYPES.contains(&known) => {}
        other => faults.push(not_supported(&format!("{PATH}.cacheType"), other, &CACHE_TYPES)),
    }
    faults
}

/// Whether `https://<pattern>` is a URL.
fn check_pattern(pattern: &str) -> Result<(), String> {
    let fault = |why: String| Err(format!("parse {:?}: {why}", format!("https://{pattern}")));
    let (host, path) = pattern.find('/').map_or((pattern, ""), |at| pattern.split_at(at));
    if let Some(bad) = pattern.chars().find(|c| c.is_control()) {
        return fault(format!("net/url: invalid control character in URL ({bad:?})"));
    }
    if let Some(bad) = host.chars().find(|c| " \"<>\\^`{}|".contains(*c)) {
        return fault(format!("invalid character {:?} in host name", bad.to_string()));
    }
    if let Some((_, port)) = host.rsplit_once(':').filter(|(name, _)| !name.contains(':') || name.ends_with(']'))
        && !port.bytes().all(|b| b.is_ascii_digit())
    {
        return fault(format!("invalid port {:?} after host", format!(":{port}")));
    }
    let escape = path.match_indices('%').find(|(at, _)| {
        let digits = path.as_bytes().get(at + 1..at + 3);
        !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    match escape {
        Some((at, _)) => fault(format!("invalid URL escape {:?}", path[at..].chars().take(3).collect::<String>())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<ProvidersConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.yaml");
        fs::write(&file, text).unwrap();
        read(&file, true).map_err(|error| error.to_string().replace(&format!("{file:?}"), "FILE"))
    }

    fn with(provider: &str) -> String {
        format!("apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {provider}\n")
    }

    const GOOD: &str = r#"{name: ecr, matchImages: ["*.dkr.ecr.*.amazonaws.com", "reg.io:5000/a"], defaultCacheDuration: 12h,
        apiVersion: credentialprovider.kubelet.k8s.io/v1, args: [get], env: [{name: A, value: hush}]}"#;

    #[test]
    fn i07_a_configuration_is_read_and_hashed() {
        for version in VERSIONS {
            let read = read_text(&with(GOOD).replace("k8s.io/v1\nkind", &format!("k8s.io/{version}\nkind"))).unwrap();
            let provider = &read.providers[0];
            assert_eq!((provider.name.as_str(), provider.args.len()), ("ecr", 1));
            assert_eq!(provider.default_cache_duration, Some(GoDuration::from_secs(12 * 3600)));
            assert!(read.hash.starts_with("sha256:") && read.hash.len() == 71);
            assert!(!format!("{read:?}").contains("hush"));
        }
    }

    #[test]
    fn i07_a_directory_is_merged_in_order_of_name_and_names_are_unique() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, provider: &str| {
            fs::write(dir.path().join(name), with(&GOOD.replace("ecr,", &format!("{provider},")))).unwrap();
        };
        assert!(
            read(dir.path(), true).unwrap_err().to_string().starts_with("no configuration files found in directory")
        );
        put("b.yml", "two");
        put("a.json", "one");
        put("ignored.txt", "x");
        let names = |config: ProvidersConfig| config.providers.into_iter().map(|p| p.name).collect::<Vec<_>>();
        assert_eq!(names(read(dir.path(), true).unwrap()), ["one", "two"]);
        put("c.yaml", "one");
        let error = read(dir.path(), true).unwrap_err().to_string();
        assert_eq!(error, "duplicate provider name \"one\" found in configuration file(s)");
        let missing = read(&dir.path().join("none"), true).unwrap_err().to_string();
        assert!(missing.starts_with("unable to access path"), "{missing}");
        assert_eq!(read(Path::new(""), true).unwrap_err().to_string(), "credential provider config path is empty");
    }

    #[test]
    fn i07_decoding_is_strict() {
        let head = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n";
        for (text, why) in [
            ("kind: CredentialProviderConfig\n".to_owned(), "Object 'apiVersion' is missing"),
            ("apiVersion: kubelet.config.k8s.io/v1\nkind: Pod\n".to_owned(), "failed to decode \"Pod\" (wrong Kind)"),
            (
                "apiVersion: v2\nkind: CredentialProviderConfig\n".to_owned(),
                "no kind \"CredentialProviderConfig\" is registered for version \"v2\"",
            ),
            (format!("{head}extra: 1\n"), "strict decoding error: unknown field \"extra\""),
            (with("{name: a, foo: 1}"), "strict decoding error: unknown field \"providers[0].foo\""),
            (with("{name: a, env: [{nome: x}]}"), "strict decoding error: unknown field \"providers[0].env[0].nome\""),
            (
                with("{name: a, tokenAttributes: {}}").replace("io/v1\n", "io/v1beta1\n"),
                "strict decoding error: unknown field \"providers[0].tokenAttributes\"",
            ),
        ] {
            assert_eq!(read_text(&text).unwrap_err(), format!("error decoding config FILE: {why}"));
        }
        assert!(read_text(&with("{name: [a]}")).unwrap_err().contains("providers[0]: "));
        assert!(read_text(&with("{name: a, name: b}")).unwrap_err().starts_with("error decoding config FILE: "));
    }

    #[test]
    fn i07_faults_are_worded_as_upstream() {
        let faulty = |change: &[(&str, &str)]| {
            let mut text = with(GOOD);
            for (from, to) in change {
                assert!(text.contains(from), "{from}");
                text = text.replacen(from, to, 1);
            }
            let error = read_text(&text).unwrap_err();
            error.strip_prefix("failed to validate credential provider config: ").map(str::to_owned).unwrap_or(error)
        };
        let plugin = "credentialprovider.kubelet.k8s.io/v1";
        assert_eq!(
            faulty(&[("ecr,", "a/b,")]),
            "providers.name: Invalid value: \"a/b\": provider name cannot contain '/'"
        );
        assert_eq!(faulty(&[("ecr,", "..,")]), "providers.name: Invalid value: \"..\": provider name cannot be '..'");
        assert_eq!(
            faulty(&[("apiVersion: credentialprovider.kubelet.k8s.io/v1", "apiVersion: v1")]),
            format!(
                "providers.apiVersion: Unsupported value: \"v1\": supported values: \"{plugin}\", \"{plugin}alpha1\", \"{plugin}beta1\""
            )
        );
        assert_eq!(
            faulty(&[("defaultCacheDuration: 12h,", ""), ("\"reg.io:5000/a\"", "\"a b\"")]),
            "[providers.matchImages: Invalid value: \"a b\": match image is invalid: parse \"https://a b\": invalid character \" \" in host name, providers.defaultCacheDuration: Required value]"
        );
        assert_eq!(
            faulty(&[("12h", "-1s")]),
            "providers.defaultCacheDuration: Invalid value: \"-1s\": must be greater than or equal to 0"
        );
        assert!(faulty(&[("reg.io:5000/a", "reg.io:x/a")]).contains("invalid port \":x\" after host"));
        assert!(faulty(&[("reg.io:5000/a", "reg.io/%zz")]).contains("invalid URL escape \"%zz\""));
        let tokens = |attributes: &str| faulty(&[("args:", &format!("tokenAttributes: {attributes}, args:"))]);
        assert_eq!(
            tokens("{serviceAccountTokenAudience: a, requireServiceAccount: true}"),
            "providers.tokenAttributes.cacheType: Required value: cacheType is required to be set when tokenAttributes is specified. Supported values are: ServiceAccount, Token"
        );
        assert_eq!(
            tokens(
                "{serviceAccountTokenAudience: a, requireServiceAccount: false, cacheType: X, requiredServiceAccountAnnotationKeys: [k, k], optionalServiceAccountAnnotationKeys: [k]}"
            ),
            "[providers.tokenAttributes.requiredServiceAccountAnnotationKeys: Forbidden: requireServiceAccount cannot be false when requiredServiceAccountAnnotationKeys is set, \
             providers.tokenAttributes.requiredServiceAccountAnnotationKeys: Duplicate value: \"k\", \
             providers.tokenAttributes: Invalid value: [\"k\"]: annotation keys cannot be both required and optional, \
             providers.tokenAttributes.cacheType: Unsupported value: \"X\": supported values: \"ServiceAccount\", \"Token\"]"
        );
        let empty = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\n";
        assert!(
            read_text(empty)
                .unwrap_err()
                .ends_with("providers: Required value: at least 1 item in plugins is required")
        );
    }
}
