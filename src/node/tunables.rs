//! Kernel settings that the agent counts on (contract S-22).
//!
//! In: `/proc/sys`. Out: the settings as they should be, or, with `protectKernelDefaults`, an error that names those that are not. What
//! may not be written is logged and left, so that the agent also starts in a container or a user namespace.

use std::{fs, path::Path};

/// Below `/proc/sys`, wanted value.
const WANTED: [(&str, i64); 6] = [
    ("vm/overcommit_memory", 1),
    ("vm/panic_on_oom", 0),
    ("kernel/panic", 10),
    ("kernel/panic_on_oops", 1),
    ("kernel/keys/root_maxkeys", 1_000_000),
    ("kernel/keys/root_maxbytes", 25_000_000),
];

/// `protectKernelDefaults` is set and the kernel is not set up for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join(", "))]
pub struct TunablesError(pub Vec<String>);

/// Checks each setting and, unless `protect`, sets it.
pub fn apply(proc: &Path, protect: bool) -> Result<(), TunablesError> {
    let mut wrong = Vec::new();
    for (flag, expected) in WANTED {
        let path = proc.join("sys").join(flag);
        let actual = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i64>().ok());
        match actual {
            Some(value) if value == expected => {}
            Some(value) if protect => {
                wrong.push(format!("invalid kernel flag: {flag}, expected value: {expected}, actual value: {value}"));
            }
            None if protect => wrong.push(format!("cannot read kernel flag: {flag}")),
            _ => set(flag, &path, expected),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(TunablesError(wrong)) }
}

fn set(flag: &str, path: &Path, value: i64) {
    match fs::write(path, value.to_string()) {
        Ok(()) => tracing::info!(flag, value, "updated kernel flag"),
        Err(error) => tracing::warn!(flag, value, %error, "cannot update kernel flag"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc(values: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (flag, value) in values {
            let path = dir.path().join("sys").join(flag);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        dir
    }

    #[test]
    fn s22_wrong_values_are_set() {
        let dir =
            proc(&[("vm/overcommit_memory", "0\n"), ("kernel/panic", "10\n"), ("kernel/keys/root_maxkeys", "200\n")]);
        apply(dir.path(), false).unwrap();
        let read = |flag: &str| fs::read_to_string(dir.path().join("sys").join(flag)).unwrap();
        assert_eq!(read("vm/overcommit_memory"), "1");
        assert_eq!(read("kernel/keys/root_maxkeys"), "1000000");
        assert_eq!(read("kernel/panic"), "10\n", "a right value is not written");
    }

    #[test]
    fn s22_protected_defaults_are_reported_and_left() {
        let all = WANTED.map(|(flag, value)| (flag, value.to_string()));
        let mut values: Vec<(&str, &str)> = all.iter().map(|(f, v)| (*f, v.as_str())).collect();
        assert_eq!(apply(proc(&values).path(), true), Ok(()));
        values[0].1 = "2";
        let dir = proc(&values);
        let error = apply(dir.path(), true).unwrap_err();
        assert_eq!(error.to_string(), "invalid kernel flag: vm/overcommit_memory, expected value: 1, actual value: 2");
        assert_eq!(fs::read_to_string(dir.path().join("sys/vm/overcommit_memory")).unwrap(), "2");
    }

    #[test]
    fn s22_what_cannot_be_written_does_not_stop_the_agent() {
        assert_eq!(apply(Path::new("/nonexistent"), false), Ok(()));
    }
}
