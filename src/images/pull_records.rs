//! Who pulled which image on this node, and with what (contract I-10): in memory for every start of a container, on disk for the next agent.
//!
//! A pull is noted before the runtime is asked (*intent*) and again, with the credentials that worked, when it came. A crash
//! between the two leaves the intent: the image counts as pulled by an unknown, so its next user has to prove access.
//! The disk is written by blocking threads, one write at a time; what decides is read from memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use protocols::cri::v1;

use super::{
    metrics::ImageMetrics,
    record_files::{Found, PullCredentials, PulledRecord, RecordFiles, file_name},
    reference::{ImageReference, without_tag},
    verification::{Knowledge, merge},
};
use crate::time::api_time;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct PullRecords(Arc<Inner>);

struct Inner {
    files: RecordFiles,
    /// One writer at a time. Taken by blocking threads only.
    writing: Mutex<()>,
    memory: Mutex<Memory>,
    metrics: ImageMetrics,
}

#[derive(Default)]
struct Memory {
    pulled: BTreeMap<String, PulledRecord>,
    /// File names.
    unreadable: BTreeSet<String>,
    /// Pulls under way by image name; 0: left by an earlier agent.
    intents: HashMap<String, u32>,
}

impl PullRecords {
    /// Reads what an earlier agent left. Blocking: for the start of the agent.
    pub(super) fn open(root_dir: &Path, metrics: ImageMetrics) -> io::Result<Self> {
        let files = RecordFiles::open(root_dir)?;
        let Found { intents, pulled, unreadable } = files.read_all();
        let memory = Memory {
            pulled: pulled.into_iter().map(|record| (record.image_ref.clone(), record)).collect(),
            unreadable,
            intents: intents.into_iter().map(|image| (image, 0)).collect(),
        };
        let inner = Inner { files, writing: Mutex::default(), memory: Mutex::new(memory), metrics };
        inner.tell_sizes();
        Ok(Self(Arc::new(inner)))
    }

    /// Whether an earlier agent died during a pull.
    pub(super) fn left_over(&self) -> bool {
        self.0.memory().intents.values().any(|count| *count == 0)
    }

    /// Turns intents of an earlier agent whose image has come into records without credentials.
    pub(super) async fn recover(&self, images: Vec<v1::Image>, now: Timestamp) {
        self.on_disk(move |inner| inner.recover(&images, now)).await;
    }

    /// A pull is about to be asked for.
    pub(super) async fn intend(&self, image: &str) -> io::Result<()> {
        let image = image.to_owned();
        self.on_disk(move |inner| inner.intend(&image)).await.unwrap_or_else(|| Err(io::Error::other("aborted")))
    }

    /// The pull succeeded with these credentials. If that cannot be written, the intent stays.
    pub(super) async fn succeeded(&self, image: &str, image_ref: &str, with: PullCredentials, now: Timestamp) {
        let (image, image_ref) = (image.to_owned(), image_ref.to_owned());
        self.on_disk(move |inner| {
            if inner.record(&image, &image_ref, Some(&with), now) {
                inner.end_intent(&image);
            }
        })
        .await;
    }

    pub(super) async fn failed(&self, image: &str) {
        let image = image.to_owned();
        self.on_disk(move |inner| inner.end_intent(&image)).await;
    }

    /// A pod proved access without a pull, by what the record did not have yet.
    pub(super) async fn note(&self, image: &str, image_ref: &str, with: PullCredentials, now: Timestamp) {
        let (image, image_ref) = (image.to_owned(), image_ref.to_owned());
        self.on_disk(move |inner| inner.record(&image, &image_ref, Some(&with), now)).await;
    }

    pub(super) fn knowledge(&self, image: &str, image_ref: &str) -> Knowledge {
        let memory = self.0.memory();
        if let Some(record) = memory.pulled.get(image_ref) {
            return Knowledge::Pulled(record.clone());
        }
        if !memory.unreadable.is_empty() && memory.unreadable.contains(&file_name(image_ref)) {
            return Knowledge::Unreadable;
        }
        if memory.intents.contains_key(image) { Knowledge::Pulling } else { Knowledge::Preloaded }
    }

    /// Drops records of images that are gone. Nothing while pulls are under way, and nothing that changed since `listed_at`.
    pub(super) async fn prune(&self, present: BTreeSet<String>, listed_at: Timestamp) {
        self.on_disk(move |inner| inner.prune(&present, listed_at)).await;
    }

    async fn on_disk<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> Option<T> {
        let inner = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || {
            let _turn = inner.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let done = work(&inner);
            inner.tell_sizes();
            done
        });
        done.await.inspect_err(|error| tracing::error!(%error, "writing image pull records was interrupted")).ok()
    }
}

