//! The agent's gRPC peers, generated from `proto/`: CRI v1, and containerd's own event service.
//!
//! Client and server code; the servers are for tests. Nothing here does I/O or decides anything. `Debug` never shows
//! registry credentials, environment values, commands or a verbose status' info (see `redact`).

mod redact;

/// The container runtime interface.
pub mod cri {
    /// Package `runtime.v1`.
    pub mod v1 {
        #![allow(clippy::doc_lazy_continuation, clippy::large_enum_variant)]
        tonic::include_proto!("runtime.v1");
    }
}

/// containerd's own API on the same socket.
pub mod containerd {
    /// Its gRPC services.
    pub mod services {
        /// The event service.
        pub mod events {
            /// Package `containerd.services.events.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.events.v1");
            }
        }
    }
    /// Package `containerd.events`: the payloads.
    pub mod events {
        tonic::include_proto!("containerd.events");
    }
}
