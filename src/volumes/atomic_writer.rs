//! Writes a payload into a volume so that a reader sees the old content or the new, never a mix (contract V-23).
//!
//! On disk: `..2006_01_02_15_04_05.N/` holds the files, `..data` points to it, and each top-level name is a symlink
//! `name -> ..data/name`. An update makes a new directory and renames `..data_tmp` over `..data`: one atomic step. What an
//! interrupted writer left is swept by the next one. In: an open volume directory. May touch nothing outside it.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    io::{self, Write},
    os::unix::fs::{PermissionsExt, fchown},
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use jiff::Timestamp;

use super::{
    directory::{Directory, EntryKind},
    fs_group::{self, ChangePolicy, GroupOwnership},
    payload::{FileContent, Payload},
    teardown,
};

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// `..data` points to new content.
    Swapped,
    /// The content was there already.
    Unchanged,
}

/// The points between which a crash is told apart: tests stop the writer at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    DirectoryMade,
    FileWritten,
    OwnershipSet,
    LinkMade,
    Swapped,
    VisibleLinkMade,
    StaleLinkRemoved,
    OldRemoved,
}

/// Brings the volume to `payload`. Sets `ownership` on the new files and the volume's root before they become visible.
pub(super) fn write(
    volume: &Directory,
    payload: &Payload,
    ownership: Option<GroupOwnership>,
    now: Timestamp,
) -> io::Result<Written> {
    write_in_steps(volume, payload, ownership, now, &mut |_| Ok(()))
}

