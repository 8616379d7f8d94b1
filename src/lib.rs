//! rkubelet: the Kubernetes node agent. Each room opens with what it is for; `docs/architecture.md` shows the way of a pod.

pub mod admission;
pub mod agent;
pub mod api;
pub mod cli;
pub mod config;
pub mod containers;
pub mod cri;
pub mod events;
pub mod garbage_collection;
pub mod images;
pub mod logs;
pub mod network;
pub mod node;
pub mod pod_status;
pub mod pod_worker;
pub mod pods;
pub mod probes;
pub mod quantity;
pub mod resources;
pub mod rush;
pub mod server;
pub mod telemetry;
pub mod time;
pub mod user_namespaces;
pub mod volumes;
pub mod wake;
