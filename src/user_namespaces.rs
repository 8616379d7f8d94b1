//! The IDs of pods with a user namespace of their own: `spec.hostUsers: false` (contract P-58).
//!
//! Each such pod gets a block of host IDs that no other pod of the node has, as many of users as of groups. The block is recorded in
//! `pods/<uid>/userns`, in the Go kubelet's format, before the runtime hears of it, so that a restarted or exchanged agent keeps it. One owner
//! per node; touches that one file per pod, and once `getsubids`.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use protocols::cri::v1::{self, NamespaceMode};
use serde::{Deserialize, Serialize};

use crate::{
    node::NodeFacts,
    pods::{Pod, PodUid},
};

/// Blocks are multiples of this, and begin at one.
const UNIT: u32 = 65536;
/// The file in the pod's directory.
const RECORD: &str = "userns";
/// Whose sub-IDs are used, if the host has such a user.
const USER: &str = "kubelet";

/// Why a pod gets no user namespace, or the node none at all. Worded as upstream where upstream has words.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    #[error("can't set `spec.hostUsers: false`, runtime does not support user namespaces{0}")]
    Unsupported(String),
    #[error(
        "can't set `spec.hostUsers: false`, RuntimeClass handler {handler:?} does not support user namespaces{why}"
    )]
    UnsupportedHandler { handler: String, why: String },
    #[error("create user namespace: could not find an empty slot to allocate a user namespace")]
    Exhausted,
    #[error("user namespace: {0}")]
    Record(String),
    #[error("create user namespace: {path}: {source}")]
    Write { path: String, source: io::Error },
    #[error("{path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("user namespace mappings: {0}")]
    Range(String),
}

/// Host IDs that pods may have: `first` and `length - 1` more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    pub first: u32,
    pub length: u32,
}

impl IdRange {
    /// Everything above the node's own IDs.
    fn unconfigured(ids_per_pod: u32) -> Self {
        Self { first: ids_per_pod, length: u32::MAX - (ids_per_pod - 1) }
    }

    /// What `getsubids kubelet` says, if there are such a user and such a program; else all IDs above the first block.
    pub fn of_this_host(ids_per_pod: u32) -> Result<Self, UserNamespaceError> {
        let failed = |why: String| UserNamespaceError::Range(why);
        match nix::unistd::User::from_name(USER) {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(Self::unconfigured(ids_per_pod)),
            Err(errno) => return Err(failed(format!("looking up user {USER:?}: {}", errno.desc()))),
        }
        let ask = |groups: bool| {
            let arguments: &[&str] = if groups { &["-g", USER] } else { &[USER] };
            Command::new("getsubids").args(arguments).output()
        };
        let users = match ask(false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::unconfigured(ids_per_pod)),
            users => users,
        };
        let text = |out: io::Result<std::process::Output>, what: &str| match out {
            Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            Ok(out) => Err(failed(format!("error retrieving additional {what} for user {USER:?}: {}", out.status))),
            Err(error) => Err(failed(format!("error retrieving additional {what} for user {USER:?}: {error}"))),
        };
        let (users, groups) = (text(users, "uids")?, text(ask(true), "gids")?);
        if users != groups {
            return Err(failed(format!("mismatched subuids and subgids for user {USER:?}")));
        }
        Self::parse(&users)
    }

    /// One line: `0: kubelet 65536 7208960`.
    fn parse(output: &str) -> Result<Self, UserNamespaceError> {
        let text = output.trim_matches('\n');
        let parts: Vec<&str> = text.split_whitespace().collect();
        let numbers = match parts.as_slice() {
            [_, _, first, length] if !text.contains('\n') => first.parse().ok().zip(length.parse().ok()),
            _ => None,
        };
        let (first, length) =
            numbers.ok_or_else(|| UserNamespaceError::Range(format!("error parsing line {output:?}")))?;
        Ok(Self { first, length })
    }
}

/// `pods/<uid>/userns`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Record {
    fn new(host_id: u32, length: u32) -> Self {
        let mapping = vec![Mapping { host_id, container_id: 0, length }];
        Self { uid_mappings: mapping.clone(), gid_mappings: mapping }
    }

    /// The first host ID of a record that this node could have written.
    fn host_id(&self, length: u32) -> Result<u32, String> {
        let ([users], [groups]) = (self.uid_mappings.as_slice(), self.gid_mappings.as_slice()) else {
            return Err("invalid user namespace configuration: no more than one mapping allowed.".to_owned());
        };
        if users != groups {
            return Err("invalid user namespace configuration: GID and UID mapping should be identical".to_owned());
        }
        if users.container_id != 0 {
            return Err("invalid user namespace configuration: UID 0 must be mapped".to_owned());
        }
        if users.length != length {
            return Err(format!("wrong user namespace length {}", users.length));
        }
        if users.host_id % length != 0 {
            return Err(format!("wrong user namespace offset specified {}", users.host_id));
        }
        Ok(users.host_id)
    }
}