fn write_in_steps(
    volume: &Directory,
    payload: &Payload,
    ownership: Option<GroupOwnership>,
    now: Timestamp,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<Written> {
    let current = current_content(volume)?;
    let unchanged = match &current {
        Some(name) => holds(&volume.child(name)?, payload)?,
        None => false,
    };
    let (live, written) = match current {
        Some(name) if unchanged => (name, Written::Unchanged),
        current => {
            remove_content_except(volume, current.as_deref(), after)?;
            (swap_in(volume, payload, ownership, now, after)?, Written::Swapped)
        }
    };
    link_visible_names(volume, payload, after)?;
    remove_stale_names(volume, payload, after)?;
    remove_content_except(volume, Some(&live), after)?;
    Ok(written)
}

/// Writes the new content directory and makes `..data` point to it.
fn swap_in(
    volume: &Directory,
    payload: &Payload,
    ownership: Option<GroupOwnership>,
    now: Timestamp,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<OsString> {
    let (name, content) = new_content_directory(volume, now)?;
    after(Step::DirectoryMade)?;
    for (path, file) in payload.files() {
        write_file(&content, path, file)?;
        after(Step::FileWritten)?;
    }
    if let Some(ownership) = ownership {
        fs_group::apply(&content, ownership, ChangePolicy::Always, &AtomicU64::new(0))?;
        fs_group::apply_to_root(volume, ownership)?;
        after(Step::OwnershipSet)?;
    }
    volume.symlink(Path::new(&name), OsStr::new(NEW_DATA))?;
    after(Step::LinkMade)?;
    volume.rename(OsStr::new(NEW_DATA), OsStr::new(DATA))?;
    after(Step::Swapped)?;
    Ok(name)
}

/// The content directory that `..data` points to, when it points to one and that exists.
fn current_content(volume: &Directory) -> io::Result<Option<OsString>> {
    let Some(target) = volume.read_link(OsStr::new(DATA))? else { return Ok(None) };
    if !is_content_name(&target) {
        return Ok(None);
    }
    let is_directory =
        volume.stat_entry(&target)?.is_some_and(|s| super::directory::kind_of(&s) == EntryKind::Directory);
    Ok(is_directory.then_some(target))
}

/// `..` and then neither `data` nor a separator: names that only this writer (or upstream's) makes.
fn is_content_name(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let Some(rest) = name.strip_prefix("..") else { return false };
    !name.contains('/') && rest.starts_with(|c: char| c.is_ascii_digit())
}

/// `..2006_01_02_15_04_05.N` with a random N, mode 0755.
fn new_content_directory(volume: &Directory, now: Timestamp) -> io::Result<(OsString, Directory)> {
    let stamp = now.strftime("..%Y_%m_%d_%H_%M_%S.").to_string();
    let mut attempts = 0;
    loop {
        let name = OsString::from(format!("{stamp}{}", rand::random::<u32>()));
        match volume.create_child(&name, 0o755) {
            Ok(directory) => return Ok((name, directory)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && attempts < 100 => attempts += 1,
            Err(e) => return Err(e),
        }
    }
}

fn write_file(content: &Directory, path: &str, file: &FileContent) -> io::Result<()> {
    let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
    let mut directory = content.child(OsStr::new("."))?;
    for parent in parents.split('/').filter(|p| !p.is_empty()) {
        directory = directory.child_or_create(OsStr::new(parent), 0o755)?;
    }
    let mut handle = directory.create_file(OsStr::new(name))?;
    handle.write_all(&file.data)?;
    if let Some(user) = file.user {
        fchown(&handle, Some(user), None)?;
    }
    handle.set_permissions(std::fs::Permissions::from_mode(file.mode & 0o7777))
}

/// Whether the directory holds exactly the payload's files with the payload's bytes. Directories without files do not count:
/// they are mount points for volumes mounted below this one.
fn holds(content: &Directory, payload: &Payload) -> io::Result<bool> {
    let mut seen = 0;
    let mut pending = vec![(content.child(OsStr::new("."))?, PathBuf::new())];
    while let Some((directory, path)) = pending.pop() {
        for (name, kind) in directory.entries()? {
            let entry_path = path.join(&name);
            if kind == EntryKind::Directory {
                pending.push((directory.child(&name)?, entry_path));
                continue;
            }
            let Some(file) = entry_path.to_str().and_then(|p| payload.get(p)) else { return Ok(false) };
            if directory.read_file(&name)?.as_deref() != Some(file.data.as_slice()) {
                return Ok(false);
            }
            seen += 1;
        }
    }
    Ok(seen == payload.len())
}

/// Makes the missing `name -> ..data/name`. An existing entry stays: it may be the mount point of another volume.
fn link_visible_names(
    volume: &Directory,
    payload: &Payload,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<()> {
    for (name, user) in payload.top_level() {
        let name = OsStr::new(name);
        if volume.stat_entry(name)?.is_some() {
            continue;
        }
        volume.symlink(&Path::new(DATA).join(name), name)?;
        if let Some(user) = user {
            volume.set_entry_user(name, user)?;
        }
        after(Step::VisibleLinkMade)?;
    }
    Ok(())
}

/// Removes links into `..data` whose name the payload no longer has.
fn remove_stale_names(
    volume: &Directory,
    payload: &Payload,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<()> {
    let wanted: BTreeSet<&OsStr> = payload.top_level().into_keys().map(OsStr::new).collect();
    for (name, kind) in volume.entries()? {
        if kind != EntryKind::Symlink || wanted.contains(name.as_os_str()) || name == DATA || name == NEW_DATA {
            continue;
        }
        if volume.read_link(&name)?.is_some_and(|target| Path::new(&target) == Path::new(DATA).join(&name)) {
            volume.remove_file(&name)?;
            after(Step::StaleLinkRemoved)?;
        }
    }
    Ok(())
}

/// Removes every content directory but `live`: the one before, and what interrupted writers left, their `..data_tmp` included.
fn remove_content_except(
    volume: &Directory,
    live: Option<&OsStr>,
    after: &mut dyn FnMut(Step) -> io::Result<()>,
) -> io::Result<()> {
    teardown::remove_tree_one_filesystem(volume, OsStr::new(NEW_DATA))?;
    for (name, kind) in volume.entries()? {
        if kind == EntryKind::Directory && is_content_name(&name) && Some(name.as_os_str()) != live {
            teardown::remove_tree_one_filesystem(volume, &name)?;
            after(Step::OldRemoved)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::MetadataExt};

    use proptest::prelude::*;

    use super::*;

    fn now() -> Timestamp {
        "2026-11-21T10:20:30Z".parse().unwrap()
    }

    fn payload(files: &[(&str, &str)]) -> Payload {
        let mut payload = Payload::default();
        for (path, data) in files {
            let file = FileContent { data: data.as_bytes().to_vec(), mode: 0o640, user: None };
            payload.insert(path, file).unwrap();
        }
        payload
    }

    /// What a container sees: everything reachable through the visible names.
    fn visible(root: &Path) -> BTreeMap<String, String> {
        fn walk(directory: &Path, prefix: &str, out: &mut BTreeMap<String, String>) {
            for entry in std::fs::read_dir(directory).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if prefix.is_empty() && name.starts_with("..") {
                    continue;
                }
                let path = directory.join(&name);
                let shown = format!("{prefix}{name}");
                if path.is_dir() {
                    walk(&path, &format!("{shown}/"), out);
                } else if let Ok(content) = std::fs::read_to_string(&path) {
                    out.insert(shown, content);
                }
            }
        }
        let mut out = BTreeMap::new();
        walk(root, "", &mut out);
        out
    }

    fn expected(payload: &Payload) -> BTreeMap<String, String> {
        payload.files().map(|(p, f)| (p.to_owned(), String::from_utf8(f.data.clone()).unwrap())).collect()
    }

    fn live(root: &Path) -> OsString {
        std::fs::read_link(root.join(DATA)).unwrap().into_os_string()
    }

    fn own_names(root: &Path) -> Vec<String> {
        let names = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.starts_with("..")).collect()
    }

    #[test]
    fn v23_layout_links_and_modes() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        let written = write(&volume, &payload(&[("k", "v"), ("dir/sub/x", "y")]), None, now()).unwrap();
        assert_eq!(written, Written::Swapped);
        let live = live(temp.path());
        assert!(live.to_str().unwrap().starts_with("..2026_11_21_10_20_30."));
        assert_eq!(std::fs::read_link(temp.path().join("k")).unwrap(), Path::new("..data/k"));
        assert_eq!(std::fs::read_link(temp.path().join("dir")).unwrap(), Path::new("..data/dir"));
        let mode = |p: &str| std::fs::metadata(temp.path().join(p)).unwrap().mode() & 0o7777;
        assert_eq!(mode(live.to_str().unwrap()), 0o755);
        assert_eq!(mode("dir/sub"), 0o755);
        assert_eq!(mode("k"), 0o640);
    }

    #[test]
    fn v23_unchanged_payload_never_swaps() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        let content = payload(&[("k", "v"), ("d/x", "y")]);
        write(&volume, &content, None, now()).unwrap();
        let before = live(temp.path());
        // A mount point inside the live content, as upstream's nested mounts leave it.
        std::fs::create_dir(temp.path().join("..data/d/nested")).unwrap();
        assert_eq!(write(&volume, &content, None, now()).unwrap(), Written::Unchanged);
        assert_eq!(live(temp.path()), before);
        assert_eq!(write(&volume, &payload(&[("k", "v")]), None, now()).unwrap(), Written::Swapped);
        assert_eq!(visible(temp.path()), expected(&payload(&[("k", "v")])));
    }

    #[test]
    fn v23_an_emptied_payload_leaves_an_empty_volume() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        write(&volume, &payload(&[("k", "v")]), None, now()).unwrap();
        write(&volume, &Payload::default(), None, now()).unwrap();
        assert!(visible(temp.path()).is_empty());
        assert_eq!(write(&volume, &Payload::default(), None, now()).unwrap(), Written::Unchanged);
        assert_eq!(own_names(temp.path()).len(), 2, "..data and one content directory");
    }

    #[test]
    fn v40_ownership_is_set_before_the_swap() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        let ownership = GroupOwnership { group: 4242, read_only: true };
        let mut file = FileContent { data: b"t".to_vec(), mode: 0o600, user: Some(1000) };
        let mut content = Payload::default();
        content.insert("token", file.clone()).unwrap();
        let check = |step: Step| {
            if step == Step::Swapped {
                let meta = std::fs::metadata(temp.path().join("..data/token")).unwrap();
                assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (1000, 4242, 0o640));
            }
            Ok(())
        };
        write_in_steps(&volume, &content, Some(ownership), now(), &mut { check }).unwrap();
        assert_eq!(std::fs::metadata(temp.path()).unwrap().gid(), 4242);
        assert_eq!(std::fs::symlink_metadata(temp.path().join("token")).unwrap().uid(), 1000);
        file.data = b"u".to_vec();
        content.insert("token", file).unwrap();
        write_in_steps(&volume, &content, Some(ownership), now(), &mut { check }).unwrap();
    }

    #[test]
    fn a_hostile_data_link_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("keep"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), temp.path().join(DATA)).unwrap();
        std::os::unix::fs::symlink(outside.path(), temp.path().join("..2020_01_01_00_00_00.1")).unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        let content = payload(&[("k", "v")]);
        write(&volume, &content, None, now()).unwrap();
        assert_eq!(visible(temp.path()), expected(&content));
        assert_eq!(visible(outside.path()).len(), 1);
    }

    #[test]
    fn conflicting_paths_are_an_error_and_the_old_content_stays() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Directory::open(temp.path()).unwrap();
        let old = payload(&[("k", "v")]);
        write(&volume, &old, None, now()).unwrap();
        assert!(write(&volume, &payload(&[("a", "1"), ("a/b", "2")]), None, now()).is_err());
        assert_eq!(visible(temp.path()), expected(&old));
    }

    fn payloads() -> impl Strategy<Value = Payload> {
        let path = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d/x"), Just("d/y"), Just("e/f/g")];
        proptest::collection::btree_map(path, "[0-9]{0,3}", 0..6)
            .prop_map(|files| payload(&files.iter().map(|(p, d)| (*p, d.as_str())).collect::<Vec<_>>()))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn v23_a_kill_at_any_step_leaves_old_or_new(
            sequence in proptest::collection::vec((payloads(), proptest::option::of(0usize..14)), 1..6),
        ) {
            let temp = tempfile::tempdir().unwrap();
            let volume = Directory::open(temp.path()).unwrap();
            let mut old = Payload::default();
            write(&volume, &old, None, now()).unwrap();
            for (new, kill_at) in sequence {
                let mut step = 0;
                let result = write_in_steps(&volume, &new, None, now(), &mut |_| {
                    let killed = Some(step) == kill_at;
                    step += 1;
                    if killed { Err(io::Error::other("killed")) } else { Ok(()) }
                });
                let data = visible(&temp.path().join(DATA));
                if result.is_ok() {
                    prop_assert_eq!(&visible(temp.path()), &expected(&new));
                    prop_assert_eq!(own_names(temp.path()).len(), 2);
                } else {
                    prop_assert!(data == expected(&old) || data == expected(&new), "a mix: {:?}", data);
                    // Whatever is visible has its old or its new content.
                    for (path, content) in visible(temp.path()) {
                        let (before, after) = (expected(&old), expected(&new));
                        prop_assert!(before.get(&path) == Some(&content) || after.get(&path) == Some(&content));
                    }
                }
                if data == expected(&new) { old = new; }
            }
            let last = payload(&[("z", "end")]);
            write(&volume, &last, None, now()).unwrap();
            prop_assert_eq!(visible(temp.path()), expected(&last));
            prop_assert_eq!(own_names(temp.path()).len(), 2);
        }
    }
}
