//! hostPath volumes: a path of the host as it is, after a check of its type (contract V-29).
//!
//! May create the path for the `…OrCreate` types. The check follows symlinks, as the mount will.

use std::{
    fs::{DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    path::Path,
};

use super::set_up_error::{SetUpError, describe};

/// Checks `path` against `kind` (the API's `type`, empty for none); creates what an `…OrCreate` type asks for.
pub(super) fn check(path: &str, kind: &str) -> Result<(), SetUpError> {
    if path.split('/').any(|part| part == "..") {
        return Err(SetUpError::terminal(format!("invalid HostPath `{path}`: must not contain '..'")));
    }
    let (expected, name) = match kind {
        "" => return Ok(()),
        "DirectoryOrCreate" if !exists(path) => return make_directory(path),
        "DirectoryOrCreate" | "Directory" => ("Directory", "directory"),
        "FileOrCreate" if !exists(path) => return make_file(path),
        "FileOrCreate" | "File" => ("File", "file"),
        "Socket" => ("Socket", "socket file"),
        "CharDevice" => ("CharDevice", "character device"),
        "BlockDevice" => ("BlockDevice", "block device"),
        _ => return Err(SetUpError::terminal(format!("{kind} is an invalid volume type"))),
    };
    // The path may come to fit: retried.
    match type_of(path) {
        Ok(found) if found == expected => Ok(()),
        Ok(found) => {
            Err(SetUpError::retry(format!("hostPath type check failed: {path} is not a {name}, it's a {found}")))
        }
        Err(error) => Err(SetUpError::retry(format!(
            "hostPath type check failed, {path} is not a {name}, unable to determine its type: {error}"
        ))),
    }
}

fn exists(path: &str) -> bool {
    Path::new(path).exists()
}

fn type_of(path: &str) -> Result<&'static str, String> {
    let file_type = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(format!("path {path:?} does not exist")),
        Err(e) => return Err(format!("stat {path}: {}", describe(&e))),
    };
    match () {
        () if file_type.is_dir() => Ok("Directory"),
        () if file_type.is_file() => Ok("File"),
        () if file_type.is_socket() => Ok("Socket"),
        () if file_type.is_char_device() => Ok("CharDevice"),
        () if file_type.is_block_device() => Ok("BlockDevice"),
        () => Err("only recognise file, directory, socket, block device and character device".to_owned()),
    }
}

fn make_directory(path: &str) -> Result<(), SetUpError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|e| SetUpError::io("mkdir", Path::new(path), &e))
}

fn make_file(path: &str) -> Result<(), SetUpError> {
    match OpenOptions::new().write(true).create_new(true).mode(0o644).open(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(SetUpError::io("open", Path::new(path), &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::VolumeErrorClass;

    #[test]
    fn v29_types_and_messages() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("{}/{name}", temp.path().display());
        std::fs::write(at("file"), "").unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink("dir", at("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("sock")).unwrap();
        let null = "/dev/null".to_owned();
        for (path, kind, failure) in [
            (at("absent"), "", None),
            (at("dir"), "Directory", None),
            (at("link"), "Directory", None),
            (at("dir"), "DirectoryOrCreate", None),
            (at("file"), "File", None),
            (at("file"), "FileOrCreate", None),
            (at("sock"), "Socket", None),
            (null.clone(), "CharDevice", None),
            (at("file"), "Directory", Some(": {} is not a directory, it's a File")),
            (at("file"), "DirectoryOrCreate", Some(": {} is not a directory, it's a File")),
            (at("dir"), "File", Some(": {} is not a file, it's a Directory")),
            (at("dir"), "FileOrCreate", Some(": {} is not a file, it's a Directory")),
            (at("file"), "Socket", Some(": {} is not a socket file, it's a File")),
            (at("sock"), "CharDevice", Some(": {} is not a character device, it's a Socket")),
            (null, "BlockDevice", Some(": {} is not a block device, it's a CharDevice")),
            (
                at("absent"),
                "Directory",
                Some(", {} is not a directory, unable to determine its type: path \"{}\" does not exist"),
            ),
        ] {
            let expected = failure.map(|f| format!("hostPath type check failed{}", f.replace("{}", &path)));
            assert_eq!(check(&path, kind).err().map(|e| e.message), expected, "{path} {kind}");
        }
        assert_eq!(check("/x", "Nope").unwrap_err(), SetUpError::terminal("Nope is an invalid volume type"));
        let backstep = check("/x/../etc", "").unwrap_err();
        assert_eq!(backstep.message, "invalid HostPath `/x/../etc`: must not contain '..'");
        assert_eq!(backstep.class, VolumeErrorClass::Terminal);
    }

    #[test]
    fn v29_creates_with_modes() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().unwrap();
        let directory = temp.path().join("a/b");
        let file = temp.path().join("a/b/f");
        check(directory.to_str().unwrap(), "DirectoryOrCreate").unwrap();
        check(file.to_str().unwrap(), "FileOrCreate").unwrap();
        assert_eq!(directory.metadata().unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o644);
        let missing_parent = temp.path().join("no/f");
        assert!(
            check(missing_parent.to_str().unwrap(), "FileOrCreate")
                .unwrap_err()
                .message
                .ends_with("no such file or directory")
        );
    }
}
