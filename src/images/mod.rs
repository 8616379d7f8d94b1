//! Images: whether a container's image is there, pulling it, and how failures back off (contract section 4).

mod ports;

pub use ports::{ImageError, Images, PresentImage};
