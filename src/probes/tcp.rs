//! tcpSocket probes: a connection that opens is a pass (contract B-04).

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1 as corev1;
use tokio::io::AsyncWriteExt;

use super::{
    http::connect,
    net_error,
    prober::{Outcome, ProbeError, resolve_port},
    schedule,
};

/// One try. The connection is closed with a FIN, so that the server reads an orderly end, and only then dropped by a reset, so
/// that none of them stays in TIME_WAIT: hundreds of probes a second would be tens of thousands of those.
pub(super) async fn attempt(
    action: &corev1::TCPSocketAction,
    container: &corev1::Container,
    pod_host: Option<IpAddr>,
    probe: &corev1::Probe,
) -> Result<Outcome, ProbeError> {
    let port = resolve_port(&action.port, container).map_err(ProbeError::unknown)?;
    let host = match action.host.as_deref().filter(|h| !h.is_empty()) {
        Some(host) => host.to_owned(),
        None => pod_host.ok_or_else(|| ProbeError::unknown("the pod has no IP address"))?.to_string(),
    };
    let shown = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let opened = tokio::time::timeout(schedule::timeout(probe), open(&host, port)).await;
    Ok(match opened {
        Ok(Ok(())) => Outcome::Success,
        Ok(Err(message)) => Outcome::Failure(message),
        Err(_) => Outcome::Failure(format!("dial tcp {shown}: i/o timeout")),
    })
}

async fn open(host: &str, port: u16) -> Result<(), String> {
    let mut last = net_error::lookup(host);
    let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => tokio::net::lookup_host((host, port)).await.map_err(|_| last.clone())?.collect(),
    };
    for address in addresses {
        match connect(address).await {
            Ok(mut stream) => {
                // Opening was the question; an end that fails is no answer.
                let _ = stream.shutdown().await;
                return Ok(());
            }
            Err(e) => last = net_error::dial(address, &e),
        }
    }
    Err(last)
}
