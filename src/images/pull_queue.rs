//! Pulls on their way to the runtime (contract I-08, I-09): in order of arrival, one at a time or several, at most so many a second,
//! the same image with the same credentials once; each with its pull records (I-10).
//!
//! A pull is a task of its own: whoever waits for it may go away, the pull goes on.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocols::cri::v1;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use super::{
    credentials::{Credential, CredentialSource},
    pull_records::PullRecords,
    record_files::{PullCredentials, SecretCredential},
};
use crate::{
    cri::{CriError, ImageService},
    time::Clock,
};

/// What is asked of the runtime.
#[derive(Clone)]
pub(super) struct PullRequest {
    /// As the user wrote it: the name in the pull records.
    pub(super) requested: String,
    pub(super) image: v1::ImageSpec,
    /// Tried in this order; none means without credentials.
    pub(super) credentials: Vec<Credential>,
    pub(super) sandbox: v1::PodSandboxConfig,
}

/// A pulled image.
#[derive(Debug, Clone)]
pub(super) struct Pulled {
    /// The runtime's reference.
    pub(super) reference: String,
    /// Its status right after the pull, if the runtime told.
    pub(super) status: Option<v1::Image>,
    /// From the start of the pull itself, without waiting.
    pub(super) took: Duration,
}

/// Why there is no image, as it goes into events and the waiting message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PullFailure {
    /// The runtime was asked, or would have been.
    Pull(String),
    /// The intent could not be written, so nothing was asked.
    Record(String),
}

pub(super) type PullResult = Result<Pulled, PullFailure>;

#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    image: String,
    credentials: Vec<Credential>,
}

/// Limits of [`PullQueue`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limits {
    /// Pulls at a time; `None`: as many as come.
    pub(super) parallel: Option<usize>,
    /// Pulls a second; 0: no limit.
    pub(super) qps: f64,
    pub(super) burst: u32,
}

pub(super) struct PullQueue {
    service: Arc<dyn ImageService>,
    clock: Arc<dyn Clock>,
    /// `None`: the feature is off.
    records: Option<PullRecords>,
    /// Fair: first come, first served.
    slots: Option<Semaphore>,
    rate: Option<Mutex<TokenBucket>>,
    running: Mutex<HashMap<Key, watch::Receiver<Option<PullResult>>>>,
}

impl PullQueue {
    pub(super) fn new(
        service: Arc<dyn ImageService>,
        clock: Arc<dyn Clock>,
        limits: Limits,
        records: Option<PullRecords>,
    ) -> Arc<Self> {
        let bucket =
            (limits.qps > 0.0).then(|| Mutex::new(TokenBucket::new(limits.qps, limits.burst, clock.now().mono)));
        let slots = limits.parallel.map(|n| Semaphore::new(n.max(1)));
        Arc::new(Self { service, clock, records, slots, rate: bucket, running: Mutex::default() })
    }

    /// Waits for its turn and the pull, or joins the same pull on its way.
    pub(super) async fn pull(self: &Arc<Self>, request: PullRequest) -> PullResult {
        let mut result = self.start_or_join(request);
        let done = result.wait_for(Option::is_some).await.map(|value| value.clone());
        done.ok().flatten().unwrap_or_else(|| Err(PullFailure::Pull("image pull was aborted".to_owned())))
    }

    fn start_or_join(self: &Arc<Self>, request: PullRequest) -> watch::Receiver<Option<PullResult>> {
        let key = Key { image: request.image.image.clone(), credentials: request.credentials.clone() };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // A dead entry is one whose task panicked: then pull anew.
        if let Some(pull) = running.get(&key).filter(|pull| pull.has_changed().is_ok()) {
            return pull.clone();
        }
        let (done, result) = watch::channel(None);
        running.insert(key.clone(), result.clone());
        let queue = self.clone();
        tokio::spawn(async move {
            let pulled = queue.run(request).await;
            queue.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            done.send_replace(Some(pulled));
        });
        result
    }

