//! 10250 and 10248 over real sockets, with the runtime in memory.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1 as corev1;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::{
    cri::{
        RuntimeService,
        fake::{FakeRuntime, Fault, ImageScript},
        v1,
    },
    pods::{Pod, PodSource},
    time::SystemClock,
    wake::NoWakes,
};

struct Ca(Issuer<'static, KeyPair>, String);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test-ca");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self(Issuer::new(params, key), pem)
    }
    fn client(&self, name: &str, group: &str) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Some((cert.der().clone(), key.serialize_der()))
    }
}

type Identity = Option<(CertificateDer<'static>, Vec<u8>)>;

struct House {
    dir: tempfile::TempDir,
    address: SocketAddr,
    healthy: Arc<AtomicBool>,
    ca: Ca,
    fake: FakeRuntime,
    cancel: CancellationToken,
}

impl Drop for House {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn parts(fake: &FakeRuntime, healthy: &Arc<AtomicBool>, status: corev1::PodStatus) -> ServerParts {
    let pods = Arc::new(PodStore::new(&[PodSource::Api], Arc::new(NoWakes)));
    let mut object = corev1::Pod::default();
    object.metadata.uid = Some("uid-1".into());
    object.metadata.name = Some("p".into());
    object.metadata.namespace = Some("ns".into());
    let container = corev1::Container { name: "c".into(), ..Default::default() };
    object.spec = Some(corev1::PodSpec { containers: vec![container], ..Default::default() });
    pods.upsert(Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap());
    let healthy = healthy.clone();
    ServerParts {
        pods,
        runtime: Arc::new(fake.clone()),
        clock: Arc::new(SystemClock),
        status: Arc::new(move |_| Some(status.clone())),
        metrics: Arc::new(|| "m 1\n".to_owned()),
        probe_metrics: Arc::new(|| "p 1\n".to_owned()),
        configz: serde_json::json!({ "kubeletconfig": { "kind": "KubeletConfiguration" } }),
        sync_loop: Arc::new(move || if healthy.load(Ordering::SeqCst) { Ok(()) } else { Err("stuck".to_owned()) }),
    }
}

async fn house_with(status: corev1::PodStatus, fake: FakeRuntime) -> House {
    let dir = tempfile::tempdir().unwrap();
    let (ca, healthy) = (Ca::new(), Arc::new(AtomicBool::new(true)));
    let ca_file = dir.path().join("ca.crt");
    fs::write(&ca_file, &ca.1).unwrap();
    let settings = ServerSettings {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        tls_files: None,
        cert_dir: dir.path().join("pki"),
        hostname: "node-1".into(),
        node_ips: vec![Ipv4Addr::LOCALHOST.into()],
        client_ca_file: Some(ca_file),
        anonymous: false,
    };
    let parts = parts(&fake, &healthy, status);
    let keys = Arc::new(tls::ServingKeys::load(&settings, parts.clock.now().wall).unwrap());
    let authn = Arc::new(authn::Authn::new(settings.client_ca_file, false).unwrap());
    let listener = TcpListener::bind(settings.listen).await.unwrap();
    let (address, cancel) = (listener.local_addr().unwrap(), CancellationToken::new());
    tokio::spawn(connection::accept_tls(listener, keys, Arc::new(Doors { parts, authn }), cancel.clone()));
    House { dir, address, healthy, ca, fake, cancel }
}

async fn house() -> House {
    house_with(corev1::PodStatus::default(), FakeRuntime::new(Arc::new(SystemClock))).await
}

impl House {
    fn apiserver(&self) -> Identity {
        self.ca.client("kube-apiserver-kubelet-client", "system:masters")
    }

    async fn connect(&self, identity: Identity, alpn: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let served: Vec<CertificateDer<'static>> =
            CertificateDer::pem_file_iter(self.dir.path().join("pki/kubelet.crt"))
                .unwrap()
                .map(Result::unwrap)
                .collect();
        let mut roots = RootCertStore::empty();
        roots.add(served[1].clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            Some((cert, key)) => {
                builder.with_client_auth_cert(vec![cert], PrivateKeyDer::try_from(key).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("node-1").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    async fn ask(&self, identity: Identity, method: Method, path: &str) -> (StatusCode, String) {
        let stream = self.connect(identity, b"http/1.1").await;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header(header::HOST, "node-1");
        let reply = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
        let status = reply.status();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let (status, body) = self.ask(self.apiserver(), Method::GET, path).await;
        (status.as_u16(), body)
    }
}

#[tokio::test]
async fn e01_every_route_is_closed_to_all_but_the_apiserver() {
    let house = house().await;
    let stranger = Ca::new();
    for route in ROUTES {
        let path = route.path.replace(['{', '}'], "");
        let none = (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned());
        assert_eq!(house.ask(None, Method::GET, &path).await, none, "{path}");
        let foreign = stranger.client("kube-apiserver-kubelet-client", "system:masters");
        assert_eq!(house.ask(foreign, Method::GET, &path).await, none, "{path}");
        for (name, group) in [("system:node:node-2", "system:nodes"), ("kubernetes-admin", "system:masters")] {
            let (status, body) = house.ask(house.ca.client(name, group), Method::GET, &path).await;
            let subresources = subresources(&path).join(" ");
            let want = format!("Forbidden (user={name}, verb=get, resource=nodes, subresource(s)=[{subresources}])\n");
            assert_eq!((status, body), (StatusCode::FORBIDDEN, want), "{path}");
        }
        for method in route.methods {
            let admin = house.ca.client("kubernetes-admin", "system:masters");
            let (status, body) = house.ask(admin, method.clone(), &path).await;
            let verb = format!("verb={}, ", routes::verb(method));
            assert!(status == StatusCode::FORBIDDEN && body.contains(&verb), "{method} {path}: {body}");
        }
        let (status, _) = house.ask(house.apiserver(), Method::GET, &path).await;
        assert!(status != StatusCode::UNAUTHORIZED && status != StatusCode::FORBIDDEN, "{path}: {status}");
    }
    let (status, body) = house.ask(None, Method::GET, "/nothing").await;
    assert_eq!((status.as_u16(), body.as_str()), (404, "404 page not found\n"));
    assert_eq!(house.get("/containerLogs/ns/p").await.0, 404);
    assert_eq!(house.ask(house.apiserver(), Method::POST, "/pods").await.0.as_u16(), 405);
}

#[test]
fn c06_a_credential_is_good_unknown_or_bad() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.crt");
    let (ca, next) = (Ca::new(), Ca::new());
    fs::write(&path, &ca.1).unwrap();
    let now = SystemClock.now().wall;
    let closed = authn::Authn::new(Some(path.clone()), false).unwrap();
    let open = authn::Authn::new(Some(path.clone()), true).unwrap();
    let ask = |authn: &authn::Authn, of: Option<&Ca>, bearer: bool, at: jiff::Timestamp| {
        let mut request = Request::new(());
        if bearer {
            request.headers_mut().insert(header::AUTHORIZATION, header::HeaderValue::from_static("Bearer x"));
        }
        let shown: Vec<_> = of.and_then(|ca| ca.client("someone", "g")).into_iter().map(|(cert, _)| cert).collect();
        let user = authn.authenticate(&mut request, &shown, at);
        assert!(request.headers().is_empty(), "a credential goes no further");
        user.map(|user| user.name)
    };
    let (someone, anonymous) = (Some("someone".to_owned()), Some("system:anonymous".to_owned()));
    let centuries_later = jiff::Timestamp::from_second(80_000_000_000).unwrap();
    assert_eq!(ask(&closed, Some(&ca), false, now), someone);
    assert_eq!(ask(&closed, Some(&ca), true, now), someone);
    assert_eq!(ask(&closed, Some(&ca), false, centuries_later), None, "expired");
    assert_eq!((ask(&closed, None, false, now), ask(&open, None, false, now)), (None, anonymous));
    assert_eq!((ask(&open, None, true, now), ask(&open, Some(&next), false, now)), (None, None));

    fs::write(&path, &next.1).unwrap();
    assert_eq!((ask(&closed, Some(&next), false, now), ask(&closed, Some(&ca), false, now)), (someone, None));
    fs::write(&path, "").unwrap();
    assert!(ask(&closed, Some(&next), false, now).is_some(), "C-05: a broken bundle is not taken");
    let missing = authn::Authn::new(Some("/nonexistent/ca.crt".into()), false).err().unwrap().to_string();
    assert!(missing.starts_with("unable to load client CA file \"/nonexistent/ca.crt\": "), "{missing}");
}

#[tokio::test]
async fn e02_healthz_lists_what_fails() {
    let house = house().await;
    assert_eq!(house.get("/healthz").await, (200, "ok".into()));
    let verbose = "[+]ping ok\n[+]log ok\n[+]syncloop ok\nhealthz check passed\n";
    assert_eq!(house.get("/healthz?verbose").await, (200, verbose.into()));
    let verbose = "[+]ping ok\n[+]log excluded: ok\n[+]syncloop ok\n\
                   warn: some health checks cannot be excluded: no matches for \"nope\"\nhealthz check passed\n";
    assert_eq!(house.get("/healthz?verbose&exclude=log&exclude=nope").await, (200, verbose.into()));
    house.healthy.store(false, Ordering::SeqCst);
    let failing = "[+]ping ok\n[+]log ok\n[-]syncloop failed: reason withheld\nhealthz check failed\n";
    assert_eq!(house.get("/healthz").await, (500, failing.into()));
    assert_eq!(house.get("/healthz/ping").await, (200, "ok".into()));
    assert_eq!(house.get("/healthz/syncloop").await, (500, "internal server error: stuck\n".into()));
}

#[tokio::test]
async fn e03_healthz_on_10248_is_a_bare_ping() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let cancel = CancellationToken::new();
    let task = tokio::spawn(serve_healthz(free, cancel.clone()));
    let mut answer = String::new();
    for _ in 0..200 {
        if let Ok(mut stream) = TcpStream::connect(free).await {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
            stream.read_to_string(&mut answer).await.unwrap();
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
    cancel.cancel();
    task.await.unwrap();
}

#[tokio::test]
async fn e04_e12_e17_pods_metrics_and_configz() {
    let house = house().await;
    assert_eq!(house.get("/metrics").await, (200, "m 1\n".into()));
    assert_eq!(house.get("/metrics/probes").await, (200, "p 1\n".into()));
    let configz = r#"{"kubeletconfig":{"kind":"KubeletConfiguration"}}"#;
    assert_eq!(house.get("/configz").await, (200, configz.into()));
    let (status, body) = house.get("/pods").await;
    let list: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &list["kind"], &list["apiVersion"]), (200, &"PodList".into(), &"v1".into()));
    assert_eq!(list["items"][0]["metadata"]["name"], "p");
}

#[tokio::test]
async fn e23_http2_and_the_certificate_is_reloaded() {
    let house = house().await;
    let stream = house.connect(house.apiserver(), b"h2").await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let first = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request = Request::builder().uri("https://node-1/healthz").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);

    let pki = house.dir.path().join("pki");
    let other = tempfile::tempdir().unwrap();
    let now = SystemClock.now().wall;
    self_signed::ensure(other.path(), "node-1", &[], now).unwrap();
    for file in ["kubelet.key", "kubelet.crt"] {
        fs::rename(other.path().join(file), pki.join(file)).unwrap();
    }
    let again = house.connect(house.apiserver(), b"h2").await;
    assert_ne!(again.get_ref().1.peer_certificates().unwrap()[0], first);
    fs::write(pki.join("kubelet.key"), "broken").unwrap();
    house.connect(house.apiserver(), b"h2").await; // the last good pair serves on
}

#[test]
fn c04_self_signed_pair_is_kept_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    let at = jiff::Timestamp::from_second(1_800_000_000).unwrap();
    let ips = [IpAddr::from([10, 0, 0, 1])];
    let (cert, key) = self_signed::ensure(&pki, "node-1", &ips, at).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&pki), mode(&cert), mode(&key)), (0o700, 0o644, 0o600));
    let before = fs::read(&cert).unwrap();
    self_signed::ensure(&pki, "other", &[], at).unwrap();
    assert_eq!(fs::read(&cert).unwrap(), before);

    let later = at + std::time::Duration::from_secs(366 * 86_400);
    self_signed::ensure(&pki, "node-1", &ips, later).unwrap();
    let renewed = fs::read(&cert).unwrap();
    assert_ne!(renewed, before, "an expired pair is made anew");
    fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    self_signed::ensure(&pki, "node-1", &ips, later).unwrap();
    assert_ne!(fs::read(&cert).unwrap(), renewed, "so is one whose halves do not belong together");

    let chain: Vec<_> = CertificateDer::pem_slice_iter(&before).map(Result::unwrap).collect();
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    assert_eq!(leaf.subject().to_string(), "CN=node-1@1800000000");
    assert_eq!(leaf.issuer().to_string(), "CN=node-1-ca@1800000000");
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.len();
    assert_eq!(
        (names, leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()),
        (2, 365 * 86_400)
    );
}

