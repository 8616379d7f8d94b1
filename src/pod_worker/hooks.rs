//! Lifecycle hooks: postStart and preStop, by exec, httpGet or sleep (contract P-28, P-29, P-30).
//!
//! A hook has no timeout of its own: whoever awaits it drops the future when the grace is over. The texts of [`HookError`] may
//! hold a command's output and must not go into events: those say `PostStartHook failed` and `PreStopHook failed` only.

use std::{net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1 as corev1;

use crate::{
    cri::RuntimeService,
    events::{EventSink, EventType, Regarding},
    pods::Pod,
    probes::http::{GetError, Purpose, Request, get},
};

/// What a hook needs beside its handler.
#[derive(Clone)]
pub struct HookContext {
    pub pod: Pod,
    pub container: corev1::Container,
    pub container_id: String,
    /// Where httpGet goes when it names no host.
    pub pod_ip: Option<IpAddr>,
    pub runtime: Arc<dyn RuntimeService>,
    pub events: Arc<dyn EventSink>,
}

/// Why a hook failed, worded as upstream words the message of reason `PostStartHookError`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    #[error(
        "Exec lifecycle hook ([{}]) for Container {container:?} in Pod {pod:?} failed - error: {error}, message: {output:?}",
        command.join(" ")
    )]
    Exec { command: Vec<String>, container: String, pod: String, error: String, output: String },
    #[error("HTTP lifecycle hook ({path}) for Container {container:?} in Pod {pod:?} failed - error: {error}")]
    Http { path: String, container: String, pod: String, error: String },
    /// No exec, httpGet or sleep: a tcpSocket hook among them, which never worked.
    #[error("Cannot run handler: invalid handler: {kind}")]
    Invalid { kind: &'static str },
}

/// Runs one hook to its end.
pub async fn run_hook(handler: &corev1::LifecycleHandler, ctx: HookContext) -> Result<(), HookError> {
    if let Some(action) = &handler.exec {
        run_exec(action.command.clone().unwrap_or_default(), &ctx).await
    } else if let Some(action) = &handler.http_get {
        run_http(action, &ctx).await.map_err(|error| HookError::Http {
            path: action.path.clone().unwrap_or_default(),
            container: ctx.container.name.clone(),
            pod: ctx.pod.described(),
            error,
        })
    } else if let Some(action) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(action.seconds.max(0) as u64)).await;
        Ok(())
    } else if handler.tcp_socket.is_some() {
        Err(HookError::Invalid { kind: "tcpSocket" })
    } else {
        Err(HookError::Invalid { kind: "none of exec, httpGet, sleep" })
    }
}

async fn run_exec(command: Vec<String>, ctx: &HookContext) -> Result<(), HookError> {
    let result = ctx.runtime.exec_sync(&ctx.container_id, command.clone(), Duration::ZERO).await;
    let (error, output) = match result {
        Ok(response) if response.exit_code == 0 => return Ok(()),
        Ok(response) => {
            let stderr = String::from_utf8_lossy(&response.stderr).into_owned();
            let output = String::from_utf8_lossy(&response.stdout).into_owned() + &stderr;
            (format!("command '{}' exited with {}: {stderr}", command.join(" "), response.exit_code), output)
        }
        Err(error) => (error.to_string(), String::new()),
    };
    let (container, pod) = (ctx.container.name.clone(), ctx.pod.described());
    Err(HookError::Exec { command, container, pod, error, output })
}

/// Any response is a success. A plain HTTP server behind an https hook is asked again over HTTP (contract P-29).
async fn run_http(action: &corev1::HTTPGetAction, ctx: &HookContext) -> Result<(), String> {
    let request = Request::new(action, &ctx.container, ctx.pod_ip, Purpose::Lifecycle)?;
    let asked = request.url.authority();
    match get(request.clone(), None).await {
        Ok(_) | Err(GetError::Body { .. }) => Ok(()),
        Err(first @ GetError::PlainHttp { .. }) => match get(request.downgraded(), None).await {
            Ok(_) | Err(GetError::Body { .. }) => {
                let message =
                    format!("request to HTTPS lifecycle hook {asked} got HTTP response, retry with HTTP succeeded");
                let regarding = Regarding::Pod(ctx.pod.clone());
                ctx.events.event(regarding, EventType::Warning, "LifecycleHTTPFallback", message);
                Ok(())
            }
            Err(_) => Err(first.to_string()),
        },
        Err(error) => Err(error.to_string()),
    }
}
