//! One pod's entry in the store, and the only places that change it: a read put in, an event applied.
//!
//! Pure. A read replaces what was known before it was sent. An event may only move a container or sandbox forwards, add what
//! no read could have seen, or take away what was deleted; it never raises `as_of`. What events told while a read was under
//! way outlives that read.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;

use super::{Container, ContainerState, PodRuntime, Sandbox, Seq, observed::OOM_KILLED, translate, v1};

/// What one read of a pod found.
#[derive(Debug, Default)]
pub(super) struct PodRead {
    /// Drawn before the first request of the read was sent.
    pub(super) as_of: Seq,
    /// Wall time of the same moment: events made before it know nothing that the read does not.
    pub(super) sent_at: Timestamp,
    pub(super) sandboxes: Vec<Sandbox>,
    pub(super) containers: Vec<Container>,
}

/// An event told about this ID after the last read was sent.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: Seq,
    gone: bool,
}

/// What an event did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Applied {
    pub(super) changed: bool,
    /// The event hints at something that it does not say: read the pod.
    pub(super) needs_read: bool,
}

#[derive(Debug)]
pub(super) struct PodEntry {
    runtime: Arc<PodRuntime>,
    sent_at: Timestamp,
    told: HashMap<String, Told>,
}

/// Created < Running < Exited. Unknown is no progress: only a read may say it.
fn rank(state: ContainerState) -> u8 {
    match state {
        ContainerState::Unknown => 0,
        ContainerState::Created => 1,
        ContainerState::Running => 2,
        ContainerState::Exited => 3,
    }
}

/// Both tell of the same end, and only `newer` knows that it was an out-of-memory kill.
fn corrects(newer: &Container, older: &Container) -> bool {
    let both_ended = newer.state == ContainerState::Exited && older.state == ContainerState::Exited;
    both_ended && newer.reason == OOM_KILLED && older.reason != OOM_KILLED
}

impl PodEntry {
    /// An entry that knows nothing but that the pod had nothing at `as_of`.
    pub(super) fn empty(as_of: Seq, sent_at: Timestamp) -> Self {
        let runtime = Arc::new(PodRuntime { as_of, ..PodRuntime::default() });
        Self { runtime, sent_at, told: HashMap::new() }
    }

    pub(super) fn runtime(&self) -> &Arc<PodRuntime> {
        &self.runtime
    }

    pub(super) fn holds(&self, id: &str) -> bool {
        self.runtime.containers.iter().any(|c| c.id == id) || self.runtime.sandboxes.iter().any(|s| s.id == id)
    }

    /// Nothing is there, and no event has told anything since the last read.
    pub(super) fn is_vacant(&self) -> bool {
        self.runtime.is_empty() && self.told.is_empty()
    }

    /// Puts a read in place, unless a later one is there. Returns whether sandboxes or containers differ.
    pub(super) fn install(&mut self, mut read: PodRead) -> bool {
        if read.as_of <= self.runtime.as_of {
            return false;
        }
        self.told.retain(|_, told| told.at > read.as_of);
        let held = &*self.runtime;
        let gone = |id: &str| self.told.get(id).is_some_and(|t| t.gone);
        let told = |id: &str| self.told.contains_key(id);

        read.containers.retain(|c| !gone(&c.id));
        read.sandboxes.retain(|s| !gone(&s.id));
        for container in &mut read.containers {
            let Some(known) = held.containers.iter().find(|c| c.id == container.id) else { continue };
            if told(&container.id) && (rank(known.state) > rank(container.state) || corrects(known, container)) {
                *container = known.clone();
            }
            container.oom_killed |= known.oom_killed;
        }
        for sandbox in &mut read.sandboxes {
            let Some(known) = held.sandboxes.iter().find(|s| s.id == sandbox.id) else { continue };
            if told(&sandbox.id) && !known.ready {
                sandbox.ready = false;
            }
            keep_ips(sandbox, known);
        }
        let missing = held.containers.iter().filter(|c| told(&c.id) && read.containers.iter().all(|r| r.id != c.id));
        let added: Vec<_> = missing.cloned().collect();
        read.containers.extend(added);
        let missing = held.sandboxes.iter().filter(|s| told(&s.id) && read.sandboxes.iter().all(|r| r.id != s.id));
        let added: Vec<_> = missing.cloned().collect();
        read.sandboxes.extend(added);

        self.sent_at = read.sent_at;
        self.replace(PodRuntime { as_of: read.as_of, sandboxes: read.sandboxes, containers: read.containers })
    }

