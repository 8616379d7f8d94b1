//! The security context of containers and sandboxes (contract P-57, P-59, P-60): users, groups, capabilities, namespaces, paths.

use std::{fs, path::Path, sync::OnceLock};

use k8s_openapi::api::core::v1::{Capabilities, Container, PodSecurityContext, SELinuxOptions, SecurityContext};
use protocols::cri::v1::{self, NamespaceMode, security_profile::ProfileType};

use super::{ConfigError, ContainerInputs, ContainerPolicy, profiles};
use crate::pods::Pod;

/// Paths that a container does not see unless procMount is Unmasked.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What holds for one container: its own settings over the pod's.
struct Effective<'a> {
    run_as_user: Option<i64>,
    run_as_group: Option<i64>,
    run_as_non_root: bool,
    selinux: Option<&'a SELinuxOptions>,
    own: Option<&'a SecurityContext>,
}

impl<'a> Effective<'a> {
    fn of(pod: &'a Pod, container: &'a Container) -> Self {
        let (pods, own) = (pod.spec().security_context.as_ref(), container.security_context.as_ref());
        Self {
            run_as_user: own.and_then(|c| c.run_as_user).or(pods.and_then(|c| c.run_as_user)),
            run_as_group: own.and_then(|c| c.run_as_group).or(pods.and_then(|c| c.run_as_group)),
            run_as_non_root: own
                .and_then(|c| c.run_as_non_root)
                .or(pods.and_then(|c| c.run_as_non_root))
                .unwrap_or(false),
            selinux: own.and_then(|c| c.se_linux_options.as_ref()).or(pods.and_then(|c| c.se_linux_options.as_ref())),
            own,
        }
    }
}

/// The container's security context. Fails when runAsNonRoot cannot be kept, or a profile makes no sense.
pub(super) fn container_security(
    inputs: &ContainerInputs<'_>,
    policy: &ContainerPolicy,
) -> Result<v1::LinuxContainerSecurityContext, ConfigError> {
    let ContainerInputs { pod, image, root_dir, .. } = *inputs;
    let container = inputs.container.spec;
    let effective = Effective::of(pod, container);
    verify_non_root(pod, container, &effective, image.uid, &image.username)?;

    let own = effective.own;
    let unmasked = own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked");
    let mut namespaces = namespaces(pod, inputs.user_namespace)?;
    if let Some(target) = &policy.target_container_id
        && namespaces.pid() == NamespaceMode::Container
    {
        namespaces.set_pid(NamespaceMode::Target);
        namespaces.target_id.clone_from(target);
    }
    let mut context = v1::LinuxContainerSecurityContext {
        capabilities: own.and_then(|c| c.capabilities.as_ref()).map(capabilities),
        privileged: own.and_then(|c| c.privileged).unwrap_or(false),
        namespace_options: Some(namespaces),
        selinux_options: effective.selinux.map(selinux),
        run_as_user: effective.run_as_user.map(int64),
        run_as_group: effective.run_as_group.map(int64),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem).unwrap_or(false),
        supplemental_groups: supplemental_groups(pod),
        supplemental_groups_policy: groups_policy(pod)?.into(),
        no_new_privs: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        masked_paths: if unmasked { Vec::new() } else { masked_paths().to_vec() },
        readonly_paths: if unmasked { Vec::new() } else { READ_ONLY.map(str::to_owned).to_vec() },
        seccomp: Some(profiles::seccomp(pod, container, root_dir, policy.seccomp_default)?),
        ..Default::default()
    };
    if context.run_as_user.is_none() {
        context.run_as_user = image.uid.map(int64);
        context.run_as_username.clone_from(&image.username);
    }
    if let Some((profile, deprecated)) = profiles::apparmor(pod, container)? {
        context.apparmor = Some(profile);
        set_deprecated_apparmor(&mut context, deprecated);
    }
    Ok(context)
}

/// Older runtimes read only this field.
#[allow(deprecated)]
fn set_deprecated_apparmor(context: &mut v1::LinuxContainerSecurityContext, profile: String) {
    context.apparmor_profile = profile;
}

/// The sandbox's security context: as the pod says, and always the runtime's seccomp profile.
pub(super) fn sandbox_security(
    pod: &Pod,
    users: Option<&v1::UserNamespace>,
) -> Result<v1::LinuxSandboxSecurityContext, ConfigError> {
    let default = PodSecurityContext::default();
    let context = pod.spec().security_context.as_ref().unwrap_or(&default);
    Ok(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod, users)?),
        selinux_options: context.se_linux_options.as_ref().map(selinux),
        run_as_user: context.run_as_user.map(int64),
        run_as_group: context.run_as_group.map(int64),
        supplemental_groups: supplemental_groups(pod),
        supplemental_groups_policy: groups_policy(pod)?.into(),
        privileged: privileged(pod),
        seccomp: Some(profiles::profile(ProfileType::RuntimeDefault, "")),
        ..Default::default()
    })
}

