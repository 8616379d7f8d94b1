//! Credential providers (contract I-07): programs that know logins for registries, asked when an image is about to be pulled.
//!
//! In: an image's repository and the pod that wants it. Out: a [`Keyring`]. Touches the programs, and in service account mode the
//! apiserver for a token of the pod's account. Answers are kept as long and for as much as the program says; the same question
//! under way is asked once. A provider that fails is logged and gives nothing. Nothing here is shown by `Debug`.

mod cache;
mod config;
mod exec;

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, join_all},
};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

pub use config::ProviderConfigError;

use self::{
    cache::{AccountKey, LoginCache},
    config::{ProviderConfig, ProvidersConfig},
    exec::{CacheKeyType, ExecPlugin, Logins, Plugin, PluginRequest, PluginResponse},
};
use super::{
    credentials::{Coordinates, Credential, CredentialSource, Keyring, hex, registry_matches},
    metrics::ImageMetrics,
};
use crate::{
    api::{ReferencedObjects, TokenSpec},
    pods::Pod,
    time::Clock,
};

/// What a TokenRequest without a time gets.
const TOKEN_SECONDS: i64 = 3600;

/// The two flags.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProviderSettings {
    /// `--image-credential-provider-config`: a file or a directory.
    pub config: PathBuf,
    /// `--image-credential-provider-bin-dir`.
    pub bin_dir: PathBuf,
    /// Gate KubeletServiceAccountTokenForCredentialProviders.
    pub service_account_tokens: bool,
}

/// All providers, in the order of the configuration.
pub(super) struct CredentialProviders {
    providers: Vec<Provider>,
    objects: Arc<dyn ReferencedObjects>,
    clock: Arc<dyn Clock>,
}

type Flight = Shared<BoxFuture<'static, Result<PluginResponse, String>>>;
/// Image, token hash, annotations.
type FlightKey = (String, String, BTreeMap<String, String>);

struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache: Duration,
    plugin: Arc<dyn Plugin>,
    account_mode: Option<AccountMode>,
    cache: Mutex<LoginCache>,
    flights: Arc<Mutex<HashMap<FlightKey, Flight>>>,
}

struct AccountMode {
    audience: String,
    required: bool,
    required_annotations: Vec<String>,
    optional_annotations: Vec<String>,
    /// Answers hold for one token; else for the account.
    by_token: bool,
}

/// The pod's account as a provider is told of it.
struct Account {
    coordinates: Coordinates,
    annotations: BTreeMap<String, String>,
    token: String,
    token_hash: String,
}

impl CredentialProviders {
    /// Reads the configuration and looks for the programs. Blocking: for the start of the agent.
    pub(super) fn load(
        settings: &ProviderSettings,
        objects: Arc<dyn ReferencedObjects>,
        clock: Arc<dyn Clock>,
        metrics: &ImageMetrics,
    ) -> Result<Self, ProviderConfigError> {
        let directory = settings.bin_dir.display().to_string();
        match std::fs::metadata(&settings.bin_dir) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ProviderConfigError::NoDirectory(directory));
            }
            Err(source) => return Err(ProviderConfigError::Directory { path: directory, source }),
        }
        let ProvidersConfig { providers, hash } = config::read(&settings.config, settings.service_account_tokens)?;
        metrics.provider_config(&hash);
        let mut made = Vec::new();
        for config in providers {
            let program = find_program(&settings.bin_dir, &config.name)?;
            let plugin =
                ExecPlugin { program, config: config.clone(), clock: Arc::clone(&clock), metrics: metrics.clone() };
            made.push(Provider::new(config, Arc::new(plugin), clock.now().mono));
        }
        Ok(Self { providers: made, objects, clock })
    }

    /// What all providers know of a repository (`reg.io/team/app`), each asked beside the others.
    pub(super) async fn keyring(&self, repository: &str, pod: &Pod) -> Keyring {
        let answers = self.providers.iter().map(|p| p.provide(repository, pod, &*self.objects, &*self.clock));
        let mut keyring = Keyring::default();
        for (provider, answer) in self.providers.iter().zip(join_all(answers).await) {
            match answer {
                Ok((logins, source)) => {
                    for (registry, (username, password)) in logins.iter() {
                        let (username, password, source) = (username.clone(), password.clone(), source.clone());
                        keyring.add(registry, Credential { username, password, source, ..Default::default() });
                    }
                }
                Err(error) => {
                    let (pod, image) = (pod.described(), repository);
                    tracing::error!(
                        provider = provider.name,
                        image,
                        pod,
                        error,
                        "Failed to provide credentials for image"
                    );
                }
            }
        }
        keyring
    }
}

fn find_program(directory: &Path, name: &str) -> Result<PathBuf, ProviderConfigError> {
    let path = directory.join(name);
    match std::fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => Err(ProviderConfigError::Program { path, reason: "is a directory".to_owned() }),
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 => {
            Err(ProviderConfigError::Program { path, reason: "permission denied".to_owned() })
        }
        Ok(_) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(ProviderConfigError::NoProgram(path.display().to_string()))
        }
        Err(error) => Err(ProviderConfigError::Program { path, reason: error.to_string() }),
    }
}

impl Provider {
    fn new(config: ProviderConfig, plugin: Arc<dyn Plugin>, now: Instant) -> Self {
        let account_mode = config.token_attributes.filter(|t| !t.service_account_token_audience.is_empty());
        Self {
            name: config.name,
            match_images: config.match_images,
            default_cache: config.default_cache_duration.unwrap_or_default().std(),
            plugin,
            account_mode: account_mode.map(|t| AccountMode {
                audience: t.service_account_token_audience,
                required: t.require_service_account.unwrap_or(true),
                required_annotations: t.required_service_account_annotation_keys,
                optional_annotations: t.optional_service_account_annotation_keys,
                by_token: t.cache_type == "Token",
            }),
            cache: Mutex::new(LoginCache::new(now)),
            flights: Arc::default(),
        }
    }

