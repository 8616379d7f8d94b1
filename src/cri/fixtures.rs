//! Pods and containers for the tests of this room and of those that read what runs.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;

use super::{
    CONTAINER_NAME_LABEL, Container, ContainerState, POD_UID_LABEL, RuntimeService,
    fake::{FakeRuntime, ImageScript},
    v1,
};
use crate::time::SimulatedClock;

pub(crate) fn runtime() -> FakeRuntime {
    FakeRuntime::new(Arc::new(SimulatedClock::starting_at(Timestamp::from_second(1_000_000).unwrap())))
}

pub(crate) fn pod(uid: &str, attempt: u32) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: format!("pod-{uid}"),
            uid: uid.into(),
            namespace: "ns".into(),
            attempt,
        }),
        labels: HashMap::from([(POD_UID_LABEL.to_owned(), uid.to_owned())]),
        log_directory: "/var/log/pods/x".into(),
        ..Default::default()
    }
}

pub(crate) fn container(uid: &str, name: &str, attempt: u32) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt }),
        image: Some(v1::ImageSpec { image: "img".into(), ..Default::default() }),
        labels: HashMap::from([
            (POD_UID_LABEL.to_owned(), uid.to_owned()),
            (CONTAINER_NAME_LABEL.to_owned(), name.to_owned()),
        ]),
        log_path: format!("{name}/{attempt}.log"),
        ..Default::default()
    }
}

/// A sandbox with one running container; returns both IDs.
pub(crate) async fn running(runtime: &FakeRuntime, uid: &str, name: &str) -> (String, String) {
    runtime.image("img", ImageScript::Present);
    let sandbox = runtime.run_pod_sandbox(pod(uid, 0), "").await.unwrap();
    let id = runtime.create_container(&sandbox, container(uid, name, 0), pod(uid, 0)).await.unwrap();
    runtime.start_container(&id).await.unwrap();
    (sandbox, id)
}

/// A container as the store shows it: running since 1970, without labels, annotations or anything else that a test did not ask for.
pub(crate) fn seen(name: &str) -> Container {
    Container {
        id: format!("{name}-0"),
        name: name.to_owned(),
        attempt: 0,
        sandbox_id: String::new(),
        state: ContainerState::Running,
        created_at: Timestamp::UNIX_EPOCH,
        started_at: Some(Timestamp::UNIX_EPOCH),
        finished_at: None,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        image: String::new(),
        image_ref: String::new(),
        image_id: String::new(),
        image_runtime_handler: String::new(),
        labels: HashMap::new(),
        annotations: HashMap::new(),
        log_path: String::new(),
        user: None,
        resources: None,
        mounts: Vec::new(),
        stop_signal: v1::Signal::default(),
        oom_killed: false,
    }
}
