//! The flow of images against a fake image service, in paused time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ImageVolumeSource;
use protocols::cri::v1;
use tonic::Code;

use super::*;
use crate::{
    api::{
        ApiError, ConfigMapData, ReferencedObjects, RuntimeClassData, SecretData, ServiceAccountToken, ServiceEnv,
        TokenSpec,
    },
    containers::tests::pod,
    cri::{CriError, ImageService},
    events::{EventType, MemoryEvents, Regarding},
    pods::{Pod, PodUid},
    time::SimulatedClock,
};

/// Images by name; pulls take `latency` and fail while `failures` has messages.
#[derive(Default)]
struct FakeImages {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    present: HashMap<String, v1::Image>,
    failures: Vec<&'static str>,
    /// Registries that want this user.
    private: Option<&'static str>,
    latency: Duration,
    /// (image, username) of each pull as it started.
    pulls: Vec<(String, Option<String>)>,
    running: usize,
    most_running: usize,
    inspect_fails: bool,
}

#[async_trait]
impl ImageService for FakeImages {
    async fn list_images(&self) -> Result<Vec<v1::Image>, CriError> {
        Ok(self.state.lock().unwrap().present.values().cloned().collect())
    }
    async fn image_status(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>, CriError> {
        let state = self.state.lock().unwrap();
        if state.inspect_fails {
            return Err(CriError::new("ImageStatus", Code::Internal, "boom"));
        }
        Ok(state.present.get(&image.image).cloned())
    }
    async fn pull_image(
        &self,
        image: v1::ImageSpec,
        auth: Option<v1::AuthConfig>,
        _: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        let latency = {
            let mut state = self.state.lock().unwrap();
            state.pulls.push((image.image.clone(), auth.as_ref().map(|a| a.username.clone())));
            state.running += 1;
            state.most_running = state.most_running.max(state.running);
            state.latency
        };
        tokio::time::sleep(latency).await;
        let mut state = self.state.lock().unwrap();
        state.running -= 1;
        if !state.failures.is_empty() {
            return Err(CriError::new("PullImage", Code::Unknown, state.failures.remove(0)).bare());
        }
        if state.private.is_some_and(|user| auth.is_none_or(|a| a.username != user)) {
            return Err(CriError::new("PullImage", Code::Unknown, "401 Unauthorized").bare());
        }
        let id = format!("sha256:{}", image.image);
        state.present.insert(image.image, v1::Image { id: id.clone(), size: 42, ..Default::default() });
        Ok(id)
    }
    async fn remove_image(&self, _: v1::ImageSpec) -> Result<(), CriError> {
        Ok(())
    }
    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, CriError> {
        Ok(v1::ImageFsInfoResponse::default())
    }
}

/// Secrets by name.
#[derive(Default)]
struct Secrets(HashMap<String, SecretData>);

#[async_trait]
impl ReferencedObjects for Secrets {
    fn track(&self, _: &Pod) {}
    fn forget(&self, _: &PodUid) {}
    async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        Err(ApiError::NotFound { kind: "configmap", name: name.into() })
    }
    async fn secret(&self, _: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        let found = self.0.get(name).cloned().map(Arc::new);
        found.ok_or_else(|| ApiError::NotFound { kind: "secret", name: name.into() })
    }
    async fn service_account_token(&self, _: &Pod, _: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        Err(ApiError::Unavailable { message: "no tokens".into() })
    }
    fn services(&self, _: &str) -> Option<Vec<ServiceEnv>> {
        None
    }
    async fn runtime_class(&self, name: &str) -> Result<Arc<RuntimeClassData>, ApiError> {
        match name {
            "confidential" => Ok(Arc::new(RuntimeClassData { handler: "kata".into() })),
            _ => Err(ApiError::NotFound { kind: "runtimeclasses", name: name.into() }),
        }
    }
}

