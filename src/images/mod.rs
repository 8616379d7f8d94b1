//! Images: whether a container's image is there, pulling it, and how failures back off (contract section 4).
//!
//! In: a pod's container, through [`Images::ensure`]. Out: a [`PresentImage`] or why there is none, and the events of contract
//! I-02. Touches the runtime's image service, the pod's pull secrets, and the node's docker config files. Credentials
//! live only in memory and on the way to the runtime; no `Debug`, log or event shows them.

mod backoff;
mod credentials;
mod docker_config;
mod glob;
mod node_images;
mod ports;
mod pull_queue;
mod pull_time;
mod reference;
#[cfg(test)]
mod tests;

pub use node_images::{ImageSettings, NodeImages};
pub use ports::{ImageError, Images, PresentImage};
pub use reference::{ImageReference, InvalidReference};
