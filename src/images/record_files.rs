//! Pull records on disk (contract I-10): `<root>/image_manager/pulling` and `…/pulled`, one JSON file per image, in the form that the
//! Go kubelet reads and writes.
//!
//! A file's name is `sha256-` and the hash of what it is about; it appears whole or not at all. Files of the older version are written
//! again when they are read. Blocking.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::credentials::{Coordinates, hex};
use crate::time::api_time;

const VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const OLD_VERSION: &str = "kubelet.config.k8s.io/v1alpha1";
const INTENT: &str = "ImagePullIntent";
const RECORD: &str = "ImagePulledRecord";
const PREFIX: &str = "sha256-";
const TEMPORARY: &str = ".tmp";

/// A pull secret that an image was pulled with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SecretCredential {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    /// Empty: unknown, matches nothing.
    #[serde(rename = "credentialHash")]
    pub(super) credential_hash: String,
}

/// Who has shown to have access to an image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct PullCredentials {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) kubernetes_secrets: Vec<SecretCredential>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) kubernetes_service_accounts: Vec<Coordinates>,
    /// Pulled anonymously or with the node's own credentials.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) node_pods_accessible: bool,
}

/// That an image was pulled by a kubelet, and who may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PulledRecord {
    /// Whole seconds.
    pub(super) last_updated: Timestamp,
    /// The runtime's reference.
    pub(super) image_ref: String,
    /// By the image's name in the pod without tag and digest. A name that is not here was never proved.
    pub(super) credentials: BTreeMap<String, PullCredentials>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct IntentFile {
    kind: String,
    api_version: String,
    #[serde(default)]
    image: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RecordFile {
    kind: String,
    api_version: String,
    #[serde(default)]
    last_updated_time: Option<String>,
    #[serde(default)]
    image_ref: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    credential_mapping: BTreeMap<String, PullCredentials>,
}

/// Why a file counts as unreadable. The caller adds the path.
#[derive(Debug, thiserror::Error)]
enum DecodeError {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("no kind {kind:?} is registered for version {version:?}")]
    Kind { kind: String, version: String },
    #[error("lastUpdatedTime {0:?} is not a time")]
    Time(String),
}

/// What was found at the start.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) intents: Vec<String>,
    pub(super) pulled: Vec<PulledRecord>,
    /// Names of files under `pulled` that could not be read: what they are about must be proved again.
    pub(super) unreadable: BTreeSet<String>,
}

/// The two directories.
#[derive(Debug)]
pub(super) struct RecordFiles {
    pulling: PathBuf,
    pulled: PathBuf,
}

impl RecordFiles {
    /// Makes the directories, for the agent alone.
    pub(super) fn open(root_dir: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let parent = root_dir.join("image_manager");
        let files = Self { pulling: parent.join("pulling"), pulled: parent.join("pulled") };
        for directory in [&files.pulling, &files.pulled] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        Ok(files)
    }

    /// Reads everything; writes again what an older version wrote.
    pub(super) fn read_all(&self) -> Found {
        let mut found = Found::default();
        for (path, content) in read_directory(&self.pulling) {
            match content.map_err(Unreadable::from).and_then(|bytes| decode_intent(&bytes)) {
                Ok((image, current)) => {
                    if !current {
                        warn_on_error("migrating", &path, self.write_intent(&image));
                    }
                    found.intents.push(image);
                }
                Err(error) => tracing::error!(path = %path.display(), %error, "image pull intent cannot be read"),
            }
        }
        for (path, content) in read_directory(&self.pulled) {
            match content.map_err(Unreadable::from).and_then(|bytes| decode_record(&bytes)) {
                Ok((record, current)) => {
                    if !current {
                        warn_on_error("migrating", &path, self.write_record(&record));
                    }
                    found.pulled.push(record);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "image pulled record cannot be read");
                    found.unreadable.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
                }
            }
        }
        found
    }

    pub(super) fn write_intent(&self, image: &str) -> io::Result<()> {
        let intent = IntentFile { kind: INTENT.into(), api_version: VERSION.into(), image: image.to_owned() };
        write(&self.pulling, image, &intent)
    }

    pub(super) fn remove_intent(&self, image: &str) -> io::Result<()> {
        remove(&self.pulling, image)
    }

    pub(super) fn write_record(&self, record: &PulledRecord) -> io::Result<()> {
        let file = RecordFile {
            kind: RECORD.into(),
            api_version: VERSION.into(),
            last_updated_time: Some(api_time(record.last_updated).0.to_string()),
            image_ref: record.image_ref.clone(),
            credential_mapping: record.credentials.clone(),
        };
        write(&self.pulled, &record.image_ref, &file)
    }

    pub(super) fn remove_record(&self, image_ref: &str) -> io::Result<()> {
        remove(&self.pulled, image_ref)
    }
}