struct World {
    service: Arc<FakeImages>,
    events: Arc<MemoryEvents>,
    images: Arc<NodeImages>,
    root: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self::with(|_| {}, Secrets::default())
    }

    fn with(change: impl FnOnce(&mut ImageSettings), secrets: Secrets) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut settings = ImageSettings {
            serialize_pulls: true,
            max_parallel_pulls: None,
            registry_qps: 5.0,
            registry_burst: 10,
            root_dir: root.path().into(),
            home: None,
            verification: Some(VerificationPolicy::NeverVerifyPreloadedImages),
            providers: None,
            handler_in_specs: false,
        };
        change(&mut settings);
        let (service, events) = (Arc::new(FakeImages::default()), Arc::new(MemoryEvents::default()));
        let clock = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
        let parts = ImageParts { service: service.clone(), objects: Arc::new(secrets), events: events.clone(), clock };
        let images = NodeImages::new(&settings, parts, &prometheus::Registry::new()).unwrap();
        Self { service, events, images: Arc::new(images), root }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.service.state.lock().unwrap()
    }

    async fn ensure(&self, pod: &Pod) -> Result<PresentImage, ImageError> {
        ensure(&self.images, pod).await
    }

    /// (type, reason, message) since the last call of this.
    fn events(&self, seen: usize) -> Vec<(EventType, String, String)> {
        self.events.all().into_iter().skip(seen).map(|e| (e.kind, e.reason, e.message)).collect()
    }
}

async fn ensure(images: &NodeImages, pod: &Pod) -> Result<PresentImage, ImageError> {
    images.ensure(pod, pod.main_containers().next().unwrap(), &v1::PodSandboxConfig::default()).await
}

