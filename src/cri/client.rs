//! The CRI client: gRPC over the runtime's unix socket.
//!
//! Connects at the first call and again after every break. Deadlines are upstream's: `runtimeRequestTimeout` for most calls,
//! twice that for RunPodSandbox, grace + timeout for StopContainer, timeout + timeout for ExecSync, none for PullImage and
//! the event stream. The deadline also travels to the runtime, which gives up by itself. The event stream has a connection of
//! its own, so that an unread event can never hold up a call.

use std::{
    error::Error as _,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use protocols::cri::v1::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};
use thiserror::Error;
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint, Uri},
};

use super::{ContainerEventStream, CriError, CriMetrics};
use crate::time::{Clock, SystemClock};

/// As Go's CRI client; tonic's default of 4 MiB is too small for a list on a full node.
const MAX_MESSAGE: usize = 16 << 20;
/// The runtime's answer to a connect on a unix socket is immediate unless its backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The endpoint in the configuration cannot be used.
#[derive(Debug, Error)]
pub enum EndpointError {
    #[error(
        "runtime endpoint {endpoint:?}: only unix sockets are supported, like unix:///run/containerd/containerd.sock"
    )]
    Unsupported { endpoint: String },
    #[error("runtime endpoint {endpoint:?}: {source}")]
    Transport { endpoint: String, source: tonic::transport::Error },
}

/// One RPC: its name on the wire and in upstream's metrics.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rpc {
    pub(super) name: &'static str,
    pub(super) operation: &'static str,
}

/// A generated client and the socket it dials.
pub(super) struct Link<C> {
    pub(super) client: C,
    pub(super) socket: PathBuf,
}

/// Implements both ports over gRPC. Cheap to share behind an `Arc`.
pub struct CriClient {
    pub(super) runtime: Link<RuntimeServiceClient<Channel>>,
    pub(super) images: Link<ImageServiceClient<Channel>>,
    events: RuntimeServiceClient<Channel>,
    pub(super) timeout: Duration,
    metrics: Arc<CriMetrics>,
    clock: SystemClock,
}

impl CriClient {
    /// Does not dial yet. `image_endpoint` defaults to `endpoint`; `request_timeout` is `runtimeRequestTimeout`.
    pub fn connect(
        endpoint: &str,
        image_endpoint: Option<&str>,
        request_timeout: Duration,
        metrics: Arc<CriMetrics>,
    ) -> Result<Self, EndpointError> {
        let socket = socket_path(endpoint)?;
        let images = match image_endpoint.filter(|e| !e.is_empty()) {
            Some(endpoint) => socket_path(endpoint)?,
            None => socket.clone(),
        };
        let runtime_client = |channel| RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let image_client = ImageServiceClient::new(unix_channel(endpoint, images.clone())?);
        Ok(Self {
            events: runtime_client(unix_channel(endpoint, socket.clone())?),
            runtime: Link { client: runtime_client(unix_channel(endpoint, socket.clone())?), socket },
            images: Link { client: image_client.max_decoding_message_size(MAX_MESSAGE), socket: images },
            timeout: request_timeout,
            metrics,
            clock: SystemClock,
        })
    }

    /// Runs one call under its deadline, counts it, and words its error.
    pub(super) async fn measured<T>(
        &self,
        rpc: Rpc,
        socket: &Path,
        deadline: Option<Duration>,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CriError> {
        let begun = self.clock.now().mono;
        let answer = match deadline {
            Some(limit) => tokio::time::timeout(limit, call)
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded("context deadline exceeded"))),
            None => call.await,
        };
        self.metrics.operation(rpc.operation, self.clock.now().mono - begun, answer.is_err());
        answer.map(Response::into_inner).map_err(|status| to_error(rpc.name, &status, socket))
    }

    /// Opens the event stream; see [`super::RuntimeService::container_events`].
    pub(super) async fn open_events(&self) -> Result<ContainerEventStream, CriError> {
        const NAME: &str = "GetContainerEvents";
        let request = Request::new(super::v1::GetEventsRequest {});
        let opened = self.events.clone().get_container_events(request).await;
        let stream = opened.map_err(|status| to_error(NAME, &status, &self.runtime.socket))?.into_inner();
        let socket = self.runtime.socket.clone();
        Ok(stream.map(move |item| item.map_err(|status| to_error(NAME, &status, &socket))).boxed())
    }
}

fn socket_path(endpoint: &str) -> Result<PathBuf, EndpointError> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if !path.starts_with('/') {
        return Err(EndpointError::Unsupported { endpoint: endpoint.to_owned() });
    }
    Ok(PathBuf::from(path))
}

/// A channel that dials `socket` when it is first needed and whenever the connection is gone.
fn unix_channel(endpoint: &str, socket: PathBuf) -> Result<Channel, EndpointError> {
    // The URI only fills :authority; the connector ignores it.
    let endpoint = Endpoint::from_shared("http://localhost")
        .map_err(|source| EndpointError::Transport { endpoint: endpoint.to_owned(), source })?;
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).connect_with_connector_lazy(connector))
}

/// Words a failure as Go's client does, so that users and tests find the strings they know.
fn to_error(rpc: &'static str, status: &Status, socket: &Path) -> CriError {
    let (code, message) = (status.code(), status.message());
    // tonic's own timer may fire in the same instant as ours.
    if code == Code::Cancelled && message == "Timeout expired" {
        return CriError::new(rpc, Code::DeadlineExceeded, "context deadline exceeded");
    }
    // A status that came over the wire has no source: with one, it was made here, because the connection failed.
    let Some(source) = status.source() else {
        return CriError::new(rpc, code, message);
    };
    let mut chain = Some(source);
    let mut last = source;
    while let Some(cause) = chain {
        if let Some(error) = cause.downcast_ref::<io::Error>().filter(|e| e.raw_os_error().is_some()) {
            let dialing = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied
            );
            if dialing {
                let why = Errno::from_raw(error.raw_os_error().unwrap_or_default()).desc().to_lowercase();
                let text = format!(
                    "connection error: desc = \"transport: Error while dialing: dial unix {}: connect: {why}\"",
                    socket.display()
                );
                return CriError::new(rpc, Code::Unavailable, text);
            }
        }
        last = cause;
        chain = cause.source();
    }
    CriError::new(rpc, Code::Unavailable, format!("error reading from server: {last}"))
}

/// A connection of its own to the same socket, for containerd's event service.
pub(super) fn events_channel(endpoint: &str) -> Result<Channel, EndpointError> {
    unix_channel(endpoint, socket_path(endpoint)?)
}
