//! Where desired pods come from. A source owns its slice of the [`PodStore`](super::PodStore) and nothing else.
pub mod apiserver;

#[cfg(test)]
mod tests;