/// Also the key under which an unreadable file is remembered.
pub(super) fn file_name(about: &str) -> String {
    format!("{PREFIX}{}", hex(&Sha256::digest(about)))
}

fn warn_on_error(what: &str, path: &Path, done: io::Result<()>) {
    if let Err(error) = done {
        tracing::error!(path = %path.display(), %error, "{what} an image pull record failed");
    }
}

fn decode_intent(bytes: &[u8]) -> Result<(String, bool), Unreadable> {
    let file: IntentFile = serde_json::from_slice(bytes).map_err(DecodeError::from)?;
    let current = check_kind(&file.kind, INTENT, &file.api_version)?;
    Ok((file.image, current))
}

fn decode_record(bytes: &[u8]) -> Result<(PulledRecord, bool), Unreadable> {
    let file: RecordFile = serde_json::from_slice(bytes).map_err(DecodeError::from)?;
    let current = check_kind(&file.kind, RECORD, &file.api_version)?;
    let last_updated = match file.last_updated_time {
        Some(text) => text.parse().map_err(|_| DecodeError::Time(text))?,
        None => Timestamp::UNIX_EPOCH,
    };
    Ok((PulledRecord { last_updated, image_ref: file.image_ref, credentials: file.credential_mapping }, current))
}

#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Whether it is of the current version.
fn check_kind(kind: &str, wanted: &str, version: &str) -> Result<bool, DecodeError> {
    match (kind == wanted, version) {
        (true, VERSION) => Ok(true),
        (true, OLD_VERSION) => Ok(false),
        _ => Err(DecodeError::Kind { kind: kind.to_owned(), version: version.to_owned() }),
    }
}

/// Files of ours in a directory, in order of name.
fn read_directory(directory: &Path) -> Vec<(PathBuf, io::Result<Vec<u8>>)> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::error!(path = %directory.display(), %error, "image pull records cannot be listed");
            return Vec::new();
        }
    };
    let ours = |name: &str| name.starts_with(PREFIX) && !name.ends_with(TEMPORARY);
    let files = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(ours));
    let mut paths: Vec<PathBuf> = files.map(|entry| entry.path()).filter(|path| !path.is_dir()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path))).collect()
}

fn write(directory: &Path, about: &str, content: &impl Serialize) -> io::Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut bytes = serde_json::to_vec(content)?;
    bytes.push(b'\n');
    let target = directory.join(file_name(about));
    let temporary = directory.join(format!("{}{TEMPORARY}", file_name(about)));
    let written = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    let done = written.and_then(|mut file| file.write_all(&bytes)).and_then(|()| fs::rename(&temporary, &target));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