async fn container_of(fake: &FakeRuntime, log_directory: &Path) -> String {
    fake.image("img", ImageScript::Present);
    let labels = |container: Option<&str>| {
        let pod = [("io.kubernetes.pod.uid", "uid-1")];
        let container = container.map(|c| ("io.kubernetes.container.name", c));
        pod.into_iter().chain(container).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    };
    let sandbox_config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "p".into(),
            uid: "uid-1".into(),
            namespace: "ns".into(),
            attempt: 0,
        }),
        labels: labels(None),
        log_directory: log_directory.display().to_string(),
        ..Default::default()
    };
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: "img".into(), ..Default::default() }),
        labels: labels(Some("c")),
        log_path: "0.log".into(),
        ..Default::default()
    };
    let sandbox = fake.run_pod_sandbox(sandbox_config.clone(), "").await.unwrap();
    let id = fake.create_container(&sandbox, config, sandbox_config).await.unwrap();
    fake.start_container(&id).await.unwrap();
    id
}

fn status_of(id: &str) -> corev1::PodStatus {
    let running = corev1::ContainerStateRunning::default();
    let state = corev1::ContainerState { running: Some(running), ..Default::default() };
    let container = corev1::ContainerStatus {
        name: "c".into(),
        container_id: Some(format!("containerd://{id}")),
        state: Some(state),
        ..Default::default()
    };
    corev1::PodStatus { container_statuses: Some(vec![container]), ..Default::default() }
}

