//! Kubernetes quantities: `100m`, `1.5Gi`, `12E`, parsed exactly and written in Go's canonical form.
