//! Probers against real sockets on the loopback interface.

use std::net::Ipv4Addr;

use k8s_openapi::{api::core::v1::HTTPHeader, apimachinery::pkg::util::intstr::IntOrString};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};

use super::*;
use crate::probes::{grpc, tcp};

const LOCALHOST: Option<IpAddr> = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));

/// Answers each connection with the next of `answers` (the last one again and again); sends out the request heads.
async fn server(answers: Vec<String>) -> (u16, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (heads, received) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for i in 0.. {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let answer = answers[answers.len().min(i + 1) - 1].clone();
            let heads = heads.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let _ = heads.send(String::from_utf8_lossy(&head).into_owned());
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    (port, received)
}

fn response(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

fn action(port: u16, path: &str) -> corev1::HTTPGetAction {
    corev1::HTTPGetAction { port: IntOrString::Int(i32::from(port)), path: Some(path.into()), ..Default::default() }
}

fn one_second() -> corev1::Probe {
    corev1::Probe { timeout_seconds: Some(1), ..Default::default() }
}

async fn try_once(action: &corev1::HTTPGetAction) -> Result<Outcome, ProbeError> {
    attempt(action, &corev1::Container::default(), LOCALHOST, &one_second()).await
}

#[tokio::test]
async fn b03_status_decides_and_the_body_of_a_failure_is_not_shown() {
    let cases = [
        ("200 OK", Outcome::Success),
        ("204 No Content", Outcome::Success),
        ("500 Oops", Outcome::Failure("HTTP probe failed with statuscode: 500".into())),
        ("404 No", Outcome::Failure("HTTP probe failed with statuscode: 404".into())),
    ];
    for (status, want) in cases {
        let body = if status.starts_with("204") { "" } else { "secret" };
        let (port, _) = server(vec![response(status, "", body)]).await;
        assert_eq!(try_once(&action(port, "/healthz")).await, Ok(want), "{status}");
    }
}

#[tokio::test]
async fn b03_request_head_is_what_upstream_sends() {
    let (port, mut heads) = server(vec![response("200 OK", "", "")]).await;
    try_once(&action(port, "/healthz?a=b")).await.unwrap();
    let want = format!(
        "GET /healthz?a=b HTTP/1.1\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\nHost: 127.0.0.1:{port}\r\n\r\n"
    );
    assert_eq!(heads.recv().await.unwrap(), want);

    let header = |name: &str, value: &str| HTTPHeader { name: name.into(), value: value.into() };
    let mut custom = action(port, "x");
    custom.http_headers = Some(vec![
        header("Host", "example.com"),
        header("User-Agent", ""),
        header("accept", ""),
        header("X-Muffins-Or-Cupcakes", "muffins"),
        header("Content-Length", "5"),
    ]);
    try_once(&custom).await.unwrap();
    assert_eq!(
        heads.recv().await.unwrap(),
        "GET /x HTTP/1.1\r\nX-Muffins-Or-Cupcakes: muffins\r\nConnection: close\r\nHost: example.com\r\n\r\n"
    );
}

#[tokio::test]
async fn b03_local_redirects_are_followed_others_warn() {
    let local = response("302 Found", "Location: /target\r\n", "");
    let (port, mut heads) = server(vec![local.clone(), response("200 OK", "", "")]).await;
    assert_eq!(try_once(&action(port, "/redirect")).await, Ok(Outcome::Success));
    assert!(heads.recv().await.unwrap().starts_with("GET /redirect "));
    assert!(heads.recv().await.unwrap().starts_with("GET /target "));

    let body = "<a href=\"http://0.0.0.0/\">Found</a>.\n\n";
    let (port, _) = server(vec![response("302 Found", "Location: http://0.0.0.0/\r\n", body)]).await;
    let warning = format!("Probe terminated redirects, Response body: {body}");
    assert_eq!(try_once(&action(port, "/")).await, Ok(Outcome::Warning(warning)));

    let (port, _) = server(vec![local]).await;
    let failure = format!("Get \"http://127.0.0.1:{port}/target\": stopped after 10 redirects");
    assert_eq!(try_once(&action(port, "/")).await, Ok(Outcome::Failure(failure)));
}

#[tokio::test]
async fn b03_unanswered_requests_are_worded_as_upstream() {
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
    let refused =
        format!("Get \"http://127.0.0.1:{closed}/\": dial tcp 127.0.0.1:{closed}: connect: connection refused");
    assert_eq!(try_once(&action(closed, "/")).await, Ok(Outcome::Failure(refused)));

    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let late = format!(
        "Get \"http://127.0.0.1:{port}/\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
    );
    assert_eq!(try_once(&action(port, "/")).await, Ok(Outcome::Failure(late)));

    let (port, _) = server(vec![String::new()]).await;
    let eof = format!("Get \"http://127.0.0.1:{port}/\": EOF");
    assert_eq!(try_once(&action(port, "/")).await, Ok(Outcome::Failure(eof)));

    let (port, _) = server(vec!["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf".into()]).await;
    assert_eq!(try_once(&action(port, "/")).await, Err(ProbeError::failure("unexpected EOF")));
}

#[tokio::test]
async fn b03_body_is_read_to_ten_kibibytes() {
    let long = "x".repeat(BODY_LIMIT + 1);
    let (port, _) = server(vec![response("301 Moved", "Location: http://elsewhere/\r\n", &long)]).await;
    let Ok(Outcome::Warning(text)) = try_once(&action(port, "/")).await else { panic!("no warning") };
    assert_eq!(text.matches('x').count(), BODY_LIMIT);
}

#[tokio::test]
async fn b03_https_does_not_verify_and_notices_plain_http() {
    let key = rcgen::generate_simple_self_signed(vec!["whatever".into()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(tls)).accept(stream).await.unwrap();
        let mut head = [0; 16];
        stream.read_exact(&mut head).await.unwrap();
        stream.write_all(response("200 OK", "", "").as_bytes()).await.unwrap();
    });
    let mut https = action(port, "/");
    https.scheme = Some("HTTPS".into());
    assert_eq!(try_once(&https).await, Ok(Outcome::Success));

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    https.port = IntOrString::Int(i32::from(listener.local_addr().unwrap().port()));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
    });
    let Ok(Outcome::Failure(text)) = try_once(&https).await else { panic!("no failure") };
    assert!(text.ends_with(": http: server gave HTTP response to HTTPS client"), "{text}");
}