    async fn provide(
        &self,
        image: &str,
        pod: &Pod,
        objects: &dyn ReferencedObjects,
        clock: &dyn Clock,
    ) -> Result<(Arc<Logins>, CredentialSource), String> {
        let nothing = Ok((Arc::default(), CredentialSource::Node));
        if !self.match_images.iter().any(|pattern| registry_matches(pattern, image)) {
            return nothing;
        }
        let account_name = pod.spec().service_account_name.as_deref().unwrap_or_default();
        let account = match &self.account_mode {
            Some(mode) if account_name.is_empty() && mode.required => return nothing,
            Some(mode) if !account_name.is_empty() => match mode.account(pod, account_name, objects).await? {
                Some(account) => Some(account),
                None => {
                    tracing::debug!(
                        provider = self.name,
                        image,
                        "a required annotation of the service account is missing"
                    );
                    return nothing;
                }
            },
            _ => None,
        };
        let source = account
            .as_ref()
            .map_or(CredentialSource::Node, |a| CredentialSource::ServiceAccount(a.coordinates.clone()));
        let by_token = self.account_mode.as_ref().is_some_and(|mode| mode.by_token);
        let key: AccountKey = account.as_ref().map(|a| a.cache_key(by_token));
        let held = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(image, &key, clock.now().mono);
        if let Some(logins) = held {
            return Ok((logins, source));
        }
        let response = self
            .ask_once(image, account.as_ref())
            .await
            .map_err(|error| format!("failed to get credential from external registry credential provider: {error}"))?;
        if let Some(account) = &account
            && !by_token
            && response.logins.values().any(|(_, password)| *password == account.token)
        {
            return Err(
                "credential provider plugin returned the service account token as the password which is not allowed \
                        when service account cache type is not set to 'Token'"
                    .to_owned(),
            );
        }
        let scope = response
            .cache_key_type
            .map_err(|word| format!("credential provider plugin did not return a valid cacheKeyType: {word}"))?;
        let lifetime = response.cache_duration.map_or(self.default_cache, |duration| duration.std());
        if !lifetime.is_zero() {
            let until = clock.now().mono + lifetime;
            let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.put(image, scope, key, Arc::clone(&response.logins), until);
        }
        Ok((response.logins, source))
    }

    /// Joins the same question when it is under way. A question goes on when who asked has gone away.
    async fn ask_once(&self, image: &str, account: Option<&Account>) -> Result<PluginResponse, String> {
        let request = PluginRequest {
            image: image.to_owned(),
            service_account_token: account.map(|a| a.token.clone()).unwrap_or_default(),
            service_account_annotations: account.map(|a| a.annotations.clone()).unwrap_or_default(),
        };
        let token_hash = account.map(|a| a.token_hash.clone()).unwrap_or_default();
        let key: FlightKey = (image.to_owned(), token_hash, request.service_account_annotations.clone());
        let flight = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            match flights.get(&key).filter(|flight| flight.peek().is_none()) {
                Some(flight) => flight.clone(),
                None => {
                    let flight = self.launch(request, key.clone());
                    flights.insert(key, flight.clone());
                    flight
                }
            }
        };
        flight.await
    }

    fn launch(&self, request: PluginRequest, key: FlightKey) -> Flight {
        let (plugin, flights) = (Arc::clone(&self.plugin), Arc::clone(&self.flights));
        let task = tokio::spawn(async move {
            let answer = plugin.ask(request).await;
            flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            answer
        });
        async move { task.await.unwrap_or_else(|error| Err(error.to_string())) }.boxed().shared()
    }
}

impl AccountMode {
    /// `None`: the account lacks a required annotation, so the workload did not opt in.
    async fn account(&self, pod: &Pod, name: &str, objects: &dyn ReferencedObjects) -> Result<Option<Account>, String> {
        let data = objects
            .service_account(pod.namespace(), name)
            .await
            .map_err(|error| format!("failed to get service account: {error}"))?;
        let mut annotations = BTreeMap::new();
        for key in &self.required_annotations {
            let Some(value) = data.annotations.get(key) else { return Ok(None) };
            annotations.insert(key.clone(), value.clone());
        }
        for key in &self.optional_annotations {
            annotations.extend(data.annotations.get(key).map(|value| (key.clone(), value.clone())));
        }
        let spec = TokenSpec { audience: self.audience.clone(), expiration_seconds: TOKEN_SECONDS };
        let token = objects
            .service_account_token(pod, &spec)
            .await
            .map_err(|error| format!("failed to get service account token: {error}"))?
            .token;
        let coordinates = Coordinates { uid: data.uid, namespace: pod.namespace().to_owned(), name: name.to_owned() };
        let token_hash = hex(&Sha256::digest(&token));
        Ok(Some(Account { coordinates, annotations, token, token_hash }))
    }
}

impl Account {
    fn cache_key(&self, by_token: bool) -> cache::AccountIdentity {
        cache::AccountIdentity {
            account: self.coordinates.clone(),
            annotations: self.annotations.clone(),
            token_hash: by_token.then(|| self.token_hash.clone()),
        }
    }
}

/// Host and port of `reg.io:5000/team/app`.
fn registry_of(image: &str) -> &str {
    image.split('/').next().unwrap_or(image)
}

#[cfg(test)]
mod tests;
