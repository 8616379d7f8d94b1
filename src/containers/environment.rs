//! A container's environment (contract P-51, P-52): envFrom, then env in declared order, then what services add.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1::{EnvFromSource, EnvVarSource, FileKeySelector, ObjectFieldSelector};

use super::{ConfigError, env_file, expand, pod_field, resource_field, service_env::service_env};
use crate::{
    api::{ApiError, ConfigMapData, ReferencedObjects, SecretData},
    node::NodeFacts,
    pods::{ContainerRef, Pod},
    volumes::MountedVolumes,
};

/// The final environment, in order, each name once. `volumes` serves `fileKeyRef`. Values of secrets that are not UTF-8 are
/// carried with replacement characters. A reference that is missing and not optional is an error, worded as upstream words it.
pub async fn environment(
    pod: &Pod,
    container: ContainerRef<'_>,
    objects: &dyn ReferencedObjects,
    node: &NodeFacts,
    pod_ips: &[IpAddr],
    volumes: &MountedVolumes,
) -> Result<Vec<(String, String)>, ConfigError> {
    let services = match objects.services(pod.namespace()) {
        Some(services) => services,
        None if pod.is_static() => Vec::new(),
        None => {
            let message = "services have not yet been read at least once, cannot construct envvars";
            return Err(ConfigError::container(message));
        }
    };
    let service_links = pod.spec().enable_service_links.unwrap_or(true);
    let from_services = service_env(&services, pod.namespace(), service_links);

    let mut resolver = Resolver {
        pod,
        container,
        objects,
        node,
        pod_ips,
        volumes,
        config_maps: HashMap::new(),
        secrets: HashMap::new(),
    };
    let mut env = Variables::default();
    for source in container.spec.env_from.iter().flatten() {
        for (name, value) in resolver.all_of(source).await? {
            env.set(name, value);
        }
    }
    for variable in container.spec.env.iter().flatten() {
        let literal = variable.value.as_deref().unwrap_or_default();
        let value = match &variable.value_from {
            _ if !literal.is_empty() => {
                Some(expand(literal, |name| env.get(name).or_else(|| from_services.get(name)).cloned()))
            }
            Some(source) => resolver.one_of(source).await?,
            None => Some(String::new()),
        };
        if let Some(value) = value {
            env.set(variable.name.clone(), value);
        }
    }
    for (name, value) in from_services {
        if env.get(&name).is_none() {
            env.set(name, value);
        }
    }
    Ok(env.list)
}

/// Names in order of first appearance; a later value replaces an earlier one in its place.
#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
    index: HashMap<String, usize>,
}

impl Variables {
    fn set(&mut self, name: String, value: String) {
        match self.index.get(&name) {
            Some(&at) => self.list[at].1 = value,
            None => {
                self.index.insert(name.clone(), self.list.len());
                self.list.push((name, value));
            }
        }
    }
    fn get(&self, name: &str) -> Option<&String> {
        self.index.get(name).map(|&at| &self.list[at].1)
    }
}

/// Looks up references; each object is asked for once per container, so that one environment never mixes two versions.
struct Resolver<'a> {
    pod: &'a Pod,
    container: ContainerRef<'a>,
    objects: &'a dyn ReferencedObjects,
    node: &'a NodeFacts,
    pod_ips: &'a [IpAddr],
    volumes: &'a MountedVolumes,
    config_maps: HashMap<String, Arc<ConfigMapData>>,
    secrets: HashMap<String, Arc<SecretData>>,
}

