//! Lifecycle hooks: postStart and preStop, by exec, httpGet or sleep (contract P-28, P-29, P-30).
//!
//! A hook has no timeout of its own: whoever awaits it stops waiting when the grace is over; a sleep then ends and is counted. The texts of [`HookError`] may
//! hold a command's output and must not go into events: those say `PostStartHook failed` and `PreStopHook failed` only.

use std::{
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use k8s_openapi::api::core::v1 as corev1;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    cri::RuntimeService,
    events::{EventSink, EventType, Regarding},
    pods::Pod,
    probes::http::{GetError, Purpose, Request, get},
    telemetry::WorkerMetrics,
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
    pub metrics: Arc<WorkerMetrics>,
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

/// Begins a hook. Dropping the handle only ends a sleep: any other hook is never cancelled, only no longer awaited.
pub fn spawn(handler: corev1::LifecycleHandler, ctx: HookContext) -> RunningHook {
    let sleeps = handler.sleep.is_some();
    let task = tokio::spawn(async move { run_hook(&handler, ctx).await });
    if sleeps { RunningHook::Sleep(AbortOnDropHandle::new(task)) } else { RunningHook::Act(task) }
}

/// A hook that was begun.
pub enum RunningHook {
    Act(JoinHandle<Result<(), HookError>>),
    Sleep(AbortOnDropHandle<Result<(), HookError>>),
}

impl Future for RunningHook {
    type Output = Result<Result<(), HookError>, JoinError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Act(task) => Pin::new(task).poll(cx),
            Self::Sleep(task) => Pin::new(task).poll(cx),
        }
    }
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
        let mut sleep = Sleep { metrics: &ctx.metrics, slept: false };
        tokio::time::sleep(Duration::from_secs(action.seconds.max(0) as u64)).await;
        sleep.slept = true;
        Ok(())
    } else if handler.tcp_socket.is_some() {
        Err(HookError::Invalid { kind: "tcpSocket" })
    } else {
        Err(HookError::Invalid { kind: "none of exec, httpGet, sleep" })
    }
}