    /// Applies one event, drawn as `at`. See the module for what it may do.
    pub(super) fn apply(&mut self, event: v1::ContainerEventResponse, at: Seq) -> Applied {
        let kind = event.container_event_type();
        let mut next = PodRuntime::clone(&self.runtime);
        let mut needs_read = false;
        // Made before the last read was sent: whatever it knows that the read did not find is gone by now.
        let stale = event.created_at <= nanos(self.sent_at);

        let sandbox_id = event.pod_sandbox_status.as_ref().map(|s| s.id.clone()).unwrap_or_default();
        if let Some(status) = event.pod_sandbox_status {
            needs_read |= self.advance_sandbox(&mut next, translate::sandbox(status), stale, at);
        }
        let told_state = event.containers_statuses.iter().any(|s| s.id == event.container_id);
        for status in event.containers_statuses {
            needs_read |= self.advance_container(&mut next, translate::container(status, &sandbox_id), stale, at);
        }
        match kind {
            v1::ContainerEventType::ContainerDeletedEvent => {
                next.containers.retain(|c| c.id != event.container_id);
                next.sandboxes.retain(|s| s.id != event.container_id);
                self.told.insert(event.container_id, Told { at, gone: true });
            }
            // Some runtimes tell only that something happened.
            _ if !told_state && event.container_id != sandbox_id => needs_read = true,
            _ => {}
        }
        Applied { changed: self.replace(next), needs_read }
    }

    /// Marks a container as hit by an out-of-memory kill. `None` if it is not here.
    pub(super) fn mark_oom(&mut self, container_id: &str) -> Option<bool> {
        let at = self.runtime.containers.iter().position(|c| c.id == container_id)?;
        if self.runtime.containers[at].oom_killed {
            return Some(false);
        }
        let mut next = PodRuntime::clone(&self.runtime);
        next.containers[at].oom_killed = true;
        Some(self.replace(next))
    }

    /// Returns whether a read is needed.
    fn advance_container(&mut self, next: &mut PodRuntime, seen: Container, stale: bool, at: Seq) -> bool {
        if seen.id.is_empty() || self.told.get(&seen.id).is_some_and(|t| t.gone) {
            return false;
        }
        let Some(known) = next.containers.iter_mut().find(|c| c.id == seen.id) else {
            if stale {
                return true;
            }
            self.told.insert(seen.id.clone(), Told { at, gone: false });
            next.containers.push(seen);
            return false;
        };
        if seen.state == ContainerState::Unknown {
            return known.state != ContainerState::Unknown;
        }
        if rank(seen.state) > rank(known.state) || corrects(&seen, known) {
            self.told.insert(seen.id.clone(), Told { at, gone: false });
            *known = Container { oom_killed: known.oom_killed, ..seen };
        }
        false
    }

    /// Returns whether a read is needed.
    fn advance_sandbox(&mut self, next: &mut PodRuntime, seen: Sandbox, stale: bool, at: Seq) -> bool {
        if seen.id.is_empty() || self.told.get(&seen.id).is_some_and(|t| t.gone) {
            return false;
        }
        let Some(known) = next.sandboxes.iter_mut().find(|s| s.id == seen.id) else {
            if stale {
                return true;
            }
            self.told.insert(seen.id.clone(), Told { at, gone: false });
            next.sandboxes.push(seen);
            return false;
        };
        let stopped = known.ready && !seen.ready;
        let addressed = known.ips.is_empty() && !seen.ips.is_empty();
        if stopped || addressed {
            self.told.insert(seen.id.clone(), Told { at, gone: false });
            known.ready &= seen.ready;
            if addressed {
                known.ips = seen.ips;
            }
        }
        false
    }

    /// Sorts newest first, shares nothing stale, and says whether anything but `as_of` differs.
    fn replace(&mut self, mut next: PodRuntime) -> bool {
        next.containers.sort_by(|a, b| (b.created_at, b.attempt, &b.id).cmp(&(a.created_at, a.attempt, &a.id)));
        next.sandboxes.sort_by(|a, b| (b.created_at, b.attempt, &b.id).cmp(&(a.created_at, a.attempt, &a.id)));
        next.containers.shrink_to_fit();
        next.sandboxes.shrink_to_fit();
        let changed = next.containers != self.runtime.containers || next.sandboxes != self.runtime.sandboxes;
        if changed || next.as_of != self.runtime.as_of {
            self.runtime = Arc::new(next);
        }
        changed
    }
}

/// A stopped sandbox has lost its network, but the pod's status keeps the addresses it had.
fn keep_ips(sandbox: &mut Sandbox, known: &Sandbox) {
    if !sandbox.ready && sandbox.ips.is_empty() {
        sandbox.ips.clone_from(&known.ips);
    }
}

fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
