//! Whether more pods want to start than the runtime can start at once.
//!
//! The start gate says so. Those whose writes can wait (events, statuses that say little) listen: on a small node the apiserver is a
//! neighbour, and each write costs the starts some of the node's time.

use tokio::sync::watch;

/// Clones are the same rush.
#[derive(Debug, Clone)]
pub struct Rush(watch::Sender<bool>);

impl Default for Rush {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Rush {
    pub fn set(&self, on: bool) {
        self.0.send_if_modified(|now| std::mem::replace(now, on) != on);
    }

    pub fn is_on(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when there is none, at once if there is none.
    pub async fn over(&self) {
        // It cannot fail: the sender is in `self`.
        self.0.subscribe().wait_for(|on| !on).await.ok();
    }
}
