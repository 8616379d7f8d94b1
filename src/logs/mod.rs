//! Container logs: the CRI log format, reading, following, and the symlinks under `/var/log/containers` (contract section 9).
//!
//! In: the path of a log file that the runtime writes, and what the reader wants of it. Out: bytes in order, with memory that does
//! not grow with the file. `record` is pure; `read` does the file I/O; `links` keeps the symlinks. Which file belongs to which
//! container, and whether the container still runs, the caller knows.

mod links;
mod read;
mod record;

pub use links::{create_link, link_path, remove_link, remove_logs_of, runs_logged};
pub use read::{LogError, StillRunning, read_logs, tail_for_termination};
pub use record::{LogOptions, StreamChoice};