#[tokio::test]
async fn e06_container_logs() {
    let logs = tempfile::tempdir().unwrap();
    let fake = FakeRuntime::new(Arc::new(SystemClock));
    let id = container_of(&fake, logs.path()).await;
    let line = |text: &str| format!("2016-10-06T00:17:09.5Z stdout F {text}\n");
    fs::write(logs.path().join("0.log"), line("one") + &line("two")).unwrap();
    let house = house_with(status_of(&id), fake).await;
    assert_eq!(house.get("/containerLogs/ns/p/c").await, (200, "one\ntwo\n".into()));
    let stamped = "2016-10-06T00:17:09.500000000Z two\n";
    assert_eq!(house.get("/containerLogs/ns/p/c?tailLines=1&timestamps=true").await, (200, stamped.into()));
    assert_eq!(house.get("/containerLogs/ns/q/c").await, (404, "pod \"q\" does not exist".into()));
    assert_eq!(house.get("/containerLogs/ns/p/x").await, (404, "container \"x\" not found in pod \"p\"".into()));
    assert_eq!(
        house.get("/containerLogs/ns/p/c?tailLines=-1").await,
        (422, "{\"message\": \"Invalid request.\"}".into())
    );
    let previous = "previous terminated container \"c\" in pod \"p\" not found";
    assert_eq!(house.get("/containerLogs/ns/p/c?previous=true").await, (400, previous.into()));

    let stopping = house.fake.clone();
    tokio::spawn(async move {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        stopping.exit(&id, 0);
    });
    fs::File::options().append(true).open(logs.path().join("0.log")).unwrap(); // closes at once
    let followed = house.get("/containerLogs/ns/p/c?follow=true");
    let closer = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        drop(fs::File::options().append(true).open(logs.path().join("0.log")).unwrap());
    };
    let (followed, ()) = tokio::join!(followed, closer);
    assert_eq!(followed, (200, "one\ntwo\n".into()), "ends with the container");
}

