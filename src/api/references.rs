//! Which configMaps, secrets and RuntimeClass a pod refers to: a pure walk over its spec (contract V-24).

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1 as corev1;

use super::objects::ObjectKey;
use crate::pods::Pod;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct References {
    /// At most one; its namespace is empty.
    pub(super) runtime_classes: BTreeSet<ObjectKey>,
    pub(super) config_maps: BTreeSet<ObjectKey>,
    pub(super) secrets: BTreeSet<ObjectKey>,
}

impl References {
    pub(super) fn of(pod: &Pod) -> Self {
        let mut walk = Walk { namespace: pod.namespace(), found: Self::default() };
        let spec = pod.spec();
        let class = spec.runtime_class_name.clone().filter(|name| !name.is_empty());
        walk.found.runtime_classes.extend(class.map(|name| (String::new(), name)));
        for reference in spec.image_pull_secrets.iter().flatten() {
            walk.secret(Some(&reference.name));
        }
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            walk.env(container.env.as_deref(), container.env_from.as_deref());
        }
        for container in spec.ephemeral_containers.iter().flatten() {
            walk.env(container.env.as_deref(), container.env_from.as_deref());
        }
        for volume in spec.volumes.iter().flatten() {
            walk.volume(volume);
        }
        walk.found
    }
}

struct Walk<'a> {
    namespace: &'a str,
    found: References,
}

impl Walk<'_> {
    fn secret(&mut self, name: Option<&String>) {
        if let Some(name) = name.filter(|n| !n.is_empty()) {
            self.found.secrets.insert((self.namespace.to_owned(), name.clone()));
        }
    }

    fn config_map(&mut self, name: Option<&String>) {
        if let Some(name) = name.filter(|n| !n.is_empty()) {
            self.found.config_maps.insert((self.namespace.to_owned(), name.clone()));
        }
    }

    fn local(&mut self, reference: Option<&corev1::LocalObjectReference>) {
        self.secret(reference.map(|r| &r.name));
    }

    fn env(&mut self, env: Option<&[corev1::EnvVar]>, env_from: Option<&[corev1::EnvFromSource]>) {
        for source in env_from.into_iter().flatten() {
            self.config_map(source.config_map_ref.as_ref().map(|r| &r.name));
            self.secret(source.secret_ref.as_ref().map(|r| &r.name));
        }
        for source in env.into_iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            self.config_map(source.config_map_key_ref.as_ref().map(|r| &r.name));
            self.secret(source.secret_key_ref.as_ref().map(|r| &r.name));
        }
    }

    fn volume(&mut self, volume: &corev1::Volume) {
        self.secret(volume.secret.as_ref().and_then(|s| s.secret_name.as_ref()));
        self.config_map(volume.config_map.as_ref().map(|c| &c.name));
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            self.secret(source.secret.as_ref().map(|s| &s.name));
            self.config_map(source.config_map.as_ref().map(|c| &c.name));
        }
        self.local(volume.csi.as_ref().and_then(|v| v.node_publish_secret_ref.as_ref()));
        self.local(volume.cephfs.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.local(volume.cinder.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.local(volume.flex_volume.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.local(volume.iscsi.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.local(volume.rbd.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.local(volume.scale_io.as_ref().map(|v| &v.secret_ref));
        self.local(volume.storageos.as_ref().and_then(|v| v.secret_ref.as_ref()));
        self.secret(volume.azure_file.as_ref().map(|v| &v.secret_name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::PodSource;

    #[test]
    fn v24_every_place_of_a_spec_is_seen_once() {
        let object: corev1::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {
                "runtimeClassName": "kata",
                "imagePullSecrets": [{"name": "pull"}],
                "initContainers": [{"name": "i", "envFrom": [{"secretRef": {"name": "init"}}]}],
                "containers": [{"name": "c",
                    "envFrom": [{"configMapRef": {"name": "all"}}],
                    "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "one", "key": "k"}}},
                            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "pull", "key": "k"}}}]}],
                "ephemeralContainers": [{"name": "e", "envFrom": [{"configMapRef": {"name": "debug"}}]}],
                "volumes": [
                    {"name": "a", "secret": {"secretName": "files"}},
                    {"name": "b", "configMap": {"name": "conf"}},
                    {"name": "c", "csi": {"driver": "d", "nodePublishSecretRef": {"name": "csi"}}},
                    {"name": "d", "projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}},
                        {"secret": {"name": "proj"}}, {"serviceAccountToken": {"path": "token"}}]}}]
            }
        }))
        .unwrap();
        let pod = Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap();
        let found = References::of(&pod);
        let names = |set: &BTreeSet<ObjectKey>| {
            set.iter().map(|(ns, name)| format!("{ns}/{name}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(&found.config_maps), "n/all n/conf n/debug n/kube-root-ca.crt n/one");
        assert_eq!(names(&found.runtime_classes), "/kata");
        assert_eq!(names(&found.secrets), "n/csi n/files n/init n/proj n/pull");
    }
}
