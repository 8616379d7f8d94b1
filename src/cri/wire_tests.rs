//! The client over a real unix socket, against a server made from the same protocol files.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use prometheus::Registry;
use prost::Message;
use protocols::{
    containerd::{
        events::TaskOom,
        services::events::v1::{
            Envelope, SubscribeRequest,
            events_server::{Events as EventsServer, EventsServer as EventsServiceServer},
        },
    },
    cri::v1::{
        image_service_server::{ImageService as ImageServer, ImageServiceServer},
        runtime_service_server::{RuntimeService as RuntimeServer, RuntimeServiceServer},
    },
};
use tokio::{net::UnixListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, codegen::BoxStream};
use tower::Service;

use super::{
    CriClient, CriMetrics, ImageService, RuntimeService,
    fixtures::{running, runtime as fake_runtime},
    follow_oom,
    store::tests::store,
    v1,
};

/// Answers a few calls in the ways that matter; all others are Unimplemented.
#[derive(Clone, Default)]
struct Peer;

#[tonic::async_trait]
impl RuntimeServer for Peer {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        Ok(Response::new(v1::VersionResponse { runtime_name: "peer".into(), ..Default::default() }))
    }
    /// Hangs, and says what deadline it was given.
    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerResponse>, Status> {
        assert!(request.metadata().contains_key("grpc-timeout"));
        std::future::pending().await
    }
    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Result<Response<v1::StopContainerResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.timeout, 2);
        Err(Status::not_found(format!("container {:?} not found", request.container_id)))
    }
    async fn create_container(
        &self,
        _: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerResponse>, Status> {
        Err(Status::unknown("failed to reserve container name"))
    }
    /// One event, then silence.
    async fn get_container_events(
        &self,
        request: Request<v1::GetEventsRequest>,
    ) -> Result<Response<BoxStream<v1::ContainerEventResponse>>, Status> {
        assert!(!request.metadata().contains_key("grpc-timeout"), "an event stream has no deadline");
        let event = v1::ContainerEventResponse { container_id: "c".into(), ..Default::default() };
        Ok(Response::new(Box::pin(stream::iter([Ok(event)]).chain(stream::pending()))))
    }
    /// More than tonic's default limit of 4 MiB.
    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        let labels = HashMap::from([("filler".to_owned(), "x".repeat(1 << 20))]);
        let container = v1::Container { labels, ..Default::default() };
        Ok(Response::new(v1::ListContainersResponse { containers: vec![container; 6] }))
    }
}

#[tonic::async_trait]
impl ImageServer for Peer {
    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        assert!(!request.metadata().contains_key("grpc-timeout"), "a pull has no deadline");
        Err(Status::unknown("manifest unknown"))
    }
}

#[tonic::async_trait]
impl EventsServer for Peer {
    async fn subscribe(&self, request: Request<SubscribeRequest>) -> Result<Response<BoxStream<Envelope>>, Status> {
        assert_eq!(request.metadata().get("containerd-namespace").unwrap(), "k8s.io");
        assert_eq!(request.get_ref().filters, ["namespace==k8s.io,topic==\"/tasks/oom\""]);
        let id = OOM_KILLED.lock().unwrap().clone();
        let mut envelope = Envelope { namespace: "k8s.io".into(), topic: "/tasks/oom".into(), ..Default::default() };
        let event = envelope.event.get_or_insert_default();
        event.type_url = "containerd.events.TaskOOM".into();
        event.value = TaskOom { container_id: id }.encode_to_vec();
        Ok(Response::new(Box::pin(stream::iter([Ok(envelope)]).chain(stream::pending()))))
    }
}

/// What the peer's containerd events tell of.
static OOM_KILLED: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());

/// Serves all services on one socket, as a runtime does. Aborting the task breaks every connection.
fn serve(socket: &PathBuf) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let route = tower::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
        if request.uri().path().starts_with("/runtime.v1.ImageService/") {
            ImageServiceServer::new(Peer).call(request).await
        } else if request.uri().path().starts_with("/containerd.services.events.v1.Events/") {
            EventsServiceServer::new(Peer).call(request).await
        } else {
            RuntimeServiceServer::new(Peer).call(request).await
        }
    });
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let http = http2::Builder::new(TokioExecutor::new());
            connections.spawn(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(route)));
        }
    })
}

fn client(socket: &std::path::Path, timeout: Duration) -> (CriClient, Registry) {
    let registry = Registry::new();
    let metrics = Arc::new(CriMetrics::new(&registry).unwrap());
    (CriClient::connect(&format!("unix://{}", socket.display()), None, timeout, metrics).unwrap(), registry)
}

/// The counter's value of this operation.
fn counted(registry: &Registry, metric: &str, operation: &str) -> f64 {
    let families = registry.gather();
    let Some(family) = families.iter().find(|f| f.name() == metric) else { return 0.0 };
    let of_operation = family.get_metric().iter().find(|m| m.get_label().iter().any(|l| l.value() == operation));
    of_operation.map_or(0.0, |m| m.get_counter().get_value())
}

