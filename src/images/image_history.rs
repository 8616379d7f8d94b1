//! Which unused image goes first, and how much has to go (contract I-11). Pure; time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use protocols::cri::v1;
use tokio::time::Instant;

/// An image of the runtime: its ID, and the handler it was pulled for (contract I-15; empty for the default).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ImageKey {
    pub(super) id: String,
    pub(super) handler: String,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    first_detected: Instant,
    /// `None`: never in use since this agent started.
    last_used: Option<Instant>,
}

/// An image that nobody uses and that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) key: ImageKey,
    pub(super) bytes: u64,
    pub(super) first_detected: Instant,
    pub(super) last_used: Option<Instant>,
}

impl Candidate {
    /// Unused for longer than that; never used counts as long enough.
    pub(super) fn unused_for_more_than(&self, age: Duration, now: Instant) -> bool {
        self.last_used.is_none_or(|at| now.duration_since(at) > age)
    }

    /// It may have just been pulled, and be used right away.
    pub(super) fn younger_than(&self, age: Duration, now: Instant) -> bool {
        now.duration_since(self.first_detected) < age
    }
}

/// When each image was first seen and last in use.
#[derive(Debug, Default)]
pub(super) struct ImageHistory {
    images: BTreeMap<ImageKey, Seen>,
}

impl ImageHistory {
    /// Takes a complete list of images and of the references in use; returns what may go, least recently used first. Pinned images never do.
    pub(super) fn observe(&mut self, images: &[v1::Image], in_use: &BTreeSet<String>, now: Instant) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        let mut current = BTreeSet::new();
        for image in images {
            let handler = image.spec.as_ref().map(|spec| spec.runtime_handler.clone()).unwrap_or_default();
            let key = ImageKey { id: image.id.clone(), handler };
            current.insert(key.clone());
            let seen = self.images.entry(key.clone()).or_insert(Seen { first_detected: now, last_used: None });
            let names = std::iter::once(&image.id).chain(&image.repo_tags).chain(&image.repo_digests);
            if names.into_iter().any(|name| in_use.contains(name)) {
                seen.last_used = Some(now);
            } else if !image.pinned {
                let Seen { first_detected, last_used } = *seen;
                candidates.push(Candidate { key, bytes: image.size, first_detected, last_used });
            }
        }
        self.images.retain(|key, _| current.contains(key));
        candidates
            .sort_by(|a, b| (a.last_used, a.first_detected, &a.key).cmp(&(b.last_used, b.first_detected, &b.key)));
        candidates
    }

    pub(super) fn forget(&mut self, key: &ImageKey) {
        self.images.remove(key);
    }
}

/// Space of the image file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) available: u64,
}

/// What must be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortage {
    pub(super) used_percent: u64,
    pub(super) bytes: u64,
}

/// At or above `high` percent of use: as much as brings it down to `low`.
pub(super) fn shortage(space: Space, high: u64, low: u64) -> Option<Shortage> {
    let Space { capacity, available } = space;
    let percent = |part: u64, of: u64| u64::try_from(u128::from(part) * 100 / u128::from(of.max(1))).unwrap_or(100);
    let used_percent = 100_u64.saturating_sub(percent(available, capacity));
    let wanted =
        u64::try_from(u128::from(capacity) * u128::from(100_u64.saturating_sub(low)) / 100).unwrap_or(u64::MAX);
    (used_percent >= high).then(|| Shortage { used_percent, bytes: wanted.saturating_sub(available) })
}

/// `512 B`, `1.5 GiB`.
pub(super) fn readable_size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{Clock, SystemClock};

    fn image(id: &str, pinned: bool) -> v1::Image {
        v1::Image { id: id.into(), size: 7, pinned, repo_tags: vec![format!("{id}:latest")], ..Default::default() }
    }
    fn used(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }
    fn ids(candidates: &[Candidate]) -> Vec<&str> {
        candidates.iter().map(|c| c.key.id.as_str()).collect()
    }

    #[test]
    fn i11_least_recently_used_first_and_neither_used_nor_pinned_ones() {
        let (mut history, start) = (ImageHistory::default(), SystemClock.now().mono);
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let all = ["old", "a", "b", "c"].map(|id| image(id, false));
        let pinned = image("pause", true);
        let list = |images: &[v1::Image]| images.iter().cloned().chain([pinned.clone()]).collect::<Vec<_>>();
        assert_eq!(ids(&history.observe(&list(&all[..1]), &used(&[]), at(0))), ["old"]);
        // In use by ID or by any of its names.
        let candidates = history.observe(&list(&all), &used(&["a", "b:latest"]), at(1));
        assert_eq!(ids(&candidates), ["old", "c"]);
        let candidates = history.observe(&list(&all), &used(&["a"]), at(2));
        assert_eq!(ids(&candidates), ["old", "c", "b"]);
        let candidates = history.observe(&list(&all), &used(&[]), at(3));
        assert_eq!(ids(&candidates), ["old", "c", "b", "a"]);
        let a = candidates.last().unwrap();
        assert!(
            a.unused_for_more_than(Duration::from_secs(59), at(3))
                && !a.unused_for_more_than(Duration::from_secs(60), at(3))
        );
        assert!(candidates[0].unused_for_more_than(Duration::MAX, at(3)), "never used is older than anything");
        assert!(a.younger_than(Duration::from_secs(121), at(3)) && !a.younger_than(Duration::from_secs(120), at(3)));
        // What went away is new when it comes back.
        history.observe(&list(&all[1..]), &used(&[]), at(4));
        assert_eq!(ids(&history.observe(&list(&all), &used(&[]), at(5))), ["c", "old", "b", "a"]);
    }

    #[test]
    fn i11_thresholds() {
        let space = |available| Space { capacity: 1000, available };
        for (available, want) in
            [(160, None), (159, Some((85, 41))), (150, Some((85, 50))), (149, Some((86, 51))), (0, Some((100, 200)))]
        {
            let got = shortage(space(available), 85, 80).map(|s| (s.used_percent, s.bytes));
            assert_eq!(got, want, "{available}");
        }
        let huge = Space { capacity: u64::MAX, available: 1 };
        assert_eq!(shortage(huge, 85, 0).unwrap().bytes, u64::MAX - 1);
    }

    #[test]
    fn i11_sizes_as_people_read_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (100 << 30, "100.0 GiB"),
            (2 << 40, "2.0 TiB"),
        ] {
            assert_eq!(readable_size(bytes), text);
        }
    }
}
