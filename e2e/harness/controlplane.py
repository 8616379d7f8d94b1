"""etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kube-proxy as processes of this host."""

import json
import urllib.request

from e2e.harness import apiclient, layout, tools
from e2e.harness.layout import KUBECONFIGS, PKI, PORTS
from e2e.harness.processes import Service
from e2e.harness.steps import run
from e2e.harness.versions import KUBERNETES


def answers(url: str):
    """A readiness check: an HTTP 200, whoever signed the server's certificate."""
    context = apiclient.tls_context(verify=False) if url.startswith("https") else None

    def check() -> bool:
        with urllib.request.urlopen(url, timeout=5, context=context) as response:
            return response.status == 200

    return check


def _api_server_ready() -> bool:
    status, _, body = apiclient.admin_client().raw("GET", "/readyz", timeout=5)
    if status != 200:
        raise OSError(body.decode(errors="replace")[-500:])
    return True


def kubeadm_config(node_name: str) -> str:
    """kubeadm reads a stream of YAML documents; JSON is YAML."""
    documents = [
        {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "InitConfiguration",
            "localAPIEndpoint": {"advertiseAddress": layout.node_ip(), "bindPort": PORTS["kube-apiserver"]},
            "nodeRegistration": {"name": node_name, "criSocket": f"unix://{layout.CONTAINERD_SOCKET}"},
        },
        {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "ClusterConfiguration",
            "kubernetesVersion": KUBERNETES,
            "certificatesDir": str(PKI),
            "apiServer": {"certSANs": ["127.0.0.1", "localhost"]},
            # Ours listens on loopback without TLS, so no certificates for it.
            "etcd": {"external": {"endpoints": [_etcd_url()]}},
            "networking": {"serviceSubnet": layout.SERVICE_CIDR, "podSubnet": layout.CLUSTER_CIDR,
                           "dnsDomain": layout.CLUSTER_DOMAIN},
        },
    ]
    return "\n---\n".join(json.dumps(document, indent=1) for document in documents)


def kubeadm(*arguments: str, node_name: str = layout.NODE_NAME) -> str:
    config = layout.STATE / "kubeadm.yaml"
    config.write_text(kubeadm_config(node_name))
    return run([tools.path("kubeadm"), *arguments, "--config", config])


def make_certificates() -> None:
    """Certificates and kubeconfigs as kubeadm makes them; those that are there are kept."""
    if not (PKI / "sa.key").exists():
        kubeadm("init", "phase", "certs", "all")
    if not layout.ADMIN_KUBECONFIG.exists():
        KUBECONFIGS.mkdir(parents=True, exist_ok=True)
        kubeadm("init", "phase", "kubeconfig", "all", "--kubeconfig-dir", str(KUBECONFIGS))
    proxy = KUBECONFIGS / "kube-proxy.conf"
    if not proxy.exists():
        proxy.write_text(kubeadm("kubeconfig", "user", "--client-name", "system:kube-proxy"))


def _etcd_url() -> str:
    return f"http://127.0.0.1:{PORTS['etcd']}"


def _etcd() -> list[str]:
    peers = f"http://127.0.0.1:{PORTS['etcd peers']}"
    return [
        tools.path("etcd"),
        "--name=e2e",
        f"--data-dir={layout.ETCD_DATA}",
        f"--listen-client-urls={_etcd_url()}",
        f"--advertise-client-urls={_etcd_url()}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=e2e={peers}",
        "--unsafe-no-fsync",  # the data are worth nothing after a crash of this machine
        "--log-level=warn",
    ]


def _api_server() -> list[str]:
    return [
        tools.path("kube-apiserver"),
        f"--advertise-address={layout.node_ip()}",
        f"--secure-port={PORTS['kube-apiserver']}",
        f"--etcd-servers={_etcd_url()}",
        f"--service-cluster-ip-range={layout.SERVICE_CIDR}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--enable-bootstrap-token-auth",
        "--runtime-config=api/all=true",
        "--allow-privileged=true",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP,Hostname",
        f"--proxy-client-cert-file={PKI}/front-proxy-client.crt",
        f"--proxy-client-key-file={PKI}/front-proxy-client.key",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--service-account-issuer=https://kubernetes.default.svc.{layout.CLUSTER_DOMAIN}",
        f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        "--shutdown-delay-duration=0s",
    ]


def _controller_manager() -> list[str]:
    config = f"{KUBECONFIGS}/controller-manager.conf"
    return [
        tools.path("kube-controller-manager"),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        "--controllers=*,bootstrapsigner,tokencleaner",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={PKI}/sa.key",
        f"--root-ca-file={PKI}/ca.crt",
        f"--cluster-signing-cert-file={PKI}/ca.crt",
        f"--cluster-signing-key-file={PKI}/ca.key",
        f"--client-ca-file={PKI}/ca.crt",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--allocate-node-cidrs=true",
        f"--cluster-cidr={layout.CLUSTER_CIDR}",
        f"--node-cidr-mask-size={layout.NODE_CIDR_MASK}",
        f"--service-cluster-ip-range={layout.SERVICE_CIDR}",
        f"--flex-volume-plugin-dir={layout.AGENT}/volume-plugins",
        "--leader-elect=false",
    ]


def _scheduler() -> list[str]:
    config = f"{KUBECONFIGS}/scheduler.conf"
    return [
        tools.path("kube-scheduler"),
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
    ]


def _kube_proxy() -> list[str]:
    return [
        tools.path("kube-proxy"),
        f"--kubeconfig={KUBECONFIGS}/kube-proxy.conf",
        f"--hostname-override={layout.NODE_NAME}",
        f"--cluster-cidr={layout.CLUSTER_CIDR}",
        "--proxy-mode=iptables",
        "--conntrack-max-per-core=0",  # leave the host's limit alone
        "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s",
        f"--healthz-bind-address=127.0.0.1:{PORTS['kube-proxy health']}",
        f"--metrics-bind-address=127.0.0.1:{PORTS['kube-proxy metrics']}",
    ]


ETCD = Service("etcd", _etcd, answers(f"{_etcd_url()}/health"))
API_SERVER = Service("kube-apiserver", _api_server, _api_server_ready, ready_timeout=120)
CONTROLLER_MANAGER = Service(
    "kube-controller-manager", _controller_manager, answers(f"https://127.0.0.1:{PORTS['kube-controller-manager']}/healthz"))
SCHEDULER = Service("kube-scheduler", _scheduler, answers(f"https://127.0.0.1:{PORTS['kube-scheduler']}/healthz"))
KUBE_PROXY = Service("kube-proxy", _kube_proxy, answers(f"http://127.0.0.1:{PORTS['kube-proxy health']}/healthz"))


def grant_what_kubeadm_grants() -> None:
    """Two bindings that `kubeadm init` would make."""
    client = apiclient.admin_client()
    for name, role, subject in (
        ("kubeadm:cluster-admins", "cluster-admin", {"kind": "Group", "name": "kubeadm:cluster-admins"}),
        # Without it every `kubectl logs` is Forbidden by the agent.
        ("kube-apiserver-kubelet-client", "system:kubelet-api-admin", {"kind": "User", "name": "kube-apiserver-kubelet-client"}),
    ):
        group = "rbac.authorization.k8s.io"
        binding = {"apiVersion": f"{group}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
                   "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
                   "subjects": [{"apiGroup": group, **subject}]}
        path = apiclient.resource_path("clusterrolebindings", name=name)
        client.patch(f"{path}?fieldManager=e2e&force=true", binding, "apply")