#[tokio::test]
async fn e07_exec_refusals() {
    let logs = tempfile::tempdir().unwrap();
    let fake = FakeRuntime::new(Arc::new(SystemClock));
    let house = house_with(corev1::PodStatus::default(), fake).await;
    let path = "/exec/ns/p/c?command=id&output=1";
    assert_eq!(house.get("/exec/ns/p/c").await, (400, "you must specify at least 1 of stdin, stdout, stderr".into()));
    assert_eq!(house.get("/exec/ns/q/c?output=1").await, (404, "pod does not exist".into()));
    assert_eq!(house.get(path).await, (500, "container not found (\"c\")".into()));
    container_of(&house.fake, logs.path()).await;
    assert_eq!(house.get(path).await, (500, "Upgrade request required\n".into()));
    assert_eq!(house.get("/exec/ns/p/other-uid/c?output=1").await, (500, "container not found (\"c\")".into()));
    let busy = Fault::Error { code: tonic::Code::ResourceExhausted, message: "too many".into() };
    house.fake.inject("Exec", 1, busy);
    assert_eq!(house.get(path).await, (429, "rpc error: code = ResourceExhausted desc = too many".into()));
}

/// A runtime's streaming server: upgrades, then echoes.
async fn streaming_server() -> (SocketAddr, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        String::from_utf8(head).unwrap()
    });
    (address, task)
}

