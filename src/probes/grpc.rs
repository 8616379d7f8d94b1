//! grpc probes: `grpc.health.v1.Health/Check`, in plaintext (contract B-05).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1 as corev1;
use tokio::time::Instant;
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    http::connect,
    kubernetes_minor,
    net_error::go_seconds,
    prober::{Outcome, ProbeError},
    schedule,
};

/// Go's gRPC client waits so long before it connects again, growing by 1.6 to its own limit, which no probe's timeout reaches.
const RECONNECT: Duration = Duration::from_secs(1);

/// One try. As upstream, all that can go wrong is a failure, never an error.
pub(super) async fn attempt(
    action: &corev1::GRPCAction,
    pod_host: Option<IpAddr>,
    probe: &corev1::Probe,
) -> Result<Outcome, ProbeError> {
    let host = pod_host.ok_or_else(|| ProbeError::unknown("the pod has no IP address"))?;
    let port =
        u16::try_from(action.port).map_err(|_| ProbeError::unknown(format!("invalid port number: {}", action.port)))?;
    let address = SocketAddr::new(host, port);
    let timeout = schedule::timeout(probe);
    let shown = go_seconds(timeout.as_secs());
    #[allow(clippy::disallowed_methods)] // a deadline for a timer, not a time to decide by
    let deadline = Instant::now() + timeout;

    let Ok(channel) = tokio::time::timeout_at(deadline, connected(address)).await else {
        return Ok(Outcome::Failure(format!(
            "timeout: failed to connect service {:?} within {shown}: context deadline exceeded",
            address.to_string()
        )));
    };
    let channel = match channel {
        Ok(channel) => channel,
        Err(e) => {
            let at = address.to_string();
            return Ok(Outcome::Failure(format!("error: failed to connect service at {at:?}: {e}")));
        }
    };
    let request = HealthCheckRequest { service: action.service.clone().unwrap_or_default() };
    let mut client = HealthClient::new(channel);
    let checked = tokio::time::timeout_at(deadline, client.check(request)).await;
    let late = || Outcome::Failure(format!("timeout: health rpc did not complete within {shown}"));
    Ok(match checked {
        Err(_) => late(),
        Ok(Err(status)) => match status.code() {
            Code::DeadlineExceeded => late(),
            Code::Unimplemented => Outcome::Failure(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            )),
            code => Outcome::Failure(format!(
                "error: health rpc probe failed: rpc error: code = {code:?} desc = {}",
                status.message()
            )),
        },
        Ok(Ok(response)) => match response.into_inner().status() {
            ServingStatus::Serving => Outcome::Success,
            other => Outcome::Failure(format!("service unhealthy (responded with {:?})", other.as_str_name())),
        },
    })
}

/// Connects; a refused connection is tried again until the caller's deadline.
async fn connected(address: SocketAddr) -> Result<Channel, tonic::transport::Error> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}"))?.user_agent(format!("kube-probe/{}", kubernetes_minor()))?;
    let mut wait = RECONNECT;
    loop {
        let connector =
            tower::service_fn(move |_: Uri| async move { Ok::<_, io::Error>(TokioIo::new(connect(address).await?)) });
        match endpoint.connect_with_connector(connector).await {
            Ok(channel) => return Ok(channel),
            Err(_) => tokio::time::sleep(wait).await,
        }
        wait = wait.mul_f32(1.6);
    }
}
