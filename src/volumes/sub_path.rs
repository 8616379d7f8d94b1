//! subPath: one file or directory inside a volume, bound where no container can redirect it (contract V-42).
//!
//! A container that writes to the volume may swap any name in it for a symlink at any moment. So the path is resolved once, then
//! opened again from the volume's own descriptor with symlinks forbidden (`openat2`), and what is bound is that descriptor.
//! Absolute links that lead back into the volume work as upstream's do; all that leads out is an error. Blocking.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Component, Path},
};

use nix::sys::stat;

use super::{
    directory::{self, Directory, EntryKind},
    mounter::{Mounter, Unmount},
    root_dir::create_directory,
};

/// Stacked mounts that are taken off a bind target before it is given up.
const MAX_STACKED: usize = 16;

/// Why a subPath cannot be had. The detail is for the log: users must not learn about the host's file system from it.
#[derive(Debug, thiserror::Error)]
pub(super) enum SubPathError {
    #[error("failed to create subPath directory: {0}")]
    Create(io::Error),
    #[error("failed to prepare subPath: {0}")]
    Prepare(io::Error),
}

/// Binds `<volume>/<sub_path>` to `target`; makes missing directories with the volume's own mode. A bind that is there already
/// is kept if it still shows the same file, else replaced (after a container restart the file may be a new one).
pub(super) fn prepare(volume: &Path, sub_path: &str, target: &Path, mounter: &dyn Mounter) -> Result<(), SubPathError> {
    let wanted = volume.join(sub_path);
    // The trailing slash triggers an automount, if the path is one.
    let _ = fs::metadata(wanted.join(""));
    if let Err(e) = fs::metadata(&wanted)
        && e.kind() == io::ErrorKind::NotFound
    {
        match create_directories(volume, sub_path) {
            // A dangling link, or made by someone else meanwhile: opening it will tell.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            done => done.map_err(SubPathError::Create)?,
        }
    }
    let source = open_within(volume, &wanted).map_err(SubPathError::Prepare)?;
    bind(&source, target, mounter).map_err(SubPathError::Prepare)
}

/// Makes the missing directories of `sub_path`, none of them outside `volume`.
fn create_directories(volume: &Path, sub_path: &str) -> io::Result<()> {
    let volume = volume.canonicalize()?;
    let mode = fs::metadata(&volume)?.permissions().mode() & 0o7777;
    let mut existing = volume.clone();
    let mut components = Path::new(sub_path).components().filter(|c| *c != Component::CurDir).peekable();
    while let Some(component) = components.peek() {
        let next = existing.join(component);
        if fs::metadata(&next).is_err() {
            break;
        }
        existing = next;
        components.next();
    }
    let mut parent = open_directory_within(&volume, &existing)?;
    for component in components {
        let Component::Normal(name) = component else { return Err(outside()) };
        parent = parent.create_child(name, mode)?;
    }
    Ok(())
}

fn open_directory_within(volume: &Path, path: &Path) -> io::Result<Directory> {
    let fd = open_within(volume, path)?;
    Directory::reopen(&fd)
}

/// A descriptor of what `path` leads to, which must be inside the volume. Only the names of the first resolution are walked
/// the second time, so a swap in between fails instead of leading out.
fn open_within(volume: &Path, path: &Path) -> io::Result<OwnedFd> {
    let volume = volume.canonicalize()?;
    let resolved = path.canonicalize()?;
    let relative = resolved.strip_prefix(&volume).map_err(|_| outside())?;
    let base = Directory::open(&volume)?;
    base.locate_without_links(if relative.as_os_str().is_empty() { Path::new(".") } else { relative })
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the path is not within the volume")
}

fn bind(source: &OwnedFd, target: &Path, mounter: &dyn Mounter) -> io::Result<()> {
    let file = stat::fstat(source)?;
    for _ in 0..MAX_STACKED {
        if !mounter.is_mount_point(target)? {
            break;
        }
        if fs::symlink_metadata(target).is_ok_and(|t| (t.dev(), t.ino()) == (file.st_dev, file.st_ino)) {
            return Ok(());
        }
        mounter.unmount(target, Unmount::Lazy)?;
    }
    if let Some(parent) = target.parent() {
        create_directory(parent, 0o750)?;
    }
    make_target(target, directory::kind_of(&file) == EntryKind::Directory)?;
    mounter.bind(&directory::proc_path(source.as_fd()), target).inspect_err(|_| {
        // An empty target is of no use, and harmless if it stays.
        let _ = fs::remove_file(target).or_else(|_| fs::remove_dir(target));
    })
}

