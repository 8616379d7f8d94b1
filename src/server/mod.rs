//! The agent's doors: 10250 (logs, exec, metrics; TLS, authenticated, authorised) and 10248 (healthz) (contract section 7).
//!
//! In: HTTP requests. Out: what the stores and the runtime say. `routes` is the one table of what is served and under which
//! subresource it is authorised; `authn` says who asks; `tls` keeps the serving certificate; one file per endpoint. Nothing here
//! changes pods.

mod authn;
mod connection;
mod exec;
mod healthz;
mod logs;
mod pods;
mod relay;
mod reply;
mod routes;
mod self_signed;
mod tls;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use hyper::body::Incoming;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    cri::RuntimeService,
    pods::{PodStore, PodUid},
    time::Clock,
};
pub use healthz::serve_healthz;
pub use routes::{Kind, ROUTES, Route, subresources};

/// Prometheus text of one endpoint.
pub type MetricsText = Arc<dyn Fn() -> String + Send + Sync>;
/// The newest status that this agent has made of a pod.
pub type StatusOf = Arc<dyn Fn(&PodUid) -> Option<PodStatus> + Send + Sync>;
/// `Err` says why the agent is not working on its pods.
pub type SyncLoopHealth = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Where and how 10250 is served.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// `address` and `port` of the configuration.
    pub listen: SocketAddr,
    /// `tlsCertFile` and `tlsPrivateKeyFile`; without them a self-signed pair is kept in `cert_dir`.
    pub tls_files: Option<(PathBuf, PathBuf)>,
    /// `<root>/pki`.
    pub cert_dir: PathBuf,
    /// Names in a self-signed certificate.
    pub hostname: String,
    pub node_ips: Vec<IpAddr>,
    /// `authentication.x509.clientCAFile`. Without it no client certificate is good.
    pub client_ca_file: Option<PathBuf>,
    /// `authentication.anonymous.enabled`: a request without credentials is `system:anonymous` (and gets 403) instead of 401.
    pub anonymous: bool,
}

/// What the endpoints read.
#[derive(Clone)]
pub struct ServerParts {
    pub pods: Arc<PodStore>,
    pub runtime: Arc<dyn RuntimeService>,
    pub clock: Arc<dyn Clock>,
    pub status: StatusOf,
    pub metrics: MetricsText,
    pub probe_metrics: MetricsText,
    pub sync_loop: SyncLoopHealth,
    /// The whole object of `/configz`.
    pub configz: serde_json::Value,
}

const PORT_TRIES: u32 = 20;
const PORT_PAUSE: std::time::Duration = std::time::Duration::from_millis(250);

/// Why 10250 cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("failed to listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error("unable to load client CA file {path:?}: {message}")]
    ClientCa { path: PathBuf, message: String },
}

/// Binds 10250, then serves until `cancel`. Answers under way have a second to end; followed logs and exec sessions end at once.
pub async fn serve(settings: ServerSettings, parts: ServerParts, cancel: CancellationToken) -> Result<(), ServerError> {
    let authn = Arc::new(authn::Authn::new(settings.client_ca_file.clone(), settings.anonymous)?);
    let keys = Arc::new(tls::ServingKeys::load(&settings, parts.clock.now().wall)?);
    let listener = listen(settings.listen).await?;
    let doors = Arc::new(Doors { parts, authn });
    tracing::info!(address = %settings.listen, "Started kubelet server");
    connection::accept_tls(listener, keys, doors, cancel).await;
    Ok(())
}

/// An agent that is being replaced may still hold the port for a moment: worth waiting for, not worth ending for.
async fn listen(address: SocketAddr) -> Result<TcpListener, ServerError> {
    for _ in 0..PORT_TRIES {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => tokio::time::sleep(PORT_PAUSE).await,
            bound => return bound.map_err(|source| ServerError::Listen { address, source }),
        }
    }
    TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })
}

/// 10250's request handling.
pub(crate) struct Doors {
    parts: ServerParts,
    authn: Arc<authn::Authn>,
}

/// One request with what the connection knows about its peer.
pub(crate) struct Call {
    pub request: hyper::Request<Incoming>,
    /// Path segments after the endpoint's own name, decoded.
    pub arguments: Vec<String>,
    pub peer: connection::Peer,
}

impl Doors {
    /// Route, authenticate, authorise, answer: in upstream's order (an unknown path is 404 for everybody).
    pub async fn answer(
        &self,
        mut request: hyper::Request<Incoming>,
        peer: connection::Peer,
        certificates: &[rustls::pki_types::CertificateDer<'static>],
    ) -> reply::Reply {
        let path = request.uri().path().to_owned();
        if !routes::known_prefix(&path) {
            return reply::not_found();
        }
        let user = match self.authn.authenticate(&mut request, certificates, self.parts.clock.now().wall) {
            Some(user) => user,
            None => return reply::text(hyper::StatusCode::UNAUTHORIZED, "Unauthorized"),
        };
        if let Err(refused) = authn::authorize(&user, request.method(), &path) {
            return reply::text(hyper::StatusCode::FORBIDDEN, &refused);
        }
        match routes::find(request.method(), &path) {
            routes::Found::Route(kind, arguments) => self.dispatch(kind, Call { request, arguments, peer }).await,
            routes::Found::WrongMethod(allowed) => reply::method_not_allowed(&allowed),
            routes::Found::Nothing => reply::text(hyper::StatusCode::NOT_FOUND, "404: Page Not Found"),
        }
    }

    async fn dispatch(&self, kind: Kind, call: Call) -> reply::Reply {
        match kind {
            Kind::Healthz => healthz::node(&self.parts, &call),
            Kind::Metrics => reply::metrics((self.parts.metrics)()),
            Kind::ProbeMetrics => reply::metrics((self.parts.probe_metrics)()),
            Kind::Configz => {
                reply::with_type(hyper::StatusCode::OK, "application/json", self.parts.configz.to_string())
            }
            Kind::Pods => pods::list(&self.parts.pods.list(), &self.parts.status),
            Kind::ContainerLogs => logs::container_logs(&self.parts, call).await,
            Kind::Exec => exec::exec(&self.parts, call).await,
        }
    }
}

#[cfg(test)]
mod tests;