/// Any container is privileged: then the sandbox is.
fn privileged(pod: &Pod) -> bool {
    let contexts = pod.all_containers().map(|c| c.spec.security_context.as_ref());
    contexts.flatten().any(|c| c.privileged == Some(true))
}

/// Which namespaces are the node's, the pod's or each container's own.
fn namespaces(pod: &Pod, users: Option<&v1::UserNamespace>) -> Result<v1::NamespaceOption, ConfigError> {
    let spec = pod.spec();
    // Nobody has given the pod users of its own: it must not get the node's instead.
    if spec.host_users == Some(false) && users.is_none() {
        return Err(ConfigError::container(
            "can't set `spec.hostUsers: false`, runtime does not support user namespaces",
        ));
    }
    let node_or_pod = |host: Option<bool>| if host == Some(true) { NamespaceMode::Node } else { NamespaceMode::Pod };
    let pid = match (spec.host_pid, spec.share_process_namespace) {
        (Some(true), _) => NamespaceMode::Node,
        (_, Some(true)) => NamespaceMode::Pod,
        _ => NamespaceMode::Container,
    };
    Ok(v1::NamespaceOption {
        network: node_or_pod(spec.host_network).into(),
        pid: pid.into(),
        ipc: node_or_pod(spec.host_ipc).into(),
        target_id: String::new(),
        userns_options: users
            .cloned()
            .or_else(|| Some(v1::UserNamespace { mode: NamespaceMode::Node.into(), ..Default::default() })),
    })
}

fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let context = pod.spec().security_context.as_ref();
    let fs_group = context.and_then(|c| c.fs_group);
    let groups = context.and_then(|c| c.supplemental_groups.as_deref()).unwrap_or_default();
    fs_group.into_iter().chain(groups.iter().copied()).collect()
}

fn groups_policy(pod: &Pod) -> Result<v1::SupplementalGroupsPolicy, ConfigError> {
    match pod.spec().security_context.as_ref().and_then(|c| c.supplemental_groups_policy.as_deref()) {
        None | Some("Merge") => Ok(v1::SupplementalGroupsPolicy::Merge),
        Some("Strict") => Ok(v1::SupplementalGroupsPolicy::Strict),
        Some(other) => Err(ConfigError::container(format!("unsupported supplementalGroupsPolicy: {other}"))),
    }
}

fn verify_non_root(
    pod: &Pod,
    container: &Container,
    effective: &Effective<'_>,
    image_uid: Option<i64>,
    image_user: &str,
) -> Result<(), ConfigError> {
    if !effective.run_as_non_root {
        return Ok(());
    }
    let (described, name) = (pod.described(), &container.name);
    let place = format!("(pod: {described:?}, container: {name})");
    let max = i32::MAX;
    let fault = match (effective.run_as_user, image_uid) {
        (Some(0), _) => format!("container's runAsUser breaks non-root policy {place}"),
        (Some(_), _) => return Ok(()),
        (None, None) if !image_user.is_empty() => format!(
            "container has runAsNonRoot and image has non-numeric user ({image_user}), cannot verify user is non-root {place}"
        ),
        (None, Some(0)) => format!("container has runAsNonRoot and image will run as root {place}"),
        (None, Some(uid)) if !(0..=i64::from(max)).contains(&uid) => format!(
            "container has runAsNonRoot and image has an invalid user id ({uid}). (Must be 1-({max})): must be between 0 and {max}, inclusive {place}"
        ),
        _ => return Ok(()),
    };
    Err(ConfigError::container(fault))
}

