//! The checkpoint files `allocated_pods_state` and `actuated_pods_state` under the kubelet's root directory, in upstream's format (contract P-73):
//! `{"data": "<JSON as text>", "checksum": n}`, so that either agent finds what the other left.
//!
//! Reading never fails the agent: what cannot be used is set aside with an error that names the file, and the pods' specs are taken instead.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::pod_resources::PodResources;
use crate::pods::PodUid;

pub const ALLOCATED: &str = "allocated_pods_state";
pub const ACTUATED: &str = "actuated_pods_state";

/// A checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("could not restore state from checkpoint {}: checkpoint is corrupted: {why}", path.display())]
    Corrupt { path: PathBuf, why: String },
    #[error("checkpoint {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

#[derive(Serialize, Deserialize)]
struct File {
    data: String,
    checksum: u64,
}

#[derive(Serialize, Deserialize, Default)]
struct Data<T> {
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    entries: Option<T>,
}

/// Entries by pod UID, as text.
pub type Entries<T> = BTreeMap<String, T>;

/// FNV-1a-32 over Go's printed form of the text.
fn checksum(data: &str) -> u64 {
    let bytes = b"(string)".iter().chain(data.as_bytes());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    u64::from(hash)
}

/// The file's text.
pub(super) fn encode(entries: &Entries<&PodResources>) -> String {
    let data = Data { entries: Some(entries).filter(|e| !e.is_empty()) };
    let data = serde_json::to_string(&data).unwrap_or_default();
    let checksum = checksum(&data);
    serde_json::to_string(&File { data, checksum }).unwrap_or_default()
}

/// What the file says, or why it cannot be trusted.
pub(super) fn decode(text: &str) -> Result<BTreeMap<PodUid, PodResources>, String> {
    let file: File = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let expected = checksum(&file.data);
    if file.checksum != expected {
        return Err(format!("checksum is {}, of its data it is {expected}", file.checksum));
    }
    let data: Data<Entries<PodResources>> = serde_json::from_str(&file.data).map_err(|e| e.to_string())?;
    Ok(data.entries.unwrap_or_default().into_iter().map(|(uid, held)| (PodUid::new(uid), held)).collect())
}

/// Reads a checkpoint; none when there is none. One that cannot be trusted is renamed to `<name>.corrupt`.
pub(super) fn read(path: &Path) -> Result<BTreeMap<PodUid, PodResources>, CheckpointError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => String::from("not UTF-8"),
        Err(source) => return Err(CheckpointError::Io { path: path.to_owned(), source }),
    };
    decode(&text).map_err(|why| {
        let aside = path.with_extension("corrupt");
        if let Err(error) = fs::rename(path, &aside) {
            tracing::warn!(path = %path.display(), %error, "Setting a corrupt checkpoint aside failed");
        }
        CheckpointError::Corrupt { path: path.to_owned(), why }
    })
}

/// Replaces the file as a whole: a crash leaves the old one or the new one.
pub(super) fn write(path: &Path, text: &str) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(".").tempfile_in(directory).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From upstream's own test of its format.
    const GOLDEN: &str = r#"{"data":"{\"entries\":{\"pod1\":{\"ContainerResources\":{\"container1\":{\"requests\":{\"cpu\":\"1Ki\",\"memory\":\"1Ki\"}}}}}}","checksum":1178570812}"#;

    fn sample() -> BTreeMap<PodUid, PodResources> {
        decode(GOLDEN).unwrap()
    }

    fn text(held: &BTreeMap<PodUid, PodResources>) -> String {
        encode(&held.iter().map(|(uid, held)| (uid.to_string(), held)).collect())
    }

    #[test]
    fn p73_reads_what_the_go_kubelet_wrote() {
        let held = sample();
        let requests = held[&PodUid::from("pod1")].containers["container1"].requests.clone().unwrap();
        assert_eq!(requests["cpu"].0, "1Ki");
    }

    #[test]
    fn p73_writes_what_the_go_kubelet_reads() {
        let expected = r#"{"data":"{\"entries\":{\"pod1\":{\"ContainerResources\":{\"container1\":{\"requests\":{\"cpu\":\"1Ki\",\"memory\":\"1Ki\"}}},\"PodLevelResources\":null,\"EmptyDirVolumeLimits\":null}}}","checksum":"#;
        let made = text(&sample());
        assert!(made.starts_with(expected), "{made}");
        assert_eq!(decode(&made).unwrap(), sample());
        assert_eq!(text(&BTreeMap::new()).split(",\"checksum").next(), Some(r#"{"data":"{}""#));
    }

    #[test]
    fn p73_a_corrupt_checkpoint_is_set_aside_with_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ALLOCATED);
        assert!(read(&path).unwrap().is_empty(), "none yet");
        for bad in [GOLDEN.replace("1178570812", "7"), "{".to_owned(), GOLDEN.replace("entries", "entires")] {
            fs::write(&path, bad).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("allocated_pods_state: checkpoint is corrupted: "), "{error}");
            assert!(!path.exists() && dir.path().join("allocated_pods_state.corrupt").exists());
            assert!(read(&path).unwrap().is_empty());
        }
        write(&path, &text(&sample())).unwrap();
        assert_eq!(read(&path).unwrap(), sample());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }
}
