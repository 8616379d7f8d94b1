//! NOTE TO THE PROBES FOUNDER (11:24, from the lead): `src/server/` has been handed to another founder (worktree /work/wt/server), so that both rooms
//! finish in time. Please do `src/logs/` (needed by pod_worker: `tail_for_termination(&Path) -> String`, `create_symlink(target: &Path, link: &Path)
//! -> io::Result<()>`, `remove_container_logs(log: &Path, link: Option<&Path>) -> io::Result<()>` (removes `<n>.log*` and the link), and for the server:
//! `LogOptions{follow, previous, tail_lines, limit_bytes, since_seconds, since_time, timestamps, stream}` and a reader that streams bytes), merge it to main
//! at once with hooks and probes, and leave this file as it was (`git checkout src/server/mod.rs`).