fn capabilities(asked: &Capabilities) -> v1::Capability {
    v1::Capability {
        add_capabilities: asked.add.clone().unwrap_or_default(),
        drop_capabilities: asked.drop.clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn selinux(options: &SELinuxOptions) -> v1::SeLinuxOption {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    v1::SeLinuxOption {
        user: text(&options.user),
        role: text(&options.role),
        r#type: text(&options.type_),
        level: text(&options.level),
    }
}

fn int64(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}

/// The fixed list and this machine's thermal counters, which tell of neighbours' load. Read once.
fn masked_paths() -> &'static [String] {
    static PATHS: OnceLock<Vec<String>> = OnceLock::new();
    PATHS.get_or_init(|| {
        let fixed = MASKED.iter().map(|path| (*path).to_owned());
        fixed.chain(thermal_throttle_paths(Path::new("/sys/devices/system/cpu"))).collect()
    })
}

fn thermal_throttle_paths(cpus: &Path) -> Vec<String> {
    let number = |name: &str| name.strip_prefix("cpu").and_then(|n| n.parse::<u32>().ok());
    let entries = fs::read_dir(cpus).into_iter().flatten().flatten();
    let mut found: Vec<u32> = entries
        .filter_map(|entry| {
            number(entry.file_name().to_str()?).filter(|_| entry.path().join("thermal_throttle").exists())
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|n| cpus.join(format!("cpu{n}/thermal_throttle")).display().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::{container_inputs, image, pod};

    fn security(spec: &str) -> v1::LinuxContainerSecurityContext {
        let (pod, image) = (pod(spec), image(Some(0), ""));
        container_security(&container_inputs(&pod, &image), &ContainerPolicy::default()).unwrap()
    }

    fn with(pods: &str, own: &str) -> String {
        format!(
            r#"{{"securityContext":{{{pods}}},"containers":[{{"name":"c","image":"i","securityContext":{{{own}}}}}]}}"#
        )
    }

    #[test]
    fn p59_users_and_groups_the_container_before_the_pod_before_the_image() {
        for (pods, own, uid, username, want) in [
            ("", "", Some(7), "", (Some(7), "", None)),
            ("", "", None, "app", (None, "app", None)),
            (r#""runAsUser":1000,"runAsGroup":2000"#, "", Some(7), "", (Some(1000), "", Some(2000))),
            (r#""runAsUser":1000,"runAsGroup":2000"#, r#""runAsUser":5"#, None, "app", (Some(5), "", Some(2000))),
        ] {
            let (pod, image) = (pod(&with(pods, own)), image(uid, username));
            let got = container_security(&container_inputs(&pod, &image), &ContainerPolicy::default()).unwrap();
            let value = |v: Option<v1::Int64Value>| v.map(|v| v.value);
            assert_eq!(
                (value(got.run_as_user), got.run_as_username.as_str(), value(got.run_as_group)),
                want,
                "{pods} {own}"
            );
        }
        let got =
            security(&with(r#""fsGroup":9,"supplementalGroups":[10,11],"supplementalGroupsPolicy":"Strict""#, ""));
        assert_eq!(got.supplemental_groups, [9, 10, 11]);
        assert_eq!(got.supplemental_groups_policy(), v1::SupplementalGroupsPolicy::Strict);
    }

    #[test]
    fn p59_run_as_non_root_messages() {
        let place = "(pod: \"p_ns(uid-1)\", container: c)";
        for (pods, own, uid, username, fault) in [
            ("", "", Some(0), "", None),
            (r#""runAsNonRoot":true"#, r#""runAsNonRoot":false"#, Some(0), "", None),
            (r#""runAsNonRoot":true"#, "", Some(1), "", None),
            (r#""runAsNonRoot":true"#, r#""runAsUser":3"#, Some(0), "", None),
            (
                r#""runAsNonRoot":true,"runAsUser":0"#,
                "",
                Some(1),
                "",
                Some("container's runAsUser breaks non-root policy".to_owned()),
            ),
            (
                "",
                r#""runAsNonRoot":true"#,
                Some(0),
                "",
                Some("container has runAsNonRoot and image will run as root".to_owned()),
            ),
            (
                "",
                r#""runAsNonRoot":true"#,
                None,
                "app",
                Some(
                    "container has runAsNonRoot and image has non-numeric user (app), cannot verify user is non-root"
                        .to_owned(),
                ),
            ),
        ] {
            let (pod, image) = (pod(&with(pods, own)), image(uid, username));
            let got = container_security(&container_inputs(&pod, &image), &ContainerPolicy::default()).err();
            assert_eq!(
                got.map(|e| (e.reason, e.message)),
                fault.map(|f| ("CreateContainerConfigError", format!("{f} {place}")))
            );
        }
        let (pod, image) = (pod(&with("", r#""runAsNonRoot":true"#)), image(Some(-1), ""));
        let error = container_security(&container_inputs(&pod, &image), &ContainerPolicy::default()).unwrap_err();
        assert!(
            error.message.starts_with("container has runAsNonRoot and image has an invalid user id (-1)."),
            "{}",
            error.message
        );
    }

    #[test]
    fn p59_privileges_and_paths() {
        let plain = security("{}");
        assert!(!plain.privileged && !plain.no_new_privs && !plain.readonly_rootfs);
        assert_eq!(plain.capabilities, None);
        for path in
            ["/proc/asound", "/proc/interrupts", "/proc/kcore", "/sys/firmware", "/sys/devices/virtual/powercap"]
        {
            assert!(plain.masked_paths.iter().any(|p| p == path), "{path}");
        }
        assert_eq!(plain.readonly_paths, ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]);
        assert_eq!(plain.seccomp.unwrap().profile_type(), ProfileType::Unconfined);

        let full = security(&with(
            r#""seLinuxOptions":{"level":"s0:c1"}"#,
            r#""privileged":true,"readOnlyRootFilesystem":true,"allowPrivilegeEscalation":false,"procMount":"Unmasked",
               "capabilities":{"add":["NET_ADMIN"],"drop":["ALL"]}"#,
        ));
        assert!(full.privileged && full.no_new_privs && full.readonly_rootfs);
        let capabilities = full.capabilities.unwrap();
        assert_eq!(
            (capabilities.add_capabilities, capabilities.drop_capabilities),
            (vec!["NET_ADMIN".to_owned()], vec!["ALL".to_owned()])
        );
        assert!(full.masked_paths.is_empty() && full.readonly_paths.is_empty());
        assert_eq!(full.selinux_options.unwrap().level, "s0:c1");
        assert!(!security(&with("", r#""allowPrivilegeEscalation":true"#)).no_new_privs);
    }

    #[test]
    fn p57_namespaces() {
        use NamespaceMode::{Container, Node, Pod};
        for (spec, network, pid, ipc) in [
            ("{}", Pod, Container, Pod),
            (r#"{"hostNetwork":true}"#, Node, Container, Pod),
            (r#"{"hostPID":true,"shareProcessNamespace":true}"#, Pod, Node, Pod),
            (r#"{"hostIPC":true}"#, Pod, Container, Node),
            (r#"{"shareProcessNamespace":true}"#, Pod, Pod, Pod),
        ] {
            for options in
                [security(spec).namespace_options, sandbox_security(&pod(spec), None).unwrap().namespace_options]
            {
                let options = options.unwrap();
                assert_eq!((options.network(), options.pid(), options.ipc()), (network, pid, ipc), "{spec}");
                assert_eq!(options.userns_options.unwrap().mode(), Node);
            }
        }
    }

    #[test]
    fn p57_an_ephemeral_container_joins_its_target() {
        let policy = ContainerPolicy { target_container_id: Some("abc".into()), ..Default::default() };
        for (spec, pid, target) in
            [("{}", NamespaceMode::Target, "abc"), (r#"{"shareProcessNamespace":true}"#, NamespaceMode::Pod, "")]
        {
            let (pod, image) = (pod(spec), image(None, ""));
            let got = container_security(&container_inputs(&pod, &image), &policy).unwrap().namespace_options.unwrap();
            assert_eq!((got.pid(), got.target_id.as_str()), (pid, target), "{spec}");
        }
    }

    #[test]
    fn n13_a_pod_on_the_hosts_network_may_have_users_of_its_own() {
        let users = v1::UserNamespace { mode: NamespaceMode::Pod.into(), ..Default::default() };
        let security = sandbox_security(&pod(r#"{"hostUsers":false,"hostNetwork":true}"#), Some(&users)).unwrap();
        let options = security.namespace_options.unwrap();
        assert_eq!(
            (options.network(), options.userns_options.unwrap().mode()),
            (NamespaceMode::Node, NamespaceMode::Pod)
        );
    }

    #[test]
    fn p58_user_namespaces_are_refused_not_ignored() {
        let error = sandbox_security(&pod(r#"{"hostUsers":false}"#), None).unwrap_err();
        assert_eq!(error.message, "can't set `spec.hostUsers: false`, runtime does not support user namespaces");
    }

    #[test]
    fn p59_sandbox_runs_with_the_runtimes_seccomp_and_any_privileged_container_makes_it_privileged() {
        let plain = sandbox_security(
            &pod(r#"{"securityContext":{"seccompProfile":{"type":"Unconfined"},"runAsUser":5}}"#),
            None,
        )
        .unwrap();
        assert_eq!(plain.seccomp.unwrap().profile_type(), ProfileType::RuntimeDefault);
        assert_eq!((plain.privileged, plain.run_as_user.unwrap().value), (false, 5));
        for list in ["initContainers", "ephemeralContainers"] {
            let spec = format!(r#"{{"{list}":[{{"name":"x","securityContext":{{"privileged":true}}}}]}}"#);
            assert!(sandbox_security(&pod(&spec), None).unwrap().privileged, "{list}");
        }
    }

    #[test]
    fn p59_thermal_counters_are_found_in_order() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["cpu10/thermal_throttle", "cpu2/thermal_throttle", "cpu3", "cpufreq/thermal_throttle"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let want = ["cpu2", "cpu10"].map(|cpu| root.path().join(cpu).join("thermal_throttle").display().to_string());
        assert_eq!(thermal_throttle_paths(root.path()), want);
    }
}
