//! Environments against objects in memory.

use std::{collections::BTreeMap, sync::Mutex};

use async_trait::async_trait;

use super::*;
use crate::{
    api::{ServiceAccountToken, ServiceEnv, TokenSpec},
    containers::tests::{pod, pod_with},
    pods::{PodSource, PodUid},
    volumes::MountedVolume,
};

#[derive(Default)]
struct Objects {
    config_maps: BTreeMap<String, ConfigMapData>,
    secrets: BTreeMap<String, SecretData>,
    services: Option<Vec<ServiceEnv>>,
    asked: Mutex<Vec<String>>,
}

#[async_trait]
impl ReferencedObjects for Objects {
    fn track(&self, _: &Pod) {}
    fn forget(&self, _: &PodUid) {}
    async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        self.asked.lock().unwrap().push(name.to_owned());
        let found = self.config_maps.get(name).cloned().map(Arc::new);
        found.ok_or_else(|| ApiError::NotFound { kind: "configmap", name: name.into() })
    }
    async fn secret(&self, _: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        if name == "down" {
            return Err(ApiError::Unavailable { message: "connection refused".into() });
        }
        let found = self.secrets.get(name).cloned().map(Arc::new);
        found.ok_or_else(|| ApiError::NotFound { kind: "secret", name: name.into() })
    }
    async fn service_account_token(&self, _: &Pod, _: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        Err(ApiError::Unavailable { message: "no tokens".into() })
    }
    fn services(&self, _: &str) -> Option<Vec<ServiceEnv>> {
        self.services.clone()
    }
}

fn objects() -> Objects {
    let data = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let config_map = ConfigMapData { data: data(&[("b", "cb"), ("a", "ca")]), ..Default::default() };
    let bytes = [("b", "sb"), ("k", "sk")].map(|(k, v)| (k.to_owned(), v.as_bytes().to_vec()));
    let secret = SecretData { data: bytes.into(), ..Default::default() };
    let service = |name: &str, ip: &str| ServiceEnv {
        namespace: if name == "kubernetes" { "default" } else { "ns" }.into(),
        name: name.into(),
        cluster_ip: ip.into(),
        ports: vec![(String::new(), "TCP".into(), 80)],
    };
    Objects {
        config_maps: [("cm".to_owned(), config_map)].into(),
        secrets: [("s".to_owned(), secret)].into(),
        services: Some(vec![service("kubernetes", "10.96.0.1"), service("web", "10.96.0.2")]),
        asked: Mutex::default(),
    }
}

fn node() -> NodeFacts {
    let ips = ["192.168.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()).to_vec();
    NodeFacts { ips, allocatable: [("cpu".to_owned(), "4".to_owned())].into(), ..Default::default() }
}

async fn env_of(pod: &Pod, objects: &Objects) -> Result<Vec<(String, String)>, ConfigError> {
    let ips = ["fd00::9", "10.0.0.9"].map(|ip| ip.parse().unwrap());
    let container = pod.main_containers().next().unwrap();
    environment(pod, container, objects, &node(), &ips, &MountedVolumes::new()).await
}

/// The pod with these `env` and `envFrom`, without service links.
fn with(env: &str, env_from: &str) -> Pod {
    pod(&format!(
        r#"{{"enableServiceLinks":false,"nodeName":"n1","serviceAccountName":"sa","containers":[{{"name":"c","image":"i","env":[{env}],"envFrom":[{env_from}],
            "resources":{{"limits":{{"memory":"64Mi"}}}}}}]}}"#
    ))
}