impl Inner {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_sizes(&self) {
        let memory = self.memory();
        self.metrics.records(memory.intents.len(), memory.pulled.len() + memory.unreadable.len());
    }

    fn intend(&self, image: &str) -> io::Result<()> {
        self.files.write_intent(image)?;
        *self.memory().intents.entry(image.to_owned()).or_default() += 1;
        Ok(())
    }

    fn end_intent(&self, image: &str) {
        let count = self.memory().intents.get(image).copied().unwrap_or(0);
        if count > 1 {
            self.memory().intents.insert(image.to_owned(), count - 1);
            return;
        }
        match self.files.remove_intent(image) {
            Ok(()) => drop(self.memory().intents.remove(image)),
            Err(error) => tracing::error!(image, %error, "failed to remove image pull intent"),
        }
    }

    /// True when the record says so now. Without credentials it says only that a kubelet pulled the image.
    fn record(&self, image: &str, image_ref: &str, with: Option<&PullCredentials>, now: Timestamp) -> bool {
        let name = match without_tag(image) {
            Ok(name) => name,
            Err(error) => {
                tracing::error!(image_ref, %error, "failed to write image pulled record");
                return false;
            }
        };
        let last_updated = api_time(now).0;
        let known = self.memory().pulled.get(image_ref).cloned();
        let grants = with.and_then(|with| merge(known.as_ref().and_then(|record| record.credentials.get(name)), with));
        if known.is_some() && grants.is_none() {
            return true;
        }
        let empty = || PulledRecord { last_updated, image_ref: image_ref.to_owned(), credentials: BTreeMap::new() };
        let mut record = known.unwrap_or_else(empty);
        record.last_updated = last_updated;
        record.credentials.extend(grants.map(|grants| (name.to_owned(), grants)));
        if let Err(error) = self.files.write_record(&record) {
            tracing::error!(image_ref, %error, "failed to write image pulled record");
            return false;
        }
        let mut memory = self.memory();
        memory.unreadable.remove(&file_name(image_ref));
        memory.pulled.insert(image_ref.to_owned(), record);
        true
    }

    fn recover(&self, images: &[v1::Image], now: Timestamp) {
        let memory = self.memory();
        let left: Vec<String> =
            memory.intents.iter().filter(|(_, count)| **count == 0).map(|(image, _)| image.clone()).collect();
        drop(memory);
        for intent in left {
            let came = images.iter().filter(|image| is_named(image, &intent));
            let recorded = came.map(|image| self.record(&intent, &image.id, None, now)).collect::<Vec<_>>();
            if !recorded.is_empty() && recorded.iter().all(|done| *done) {
                self.end_intent(&intent);
            }
        }
    }

    fn prune(&self, present: &BTreeSet<String>, listed_at: Timestamp) {
        let memory = self.memory();
        if memory.intents.values().any(|count| *count > 0) {
            return;
        }
        // Records keep whole seconds.
        let old = |record: &&PulledRecord| record.last_updated < api_time(listed_at).0;
        let gone: Vec<String> = memory
            .pulled
            .values()
            .filter(old)
            .map(|record| record.image_ref.clone())
            .filter(|image_ref| !present.contains(image_ref))
            .collect();
        drop(memory);
        for image_ref in gone {
            match self.files.remove_record(&image_ref) {
                Ok(()) => drop(self.memory().pulled.remove(&image_ref)),
                Err(error) => tracing::error!(image_ref, %error, "failed to remove an ImagePulledRecord"),
            }
        }
    }
}