#[tokio::test]
async fn e07_upgrade_passes_bytes_both_ways() {
    let (streaming, task) = streaming_server().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let door = listener.local_addr().unwrap();
    let cancel = CancellationToken::new();
    let url = format!("http://{streaming}/exec/token");
    tokio::spawn(connection::accept(listener, cancel.clone(), move |stream, peer| {
        let url = url.clone();
        connection::speak(stream, peer, move |request, peer| {
            let url = url.clone();
            async move { exec::proxy(&url, &mut Call { request, arguments: vec![], peer }).await }
        })
    }));
    let mut client = TcpStream::connect(door).await.unwrap();
    let head = "POST /exec/ns/p/c?output=1 HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(client.read_u8().await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap().to_lowercase();
    assert!(
        answer.starts_with("http/1.1 101 ") && answer.contains("x-stream-protocol-version: v4.channel.k8s.io"),
        "{answer}"
    );
    let sent: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 31 % 251) as u8).collect();
    let (mut read, mut write) = client.split();
    let mut received = vec![0; sent.len()];
    let (wrote, got) = tokio::join!(write.write_all(&sent), read.read_exact(&mut received));
    wrote.unwrap();
    got.unwrap();
    assert!(received == sent, "1 MiB comes back byte for byte");
    drop(client);
    let head = task.await.unwrap().to_lowercase();
    assert!(head.starts_with("post /exec/token http/1.1\r\n"), "{head}");
    assert!(head.contains("\r\nhost: node\r\n") && head.contains("\r\nx-forwarded-for: 127.0.0.1\r\n"), "{head}");
    cancel.cancel();
}

/// Asks for a session over TLS; returns the stream behind the 101.
async fn exec_session(house: &House) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut client = house.connect(house.apiserver(), b"http/1.1").await;
    let head = "GET /exec/ns/p/c?command=cat&input=1&output=1 HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(client.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
    client
}

#[tokio::test]
async fn e07_session_through_the_route_survives_half_a_close_and_ends_with_the_server() {
    let logs = tempfile::tempdir().unwrap();
    let fake = FakeRuntime::new(Arc::new(SystemClock));
    let id = container_of(&fake, logs.path()).await;
    let house = house_with(corev1::PodStatus::default(), fake).await;
    let (streaming, task) = streaming_server().await;
    house.fake.streaming_url(&format!("http://{streaming}"));
    let mut client = exec_session(&house).await;
    client.write_all(b"last words").await.unwrap();
    client.shutdown().await.unwrap();
    let mut echoed = Vec::new();
    client.read_to_end(&mut echoed).await.unwrap();
    assert_eq!(echoed, b"last words", "what the runtime says after the client's end still arrives");
    let head = task.await.unwrap();
    assert!(head.starts_with(&format!("GET /exec/{id} HTTP/1.1\r\n")), "{head}");

    let (streaming, task) = streaming_server().await;
    house.fake.streaming_url(&format!("http://{streaming}"));
    let mut client = exec_session(&house).await;
    house.cancel.cancel();
    let mut nothing = Vec::new();
    let _ = client.read_to_end(&mut nothing).await;
    assert!(nothing.is_empty());
    task.await.unwrap();

    house.fake.streaming_url("http://127.0.0.1:1");
}

#[tokio::test]
async fn e07_a_runtime_that_does_not_listen_or_refuses_is_told_as_it_is() {
    let logs = tempfile::tempdir().unwrap();
    let fake = FakeRuntime::new(Arc::new(SystemClock));
    container_of(&fake, logs.path()).await;
    let house = house_with(corev1::PodStatus::default(), fake).await;
    let ask = async || {
        let mut client = house.connect(house.apiserver(), b"http/1.1").await;
        let head = "POST /exec/ns/p/c?output=1 HTTP/1.1\r\nHost: node\r\nConnection: Upgrade, close\r\nUpgrade: SPDY/3.1\r\n\r\n";
        client.write_all(head.as_bytes()).await.unwrap();
        // A server that closes without TLS' goodbye is an error only after what was read.
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    };
    let silent = ask().await;
    assert!(silent.starts_with("HTTP/1.1 500 ") && silent.contains("error dialing backend: "), "{silent}");

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    house.fake.streaming_url(&format!("http://{}", listener.local_addr().unwrap()));
    tokio::spawn(async move {
        for answer in
            ["HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
        {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            stream.write_all(answer.as_bytes()).await.unwrap();
            while stream.read(&mut request).await.is_ok_and(|n| n > 0) {}
        }
    });
    let refused = ask().await;
    assert!(refused.starts_with("HTTP/1.1 404 ") && refused.ends_with("gone"), "{refused}");
    let not_switched = ask().await;
    assert!(not_switched.ends_with("invalid upgrade response: status code 200\n"), "{not_switched}");
}

#[tokio::test]
async fn s21_a_port_that_is_just_being_left_is_waited_for() {
    let occupant = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = occupant.local_addr().unwrap();
    let waiting = tokio::spawn(listen(address));
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    drop(occupant);
    assert_eq!(waiting.await.unwrap().unwrap().local_addr().unwrap(), address);
}