/// See the module.
#[derive(Debug)]
pub struct UserNamespaces {
    root_dir: PathBuf,
    range: IdRange,
    ids_per_pod: u32,
    /// Pod → its first host ID.
    used: Mutex<HashMap<PodUid, u32>>,
}

impl UserNamespaces {
    /// Reads what earlier agents recorded. Fails when the range cannot serve `max_pods` pods, or a record makes no sense: giving the same
    /// IDs out twice would be worse than not starting.
    pub fn open(root_dir: &Path, ids_per_pod: u32, max_pods: u32, range: IdRange) -> Result<Self, UserNamespaceError> {
        check(ids_per_pod, max_pods, range).map_err(UserNamespaceError::Range)?;
        let this = Self { root_dir: root_dir.to_owned(), range, ids_per_pod, used: Mutex::default() };
        let pods = root_dir.join("pods");
        let entries = match fs::read_dir(&pods) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(this),
            entries => {
                entries.map_err(|source| UserNamespaceError::Read { path: pods.display().to_string(), source })?
            }
        };
        for entry in entries.flatten() {
            let Some(uid) = entry.file_name().to_str().map(PodUid::from) else { continue };
            if let Some(first) = this.recorded(&uid)? {
                this.claim(&uid, first)?;
            }
        }
        Ok(this)
    }

    /// The user namespace of a pod's sandbox and containers; the node's own unless it asks for one. `handler` is the pod's runtime
    /// handler, "" the default. Blocking: writes and syncs a file the first time.
    pub fn of(&self, pod: &Pod, handler: &str, node: &NodeFacts) -> Result<v1::UserNamespace, UserNamespaceError> {
        if pod.spec().host_users != Some(false) {
            return Ok(Self::shared());
        }
        supported(handler, node)?;
        let first = self.block(pod.uid())?;
        let mapping = vec![v1::IdMapping { host_id: first, container_id: 0, length: self.ids_per_pod }];
        Ok(v1::UserNamespace { mode: NamespaceMode::Pod.into(), uids: mapping.clone(), gids: mapping })
    }

    /// The users of the host, which all pods have that ask for none of their own.
    pub fn shared() -> v1::UserNamespace {
        v1::UserNamespace { mode: NamespaceMode::Node.into(), ..Default::default() }
    }

    /// Lets the pod's IDs go. Nothing of it may run any more.
    pub fn release(&self, uid: &PodUid) {
        if self.lock().remove(uid).is_some() {
            let _ = fs::remove_file(self.record_path(uid));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PodUid, u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record_path(&self, uid: &PodUid) -> PathBuf {
        self.root_dir.join("pods").join(uid.as_str()).join(RECORD)
    }

    fn block(&self, uid: &PodUid) -> Result<u32, UserNamespaceError> {
        let known = self.lock().get(uid).copied();
        if let Some(first) = known {
            return Ok(first);
        }
        if let Some(first) = self.recorded(uid)? {
            self.claim(uid, first)?;
            return Ok(first);
        }
        let first = {
            let mut used = self.lock();
            let first = self.free(&used).ok_or(UserNamespaceError::Exhausted)?;
            used.insert(uid.clone(), first);
            first
        };
        self.write(uid, first).inspect_err(|_| {
            self.lock().remove(uid);
        })?;
        Ok(first)
    }

    fn free(&self, used: &HashMap<PodUid, u32>) -> Option<u32> {
        let taken: std::collections::HashSet<u32> = used.values().copied().collect();
        let blocks = self.range.length / self.ids_per_pod;
        (0..blocks).map(|block| self.range.first + block * self.ids_per_pod).find(|first| !taken.contains(first))
    }

    /// Takes a recorded block for its pod.
    fn claim(&self, uid: &PodUid, first: u32) -> Result<(), UserNamespaceError> {
        let inside = first >= self.range.first
            && (first - self.range.first) / self.ids_per_pod < self.range.length / self.ids_per_pod;
        if !inside {
            return Err(UserNamespaceError::Record(format!("id {first} is out of range")));
        }
        let mut used = self.lock();
        if used.iter().any(|(other, taken)| *taken == first && other != uid) {
            return Err(UserNamespaceError::Record(format!("range picked for pod {:?} already taken", uid.as_str())));
        }
        used.insert(uid.clone(), first);
        Ok(())
    }

    fn recorded(&self, uid: &PodUid) -> Result<Option<u32>, UserNamespaceError> {
        let path = self.record_path(uid);
        let text = match fs::read(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            text => text.map_err(|source| UserNamespaceError::Read { path: path.display().to_string(), source })?,
        };
        if text.is_empty() {
            return Ok(None);
        }
        let described = |why: String| UserNamespaceError::Record(format!("{}: {why}", path.display()));
        let record: Record = serde_json::from_slice(&text)
            .map_err(|error| described(format!("invalid user namespace mappings file: {error}")))?;
        record.host_id(self.ids_per_pod).map(Some).map_err(described)
    }

    /// Whole or not at all, and on the disk before anybody uses the IDs.
    fn write(&self, uid: &PodUid, first: u32) -> Result<(), UserNamespaceError> {
        let path = self.record_path(uid);
        let write = || -> io::Result<()> {
            let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
            fs::DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
            let temporary = path.with_extension("tmp");
            let text = serde_json::to_vec(&Record::new(first, self.ids_per_pod)).map_err(io::Error::other)?;
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(dir)?.sync_all()
        };
        write().map_err(|source| UserNamespaceError::Write { path: path.display().to_string(), source })
    }
}

fn check(ids_per_pod: u32, max_pods: u32, range: IdRange) -> Result<(), String> {
    let IdRange { first, length } = range;
    if ids_per_pod == 0 || !ids_per_pod.is_multiple_of(UNIT) {
        return Err(format!("kubelet user namespace length {ids_per_pod} is not a multiple of {UNIT}"));
    }
    if !first.is_multiple_of(ids_per_pod) {
        return Err(format!("kubelet user assigned ID {first} is not a multiple of {ids_per_pod}"));
    }
    if first < ids_per_pod {
        return Err(format!("kubelet user assigned ID {first} must be greater or equal to {ids_per_pod}"));
    }
    if !length.is_multiple_of(ids_per_pod) {
        return Err(format!("kubelet user assigned IDs length {length} is not a multiple of {ids_per_pod}"));
    }
    if length / ids_per_pod < max_pods {
        return Err(format!("kubelet user assigned IDs are not enough to support {max_pods} pods"));
    }
    Ok(())
}

fn supported(handler: &str, node: &NodeFacts) -> Result<(), UserNamespaceError> {
    let why = match node.user_namespace_handlers.get(handler) {
        Some(true) => return Ok(()),
        Some(false) => String::new(),
        None if node.user_namespace_handlers.is_empty() => String::new(),
        None => format!(": the handler {handler:?} is not known"),
    };
    Err(match handler {
        "" => UserNamespaceError::Unsupported(why),
        handler => UserNamespaceError::UnsupportedHandler { handler: handler.to_owned(), why },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::PodSource;

    const RANGE: IdRange = IdRange { first: UNIT, length: 10 * UNIT };

    fn pod(uid: &str, host_users: Option<bool>) -> Pod {
        let object = serde_json::from_value(serde_json::json!({
            "metadata": {"uid": uid, "name": "p", "namespace": "n"},
            "spec": {"hostUsers": host_users, "containers": [{"name": "c"}]}
        }))
        .unwrap();
        Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    }

    fn node() -> NodeFacts {
        let user_namespace_handlers =
            [(String::new(), true), ("runc".to_owned(), true), ("old".to_owned(), false)].into();
        NodeFacts { user_namespace_handlers, ..NodeFacts::default() }
    }

    fn first(of: &v1::UserNamespace) -> u32 {
        assert_eq!((of.mode(), &of.uids), (NamespaceMode::Pod, &of.gids));
        assert_eq!((of.uids[0].container_id, of.uids[0].length), (0, UNIT));
        of.uids[0].host_id
    }

    #[test]
    fn p58_every_pod_has_a_block_of_its_own_that_survives_the_agent() {
        let root = tempfile::tempdir().unwrap();
        let open = || UserNamespaces::open(root.path(), UNIT, 2, RANGE).unwrap();
        let all = open();
        let a = first(&all.of(&pod("a", Some(false)), "", &node()).unwrap());
        let b = first(&all.of(&pod("b", Some(false)), "runc", &node()).unwrap());
        assert_ne!(a, b);
        assert_eq!(first(&all.of(&pod("a", Some(false)), "", &node()).unwrap()), a);
        let text = fs::read_to_string(root.path().join("pods/a/userns")).unwrap();
        let mapping = format!(r#"[{{"hostId":{a},"containerId":0,"length":65536}}]"#);
        assert_eq!(text, format!(r#"{{"uidMappings":{mapping},"gidMappings":{mapping}}}"#));

        let again = open();
        let c = first(&again.of(&pod("c", Some(false)), "", &node()).unwrap());
        assert!(c != a && c != b, "recorded blocks are taken");
        assert_eq!(first(&again.of(&pod("b", Some(false)), "", &node()).unwrap()), b);
        again.release(&"b".into());
        assert!(!root.path().join("pods/b/userns").exists());
        assert_eq!(
            first(&again.of(&pod("d", Some(false)), "", &node()).unwrap()),
            b,
            "a block that was let go is free"
        );
    }

    #[test]
    fn p58_pods_that_ask_for_nothing_share_the_nodes_users() {
        let root = tempfile::tempdir().unwrap();
        let all = UserNamespaces::open(root.path(), UNIT, 1, RANGE).unwrap();
        for host_users in [None, Some(true)] {
            let got = all.of(&pod("a", host_users), "old", &NodeFacts::default()).unwrap();
            assert_eq!((got.mode(), got.uids.len()), (NamespaceMode::Node, 0));
        }
        assert!(!root.path().join("pods").exists());
    }

    #[test]
    fn p58_a_handler_that_cannot_is_named() {
        let root = tempfile::tempdir().unwrap();
        let all = UserNamespaces::open(root.path(), UNIT, 1, RANGE).unwrap();
        let silent = NodeFacts::default();
        for (handler, node, want) in [
            ("", &silent, "can't set `spec.hostUsers: false`, runtime does not support user namespaces"),
            (
                "old",
                &node(),
                "can't set `spec.hostUsers: false`, RuntimeClass handler \"old\" does not support user namespaces",
            ),
            (
                "new",
                &node(),
                "can't set `spec.hostUsers: false`, RuntimeClass handler \"new\" does not support user namespaces: the handler \"new\" is not known",
            ),
        ] {
            assert_eq!(all.of(&pod("a", Some(false)), handler, node).unwrap_err().to_string(), want);
        }
    }

    #[test]
    fn p58_no_block_is_left() {
        let root = tempfile::tempdir().unwrap();
        let all = UserNamespaces::open(root.path(), UNIT, 1, IdRange { first: UNIT, length: UNIT }).unwrap();
        all.of(&pod("a", Some(false)), "", &node()).unwrap();
        let error = all.of(&pod("b", Some(false)), "", &node()).unwrap_err();
        assert!(matches!(error, UserNamespaceError::Exhausted), "{error}");
        assert!(!root.path().join("pods/b").exists());
    }

    #[test]
    fn p58_records_that_make_no_sense_stop_the_start() {
        let mapping = |host: u32, container: u32, length: u32| {
            format!(r#"[{{"hostId":{host},"containerId":{container},"length":{length}}}]"#)
        };
        let good = mapping(UNIT, 0, UNIT);
        for (users, groups, want) in [
            (good.clone(), mapping(2 * UNIT, 0, UNIT), "should be identical"),
            (mapping(UNIT, 1, UNIT), mapping(UNIT, 1, UNIT), "UID 0 must be mapped"),
            (mapping(UNIT, 0, 7), mapping(UNIT, 0, 7), "wrong user namespace length 7"),
            (mapping(5, 0, UNIT), mapping(5, 0, UNIT), "wrong user namespace offset specified 5"),
            (mapping(0, 0, UNIT), mapping(0, 0, UNIT), "id 0 is out of range"),
            (mapping(11 * UNIT, 0, UNIT), mapping(11 * UNIT, 0, UNIT), "out of range"),
            ("[]".to_owned(), "[]".to_owned(), "no more than one mapping"),
        ] {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("pods/a")).unwrap();
            let text = format!(r#"{{"uidMappings":{users},"gidMappings":{groups}}}"#);
            fs::write(root.path().join("pods/a/userns"), text).unwrap();
            let error = UserNamespaces::open(root.path(), UNIT, 1, RANGE).unwrap_err().to_string();
            assert!(error.contains(want), "{error} / {want}");
        }
    }

    #[test]
    fn p58_ranges() {
        let unconfigured = IdRange::unconfigured(UNIT);
        assert_eq!(
            (unconfigured.first, u64::from(unconfigured.first) + u64::from(unconfigured.length)),
            (UNIT, 1 << 32)
        );
        assert_eq!(check(UNIT, 110, unconfigured), Ok(()));
        assert_eq!(IdRange::parse("0: kubelet 65536 7208960\n").unwrap(), IdRange { first: 65536, length: 7_208_960 });
        for text in ["", "0: kubelet 1", "0: kubelet x 1", "0: kubelet 1 2\n1: kubelet 3 4"] {
            assert!(IdRange::parse(text).is_err(), "{text}");
        }
        for (ids, pods, first, length, want) in [
            (1, 1, UNIT, UNIT, "is not a multiple of 65536"),
            (UNIT, 1, 5, UNIT, "assigned ID 5 is not a multiple"),
            (UNIT, 1, 0, UNIT, "must be greater or equal"),
            (UNIT, 1, UNIT, 7, "length 7 is not a multiple"),
            (UNIT, 3, UNIT, 2 * UNIT, "not enough to support 3 pods"),
        ] {
            assert!(check(ids, pods, IdRange { first, length }).unwrap_err().contains(want), "{want}");
        }
    }
}
