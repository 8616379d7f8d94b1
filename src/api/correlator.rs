//! What becomes of an event: sent new, counted onto an earlier one, combined with similar ones, or dropped as spam (contract P-45).
//!
//! Pure: an event and the time in, a [`Decision`] out. The same event again → PATCH of its count; ten different messages of one
//! reason on one object within ten minutes → one combined event; more than 25 events of one object → one per five minutes.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::Event, apimachinery::pkg::apis::meta::v1::Time};
use tokio::time::Instant;

use crate::time::{Now, api_time};

const SIMILAR_LIMIT: usize = 10;
const SIMILAR_WINDOW_SECONDS: i64 = 600;
const SPAM_BURST: f64 = 25.0;
const SPAM_PER_SECOND: f64 = 1.0 / 300.0;
const CACHE_ENTRIES: usize = 4096;

/// What to do with one event.
#[derive(Debug)]
pub(super) enum Decision {
    Create(Event),
    /// Known already: its name, count and time are set for a PATCH, and complete for a new creation if it has expired meanwhile.
    Count(Event),
    Drop,
}

/// Keeps the most recently used entries.
struct Recent<K, V> {
    entries: HashMap<K, (u64, V)>,
    uses: u64,
}

impl<K: Hash + Eq + Clone, V> Recent<K, V> {
    fn new() -> Self {
        Self { entries: HashMap::new(), uses: 0 }
    }

    fn entry(&mut self, key: K, new: impl FnOnce() -> V) -> &mut V {
        self.uses += 1;
        if self.entries.len() >= CACHE_ENTRIES && !self.entries.contains_key(&key) {
            self.drop_oldest();
        }
        let uses = self.uses;
        let (used, value) = self.entries.entry(key).or_insert_with(|| (uses, new()));
        *used = uses;
        value
    }

    /// Drops the older half at once, so that this is rare.
    fn drop_oldest(&mut self) {
        let mut ages: Vec<u64> = self.entries.values().map(|(used, _)| *used).collect();
        ages.sort_unstable();
        let median = ages.get(ages.len() / 2).copied().unwrap_or_default();
        self.entries.retain(|_, (used, _)| *used > median);
    }
}

struct Similar {
    messages: HashSet<String>,
    last: Timestamp,
}

#[derive(Default)]
struct Observed {
    count: i32,
    first: Option<Time>,
    name: String,
}

struct Tokens {
    at: Instant,
    level: f64,
}

/// Remembers what was sent lately.
pub(super) struct Correlator {
    similar: Recent<String, Similar>,
    observed: Recent<String, Observed>,
    tokens: Recent<String, Tokens>,
}

/// The parts of an event that say who reports on what.
fn object_key(event: &Event) -> Vec<&str> {
    let object = &event.involved_object;
    let source = event.source.as_ref();
    vec![
        source.and_then(|s| s.component.as_deref()).unwrap_or_default(),
        source.and_then(|s| s.host.as_deref()).unwrap_or_default(),
        object.kind.as_deref().unwrap_or_default(),
        object.namespace.as_deref().unwrap_or_default(),
        object.name.as_deref().unwrap_or_default(),
        object.uid.as_deref().unwrap_or_default(),
        object.api_version.as_deref().unwrap_or_default(),
        event.type_.as_deref().unwrap_or_default(),
    ]
}

fn joined(parts: &[&str]) -> String {
    parts.join("\u{1f}")
}

impl Correlator {
    pub(super) fn new() -> Self {
        Self { similar: Recent::new(), observed: Recent::new(), tokens: Recent::new() }
    }

    pub(super) fn decide(&mut self, event: Event, now: Now) -> Decision {
        let (event, key) = self.combine(event, now);
        let event = self.observe(event, key);
        if self.is_spam(&event, now.mono) {
            return Decision::Drop;
        }
        if event.count.unwrap_or(1) > 1 { Decision::Count(event) } else { Decision::Create(event) }
    }

    /// Replaces an event that is one of many similar ones. The key names what its count belongs to.
    fn combine(&mut self, event: Event, now: Now) -> (Event, String) {
        let message = event.message.clone().unwrap_or_default();
        let reason = event.reason.clone().unwrap_or_default();
        let mut parts = object_key(&event);
        parts.push(&reason);
        let similar_key = joined(&parts);
        parts.push(event.involved_object.field_path.as_deref().unwrap_or_default());
        parts.push(&message);
        let own_key = joined(&parts);

        let similar =
            self.similar.entry(similar_key.clone(), || Similar { messages: HashSet::new(), last: Timestamp::MIN });
        if now.wall.as_second() - similar.last.as_second() > SIMILAR_WINDOW_SECONDS {
            similar.messages.clear();
        }
        similar.last = now.wall;
        similar.messages.insert(message.clone());
        if similar.messages.len() < SIMILAR_LIMIT {
            return (event, own_key);
        }
        // The set stays at its limit while such events go on.
        if let Some(any) = similar.messages.iter().next().cloned() {
            similar.messages.remove(&any);
        }
        let at = api_time(now.wall);
        let mut combined = event;
        combined.message = Some(format!("(combined from similar events): {message}"));
        combined.first_timestamp = Some(at.clone());
        combined.last_timestamp = Some(at);
        (combined, similar_key)
    }