fn wants(image: &str, policy: &str) -> Pod {
    pod(&format!(r#"{{"containers":[{{"name":"c","image":"{image}","imagePullPolicy":"{policy}"}}]}}"#))
}

fn event(kind: EventType, reason: &str, message: &str) -> (EventType, String, String) {
    (kind, reason.to_owned(), message.to_owned())
}

#[tokio::test(start_paused = true)]
async fn i02_a_pull_tells_what_it_does() {
    let world = World::new();
    world.state().latency = Duration::from_millis(1200);
    let image = world.ensure(&wants("nginx", "Always")).await.unwrap();
    assert_eq!((image.reference.as_str(), image.requested.as_str()), ("sha256:nginx:latest", "nginx"));
    let pulled = "Successfully pulled image \"nginx\" in 1.2s (1.2s including waiting). Image size: 42 bytes.";
    assert_eq!(
        world.events(0),
        [event(EventType::Normal, "Pulling", "Pulling image \"nginx\""), event(EventType::Normal, "Pulled", pulled)]
    );
    let all = world.events.all();
    assert!(matches!(&all[0].regarding, Regarding::Container { field_path, .. } if field_path == "spec.containers{c}"));
}

#[tokio::test(start_paused = true)]
async fn i01_policies() {
    let world = World::new();
    world.state().present.insert("a:1".into(), v1::Image { id: "id".into(), ..Default::default() });
    let image = world.ensure(&wants("a:1", "IfNotPresent")).await.unwrap();
    assert_eq!((image.reference.as_str(), image.uid), ("id", Some(0)));
    world.ensure(&wants("a:1", "Never")).await.unwrap();
    assert!(world.state().pulls.is_empty());
    let there = "Container image \"a:1\" already present on machine and can be accessed by the pod";
    assert_eq!(world.events(0), [event(EventType::Normal, "Pulled", there), event(EventType::Normal, "Pulled", there)]);

    world.ensure(&wants("a:1", "Always")).await.unwrap();
    world.ensure(&wants("b:1", "IfNotPresent")).await.unwrap();
    assert_eq!(world.state().pulls.len(), 2);

    let seen = world.events.all().len();
    let error = world.ensure(&wants("c:1", "Never")).await.unwrap_err();
    let message = "Container image \"c:1\" is not present with pull policy of Never";
    assert_eq!((error.reason, error.message.as_str()), ("ErrImageNeverPull", message));
    assert!(error.retry_at.is_some());
    assert_eq!(
        world.events(seen),
        [
            event(EventType::Warning, "ErrImageNeverPull", message),
            event(EventType::Warning, "Failed", "Error: ErrImageNeverPull")
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn i03_names_and_inspection_that_fail() {
    let world = World::new();
    let error = world.ensure(&wants("Bad Name", "Always")).await.unwrap_err();
    let message = "Failed to apply default image tag \"Bad Name\": couldn't parse image name \"Bad Name\": invalid reference format: repository name (library/Bad Name) must be lowercase";
    assert_eq!((error.reason, error.message.as_str(), error.retry_at), ("InvalidImageName", message, None));
    assert_eq!(
        world.events(0),
        [
            event(EventType::Warning, "InspectFailed", message),
            event(EventType::Warning, "Failed", "Error: InvalidImageName")
        ]
    );
    world.state().inspect_fails = true;
    let error = world.ensure(&wants("a:1", "IfNotPresent")).await.unwrap_err();
    assert_eq!(error.reason, "ImageInspectError");
    assert_eq!(error.message, "Failed to inspect image \"a:1\": rpc error: code = Internal desc = boom");
}

#[tokio::test(start_paused = true)]
async fn i04_a_failing_pull_backs_off_and_recovers() {
    let world = World::new();
    world.state().failures = vec!["no such image", "still none"];
    let pod = wants("a:1", "Always");
    let error = world.ensure(&pod).await.unwrap_err();
    assert_eq!((error.reason, error.message.as_str()), ("ErrImagePull", "no such image"));
    assert_eq!(
        world.events(1),
        [
            event(EventType::Warning, "Failed", "Failed to pull image \"a:1\": no such image"),
            event(EventType::Warning, "Failed", "Error: ErrImagePull")
        ]
    );

    tokio::time::sleep_until(error.retry_at.unwrap()).await;
    let seen = world.events.all().len();
    let error = world.ensure(&pod).await.unwrap_err();
    assert_eq!(
        (error.reason, error.message.as_str()),
        ("ImagePullBackOff", "Back-off pulling image \"a:1\": ErrImagePull: no such image")
    );
    assert_eq!(
        world.events(seen),
        [
            event(EventType::Normal, "BackOff", "Back-off pulling image \"a:1\""),
            event(EventType::Warning, "Failed", "Error: ImagePullBackOff")
        ]
    );
    assert_eq!(world.state().pulls.len(), 1);

    tokio::time::sleep_until(error.retry_at.unwrap()).await;
    assert_eq!(world.ensure(&pod).await.unwrap_err().message, "still none");
    tokio::time::sleep(Duration::from_secs(19)).await;
    assert_eq!(world.ensure(&pod).await.unwrap_err().reason, "ImagePullBackOff");
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.ensure(&pod).await.unwrap();

    world.state().failures = vec!["again"];
    world.ensure(&pod).await.unwrap_err();
    world.images.forget(pod.uid());
    world.ensure(&pod).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn i03_what_the_runtime_names_itself() {
    for (failure, reason, message) in [
        (
            "RegistryUnavailable: down",
            "RegistryUnavailable",
            "image pull failed for a:1 because the registry is unavailable: down",
        ),
        (
            "SignatureValidationFailed: who?",
            "SignatureValidationFailed",
            "image pull failed for a:1 because the signature validation failed: who?",
        ),
    ] {
        let world = World::new();
        world.state().failures = vec![failure];
        let error = world.ensure(&wants("a:1", "Always")).await.unwrap_err();
        assert_eq!((error.reason, error.message.as_str()), (reason, message));
    }
}

#[tokio::test(start_paused = true)]
async fn i08_one_at_a_time_in_order_or_so_many() {
    for (serialize, max, most) in [(true, Some(5), 1), (false, Some(2), 2), (false, None, 4), (false, Some(0), 4)] {
        let world = World::with(|s| (s.serialize_pulls, s.max_parallel_pulls) = (serialize, max), Secrets::default());
        world.state().latency = Duration::from_secs(1);
        let pods: Vec<Pod> = (0..4).map(|n| wants(&format!("i{n}:1"), "Always")).collect();
        let arrivals = pods.iter().zip(0..).map(async |(pod, n)| {
            tokio::time::sleep(Duration::from_millis(n)).await;
            world.ensure(pod).await
        });
        let results = futures::future::join_all(arrivals).await;
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(world.state().most_running, most, "{serialize} {max:?}");
        let order: Vec<String> = world.state().pulls.iter().map(|(image, _)| image.clone()).collect();
        assert_eq!(order, ["i0:1", "i1:1", "i2:1", "i3:1"]);
        if serialize {
            let last = world.events.all().pop().unwrap().message;
            assert!(last.starts_with("Successfully pulled image \"i3:1\" in 1s (3.997s including waiting)."), "{last}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn i08_the_same_image_is_pulled_once_for_all_who_wait() {
    let world = World::new();
    world.state().latency = Duration::from_secs(1);
    let pod = wants("a:1", "Always");
    let results = futures::future::join_all((0..3).map(|_| world.ensure(&pod))).await;
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(world.state().pulls.len(), 1);
    world.ensure(&pod).await.unwrap();
    assert_eq!(world.state().pulls.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn i08_who_goes_away_does_not_abort_the_pull() {
    let world = World::new();
    world.state().latency = Duration::from_secs(5);
    let (images, pod) = (world.images.clone(), wants("a:1", "IfNotPresent"));
    let waiter = tokio::spawn({
        let pod = pod.clone();
        async move { ensure(&images, &pod).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    waiter.abort();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(world.state().present.contains_key("a:1"));
    world.ensure(&pod).await.unwrap();
    assert_eq!(world.state().pulls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn i09_too_many_pulls_a_second_fail() {
    let world = World::with(|s| (s.registry_qps, s.registry_burst) = (1.0, 2), Secrets::default());
    let mut results = Vec::new();
    for n in 0..3 {
        results.push(world.ensure(&wants(&format!("i{n}:1"), "Always")).await.map_err(|e| e.message).err());
    }
    assert_eq!(results, [None, None, Some("pull QPS exceeded".to_owned())]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.ensure(&wants("i9:1", "Always")).await.unwrap();
}

fn docker_secret(user: &str) -> SecretData {
    let config = format!(r#"{{"auths":{{"reg.io":{{"username":"{user}","password":"hush"}}}}}}"#);
    let data = [(".dockerconfigjson".to_owned(), config.into_bytes())].into();
    let type_ = "kubernetes.io/dockerconfigjson".into();
    SecretData { uid: format!("uid-{user}"), type_, data, ..Default::default() }
}

fn with_secrets(names: &[&str]) -> Pod {
    let refs: Vec<String> = names.iter().map(|n| format!(r#"{{"name":"{n}"}}"#)).collect();
    pod(&format!(
        r#"{{"imagePullSecrets":[{}],"containers":[{{"name":"c","image":"reg.io/a:1","imagePullPolicy":"Always"}}]}}"#,
        refs.join(",")
    ))
}

#[tokio::test(start_paused = true)]
async fn i05_credentials_are_tried_in_order_and_never_shown() {
    let secrets = Secrets([("s1", "one"), ("s2", "two")].map(|(n, u)| (n.to_owned(), docker_secret(u))).into());
    let world = World::with(|_| {}, secrets);
    world.state().failures = vec!["401 Unauthorized"];
    world.ensure(&with_secrets(&["s1", "", "gone", "s2"])).await.unwrap();
    let users: Vec<_> = world.state().pulls.iter().map(|(_, user)| user.clone().unwrap()).collect();
    assert_eq!(users, ["one", "two"]);
    let told = world.events.all().into_iter().find(|e| e.reason == "FailedToRetrieveImagePullSecret").unwrap();
    assert_eq!(
        told.message,
        "Unable to retrieve some image pull secrets (gone); attempting to pull the image may not succeed."
    );
    assert!(matches!(told.regarding, Regarding::Pod(_)));
    assert!(world.events.all().iter().all(|e| !format!("{e:?}").contains("hush")));
}

#[tokio::test(start_paused = true)]
async fn i05_pods_with_other_credentials_pull_for_themselves() {
    let world = World::with(|s| s.serialize_pulls = false, Secrets([("s1".to_owned(), docker_secret("one"))].into()));
    world.state().latency = Duration::from_secs(1);
    let (with, without) = (with_secrets(&["s1"]), with_secrets(&[]));
    let (a, b) = tokio::join!(world.ensure(&with), world.ensure(&without));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(world.state().pulls.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn i05_a_broken_secret_fails_the_pull() {
    let mut broken = docker_secret("x");
    broken.data.insert(".dockerconfigjson".into(), b"{hush".to_vec());
    let world = World::with(|_| {}, Secrets([("s1".to_owned(), broken)].into()));
    let error = world.ensure(&with_secrets(&["s1"])).await.unwrap_err();
    assert_eq!(error.reason, "ErrImagePull");
    assert!(error.message.starts_with("image pull secret ns/s1: docker config is not valid JSON"), "{}", error.message);
    assert!(world.state().pulls.is_empty() && !error.message.contains("hush"));
}

#[tokio::test(start_paused = true)]
async fn p59_the_image_tells_its_user() {
    let world = World::new();
    let image = |uid: Option<i64>, name: &str| v1::Image {
        id: "id".into(),
        uid: uid.map(|value| v1::Int64Value { value }),
        username: name.into(),
        ..Default::default()
    };
    for (status, uid, username) in [
        (image(Some(7), ""), Some(7), ""),
        (image(Some(0), "x"), Some(0), ""),
        (image(None, "app"), None, "app"),
        (image(None, ""), Some(0), ""),
    ] {
        world.state().present.insert("a:1".into(), status);
        let got = world.ensure(&wants("a:1", "IfNotPresent")).await.unwrap();
        assert_eq!((got.uid, got.username.as_str()), (uid, username));
    }
}

fn private(secret: &str, policy: &str) -> Pod {
    pod(&format!(
        r#"{{"imagePullSecrets":[{{"name":"{secret}"}}],"containers":[{{"name":"c","image":"reg.io/a:1","imagePullPolicy":"{policy}"}}]}}"#
    ))
}

#[tokio::test(start_paused = true)]
async fn i10_a_pod_without_access_does_not_get_the_image_that_another_pulled() {
    let secrets = [("mine", docker_secret("me")), ("other", docker_secret("else")), ("copy", docker_secret("me"))];
    let world = World::with(|_| {}, Secrets(secrets.map(|(n, s)| (n.to_owned(), s)).into()));
    world.state().private = Some("me");
    world.ensure(&private("mine", "IfNotPresent")).await.unwrap();
    assert_eq!(world.state().pulls.len(), 1);

    // The same secret, and another one of the same content: no pull.
    for secret in ["mine", "copy"] {
        let seen = world.events.all().len();
        world.ensure(&private(secret, "IfNotPresent")).await.unwrap();
        world.ensure(&private(secret, "Never")).await.unwrap();
        assert_eq!(world.events(seen).len(), 2);
    }
    assert_eq!(world.state().pulls.len(), 1);

    // Another secret, or none: pulled again, and refused by the registry.
    let seen = world.events.all().len();
    let error = world.ensure(&private("other", "IfNotPresent")).await.unwrap_err();
    assert_eq!((error.reason, error.message.as_str()), ("ErrImagePull", "401 Unauthorized"));
    assert_eq!(world.events(seen)[0], event(EventType::Normal, "Pulling", "Pulling image \"reg.io/a:1\""));
    let error = world.ensure(&wants("reg.io/a:1", "Never")).await.unwrap_err();
    assert_eq!(error.reason, "ErrImageNeverPull");
    assert_eq!(error.message, "Container image \"reg.io/a:1\" is not present with pull policy of Never");
    // Once the image needs no login, every pod may use it.
    world.state().private = None;
    world.images.forget(&PodUid::from("uid-1"));
    world.ensure(&wants("reg.io/a:1", "IfNotPresent")).await.unwrap();
    world.ensure(&private("other", "Never")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn i10_policies_decide_for_images_that_were_there_before() {
    for (policy, pulls) in [
        (Some(VerificationPolicy::NeverVerify), 0),
        (Some(VerificationPolicy::NeverVerifyPreloadedImages), 0),
        (Some(VerificationPolicy::NeverVerifyAllowlistedImages(vec!["a".into()])), 0),
        (Some(VerificationPolicy::NeverVerifyAllowlistedImages(vec!["b".into()])), 1),
        (Some(VerificationPolicy::AlwaysVerify), 1),
        (None, 0),
    ] {
        let world = World::with(|s| s.verification = policy.clone(), Secrets::default());
        world.state().present.insert("a:1".into(), v1::Image { id: "sha256:a:1".into(), ..Default::default() });
        world.ensure(&wants("a:1", "IfNotPresent")).await.unwrap();
        assert_eq!(world.state().pulls.len(), pulls, "{policy:?}");
        if policy.is_none() {
            let message = "Container image \"a:1\" already present on machine";
            assert_eq!(world.events(0), [event(EventType::Normal, "Pulled", message)]);
            assert!(!world.root.path().join("image_manager").exists());
        }
        // Proved once is proved.
        world.ensure(&wants("a:1", "IfNotPresent")).await.unwrap();
        assert_eq!(world.state().pulls.len(), pulls, "{policy:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn i10_a_pull_leaves_an_intent_while_it_runs_and_a_record_after_it() {
    let world = World::new();
    world.state().latency = Duration::from_secs(5);
    let count = |sub: &str| std::fs::read_dir(world.root.path().join("image_manager").join(sub)).unwrap().count();
    let images = world.images.clone();
    let waiter = tokio::spawn(async move { ensure(&images, &wants("a:1", "Always")).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((count("pulling"), count("pulled")), (1, 0));
    // Whoever waited is gone; the record is written all the same.
    waiter.abort();
    tokio::time::sleep(Duration::from_secs(5)).await;
    while count("pulling") > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(count("pulled"), 1);
    world.state().failures = vec!["no such image"];
    world.ensure(&wants("b:1", "Always")).await.unwrap_err();
    assert_eq!((count("pulling"), count("pulled")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn i10_a_pull_that_cannot_be_recorded_is_not_asked_for() {
    let world = World::new();
    std::fs::remove_dir_all(world.root.path().join("image_manager/pulling")).unwrap();
    let error = world.ensure(&wants("a:1", "Always")).await.unwrap_err();
    assert_eq!(error.reason, "ErrImagePull");
    assert!(error.message.starts_with("Failed to record image pull intent for container image \"a:1\": "), "{error}");
    assert!(world.state().pulls.is_empty());
}

fn image_volume(policy: &str) -> ImageVolumeSource {
    ImageVolumeSource { reference: Some("data:1".into()), pull_policy: Some(policy.into()) }
}

#[tokio::test(start_paused = true)]
async fn i13_an_image_volume_is_pulled_with_events_on_the_pod() {
    let world = World::new();
    let pod = wants("a:1", "Always");
    world.state().latency = Duration::from_secs(1);
    let sandbox = v1::PodSandboxConfig::default();
    let source = image_volume("IfNotPresent");
    let pull = || world.images.ensure_volume(&pod, "v", &source, &sandbox);
    let (one, two) = tokio::join!(pull(), pull());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!((one.image.as_str(), one.user_specified_image.as_str()), ("sha256:data:1", "data:1"));
    assert_eq!(one, two);
    let reasons: Vec<String> = world.events(0).into_iter().map(|(_, reason, _)| reason).collect();
    assert_eq!(reasons, ["Pulling", "Pulled"], "one try serves both");
    assert!(world.events.all().iter().all(|e| matches!(e.regarding, Regarding::Pod(_))));
    pull().await.unwrap();
    assert_eq!(world.state().pulls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn i13_an_image_volume_that_cannot_be_pulled_backs_off_without_container_events() {
    let world = World::new();
    world.state().failures = vec!["no such image"];
    let (pod, sandbox) = (wants("a:1", "Always"), v1::PodSandboxConfig::default());
    let source = image_volume("Always");
    let error = world.images.ensure_volume(&pod, "v", &source, &sandbox).await.unwrap_err();
    assert_eq!((error.reason, error.message.as_str()), ("ErrImagePull", "no such image"));
    let error = world.images.ensure_volume(&pod, "v", &source, &sandbox).await.unwrap_err();
    assert_eq!(
        (error.reason, error.message.as_str()),
        ("ImagePullBackOff", "Back-off pulling image \"data:1\": ErrImagePull: no such image")
    );
    let reasons: Vec<String> = world.events(0).into_iter().map(|(_, reason, _)| reason).collect();
    assert_eq!(reasons, ["Pulling", "Failed", "BackOff"]);
}

#[tokio::test(start_paused = true)]
async fn i15_the_handler_goes_with_the_image_only_when_the_gate_is_on() {
    for (on, handler) in [(true, "kata"), (false, "")] {
        let world = World::with(|s| s.handler_in_specs = on, Secrets::default());
        let sandbox = v1::PodSandboxConfig::default();
        let ensured = async |class: &str| {
            let pod = pod(&format!(r#"{{"runtimeClassName":"{class}"}}"#));
            let spec = world.images.ensure_volume(&pod, "v", &image_volume("Always"), &sandbox).await;
            spec.map(|spec| spec.runtime_handler)
        };
        assert_eq!(ensured("confidential").await.unwrap(), handler);
        // Without the gate nobody looks for the class.
        assert_eq!(ensured("missing").await.is_err(), on);
    }
}