fn remove(directory: &Path, about: &str) -> io::Result<()> {
    match fs::remove_file(directory.join(file_name(about))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn record() -> PulledRecord {
        let secret = SecretCredential {
            uid: "testsecretuid".into(),
            namespace: "default".into(),
            name: "pull-secret".into(),
            credential_hash: "testsecrethash".into(),
        };
        let credentials = PullCredentials { kubernetes_secrets: vec![secret], ..Default::default() };
        PulledRecord {
            last_updated: at("2024-10-21T12:26:40Z"),
            image_ref: "testimageref".into(),
            credentials: [("docker.io/testing/test".to_owned(), credentials)].into(),
        }
    }

    /// Names and bytes as in upstream's own test data.
    #[test]
    fn i10_files_are_the_go_kubelets_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let files = RecordFiles::open(dir.path()).unwrap();
        files.write_record(&record()).unwrap();
        files.write_intent("docker.io/testing/test:something").unwrap();
        let manager = dir.path().join("image_manager");
        let pulled = manager.join("pulled/sha256-b3c0cc4278800b03a308ceb2611161430df571ca733122f0a40ac8b9792a9064");
        assert_eq!(
            fs::read_to_string(&pulled).unwrap(),
            concat!(
                r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","#,
                r#""lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testimageref","credentialMapping":"#,
                r#"{"docker.io/testing/test":{"kubernetesSecrets":[{"uid":"testsecretuid","namespace":"default","#,
                r#""name":"pull-secret","credentialHash":"testsecrethash"}]}}}"#,
                "\n"
            )
        );
        let pulling = manager.join("pulling/sha256-f24acc752be18b93b0504c86312bbaf482c9efb0c45e925bbccb0a591cebd7af");
        assert_eq!(
            fs::read_to_string(pulling).unwrap(),
            concat!(
                r#"{"kind":"ImagePullIntent","apiVersion":"kubelet.config.k8s.io/v1beta1","#,
                r#""image":"docker.io/testing/test:something"}"#,
                "\n"
            )
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&pulled), mode(&manager.join("pulled"))), (0o600, 0o700));
        let found = files.read_all();
        assert_eq!((found.pulled, found.intents), (vec![record()], vec!["docker.io/testing/test:something".into()]));
        files.remove_record("testimageref").unwrap();
        files.remove_intent("docker.io/testing/test:something").unwrap();
        files.remove_intent("never there").unwrap();
        let found = files.read_all();
        assert!(found.pulled.is_empty() && found.intents.is_empty() && found.unreadable.is_empty());
    }

    #[test]
    fn i10_other_grants_are_written_by_their_own_fields() {
        let account = Coordinates { uid: "u".into(), namespace: "ns".into(), name: "sa".into() };
        let accounts = PullCredentials { kubernetes_service_accounts: vec![account], ..Default::default() };
        let everybody = PullCredentials { node_pods_accessible: true, ..Default::default() };
        let json = |of: &PullCredentials| serde_json::to_string(of).unwrap();
        assert_eq!(json(&accounts), r#"{"kubernetesServiceAccounts":[{"uid":"u","namespace":"ns","name":"sa"}]}"#);
        assert_eq!(json(&everybody), r#"{"nodePodsAccessible":true}"#);
        assert_eq!(json(&PullCredentials::default()), "{}");
    }

    #[test]
    fn i10_old_files_are_migrated_and_broken_ones_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = RecordFiles::open(dir.path()).unwrap();
        let put = |sub: &str, about: &str, content: &str| {
            let path = dir.path().join("image_manager").join(sub).join(file_name(about));
            fs::write(&path, content).unwrap();
            path
        };
        let old = put(
            "pulled",
            "ref",
            r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1alpha1","lastUpdatedTime":null,"imageRef":"ref"}"#,
        );
        put("pulling", "i", r#"{"kind":"ImagePullIntent","apiVersion":"kubelet.config.k8s.io/v1alpha1","image":"i"}"#);
        let unknown_field =
            r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","imageRef":"a","more":1}"#;
        for (about, content) in
            [("cut", r#"{"kind":"ImagePul"#), ("kind", r#"{"kind":"Pod","apiVersion":"v1"}"#), ("field", unknown_field)]
        {
            put("pulled", about, content);
        }
        fs::write(dir.path().join("image_manager/pulled/sha256-x.tmp"), "{").unwrap();
        fs::write(dir.path().join("image_manager/pulled/other"), "{").unwrap();
        let found = files.read_all();
        assert_eq!(found.intents, ["i"]);
        assert_eq!(found.pulled.len(), 1);
        assert_eq!(found.unreadable, ["cut", "kind", "field"].map(file_name).into());
        assert!(fs::read_to_string(old).unwrap().contains("v1beta1"));
    }
}
