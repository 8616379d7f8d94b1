//! Images that were handed to pods a moment ago: their containers may not be made yet, so nothing else shows that they are in use.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// From handing an image out to its container at the runtime. A start that takes longer pulls again.
const HELD: Duration = Duration::from_secs(120);

#[derive(Debug, Default)]
pub(super) struct RecentUses {
    touched: Mutex<HashMap<String, Instant>>,
    /// Rings at every use: there are images now.
    pub(super) used: Notify,
}

impl RecentUses {
    /// `reference` as the runtime gave it.
    pub(super) fn touch(&self, reference: &str, now: Instant) {
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        touched.retain(|_, at| now.duration_since(*at) < HELD);
        touched.insert(reference.to_owned(), now);
        drop(touched);
        self.used.notify_one();
    }

    /// References that were handed out lately.
    pub(super) fn held(&self, now: Instant) -> Vec<String> {
        let touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        touched.iter().filter(|(_, at)| now.duration_since(**at) < HELD).map(|(name, _)| name.clone()).collect()
    }
}