/// Without what services add.
fn own(env: Vec<(String, String)>) -> Vec<(String, String)> {
    env.into_iter().filter(|(name, _)| !name.starts_with("KUBERNETES_")).collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

#[tokio::test]
async fn p51_order_env_from_then_env_then_services() {
    let pod = with(
        r#"{"name":"Z","value":"1"},{"name":"a","value":"over"},{"name":"REF","value":"$(Z)-$(P_b)-$(KUBERNETES_SERVICE_HOST)-$(NO)-$$(Z)"},{"name":"EMPTY"}"#,
        r#"{"configMapRef":{"name":"cm"}},{"prefix":"P_","secretRef":{"name":"s"}}"#,
    );
    let env = env_of(&pod, &objects()).await.unwrap();
    assert_eq!(
        own(env.clone()),
        pairs(&[
            ("a", "over"),
            ("b", "cb"),
            ("P_b", "sb"),
            ("P_k", "sk"),
            ("Z", "1"),
            ("REF", "1-sb-10.96.0.1-$(NO)-$(Z)"),
            ("EMPTY", "")
        ])
    );
    assert!(env[7..].iter().all(|(name, _)| name.starts_with("KUBERNETES_")));
    assert!(!env.iter().any(|(name, _)| name.starts_with("WEB_")));
}

#[tokio::test]
async fn p51_later_wins_and_services_never_override() {
    let pod = with(
        r#"{"name":"A","value":"1"},{"name":"B","value":"$(A)"},{"name":"A","value":"2"},{"name":"C","value":"$(A)"},{"name":"KUBERNETES_SERVICE_HOST","value":"mine"}"#,
        r#"{"configMapRef":{"name":"cm"}},{"secretRef":{"name":"s"}}"#,
    );
    let env: BTreeMap<_, _> = env_of(&pod, &objects()).await.unwrap().into_iter().collect();
    for (name, value) in [
        ("A", "2"),
        ("B", "1"),
        ("C", "2"),
        ("b", "sb"),
        ("KUBERNETES_SERVICE_HOST", "mine"),
        ("KUBERNETES_SERVICE_PORT", "80"),
    ] {
        assert_eq!(env[name], value, "{name}");
    }
}

#[tokio::test]
async fn p51_key_references() {
    let pod = with(
        r#"{"name":"A","valueFrom":{"configMapKeyRef":{"name":"cm","key":"a"}}},
           {"name":"S","valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}},
           {"name":"O1","valueFrom":{"configMapKeyRef":{"name":"cm","key":"none","optional":true}}},
           {"name":"O2","valueFrom":{"secretKeyRef":{"name":"none","key":"k","optional":true}}}"#,
        r#"{"configMapRef":{"name":"none","optional":true}}"#,
    );
    let objects = objects();
    assert_eq!(own(env_of(&pod, &objects).await.unwrap()), pairs(&[("A", "ca"), ("S", "sk")]));
    assert_eq!(*objects.asked.lock().unwrap(), ["none", "cm"], "one look per object");
}

#[tokio::test]
async fn p51_missing_references_are_worded_as_upstream() {
    for (env, env_from, message) in [
        (
            r#"{"name":"A","valueFrom":{"configMapKeyRef":{"name":"cm","key":"x"}}}"#,
            "",
            "couldn't find key x in ConfigMap ns/cm",
        ),
        (
            r#"{"name":"A","valueFrom":{"secretKeyRef":{"name":"s","key":"x"}}}"#,
            "",
            "couldn't find key x in Secret ns/s",
        ),
        (r#"{"name":"A","valueFrom":{"configMapKeyRef":{"name":"no","key":"x"}}}"#, "", "configmap \"no\" not found"),
        ("", r#"{"secretRef":{"name":"no"}}"#, "secret \"no\" not found"),
        ("", r#"{"secretRef":{"name":"down","optional":true}}"#, "connection refused"),
        (
            r#"{"name":"A","valueFrom":{"fileKeyRef":{"volumeName":"v","path":"f","key":"k"}}}"#,
            "",
            "cannot find the volume \"v\" referenced by FileKeyRef",
        ),
    ] {
        let error = env_of(&with(env, env_from), &objects()).await.unwrap_err();
        assert_eq!((error.reason, error.message.as_str()), ("CreateContainerConfigError", message));
    }
}

#[tokio::test]
async fn p51_services_must_have_been_read_but_for_static_pods() {
    let objects = Objects { services: None, ..objects() };
    let error = env_of(&with("", ""), &objects).await.unwrap_err();
    assert_eq!(error.message, "services have not yet been read at least once, cannot construct envvars");
    let object = serde_json::from_str(
        r#"{"metadata":{"name":"p","namespace":"ns","uid":"u"},"spec":{"containers":[{"name":"c"}]}}"#,
    )
    .unwrap();
    let pod = Pod::new(object, PodSource::File, jiff::Timestamp::UNIX_EPOCH).unwrap();
    assert_eq!(env_of(&pod, &objects).await.unwrap(), []);
}

#[tokio::test]
async fn p51_service_links_bring_the_namespaces_services() {
    let env: BTreeMap<_, _> = env_of(&pod("{}"), &objects()).await.unwrap().into_iter().collect();
    assert_eq!(env["WEB_SERVICE_HOST"], "10.96.0.2");
    assert_eq!(env["WEB_PORT_80_TCP"], "tcp://10.96.0.2:80");
}

fn field(path: &str) -> String {
    format!(r#"{{"name":"X","valueFrom":{{"fieldRef":{{"fieldPath":"{path}"}}}}}}"#)
}

#[tokio::test]
async fn p52_fields_of_the_pod() {
    for (path, want) in [
        ("metadata.name", "p"),
        ("metadata.namespace", "ns"),
        ("metadata.uid", "uid-1"),
        ("spec.nodeName", "n1"),
        ("spec.serviceAccountName", "sa"),
        ("status.hostIP", "192.168.0.2"),
        ("status.hostIPs", "192.168.0.2,fd00::2"),
        ("status.podIP", "10.0.0.9"),
        ("status.podIPs", "10.0.0.9,fd00::9"),
    ] {
        assert_eq!(own(env_of(&with(&field(path), ""), &objects()).await.unwrap()), pairs(&[("X", want)]), "{path}");
    }
    for path in ["spec.none", "status.phase"] {
        assert!(env_of(&with(&field(path), ""), &objects()).await.is_err(), "{path}");
    }
    let host = format!(r#"{{"hostNetwork":true,"containers":[{{"name":"c","env":[{}]}}]}}"#, field("status.podIP"));
    let env: BTreeMap<_, _> = env_of(&pod(&host), &objects()).await.unwrap().into_iter().collect();
    assert_eq!(env["X"], "192.168.0.2");
    let labelled = pod_with(
        serde_json::json!({"name": "p", "namespace": "ns", "uid": "u", "labels": {"topology.kubernetes.io/zone": "z1"}}),
        &format!(
            r#"{{"containers":[{{"name":"c","env":[{}]}}]}}"#,
            field("metadata.labels['topology.kubernetes.io/zone']")
        ),
    );
    let env: BTreeMap<_, _> = env_of(&labelled, &objects()).await.unwrap().into_iter().collect();
    assert_eq!(env["X"], "z1");
}

#[tokio::test]
async fn p52_resources_of_the_container() {
    let reference = |resource: &str| {
        format!(r#"{{"name":"X","valueFrom":{{"resourceFieldRef":{{"resource":"{resource}","divisor":"1Mi"}}}}}}"#)
    };
    let env = own(env_of(&with(&reference("limits.memory"), ""), &objects()).await.unwrap());
    assert_eq!(env, pairs(&[("X", "64")]));
    let cpu = r#"{"name":"X","valueFrom":{"resourceFieldRef":{"resource":"limits.cpu"}}}"#;
    assert_eq!(own(env_of(&with(cpu, ""), &objects()).await.unwrap()), pairs(&[("X", "4")]));
}

#[tokio::test]
async fn p53_a_variable_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("env"), "K='v'\nBAD\n").unwrap();
    let volume = MountedVolume { host_path: dir.path().into(), image: None, read_only: false, selinux_relabel: false };
    let volumes: MountedVolumes = [("v".to_owned(), volume)].into();
    for (key, optional, want) in [
        ("K", false, Ok(vec![("X", "v")])),
        ("none", false, Err("couldn't parse env file".to_owned())),
        ("none", true, Err("couldn't parse env file".to_owned())),
    ] {
        let pod = with(
            &format!(
                r#"{{"name":"X","valueFrom":{{"fileKeyRef":{{"volumeName":"v","path":"env","key":"{key}","optional":{optional}}}}}}}"#
            ),
            "",
        );
        let got = environment(&pod, pod.container("c").unwrap(), &objects(), &node(), &[], &volumes).await;
        assert_eq!(got.map(own).map_err(|e| e.message), want.map(|w| pairs(&w)), "{key}");
    }
    std::fs::write(dir.path().join("env"), "K='v'\n").unwrap();
    for (optional, want) in [
        (true, Ok(vec![])),
        (
            false,
            Err(format!(
                "environment variable key \"none\" not found in file {:?}",
                dir.path().join("env").display().to_string()
            )),
        ),
    ] {
        let pod = with(
            &format!(
                r#"{{"name":"X","valueFrom":{{"fileKeyRef":{{"volumeName":"v","path":"env","key":"none","optional":{optional}}}}}}}"#
            ),
            "",
        );
        let got = environment(&pod, pod.container("c").unwrap(), &objects(), &node(), &[], &volumes).await;
        assert_eq!(got.map(own).map_err(|e| e.message), want);
    }
}