#[tokio::test]
async fn v05_calls_are_worded_counted_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cri.sock");
    let _server = serve(&socket);
    let (client, registry) = client(&socket, Duration::from_millis(300));

    let unimplemented = client.runtime_config().await.unwrap_err();
    assert!(unimplemented.is_unimplemented(), "{unimplemented}");
    assert_eq!(
        client.version().await.unwrap_err().to_string(),
        "not all fields are set in VersionResponse (missing Version, RuntimeApiVersion, RuntimeVersion)"
    );
    let late = client.start_container("c").await.unwrap_err();
    assert_eq!(late.to_string(), "rpc error: code = DeadlineExceeded desc = context deadline exceeded");
    assert!(late.outcome_unknown());
    client.stop_container("gone", Duration::from_millis(1500)).await.unwrap();
    let reserved = client.create_container("s", v1::ContainerConfig::default(), v1::PodSandboxConfig::default()).await;
    let reserved = reserved.unwrap_err();
    assert_eq!(reserved.to_string(), "rpc error: code = Unknown desc = failed to reserve container name");
    assert!(!reserved.outcome_unknown());
    assert_eq!(client.list_containers(None).await.unwrap().len(), 6);
    let pull = client.pull_image(v1::ImageSpec::default(), None, None).await.unwrap_err();
    assert_eq!(pull.to_string(), "manifest unknown");

    let total = |operation| counted(&registry, "kubelet_runtime_operations_total", operation);
    let errors = |operation| counted(&registry, "kubelet_runtime_operations_errors_total", operation);
    assert_eq!((total("start_container"), errors("start_container")), (1.0, 1.0));
    assert_eq!((total("list_containers"), errors("list_containers")), (1.0, 0.0));
    assert_eq!(total("pull_image"), 1.0);
}

#[tokio::test]
async fn i14_images_go_to_a_socket_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let (runtime, images) = (dir.path().join("runtime.sock"), dir.path().join("images.sock"));
    let server = serve(&images);
    let metrics = Arc::new(CriMetrics::new(&Registry::new()).unwrap());
    let endpoint = |socket: &PathBuf| format!("unix://{}", socket.display());
    let client =
        CriClient::connect(&endpoint(&runtime), Some(&endpoint(&images)), Duration::from_secs(2), metrics).unwrap();
    let pull = client.pull_image(v1::ImageSpec::default(), None, None).await.unwrap_err();
    assert_eq!(pull.to_string(), "manifest unknown");
    assert_eq!(client.version().await.unwrap_err().code, Code::Unavailable, "nobody listens on the runtime's socket");
    server.abort();
}

#[tokio::test]
async fn s12_the_client_finds_a_runtime_that_comes_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cri.sock");
    let (client, _) = client(&socket, Duration::from_secs(5));
    let absent = client.status(false).await.unwrap_err();
    let expected = format!(
        "rpc error: code = Unavailable desc = connection error: desc = \"transport: Error while dialing: dial unix {}: \
         connect: no such file or directory\"",
        socket.display()
    );
    assert_eq!(absent.to_string(), expected);

    let server = serve(&socket);
    assert!(client.runtime_config().await.unwrap_err().is_unimplemented());

    server.abort();
    let _ = server.await;
    let hung = tokio::time::timeout(Duration::from_secs(5), client.runtime_config());
    let broken = hung.await.unwrap().unwrap_err();
    assert_eq!(broken.code, Code::Unavailable, "{broken}");
    std::fs::remove_file(&socket).unwrap();
    let _server = serve(&socket);
    for _ in 0..3 {
        if client.runtime_config().await.unwrap_err().is_unimplemented() {
            return;
        }
    }
    panic!("the client did not reconnect");
}

#[tokio::test]
async fn p08_the_event_stream_delivers_and_says_when_it_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cri.sock");
    let server = serve(&socket);
    let (client, _) = client(&socket, Duration::from_millis(50));
    let mut events = client.container_events().await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().container_id, "c");
    // Silence for longer than the request timeout breaks nothing.
    assert!(tokio::time::timeout(Duration::from_millis(200), events.next()).await.is_err());
    server.abort();
    assert_eq!(events.next().await.unwrap().unwrap_err().code, Code::Unavailable);
}

#[tokio::test]
async fn an_oom_kill_that_containerd_tells_marks_the_container_and_wakes_its_pod() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("cri.sock");
    let _server = serve(&socket);
    let fake = fake_runtime();
    let (_, id) = running(&fake, "a", "web").await;
    let (store, woken) = store(&fake);
    store.relist().await.unwrap();
    woken.take();
    *OOM_KILLED.lock().unwrap() = id;
    let endpoint = format!("unix://{}", socket.display());
    let cancel = CancellationToken::new();
    let following = tokio::spawn(follow_oom(endpoint, Arc::new(fake), store.clone(), cancel.clone()));
    while woken.take().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(store.pod(&"a".into()).unwrap().latest("web").unwrap().oom_killed);
    cancel.cancel();
    following.await.unwrap();
}

#[test]
fn only_unix_sockets_are_endpoints() {
    let metrics = Arc::new(CriMetrics::new(&Registry::new()).unwrap());
    let connect = |endpoint: &str| CriClient::connect(endpoint, None, Duration::from_secs(1), metrics.clone());
    assert!(connect("tcp://127.0.0.1:1").is_err());
    assert!(connect("npipe:////./pipe/x").is_err());
}
