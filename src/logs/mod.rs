//! Container logs: the CRI log format, reading, following, and the symlinks under `/var/log/containers` (contract section 9).