/// A directory to bind a directory to, an empty file for anything else.
fn make_target(target: &Path, is_directory: bool) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() == is_directory && !found.is_symlink() => return Ok(()),
        Ok(found) if found.is_dir() => fs::remove_dir(target)?,
        Ok(_) => fs::remove_file(target)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    if is_directory {
        fs::create_dir(target)?;
        return fs::set_permissions(target, fs::Permissions::from_mode(0o750));
    }
    fs::OpenOptions::new().write(true).create_new(true).mode(0o640).open(target).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::symlink,
        path::PathBuf,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::volumes::mounter::LinuxMounter;

    /// A volume, a place for targets, and a mounter whose mounts below the place are undone at the end.
    struct Bench {
        temp: tempfile::TempDir,
        mounter: LinuxMounter,
    }

    impl Bench {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            fs::create_dir(temp.path().join("volume")).unwrap();
            Self { temp, mounter: LinuxMounter::default() }
        }
        fn volume(&self, path: &str) -> PathBuf {
            self.temp.path().join("volume").join(path)
        }
        fn target(&self) -> PathBuf {
            self.temp.path().join("volume-subpaths/v/c/0")
        }
        fn prepare(&self, sub_path: &str) -> Result<(), SubPathError> {
            prepare(&self.volume(""), sub_path, &self.target(), &self.mounter)
        }
        fn mounts(&self) -> usize {
            self.mounter.list().unwrap().iter().filter(|m| m.path.starts_with(self.temp.path())).count()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            while self.mounter.is_mount_point(&self.target()).unwrap_or(false) {
                let _ = self.mounter.unmount(&self.target(), Unmount::Lazy);
            }
        }
    }

    #[test]
    fn v42_files_directories_and_links_inside_are_bound() {
        let bench = Bench::new();
        fs::create_dir(bench.volume("d")).unwrap();
        fs::write(bench.volume("d/f"), "content").unwrap();
        symlink("d/f", bench.volume("relative")).unwrap();
        symlink(bench.volume("d").canonicalize().unwrap(), bench.volume("absolute")).unwrap();
        for sub_path in ["d/f", "relative", "./absolute/f"] {
            bench.prepare(sub_path).unwrap();
            assert_eq!(fs::read_to_string(bench.target()).unwrap(), "content", "{sub_path}");
        }
        assert_eq!(bench.mounts(), 1, "the same file is bound once");
        bench.prepare("d").unwrap();
        assert!(bench.target().join("f").exists());
        assert_eq!(bench.mounts(), 1);
        bench.prepare(".").unwrap();
        assert!(bench.target().join("d/f").exists());
    }

    #[test]
    fn v42_missing_directories_get_the_volumes_mode() {
        let bench = Bench::new();
        fs::set_permissions(bench.volume(""), fs::Permissions::from_mode(0o2777)).unwrap();
        bench.prepare("a/b").unwrap();
        for path in ["a", "a/b"] {
            assert_eq!(fs::metadata(bench.volume(path)).unwrap().permissions().mode() & 0o7777, 0o2777, "{path}");
        }
        fs::write(bench.target().join("through"), "").unwrap();
        assert!(bench.volume("a/b/through").exists());
    }

    #[test]
    fn v42_what_leads_out_of_the_volume_is_refused() {
        let bench = Bench::new();
        symlink("/etc", bench.volume("etc")).unwrap();
        symlink("../..", bench.volume("up")).unwrap();
        symlink("/nonexistent/x", bench.volume("dangling")).unwrap();
        fs::write(bench.volume("file"), "").unwrap();
        for sub_path in ["etc", "etc/passwd", "etc/new", "up", "up/new", "dangling", "dangling/new", "file/x", "../x"] {
            assert!(bench.prepare(sub_path).is_err(), "{sub_path}");
        }
        assert!(!Path::new("/etc/new").exists() && !bench.temp.path().join("x").exists());
        assert_eq!(bench.mounts(), 0);
    }

    #[test]
    fn v42_devices_and_pipes_are_bound_without_being_opened() {
        let bench = Bench::new();
        nix::unistd::mkfifo(&bench.volume("pipe"), stat::Mode::from_bits_truncate(0o600)).unwrap();
        let null = stat::makedev(1, 3);
        stat::mknod(&bench.volume("null"), stat::SFlag::S_IFCHR, stat::Mode::from_bits_truncate(0o600), null).unwrap();
        for sub_path in ["pipe", "null"] {
            bench.prepare(sub_path).unwrap();
            assert_eq!(
                fs::metadata(bench.target()).unwrap().ino(),
                fs::metadata(bench.volume(sub_path)).unwrap().ino()
            );
        }
    }

    #[test]
    fn v42_a_replaced_file_is_bound_anew_after_a_restart() {
        let bench = Bench::new();
        fs::write(bench.volume("f"), "old").unwrap();
        bench.prepare("f").unwrap();
        fs::write(bench.volume("f.new"), "new").unwrap();
        fs::rename(bench.volume("f.new"), bench.volume("f")).unwrap();
        bench.prepare("f").unwrap();
        assert_eq!(fs::read_to_string(bench.target()).unwrap(), "new");
        assert_eq!(bench.mounts(), 1);
    }

    #[test]
    fn v42_a_link_swapped_in_while_it_is_prepared_never_leads_out() {
        let bench = Bench::new();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "").unwrap();
        fs::create_dir_all(bench.volume("real/x")).unwrap();
        symlink(outside.path(), bench.volume("evil")).unwrap();
        let stop = AtomicBool::new(false);
        let (real, evil, live, spare) =
            (bench.volume("real"), bench.volume("evil"), bench.volume("live"), bench.volume("spare"));
        let (mut bound, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = fs::rename(&real, &live);
                    let _ = fs::rename(&live, &spare);
                    let _ = fs::rename(&evil, &live);
                    let _ = fs::rename(&live, &evil);
                    let _ = fs::rename(&spare, &real);
                }
            });
            for _ in 0..2000 {
                match bench.prepare("live") {
                    Ok(()) => bound += 1,
                    Err(_) => refused += 1,
                }
                assert!(!bench.target().join("secret").exists(), "the bind shows a directory outside the volume");
                let _ = bench.mounter.unmount(&bench.target(), Unmount::Lazy);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(bound > 0 && refused > 0, "no race: {bound} bound, {refused} refused");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "nothing was created outside");
    }
}