    async fn run(&self, request: PullRequest) -> PullResult {
        let _slot = match &self.slots {
            Some(slots) => Some(slots.acquire().await.map_err(|error| PullFailure::Pull(error.to_string()))?),
            None => None,
        };
        let start = self.clock.now().mono;
        if !self.take_token(start) {
            return Err(PullFailure::Pull("pull QPS exceeded".to_owned()));
        }
        let (image, requested) = (request.image.clone(), request.requested.clone());
        if let Some(records) = &self.records {
            records.intend(&requested).await.map_err(|error| {
                PullFailure::Record(format!(
                    "Failed to record image pull intent for container image {requested:?}: failed to record image pull \
                     intent: {error}"
                ))
            })?;
        }
        let pulled = self.try_credentials(request).await;
        match (&self.records, &pulled) {
            (Some(records), Ok((reference, used))) => {
                records.succeeded(&requested, reference, proof(used.as_ref()), self.clock.now().wall).await;
            }
            (Some(records), Err(_)) => records.failed(&requested).await,
            (None, _) => {}
        }
        let (reference, _) = pulled.map_err(PullFailure::Pull)?;
        let status = self.service.image_status(image).await.ok().flatten();
        Ok(Pulled { reference, status, took: self.clock.now().mono - start })
    }

    fn take_token(&self, now: Instant) -> bool {
        self.rate.as_ref().is_none_or(|rate| rate.lock().unwrap_or_else(PoisonError::into_inner).take(now))
    }

    /// The runtime's reference, and the credential that worked.
    async fn try_credentials(&self, request: PullRequest) -> Result<(String, Option<Credential>), String> {
        let PullRequest { image, credentials, sandbox, .. } = request;
        let pull = |auth| self.service.pull_image(image.clone(), auth, Some(sandbox.clone()));
        if credentials.is_empty() {
            return pull(None).await.map(|reference| (reference, None)).map_err(|error| error.to_string());
        }
        let mut errors = Vec::new();
        for credential in credentials {
            match pull(Some(credential.to_cri())).await {
                Ok(reference) => return Ok((reference, Some(credential))),
                Err(error) => errors.push(error),
            }
        }
        Err(aggregate(&errors))
    }
}

/// Who has shown access by a pull: the owner of the credential, or every pod when it was the node's or none.
fn proof(used: Option<&Credential>) -> PullCredentials {
    let mut proof = PullCredentials::default();
    match used.map(|credential| (&credential.source, credential)) {
        None | Some((CredentialSource::Node, _)) => proof.node_pods_accessible = true,
        Some((CredentialSource::Secret(_), credential)) => {
            proof.kubernetes_secrets.extend(secret_credential(credential));
        }
        Some((CredentialSource::ServiceAccount(account), _)) => {
            proof.kubernetes_service_accounts.push(account.clone());
        }
    }
    proof
}

/// What a record keeps of a pull secret's credential; `None` for credentials of other sources.
pub(super) fn secret_credential(credential: &Credential) -> Option<SecretCredential> {
    let CredentialSource::Secret(of) = &credential.source else { return None };
    Some(SecretCredential {
        uid: of.uid.clone(),
        namespace: of.namespace.clone(),
        name: of.name.clone(),
        credential_hash: credential.hash(),
    })
}

/// Different messages once each, in brackets when there is more than one.
fn aggregate(errors: &[CriError]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for text in errors.iter().map(ToString::to_string) {
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    match &texts[..] {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

/// `qps` tokens a second, at most `burst` saved up.
struct TokenBucket {
    qps: f64,
    burst: f64,
    tokens: f64,
    at: Instant,
}

impl TokenBucket {
    fn new(qps: f64, burst: u32, now: Instant) -> Self {
        Self { qps, burst: f64::from(burst), tokens: f64::from(burst), at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.qps;
        self.tokens = (self.tokens + earned).min(self.burst);
        self.at = now;
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::time::SystemClock;

    #[test]
    fn i09_token_bucket_follows_the_clock() {
        let start = SystemClock.now().mono;
        let mut bucket = TokenBucket::new(5.0, 2, start);
        assert_eq!([0, 0, 0].map(|_| bucket.take(start)), [true, true, false]);
        assert!(!bucket.take(start + Duration::from_millis(100)));
        assert!(bucket.take(start + Duration::from_millis(201)));
        let later = start + Duration::from_secs(60);
        assert_eq!([0, 0, 0].map(|_| bucket.take(later)), [true, true, false]);
    }

    #[test]
    fn i05_errors_of_all_credentials_are_told_once_each() {
        let error = |message: &str| CriError::new("PullImage", Code::NotFound, message);
        assert_eq!(aggregate(&[error("a"), error("a")]), "rpc error: code = NotFound desc = a");
        assert_eq!(
            aggregate(&[error("a"), error("b"), error("a")]),
            "[rpc error: code = NotFound desc = a, rpc error: code = NotFound desc = b]"
        );
    }
}