impl Resolver<'_> {
    /// Everything in a configMap or secret, prefixed, in key order; binary data of configMaps never.
    async fn all_of(&mut self, source: &EnvFromSource) -> Result<Vec<(String, String)>, ConfigError> {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            let found = self.config_map(&reference.name, reference.optional.unwrap_or(false)).await?;
            let data = found.iter().flat_map(|object| &object.data);
            return Ok(data.map(|(key, value)| (format!("{prefix}{key}"), value.clone())).collect());
        }
        if let Some(reference) = &source.secret_ref {
            let found = self.secret(&reference.name, reference.optional.unwrap_or(false)).await?;
            let data = found.iter().flat_map(|object| &object.data);
            return Ok(data.map(|(key, value)| (format!("{prefix}{key}"), text(value))).collect());
        }
        Ok(Vec::new())
    }

    /// `None`: an optional reference that is missing; the variable is not set at all.
    async fn one_of(&mut self, source: &EnvVarSource) -> Result<Option<String>, ConfigError> {
        if let Some(field) = &source.field_ref {
            return self.field(field).map(Some);
        }
        if let Some(field) = &source.resource_field_ref {
            return resource_field(self.pod, self.container.spec, field, &self.node.allocatable).map(Some);
        }
        if let Some(reference) = &source.config_map_key_ref {
            let optional = reference.optional.unwrap_or(false);
            let Some(object) = self.config_map(&reference.name, optional).await? else { return Ok(None) };
            return self.key(
                "ConfigMap",
                &reference.name,
                &reference.key,
                optional,
                object.data.get(&reference.key).cloned(),
            );
        }
        if let Some(reference) = &source.secret_key_ref {
            let optional = reference.optional.unwrap_or(false);
            let Some(object) = self.secret(&reference.name, optional).await? else { return Ok(None) };
            let value = object.data.get(&reference.key).map(|bytes| text(bytes));
            return self.key("Secret", &reference.name, &reference.key, optional, value);
        }
        match &source.file_key_ref {
            Some(reference) => self.file_key(reference),
            None => Ok(Some(String::new())),
        }
    }

    fn field(&self, field: &ObjectFieldSelector) -> Result<String, ConfigError> {
        let version = field.api_version.as_deref().unwrap_or("v1");
        if version != "v1" {
            return Err(ConfigError::container(format!("unsupported pod version: {version}")));
        }
        let node_ips = &self.node.ips;
        let pod_ips = by_family(if self.pod.host_network() { node_ips } else { self.pod_ips }, node_ips);
        let host_ips = || match by_family(node_ips, node_ips) {
            ips if ips.is_empty() => Err(ConfigError::container("host IP unknown; known addresses: []")),
            ips => Ok(ips),
        };
        match field.field_path.as_str() {
            "spec.nodeName" | "spec.host" => Ok(self.pod.spec().node_name.clone().unwrap_or_default()),
            "spec.serviceAccountName" => Ok(self.pod.spec().service_account_name.clone().unwrap_or_default()),
            "status.hostIP" => host_ips().map(|ips| ips.into_iter().next().unwrap_or_default()),
            "status.hostIPs" => host_ips().map(|ips| ips.join(",")),
            "status.podIP" => Ok(pod_ips.into_iter().next().unwrap_or_default()),
            "status.podIPs" => Ok(pod_ips.join(",")),
            path @ ("spec.restartPolicy" | "spec.schedulerName" | "status.phase") => {
                Err(ConfigError::container(format!("unsupported fieldPath: {path}")))
            }
            path => pod_field(self.pod, path),
        }
    }

    fn key(
        &self,
        kind: &str,
        name: &str,
        key: &str,
        optional: bool,
        value: Option<String>,
    ) -> Result<Option<String>, ConfigError> {
        if value.is_none() && !optional {
            let namespace = self.pod.namespace();
            return Err(ConfigError::container(format!("couldn't find key {key} in {kind} {namespace}/{name}")));
        }
        Ok(value)
    }

    fn file_key(&self, reference: &FileKeySelector) -> Result<Option<String>, ConfigError> {
        let FileKeySelector { volume_name, path, key, optional } = reference;
        let volume = self.volumes.get(volume_name).ok_or_else(|| {
            ConfigError::container(format!("cannot find the volume {volume_name:?} referenced by FileKeyRef"))
        })?;
        let found = env_file::read(&volume.host_path, path).and_then(|text| env_file::find(&text, key));
        let value = found.map_err(|error| {
            tracing::warn!(pod = %self.pod.described(), volume = volume_name, %error, "cannot read a variable from a file");
            ConfigError::container("couldn't parse env file")
        })?;
        match value.filter(|value| !value.is_empty()) {
            None if !optional.unwrap_or(false) => {
                let file = volume.host_path.join(path);
                let message =
                    format!("environment variable key {key:?} not found in file {:?}", file.display().to_string());
                Err(ConfigError::container(message))
            }
            value => Ok(value),
        }
    }

    async fn config_map(&mut self, name: &str, optional: bool) -> Result<Option<Arc<ConfigMapData>>, ConfigError> {
        if let Some(object) = self.config_maps.get(name) {
            return Ok(Some(object.clone()));
        }
        let fetched = present(self.objects.config_map(self.pod.namespace(), name).await, optional)?;
        if let Some(object) = &fetched {
            self.config_maps.insert(name.to_owned(), object.clone());
        }
        Ok(fetched)
    }

    async fn secret(&mut self, name: &str, optional: bool) -> Result<Option<Arc<SecretData>>, ConfigError> {
        if let Some(object) = self.secrets.get(name) {
            return Ok(Some(object.clone()));
        }
        let fetched = present(self.objects.secret(self.pod.namespace(), name).await, optional)?;
        if let Some(object) = &fetched {
            self.secrets.insert(name.to_owned(), object.clone());
        }
        Ok(fetched)
    }
}

fn present<T>(result: Result<T, ApiError>, optional: bool) -> Result<Option<T>, ConfigError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(ApiError::NotFound { .. }) if optional => Ok(None),
        Err(error) => Err(ConfigError::container(error.to_string())),
    }
}

/// The port's environment is text: see [`environment`].
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One address of each family, the node's primary family first.
fn by_family(ips: &[IpAddr], node_ips: &[IpAddr]) -> Vec<String> {
    let v6_first = node_ips.first().is_some_and(IpAddr::is_ipv6);
    let first_of = |v6: bool| ips.iter().find(|ip| ip.is_ipv6() == v6);
    [first_of(v6_first), first_of(!v6_first)].into_iter().flatten().map(IpAddr::to_string).collect()
}

#[cfg(test)]
#[path = "environment_tests.rs"]
mod tests;
