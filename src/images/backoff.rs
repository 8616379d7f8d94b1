//! How long a failing image of a pod is left alone (contract I-04): 10 s, doubling to 300 s. Time is an argument.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::pods::PodUid;

const FIRST: Duration = Duration::from_secs(10);
const MAX: Duration = Duration::from_secs(300);

/// As the Go kubelet's key: two containers of a pod with the same image share one back-off.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: PodUid,
    /// As the user wrote it.
    image: String,
}

#[derive(Debug)]
struct Entry {
    delay: Duration,
    failed_at: Instant,
    /// `ErrImagePull: <message>`: shown while waiting.
    error: String,
}

impl Entry {
    /// Left alone for twice the longest delay: the next failure is a first one again.
    fn expired(&self, now: Instant) -> bool {
        now.duration_since(self.failed_at) > 2 * MAX
    }
}

/// Failed pulls by pod and image.
#[derive(Debug, Default)]
pub(super) struct PullBackoff {
    entries: HashMap<Key, Entry>,
}

impl PullBackoff {
    /// When the back-off ends and why there is one; `None`: pull now.
    pub(super) fn waiting(&self, uid: &PodUid, image: &str, now: Instant) -> Option<(Instant, &str)> {
        let entry = self.entries.get(&key(uid, image)).filter(|entry| !entry.expired(now))?;
        let until = entry.failed_at + entry.delay;
        (now < until).then_some((until, entry.error.as_str()))
    }

    /// Notes a failed pull; returns when the next one may start.
    pub(super) fn failed(&mut self, uid: &PodUid, image: &str, error: String, now: Instant) -> Instant {
        let key = key(uid, image);
        let before = self.entries.get(&key).filter(|entry| !entry.expired(now)).map(|entry| entry.delay);
        let delay = before.map_or(FIRST, |delay| (delay * 2).min(MAX));
        self.entries.insert(key, Entry { delay, failed_at: now, error });
        now + delay
    }

    pub(super) fn forget(&mut self, uid: &PodUid) {
        self.entries.retain(|key, _| key.uid != *uid);
    }
}

fn key(uid: &PodUid, image: &str) -> Key {
    Key { uid: uid.clone(), image: image.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Instant {
        use crate::time::Clock;
        crate::time::SystemClock.now().mono
    }

    #[test]
    fn i04_doubles_from_10_s_to_300_s_per_pod_and_image() {
        let (mut backoff, uid, mut now) = (PullBackoff::default(), PodUid::from("u"), start());
        for seconds in [10, 20, 40, 80, 160, 300, 300] {
            let until = backoff.failed(&uid, "i", "ErrImagePull: x".into(), now);
            assert_eq!(until - now, Duration::from_secs(seconds));
            assert_eq!(backoff.waiting(&uid, "i", now).unwrap(), (until, "ErrImagePull: x"));
            assert!(backoff.waiting(&uid, "i", until - Duration::from_millis(1)).is_some());
            assert_eq!(backoff.waiting(&uid, "i", until), None);
            assert_eq!(backoff.waiting(&uid, "other", now), None);
            assert_eq!(backoff.waiting(&PodUid::from("v"), "i", now), None);
            now = until;
        }
    }

    #[test]
    fn i04_starts_afresh_after_600_s_of_quiet_and_when_forgotten() {
        let (mut backoff, uid, now) = (PullBackoff::default(), PodUid::from("u"), start());
        backoff.failed(&uid, "i", String::new(), now);
        let later = now + Duration::from_secs(601);
        assert_eq!(backoff.failed(&uid, "i", String::new(), later) - later, FIRST);
        let soon = later + Duration::from_secs(600);
        assert_eq!(backoff.failed(&uid, "i", String::new(), soon) - soon, 2 * FIRST);
        backoff.forget(&uid);
        assert_eq!(backoff.waiting(&uid, "i", soon), None);
        assert!(backoff.entries.is_empty());
    }
}
