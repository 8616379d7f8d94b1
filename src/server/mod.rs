//! The agent's doors: 10250 (logs, exec; TLS, authenticated, authorised) and 10248 (healthz) (contract section 7).