    fn observe(&mut self, mut event: Event, key: String) -> Event {
        let seen = self.observed.entry(key, Observed::default);
        if seen.count > 0 {
            event.metadata.name = Some(seen.name.clone());
            event.first_timestamp = seen.first.clone();
            event.count = Some(seen.count.saturating_add(1));
        }
        *seen = Observed {
            count: event.count.unwrap_or(1),
            first: event.first_timestamp.clone(),
            name: event.metadata.name.clone().unwrap_or_default(),
        };
        event
    }

    fn is_spam(&mut self, event: &Event, now: Instant) -> bool {
        let tokens = self.tokens.entry(joined(&object_key(event)), || Tokens { at: now, level: SPAM_BURST });
        let grown = now.saturating_duration_since(tokens.at).as_secs_f64() * SPAM_PER_SECOND;
        tokens.level = (tokens.level + grown).min(SPAM_BURST);
        tokens.at = now;
        if tokens.level < 1.0 {
            return true;
        }
        tokens.level -= 1.0;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{Clock, SimulatedClock};
    use std::time::Duration;

    fn event(reason: &str, message: &str, serial: u32) -> Event {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": format!("p.{serial}"), "namespace": "n"},
            "involvedObject": {"kind": "Pod", "namespace": "n", "name": "p", "uid": "u", "apiVersion": "v1"},
            "source": {"component": "kubelet", "host": "node"},
            "type": "Warning", "reason": reason, "message": message, "count": 1,
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z"
        }))
        .unwrap()
    }

    fn clock() -> SimulatedClock {
        SimulatedClock::starting_at("2026-01-01T00:00:00Z".parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn p45_the_same_event_is_counted_under_its_first_name() {
        let (mut correlator, clock) = (Correlator::new(), clock());
        assert!(matches!(correlator.decide(event("BackOff", "m", 1), clock.now()), Decision::Create(_)));
        for count in 2..5 {
            match correlator.decide(event("BackOff", "m", count), clock.now()) {
                Decision::Count(e) => {
                    assert_eq!((e.metadata.name.as_deref(), e.count), (Some("p.1"), Some(count as i32)));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn p45_the_tenth_similar_event_becomes_a_combined_one() {
        let (mut correlator, clock) = (Correlator::new(), clock());
        for n in 1..10 {
            assert!(matches!(
                correlator.decide(event("Failed", &format!("m{n}"), n), clock.now()),
                Decision::Create(_)
            ));
        }
        match correlator.decide(event("Failed", "m10", 10), clock.now()) {
            Decision::Create(e) => assert_eq!(e.message.as_deref(), Some("(combined from similar events): m10")),
            other => panic!("{other:?}"),
        }
        match correlator.decide(event("Failed", "m11", 11), clock.now()) {
            Decision::Count(e) => {
                assert_eq!(e.message.as_deref(), Some("(combined from similar events): m11"));
                assert_eq!((e.metadata.name.as_deref(), e.count), (Some("p.10"), Some(2)));
            }
            other => panic!("{other:?}"),
        }
        tokio::time::advance(Duration::from_secs(601)).await;
        match correlator.decide(event("Failed", "m12", 12), clock.now()) {
            Decision::Create(e) => assert_eq!(e.message.as_deref(), Some("m12")),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn p45_spam_is_limited_to_25_then_one_in_300_seconds() {
        let (mut correlator, clock) = (Correlator::new(), clock());
        let mut sent = 0;
        for n in 0..60 {
            sent +=
                i32::from(!matches!(correlator.decide(event(&format!("R{n}"), "m", n), clock.now()), Decision::Drop));
        }
        assert_eq!(sent, 25);
        tokio::time::advance(Duration::from_secs(299)).await;
        assert!(matches!(correlator.decide(event("R", "m", 61), clock.now()), Decision::Drop));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!matches!(correlator.decide(event("R2", "m", 62), clock.now()), Decision::Drop));
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut recent: Recent<usize, ()> = Recent::new();
        for n in 0..3 * CACHE_ENTRIES {
            recent.entry(n, || ());
        }
        assert!(recent.entries.len() <= CACHE_ENTRIES);
        assert!(recent.entries.contains_key(&(3 * CACHE_ENTRIES - 1)));
    }
}
