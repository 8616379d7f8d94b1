//! One provider over a fake program, in paused time.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use jiff::Timestamp;

use super::*;
use crate::{
    api::{ApiError, ConfigMapData, SecretData, ServiceAccountData, ServiceAccountToken, ServiceEnv},
    config::GoDuration,
    containers::tests::{named_pod, pod},
    pods::PodUid,
    time::SimulatedClock,
};

/// Answers after a second; counts, and keeps what it was asked.
struct FakePlugin {
    asked: Mutex<Vec<PluginRequest>>,
    scope: Result<CacheKeyType, String>,
    duration: Option<GoDuration>,
    password: String,
}

#[async_trait]
impl Plugin for FakePlugin {
    async fn ask(&self, request: PluginRequest) -> Result<PluginResponse, String> {
        self.asked.lock().unwrap().push(request);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let logins = Logins::from([("reg.io".to_owned(), ("u".to_owned(), self.password.clone()))]);
        Ok(PluginResponse {
            cache_key_type: self.scope.clone(),
            cache_duration: self.duration,
            logins: Arc::new(logins),
        })
    }
}

/// One service account with annotation `have`; every token is new.
#[derive(Default)]
struct Accounts(AtomicUsize);

#[async_trait]
impl ReferencedObjects for Accounts {
    fn track(&self, _: &Pod) {}
    fn forget(&self, _: &PodUid) {}
    async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        Err(ApiError::NotFound { kind: "configmap", name: name.into() })
    }
    async fn secret(&self, _: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        Err(ApiError::NotFound { kind: "secret", name: name.into() })
    }
    async fn service_account_token(&self, _: &Pod, spec: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        assert_eq!((spec.audience.as_str(), spec.expiration_seconds), ("aud", 3600));
        let token = format!("token-{}", self.0.fetch_add(1, Ordering::SeqCst));
        Ok(ServiceAccountToken { token, issued: Timestamp::UNIX_EPOCH, expires: Timestamp::UNIX_EPOCH })
    }
    async fn service_account(&self, namespace: &str, name: &str) -> Result<ServiceAccountData, ApiError> {
        assert_eq!((namespace, name), ("ns", "sa"));
        Ok(ServiceAccountData { uid: "sa-uid".into(), annotations: [("have".to_owned(), "v".to_owned())].into() })
    }
    fn services(&self, _: &str) -> Option<Vec<ServiceEnv>> {
        None
    }
}

struct World {
    plugin: Arc<FakePlugin>,
    providers: CredentialProviders,
}

impl World {
    /// `attributes`: tokenAttributes as JSON.
    fn new(
        scope: Result<CacheKeyType, String>,
        duration: Option<GoDuration>,
        password: &str,
        attributes: &str,
    ) -> Self {
        let plugin = Arc::new(FakePlugin { asked: Mutex::default(), scope, duration, password: password.into() });
        let clock = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
        let config = format!(
            r#"{{"name":"p","matchImages":["reg.io","*.reg.io/team"],"defaultCacheDuration":"1m","tokenAttributes":{attributes}}}"#
        );
        let provider = Provider::new(serde_json::from_str(&config).unwrap(), plugin.clone(), clock.now().mono);
        let providers =
            CredentialProviders { providers: vec![provider], objects: Arc::new(Accounts::default()), clock };
        Self { plugin, providers }
    }

    fn plain(scope: CacheKeyType, duration: Option<GoDuration>) -> Self {
        Self::new(Ok(scope), duration, "hush", "null")
    }

    async fn users(&self, image: &str, pod: &Pod) -> usize {
        self.providers.keyring(image, pod).await.lookup("reg.io/a").len()
    }

    fn asked(&self) -> usize {
        self.plugin.asked.lock().unwrap().len()
    }
}

fn with_account() -> Pod {
    pod(r#"{"serviceAccountName":"sa"}"#)
}

const ACCOUNT: &str = r#"{"serviceAccountTokenAudience":"aud","requireServiceAccount":true,"cacheType":"ServiceAccount",
    "requiredServiceAccountAnnotationKeys":["have"],"optionalServiceAccountAnnotationKeys":["wish"]}"#;

#[tokio::test(start_paused = true)]
async fn i07_only_matching_images_are_asked_for() {
    let world = World::plain(CacheKeyType::Image, None);
    for (image, asked) in [("reg.io/a", 1), ("eu.reg.io/a", 1), ("eu.reg.io/team/x", 2), ("docker.io/library/a", 2)] {
        world.users(image, &pod("{}")).await;
        assert_eq!(world.asked(), asked, "{image}");
    }
}

