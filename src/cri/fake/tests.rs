//! The fake keeps containerd's rules: otherwise tests over it prove nothing.

use super::*;
use crate::cri::{
    ImageService, RuntimeService,
    fixtures::{container, pod, running, runtime},
};

#[tokio::test(start_paused = true)]
async fn names_are_reserved_until_removed() {
    let fake = runtime();
    let (sandbox, id) = running(&fake, "u", "web").await;
    let error = fake.run_pod_sandbox(pod("u", 0), "").await.unwrap_err();
    assert!(error.message.contains("failed to reserve sandbox name \"pod-u_ns_u_0\""), "{error}");
    let error = fake.create_container(&sandbox, container("u", "web", 0), pod("u", 0)).await.unwrap_err();
    assert!(error.message.contains("failed to reserve container name"), "{error}");
    fake.remove_container(&id).await.unwrap();
    fake.create_container(&sandbox, container("u", "web", 0), pod("u", 0)).await.unwrap();
    fake.remove_pod_sandbox(&sandbox).await.unwrap();
    assert!(fake.containers("u", "web").is_empty());
    fake.run_pod_sandbox(pod("u", 0), "").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_gives_its_name_back_and_does_nothing() {
    let fake = runtime();
    fake.inject("RunPodSandbox", 1, Fault::Hang);
    let hung = tokio::time::timeout(Duration::from_secs(5), fake.run_pod_sandbox(pod("u", 0), "")).await;
    assert!(hung.is_err());
    assert_eq!(fake.in_flight("RunPodSandbox"), (0, 1));
    assert!(fake.sandboxes("u").is_empty());
    fake.run_pod_sandbox(pod("u", 0), "").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn containers_follow_their_scripts() {
    let fake = runtime();
    fake.script(
        "web",
        [Script::exits(Duration::from_secs(3), 7), Script::start_fails("no such file"), Script::ignores_term()],
    );
    let (sandbox, first) = running(&fake, "u", "web").await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let status = fake.container_status(&first).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    assert_eq!(status.finished_at - status.started_at, 3_000_000_000);
    assert!(fake.start_container(&first).await.unwrap_err().message.contains("CONTAINER_EXITED"));

    let second = fake.create_container(&sandbox, container("u", "web", 1), pod("u", 0)).await.unwrap();
    let error = fake.start_container(&second).await.unwrap_err();
    assert_eq!(error.to_string(), "rpc error: code = Unknown desc = failed to create containerd task: no such file");
    assert_eq!(fake.container_status(&second).await.unwrap().reason, "StartError");

    let third = fake.create_container(&sandbox, container("u", "web", 2), pod("u", 0)).await.unwrap();
    fake.start_container(&third).await.unwrap();
    let begun = tokio::time::Instant::now();
    fake.stop_container(&third, Duration::from_secs(30)).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 30);
    assert_eq!(fake.container_status(&third).await.unwrap().exit_code, 137);
    assert_eq!(fake.max_running("u", "web"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_shorter_grace_supersedes_a_running_stop() {
    let fake = runtime();
    fake.script("web", [Script::ignores_term()]);
    let (_, id) = running(&fake, "u", "web").await;
    let begun = tokio::time::Instant::now();
    let (long, short) = tokio::join!(
        fake.stop_container(&id, Duration::from_secs(300)),
        fake.stop_container(&id, Duration::from_secs(2))
    );
    assert!(long.is_ok() && short.is_ok());
    assert_eq!(begun.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn faults_meet_the_calls_they_are_meant_for() {
    let fake = runtime();
    fake.inject_for("RunPodSandbox", "b", 1, Fault::error("no network"));
    fake.inject("StopPodSandbox", 1, Fault::DoneButLost);
    let sandbox = fake.run_pod_sandbox(pod("a", 0), "").await.unwrap();
    assert_eq!(fake.run_pod_sandbox(pod("b", 0), "").await.unwrap_err().message, "no network");
    fake.run_pod_sandbox(pod("b", 0), "").await.unwrap();
    assert!(fake.stop_pod_sandbox(&sandbox).await.unwrap_err().outcome_unknown());
    assert_eq!(fake.sandboxes("a"), [(sandbox, false)]);
    assert_eq!(fake.count("RunPodSandbox"), 3);
    fake.set_down(true);
    assert_eq!(fake.version().await.unwrap_err().code, Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn images_are_present_pullable_or_failing() {
    let fake = runtime();
    fake.image("bad", ImageScript::Fails { code: Code::Unknown, message: "manifest unknown".into() });
    let spec = |name: &str| v1::ImageSpec { image: name.into(), ..Default::default() };
    assert_eq!(fake.pull_image(spec("bad"), None, None).await.unwrap_err().to_string(), "manifest unknown");
    assert_eq!(fake.image_status(spec("good")).await.unwrap(), None);
    let id = fake.pull_image(spec("good"), None, None).await.unwrap();
    assert_eq!(fake.image_status(spec(&id)).await.unwrap().unwrap().repo_tags, ["good"]);
    fake.remove_image(spec("good")).await.unwrap();
    assert!(fake.list_images().await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stop_whose_answer_is_lost_still_stops() {
    let fake = runtime();
    fake.script("web", [Script::ignores_term()]);
    let (_, id) = running(&fake, "u", "web").await;
    fake.inject("StopContainer", 1, Fault::DoneButLost);
    assert!(fake.stop_container(&id, Duration::from_secs(2)).await.unwrap_err().outcome_unknown());
    assert_eq!(fake.containers("u", "web")[0].1, ContainerState::Running);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(fake.containers("u", "web")[0].1, ContainerState::Exited);
}