#[tokio::test]
async fn b03_named_port_and_missing_port() {
    let (port, _) = server(vec![response("200 OK", "", "")]).await;
    let container = corev1::Container {
        ports: Some(vec![corev1::ContainerPort {
            name: Some("web".into()),
            container_port: i32::from(port),
            ..Default::default()
        }]),
        ..Default::default()
    };
    let mut named = action(port, "/");
    named.port = IntOrString::String("web".into());
    assert_eq!(attempt(&named, &container, LOCALHOST, &one_second()).await, Ok(Outcome::Success));
    named.port = IntOrString::String("nope".into());
    let missing = attempt(&named, &container, LOCALHOST, &one_second()).await;
    assert_eq!(missing, Err(ProbeError::unknown("port \"nope\" not found")));
}

#[tokio::test]
async fn b04_tcp_opens_or_fails() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let action = corev1::TCPSocketAction { port: IntOrString::Int(i32::from(port)), host: None };
    let container = corev1::Container::default();
    assert_eq!(tcp::attempt(&action, &container, LOCALHOST, &one_second()).await, Ok(Outcome::Success));
    drop(listener);
    let refused = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
    assert_eq!(tcp::attempt(&action, &container, LOCALHOST, &one_second()).await, Ok(Outcome::Failure(refused)));
}

/// How many connections from or to that port of this host are in TIME_WAIT.
fn waiting(port: u16) -> usize {
    const TIME_WAIT: &str = "06";
    let (port, table) = (format!(":{port:04X}"), std::fs::read_to_string("/proc/net/tcp").unwrap());
    let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[3] == TIME_WAIT && (row[1].ends_with(&port) || row[2].ends_with(&port))).count()
}

#[tokio::test]
async fn b04_tcp_ends_orderly_for_the_server_and_leaves_no_time_wait() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let action = corev1::TCPSocketAction { port: IntOrString::Int(i32::from(port)), host: None };
    for _ in 0..20 {
        let container = corev1::Container::default();
        assert_eq!(tcp::attempt(&action, &container, LOCALHOST, &one_second()).await, Ok(Outcome::Success));
        let (mut stream, _) = listener.accept().await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "the end of a stream, not a reset");
    }
    assert_eq!(waiting(port), 0);
}

#[tokio::test]
async fn b03_no_connection_is_left_in_time_wait() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        for _ in 0..20 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            let _ = stream.read(&mut request).await;
        }
    });
    let action = corev1::HTTPGetAction { port: IntOrString::Int(i32::from(port)), ..Default::default() };
    for _ in 0..20 {
        let container = corev1::Container::default();
        assert_eq!(attempt(&action, &container, LOCALHOST, &one_second()).await, Ok(Outcome::Success));
    }
    server.await.unwrap();
    assert_eq!(waiting(port), 0);
}

#[tokio::test]
async fn b05_grpc_health_words() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper_util::service::TowerToHyperService::new(service.clone());
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    });
    reporter.set_service_status("bad", tonic_health::ServingStatus::NotServing).await;

    let check = |service: &str, port: u16| {
        let action = corev1::GRPCAction { port: i32::from(port), service: Some(service.into()), ..Default::default() };
        async move { grpc::attempt(&action, LOCALHOST, &one_second()).await }
    };
    assert_eq!(check("", port).await, Ok(Outcome::Success));
    let unhealthy = "service unhealthy (responded with \"NOT_SERVING\")";
    assert_eq!(check("bad", port).await, Ok(Outcome::Failure(unhealthy.into())));
    let Ok(Outcome::Failure(unknown)) = check("unknown", port).await else { panic!("no failure") };
    assert!(unknown.starts_with("error: health rpc probe failed: rpc error: code = NotFound desc = "), "{unknown}");

    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
    let late =
        format!("timeout: failed to connect service \"127.0.0.1:{closed}\" within 1s: context deadline exceeded");
    assert_eq!(check("", closed).await, Ok(Outcome::Failure(late)));
}