#[tokio::test(start_paused = true)]
async fn i07_answers_are_kept_for_the_default_the_given_or_no_time() {
    for (duration, held) in [(None, 60), (Some(GoDuration::from_secs(600)), 600), (Some(GoDuration::ZERO), 0)] {
        let world = World::plain(CacheKeyType::Registry, duration);
        assert_eq!(world.users("reg.io/a", &pod("{}")).await, 1);
        world.users("reg.io/b", &pod("{}")).await;
        assert_eq!(world.asked(), if held > 0 { 1 } else { 2 });
        tokio::time::sleep(Duration::from_secs(held + 1)).await;
        world.users("reg.io/a", &pod("{}")).await;
        assert_eq!(world.asked(), if held > 0 { 2 } else { 3 });
    }
}

#[tokio::test(start_paused = true)]
async fn i07_the_same_question_is_asked_once_at_a_time() {
    let world = World::plain(CacheKeyType::Image, Some(GoDuration::ZERO));
    let pods: Vec<Pod> = (0..5).map(|n| named_pod(&format!("p{n}"), "{}")).collect();
    let all = join_all(pods.iter().map(|pod| world.users("reg.io/a", pod))).await;
    assert_eq!((all, world.asked()), (vec![1; 5], 1));
    world.users("reg.io/a", &pods[0]).await;
    assert_eq!(world.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn i07_a_provider_that_fails_gives_nothing() {
    let world = World::new(Err("Node".into()), None, "hush", "null");
    assert_eq!(world.users("reg.io/a", &pod("{}")).await, 0);
}

#[tokio::test(start_paused = true)]
async fn i07_account_mode_hands_over_token_and_annotations() {
    let world = World::new(Ok(CacheKeyType::Image), None, "hush", ACCOUNT);
    let keyring = world.providers.keyring("reg.io/a", &with_account()).await;
    let coordinates = Coordinates { uid: "sa-uid".into(), namespace: "ns".into(), name: "sa".into() };
    assert_eq!(keyring.lookup("reg.io/a")[0].source, CredentialSource::ServiceAccount(coordinates));
    let asked = world.plugin.asked.lock().unwrap()[0].clone();
    assert_eq!(asked.service_account_token, "token-0");
    assert_eq!(asked.service_account_annotations, [("have".to_owned(), "v".to_owned())].into());
    // Every call has another token, and the account is the same.
    world.users("reg.io/a", &with_account()).await;
    assert_eq!(world.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn i07_account_mode_by_token_without_account_and_without_annotation() {
    let by_token =
        World::new(Ok(CacheKeyType::Image), None, "token-0", &ACCOUNT.replace("\"ServiceAccount\"", "\"Token\""));
    for n in 1..3 {
        assert_eq!(by_token.users("reg.io/a", &with_account()).await, 1);
        assert_eq!(by_token.asked(), n, "another token, another question");
    }
    let echo = World::new(Ok(CacheKeyType::Image), None, "token-0", ACCOUNT);
    assert_eq!(echo.users("reg.io/a", &with_account()).await, 0, "an echoed token is refused");

    let missing = World::new(Ok(CacheKeyType::Image), None, "hush", &ACCOUNT.replace("[\"have\"]", "[\"have not\"]"));
    assert_eq!((missing.users("reg.io/a", &with_account()).await, missing.asked()), (0, 0));

    let required = World::new(Ok(CacheKeyType::Image), None, "hush", ACCOUNT);
    assert_eq!((required.users("reg.io/a", &pod("{}")).await, required.asked()), (0, 0));
    let optional = ACCOUNT.replace("true", "false").replace("[\"have\"]", "[]");
    let optional = World::new(Ok(CacheKeyType::Image), None, "hush", &optional);
    assert_eq!((optional.users("reg.io/a", &pod("{}")).await, optional.asked()), (1, 1));
    assert_eq!(optional.plugin.asked.lock().unwrap()[0].service_account_token, "");
}

#[tokio::test]
async fn i07_programs_must_be_there_and_executable() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(
        &config,
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {name: p, matchImages: [reg.io], \
         defaultCacheDuration: 1m, apiVersion: credentialprovider.kubelet.k8s.io/v1}\n",
    )
    .unwrap();
    let bin_dir = dir.path().join("bin");
    let load = || {
        let settings =
            ProviderSettings { config: config.clone(), bin_dir: bin_dir.clone(), service_account_tokens: true };
        let clock = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
        CredentialProviders::load(&settings, Arc::new(Accounts::default()), clock, &ImageMetrics::unregistered())
            .map(|loaded| loaded.providers.len())
            .map_err(|error| error.to_string())
    };
    assert_eq!(load(), Err(format!("plugin binary directory {} did not exist", bin_dir.display())));
    std::fs::create_dir(&bin_dir).unwrap();
    let program = bin_dir.join("p");
    assert_eq!(load(), Err(format!("plugin binary executable {program:?} did not exist").replace('"', "")));
    std::fs::write(&program, "#!/bin/sh\n").unwrap();
    assert_eq!(load(), Err(format!("error inspecting binary executable {}: permission denied", program.display())));
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(load(), Ok(1));
}