/// Whether this is the image that a pod calls so: runtimes list full names, pods may use short ones.
fn is_named(image: &v1::Image, name: &str) -> bool {
    let full = |name: &str| {
        let ImageReference { repository, tag, digest } = ImageReference::parse(name).ok()?;
        let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Some((repository, tag.filter(|_| digest.is_none()), digest))
    };
    let wanted = full(name);
    image
        .repo_tags
        .iter()
        .chain(&image.repo_digests)
        .any(|known| known == name || (wanted.is_some() && full(known) == wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::record_files::SecretCredential;

    fn open(dir: &Path) -> PullRecords {
        PullRecords::open(dir, ImageMetrics::unregistered()).unwrap()
    }
    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }
    fn everybody() -> PullCredentials {
        PullCredentials { node_pods_accessible: true, ..Default::default() }
    }
    fn secret(name: &str) -> PullCredentials {
        let secret = SecretCredential { name: name.into(), credential_hash: "h".into(), ..Default::default() };
        PullCredentials { kubernetes_secrets: vec![secret], ..Default::default() }
    }
    fn grants(records: &PullRecords, image_ref: &str, name: &str) -> Option<PullCredentials> {
        match records.knowledge("", image_ref) {
            Knowledge::Pulled(record) => record.credentials.get(name).cloned(),
            _ => None,
        }
    }

    #[tokio::test]
    async fn i10_an_intent_stands_while_any_pull_of_the_image_does() {
        let dir = tempfile::tempdir().unwrap();
        let records = open(dir.path());
        assert_eq!(records.knowledge("a:1", "ref"), Knowledge::Preloaded);
        records.intend("a:1").await.unwrap();
        records.intend("a:1").await.unwrap();
        records.failed("a:1").await;
        assert_eq!(records.knowledge("a:1", "ref"), Knowledge::Pulling);
        assert_eq!(records.knowledge("b:1", "ref"), Knowledge::Preloaded);
        records.succeeded("a:1", "ref", secret("s"), at(5)).await;
        assert_eq!(grants(&records, "ref", "a"), Some(secret("s")));
        assert!(!open(dir.path()).left_over(), "nothing is left on disk");
    }

    #[tokio::test]
    async fn i10_a_crash_between_pulling_and_pulled_leaves_an_image_that_must_be_proved() {
        let dir = tempfile::tempdir().unwrap();
        for image in ["nginx", "reg.io/a:1", "reg.io/never:1"] {
            open(dir.path()).intend(image).await.unwrap();
        }
        let records = open(dir.path());
        assert!(records.left_over());
        assert_eq!(records.knowledge("nginx", "id-1"), Knowledge::Pulling);
        let image =
            |id: &str, tag: &str| v1::Image { id: id.into(), repo_tags: vec![tag.into()], ..Default::default() };
        let listed = vec![image("id-1", "docker.io/library/nginx:latest"), image("id-2", "reg.io/a:1")];
        records.recover(listed, at(9)).await;
        for (image, id) in [("docker.io/library/nginx:latest", "id-1"), ("reg.io/a:1", "id-2")] {
            let Knowledge::Pulled(record) = records.knowledge(image, id) else { panic!("{image}") };
            assert!(record.credentials.is_empty() && record.last_updated == at(9));
        }
        assert_eq!(records.knowledge("reg.io/never:1", "id-3"), Knowledge::Pulling);
        let again = open(dir.path());
        assert!(again.left_over(), "the image that did not come is still awaited");
        assert!(matches!(again.knowledge("nginx", "id-1"), Knowledge::Pulled(_)));
    }

    #[tokio::test]
    async fn i10_records_survive_and_grow() {
        let dir = tempfile::tempdir().unwrap();
        let records = open(dir.path());
        records.succeeded("reg.io/a:1", "ref", secret("s"), at(1)).await;
        records.note("reg.io/a:2", "ref", secret("t"), at(2)).await;
        records.succeeded("reg.io/b", "ref", everybody(), at(3)).await;
        let again = open(dir.path());
        assert_eq!(grants(&again, "ref", "reg.io/a").unwrap().kubernetes_secrets.len(), 2);
        assert_eq!(grants(&again, "ref", "reg.io/b"), Some(everybody()));
    }

    #[tokio::test]
    async fn i10_records_of_gone_images_are_dropped_but_never_during_a_pull() {
        let dir = tempfile::tempdir().unwrap();
        let records = open(dir.path());
        for (image_ref, second) in [("kept", 1), ("gone", 1), ("new", 10)] {
            records.succeeded("a", image_ref, everybody(), at(second)).await;
        }
        let present = BTreeSet::from(["kept".to_owned()]);
        records.intend("b").await.unwrap();
        records.prune(present.clone(), at(10)).await;
        assert!(grants(&records, "gone", "a").is_some());
        records.failed("b").await;
        records.prune(present, at(10)).await;
        let left = |r: &PullRecords| ["kept", "gone", "new"].map(|image_ref| grants(r, image_ref, "a").is_some());
        assert_eq!(left(&records), [true, false, true]);
        assert_eq!(left(&open(dir.path())), [true, false, true]);
    }

    #[tokio::test]
    async fn i10_an_unreadable_record_is_replaced_by_the_next_pull() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).succeeded("a", "ref", everybody(), at(1)).await;
        std::fs::write(dir.path().join("image_manager/pulled").join(file_name("ref")), "{").unwrap();
        let records = open(dir.path());
        assert_eq!(records.knowledge("a", "ref"), Knowledge::Unreadable);
        records.succeeded("a", "ref", secret("s"), at(2)).await;
        assert_eq!(grants(&records, "ref", "a"), Some(secret("s")));
    }
}
