//! Turns `proto/*.proto` into Rust: parsed by protox (no protoc), client and server code. A server answers Unimplemented to
//! what it does not override.

use std::error::Error;

const FILES: [&str; 3] = ["cri.proto", "containerd_events.proto", "containerd_task_events.proto"];

/// Messages whose own fields are secrets: `src/redact.rs` writes their `Debug`. Whatever contains them derives it safely.
const REDACTED: [&str; 4] = [
    ".runtime.v1.AuthConfig",
    ".runtime.v1.KeyValue",
    ".runtime.v1.ContainerConfig",
    ".runtime.v1.ContainerStatusResponse",
];

#[allow(clippy::print_stdout)] // cargo reads directives from stdout
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().generate_default_stubs(true).skip_debug(REDACTED).compile_fds(descriptors)?;
    Ok(())
}
