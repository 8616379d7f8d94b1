//! Images: whether a container's image is there and may be used, pulling it, how failures back off, and removing what nobody uses
//! (contract section 4).
//!
//! In: a pod's container or image volume, through [`Images`]. Out: a [`PresentImage`] or why there is none, and the events of contract
//! I-02. Touches the runtime's image service, the pod's pull secrets, the node's docker config files, credential providers' programs,
//! and the pull records under `<root>/image_manager`. Credentials live only in memory and on the way to the runtime; no
//! `Debug`, log, event or file shows them.
//!
//! [`flow`] is one image's way, [`pull_queue`] the runtime's turn; [`verification`] decides by [`pull_records`] who may use what is there;
//! [`providers`] and [`docker_config`] fill keyrings; [`garbage_collection`] removes by [`image_history`].

mod backoff;
mod credentials;
mod docker_config;
mod flow;
mod garbage_collection;
mod glob;
mod image_history;
mod metrics;
mod node_images;
mod ports;
mod providers;
mod pull_queue;
mod pull_records;
mod pull_time;
mod recent_uses;
mod record_files;
mod reference;
#[cfg(test)]
mod tests;
mod verification;

pub use garbage_collection::{
    CollectionError, CollectorParts, CollectorSettings, ImageGarbageCollector, ImageUsers, RuntimeImageUsers, StatFs,
    machine_stat_fs,
};
pub use node_images::{ImageParts, ImageSettings, ImagesSetupError, NodeImages};
pub use ports::{ImageError, Images, PresentImage};
pub use providers::{ProviderConfigError, ProviderSettings};
pub use reference::{ImageReference, InvalidReference};
pub use verification::VerificationPolicy;
