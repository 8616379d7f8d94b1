//! The transport over real sockets and TLS: HTTP/2, its absence, and rejected credentials.

use std::{
    convert::Infallible,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rustls_pki_types::{PrivateKeyDer, pem::PemObject};

use super::{ApiClients, ApiSettings, rest};

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    requests: AtomicUsize,
}

struct Server {
    seen: Arc<Seen>,
    kubeconfig: tempfile::TempDir,
}

impl Server {
    fn config(&self) -> std::path::PathBuf {
        self.kubeconfig.path().join("kubelet.conf")
    }
}

/// Serves `version token` of each request; token `old` is refused.
async fn serve(alpn: &[&str], token_file: &str) -> Server {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    tls.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::new(Seen::default());
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let counted = Arc::clone(&seen);
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, seen) = (acceptor.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(tcp).await else { return };
                seen.connections.fetch_add(1, Ordering::Relaxed);
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    seen.requests.fetch_add(1, Ordering::Relaxed);
                    async move { Ok::<_, Infallible>(answer(&request)) }
                });
                auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await.ok();
            });
        }
    });
    let kubeconfig = tempfile::tempdir().unwrap();
    std::fs::write(kubeconfig.path().join("token"), token_file).unwrap();
    let text = format!(
        "current-context: x\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {{tokenFile: token}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{port}/prefix/', tls-server-name: localhost, \
         certificate-authority-data: {}}}}}]\n",
        STANDARD.encode(made.cert.pem())
    );
    std::fs::write(kubeconfig.path().join("kubelet.conf"), text).unwrap();
    Server { seen, kubeconfig }
}

fn answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let version = if request.version() == Version::HTTP_2 { "h2" } else { "http/1.1" };
    let code = if header("authorization") == "Bearer old" { 401 } else { 200 };
    let text = format!("{version} {} {} {}", request.uri().path(), header("authorization"), header("user-agent"));
    Response::builder().status(code).body(Full::new(Bytes::from(text))).unwrap()
}

fn connect(kubeconfig: &Path) -> ApiClients {
    let settings = ApiSettings { user_agent: "kubelet/v1.37.1 (linux/amd64)".to_owned(), ..ApiSettings::default() };
    ApiClients::connect(kubeconfig, &settings).unwrap()
}

#[tokio::test]
async fn s11_many_requests_share_one_http2_connection() {
    let server = serve(&["h2", "http/1.1"], "good").await;
    let clients = connect(&server.config());
    let registry = prometheus::Registry::new();
    clients.register_metrics(&registry).unwrap();
    let requests = (0..50).map(|_| rest::get(&clients.general, "/api/v1/pods"));
    for answer in futures::future::join_all(requests).await {
        assert_eq!(answer.unwrap(), "h2 /prefix/api/v1/pods Bearer good kubelet/v1.37.1 (linux/amd64)");
    }
    assert_eq!(server.seen.connections.load(Ordering::Relaxed), 1);
    let _watch = clients.watch_slot();
    let gathered = registry.gather();
    let family = |name: &str| gathered.iter().find(|f| f.name() == name).unwrap().get_metric()[0].clone();
    assert_eq!(family("rest_client_requests_total").get_counter().get_value() as u32, 50);
    assert_eq!(family("rest_client_request_duration_seconds").get_histogram().get_sample_count(), 50);
    assert_eq!(family("rkubelet_api_watches").get_gauge().get_value() as u32, 1);
    rest::get(&clients.heartbeat(), "/x").await.unwrap();
    assert_eq!(server.seen.connections.load(Ordering::Relaxed), 2, "the heartbeat has its own");
}

#[tokio::test]
async fn s11_a_server_without_http2_is_spoken_to_in_http1() {
    let server = serve(&["http/1.1"], "good").await;
    let clients = connect(&server.config());
    for _ in 0..3 {
        let answer = rest::get(&clients.general, "/a").await.unwrap();
        assert!(answer.starts_with(b"http/1.1 /prefix/a"), "{answer:?}");
    }
}

#[tokio::test]
async fn s11_a_heartbeat_client_works_on_another_runtime() {
    let server = serve(&["h2"], "good").await;
    let clients = connect(&server.config());
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { rest::get(&clients.heartbeat(), "/lease").await.unwrap() })
    });
    let answer = tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    assert!(answer.starts_with(b"h2 /prefix/lease"));
}

#[tokio::test]
async fn a_rejected_request_is_tried_once_more_and_errors_name_their_cause() {
    let server = serve(&["h2"], "old").await;
    let clients = connect(&server.config());
    let error = rest::get(&clients.general, "/a").await.unwrap_err();
    assert_eq!(error.code(), Some(401));
    assert_eq!(server.seen.requests.load(Ordering::Relaxed), 2);
    std::fs::write(server.kubeconfig.path().join("token"), "new").unwrap();
    assert!(rest::get(&clients.general, "/a").await.unwrap().starts_with(b"h2 /prefix/a Bearer new"));

    let text = std::fs::read_to_string(server.config())
        .unwrap()
        .replace("tls-server-name: localhost", "tls-server-name: elsewhere");
    std::fs::write(server.config(), text).unwrap();
    let error = rest::get(&connect(&server.config()).general, "/a").await.unwrap_err().to_string();
    assert!(error.contains("certificate not valid for name \"elsewhere\""), "{error}");
}