/// Counts a sleep that was dropped before its end (contract P-30).
struct Sleep<'a> {
    metrics: &'a WorkerMetrics,
    slept: bool,
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if !self.slept {
            self.metrics.sleep_cut_short();
        }
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
                ctx.metrics.hook_fell_back();
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        cri::{
            fake::{ExecScript, FakeRuntime},
            fixtures::running,
        },
        events::MemoryEvents,
        pods::PodSource,
        time::SystemClock,
    };

    async fn context() -> (HookContext, FakeRuntime, Arc<MemoryEvents>) {
        let (fake, events) = (FakeRuntime::new(Arc::new(SystemClock)), Arc::new(MemoryEvents::default()));
        let (_, container_id) = running(&fake, "uid-1", "c").await;
        let container = corev1::Container { name: "c".into(), ..Default::default() };
        let mut object = corev1::Pod::default();
        object.metadata.uid = Some("uid-1".into());
        object.metadata.name = Some("p".into());
        object.metadata.namespace = Some("ns".into());
        object.spec = Some(corev1::PodSpec { containers: vec![container.clone()], ..Default::default() });
        let context = HookContext {
            pod: Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap(),
            container,
            container_id,
            pod_ip: Some(Ipv4Addr::LOCALHOST.into()),
            runtime: Arc::new(fake.clone()),
            events: events.clone(),
            metrics: Arc::new(WorkerMetrics::new(&prometheus::Registry::new()).unwrap()),
        };
        (context, fake, events)
    }

    /// Answers every connection with `status`, whatever was said; sends out what it read first.
    async fn server(status: &'static str) -> (i32, tokio::sync::mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (heads, received) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = vec![0; 4096];
                let n = stream.read(&mut head).await.unwrap_or(0);
                let _ = heads.send(String::from_utf8_lossy(&head[..n]).into_owned());
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.read(&mut head).await;
            }
        });
        (i32::from(port), received)
    }

    fn http(port: i32, scheme: &str) -> corev1::LifecycleHandler {
        let header = |name: &str, value: &str| corev1::HTTPHeader { name: name.into(), value: value.into() };
        let action = corev1::HTTPGetAction {
            port: IntOrString::Int(port),
            path: Some("/echo?msg=x".into()),
            scheme: Some(scheme.into()),
            http_headers: Some(vec![header("Authorization", "secret"), header("X-A", "b")]),
            ..Default::default()
        };
        corev1::LifecycleHandler { http_get: Some(action), ..Default::default() }
    }

    #[tokio::test]
    async fn p28_exec_hook_fails_by_its_exit_code() {
        let (ctx, fake, _) = context().await;
        let command = Some(vec!["sh".into(), "-c".into(), "exit 1".into()]);
        let handler = corev1::LifecycleHandler { exec: Some(corev1::ExecAction { command }), ..Default::default() };
        assert_eq!(run_hook(&handler, ctx.clone()).await, Ok(()));
        let failing = ExecScript { exit_code: 1, stdout: b"out ".into(), stderr: b"err".into(), ..Default::default() };
        fake.exec_script("c", failing);
        let error = run_hook(&handler, ctx).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Exec lifecycle hook ([sh -c exit 1]) for Container \"c\" in Pod \"p_ns(uid-1)\" failed - error: \
             command 'sh -c exit 1' exited with 1: err, message: \"out err\""
        );
    }

    #[tokio::test]
    async fn p29_http_hook_any_answer_will_do() {
        let (ctx, ..) = context().await;
        let (port, mut heads) = server("500 Oops").await;
        assert_eq!(run_hook(&http(port, "HTTP"), ctx.clone()).await, Ok(()));
        let head = heads.recv().await.unwrap();
        assert!(head.starts_with("GET /echo?msg=x HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("\r\nUser-Agent: kube-lifecycle/1.37\r\n") && head.contains("\r\nX-A: b\r\n"), "{head}");
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
        let error = run_hook(&http(i32::from(closed), ""), ctx).await.unwrap_err().to_string();
        let want = "HTTP lifecycle hook (/echo?msg=x) for Container \"c\" in Pod \"p_ns(uid-1)\" failed - error: Get \"http://127.0.0.1:";
        assert!(error.starts_with(want) && error.ends_with("connect: connection refused"), "{error}");
    }

    #[tokio::test]
    async fn p29_https_hook_falls_back_to_http_without_credentials() {
        let (mut ctx, _, events) = context().await;
        let registry = prometheus::Registry::new();
        ctx.metrics = Arc::new(WorkerMetrics::new(&registry).unwrap());
        let (port, mut heads) = server("200 OK").await;
        assert_eq!(run_hook(&http(port, "HTTPS"), ctx).await, Ok(()));
        heads.recv().await.unwrap(); // a ClientHello
        let head = heads.recv().await.unwrap();
        assert!(head.starts_with("GET /echo?msg=x ") && !head.to_lowercase().contains("authorization"), "{head}");
        let message =
            format!("request to HTTPS lifecycle hook 127.0.0.1:{port} got HTTP response, retry with HTTP succeeded");
        assert!(events.has("LifecycleHTTPFallback", &message));
        assert_eq!(counter(&registry, "kubelet_lifecycle_handler_http_fallbacks_total"), 1);
    }

    fn counter(registry: &prometheus::Registry, name: &str) -> u64 {
        let families = registry.gather();
        let family = families.iter().find(|f| f.name() == name).unwrap();
        family.get_metric()[0].get_counter().get_value() as u64
    }

    #[tokio::test(start_paused = true)]
    async fn p30_a_sleep_that_is_cut_short_is_counted() {
        let (mut ctx, ..) = context().await;
        let registry = prometheus::Registry::new();
        ctx.metrics = Arc::new(WorkerMetrics::new(&registry).unwrap());
        let sleep =
            |seconds| corev1::LifecycleHandler { sleep: Some(corev1::SleepAction { seconds }), ..Default::default() };
        let bound = Duration::from_secs(3);
        assert!(tokio::time::timeout(bound, run_hook(&sleep(2), ctx.clone())).await.is_ok());
        assert_eq!(counter(&registry, "kubelet_sleep_action_terminated_early_total"), 0);
        assert!(tokio::time::timeout(bound, run_hook(&sleep(5), ctx)).await.is_err());
        assert_eq!(counter(&registry, "kubelet_sleep_action_terminated_early_total"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn p30_sleep_hook_sleeps() {
        let (ctx, ..) = context().await;
        let sleep =
            |seconds| corev1::LifecycleHandler { sleep: Some(corev1::SleepAction { seconds }), ..Default::default() };
        let start = tokio::time::Instant::now();
        assert_eq!(run_hook(&sleep(5), ctx.clone()).await, Ok(()));
        assert_eq!(start.elapsed().as_secs(), 5);
        assert_eq!(run_hook(&sleep(0), ctx.clone()).await, Ok(()));
        let tcp = corev1::LifecycleHandler { tcp_socket: Some(Default::default()), ..Default::default() };
        let error = run_hook(&tcp, ctx).await.unwrap_err().to_string();
        assert_eq!(error, "Cannot run handler: invalid handler: tcpSocket");
    }
}
