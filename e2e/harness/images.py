"""Makes the images under the names that the tests use: no registry of the world is reachable or needed.

What they have inside is what tests ask of them, no more: a Debian root with network tools below agnhost, nginx and the
like, static busybox, a pause program. One archive, kept in the cache, keyed by everything that goes into it.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from e2e.harness import layout, oci, tools, versions
from e2e.harness.oci import Image, LayerWriter
from e2e.harness.steps import run, step
from e2e.harness.versions import IMAGE_NAMES

SOURCES = layout.E2E / "manifests" / "images"  # C sources


def archive() -> Path:
    return layout.IMAGE_CACHE / f"images-{_recipe()}.tar"


def _recipe() -> str:
    """A digest of what decides the contents: this code, the pins and the sources."""
    digest = hashlib.sha256()
    for source in [Path(__file__), Path(oci.__file__), *sorted(SOURCES.iterdir())]:
        digest.update(source.read_bytes())
    for name in ("agnhost", "coredns"):
        digest.update(repr(versions.PROGRAMS[name]).encode())
    digest.update(repr((sorted(IMAGE_NAMES.items()), _debian_recipe())).encode())
    return digest.hexdigest()[:16]


def _debian_recipe() -> str:
    return f"{versions.DEBIAN_SUITE} {versions.DEBIAN_MIRROR} {' '.join(versions.DEBIAN_ROOT_PACKAGES)}"


def build() -> Path:
    """Gives the archive with all images, made now or before."""
    target = archive()
    if target.exists():
        return target
    debian = _debian_layer()
    with step("making the images"), tempfile.TemporaryDirectory(dir=layout.IMAGE_CACHE) as scratch:
        folder = Path(scratch)
        oci.write_archive(_images(folder, debian), target, folder / "oci")
    for older in layout.IMAGE_CACHE.glob("images-*.tar"):
        if older != target:
            older.unlink()
    return target


def _debian_layer() -> Path:
    """A small Debian with the tools that agnhost tests run inside a pod."""
    layout.IMAGE_CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(_debian_recipe().encode()).hexdigest()[:16]
    target = layout.IMAGE_CACHE / f"debian-{key}.tar"
    if target.exists():
        return target
    with step("making a Debian root with debootstrap (downloads about 80 MB)"), \
            tempfile.TemporaryDirectory(dir=layout.IMAGE_CACHE) as scratch:
        root = Path(scratch) / "root"
        run(["debootstrap", "--variant=minbase", f"--include={','.join(versions.DEBIAN_ROOT_PACKAGES)}",
             versions.DEBIAN_SUITE, root, versions.DEBIAN_MIRROR])
        partial = Path(scratch) / "layer.tar"
        waste = ["dev/*", "proc/*", "sys/*", "var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*",
                 "usr/share/man/*", "usr/share/locale/*", "var/log/*.log"]
        run(["tar", "-C", root, "--numeric-owner", "--sort=name", *[f"--exclude=./{path}" for path in waste], "-cf", partial, "."])
        partial.rename(target)
        passwd = target.with_suffix(".passwd")
        shutil.copyfile(root / "etc/passwd", passwd)
        shutil.copyfile(root / "etc/group", target.with_suffix(".group"))
    return target


def _images(folder: Path, debian: Path) -> list[Image]:
    busybox = _busybox_layer(folder)
    agnhost = [debian, _agnhost_layer(folder, debian)]
    nginx = [debian, _nginx_layer(folder)]
    agnhost_start = {"entrypoint": ["/agnhost"], "command": ["pause"]}
    nginx_start = {"command": ["nginx", "-g", "daemon off;"]}
    return [
        Image(IMAGE_NAMES["pause"], [_pause_layer(folder)], entrypoint=["/pause"], user="65535:65535"),
        Image(IMAGE_NAMES["agnhost"], agnhost, **agnhost_start),
        # A label makes it an image of its own, with another ID, as it is in life.
        Image(IMAGE_NAMES["agnhost_previous"], agnhost, labels={"version": versions.AGNHOST_PREVIOUS}, **agnhost_start),
        Image(IMAGE_NAMES["busybox"], [busybox], command=["sh"]),
        Image(IMAGE_NAMES["nginx"], nginx, labels={"version": "old"}, **nginx_start),
        Image(IMAGE_NAMES["nginx_new"], nginx, labels={"version": "new"}, **nginx_start),
        Image(IMAGE_NAMES["nonewprivs"], [busybox, _nonewprivs_layer(folder)], command=["nnp"]),
        Image(IMAGE_NAMES["nonroot"], [busybox], command=["id", "-u"], user="1234"),
        Image(IMAGE_NAMES["ipc_utils"], [debian], command=["bash"], labels={"for": "ipc-utils"}),
        Image(IMAGE_NAMES["glibc_dns_testing"], [debian], command=["bash"], labels={"for": "glibc-dns-testing"}),
        Image(IMAGE_NAMES["perl"], [debian], command=["perl"], labels={"for": "perl"}),
        Image(IMAGE_NAMES["kitten"], [*agnhost, _served_picture(folder, "kitten")],
              entrypoint=["/agnhost"], command=["test-webserver"]),
        Image(IMAGE_NAMES["nautilus"], [*agnhost, _served_picture(folder, "nautilus")],
              entrypoint=["/agnhost"], command=["test-webserver"]),
        Image(IMAGE_NAMES["coredns"], [_coredns_layer(folder)], entrypoint=["/coredns"]),
    ]


def _compiled(folder: Path, name: str) -> Path:
    """A static program from a C source of ours."""
    program = folder / name
    run(["gcc", "-static", "-Os", "-s", "-Wall", "-o", program, SOURCES / f"{name}.c"])
    return program


def _pause_layer(folder: Path) -> Path:
    layer = LayerWriter(folder / "pause.tar")
    layer.file("/pause", _compiled(folder, "pause"), 0o755)
    return layer.close()


def _nonewprivs_layer(folder: Path) -> Path:
    layer = LayerWriter(folder / "nonewprivs.tar")
    layer.file("/usr/local/bin/nnp", _compiled(folder, "nnp"), 0o4755)
    return layer.close()


def _busybox_layer(folder: Path) -> Path:
    layer = LayerWriter(folder / "busybox.tar")
    for name in ("/bin", "/sbin", "/usr", "/usr/bin", "/usr/sbin", "/usr/local", "/usr/local/bin", "/etc", "/root",
                 "/home", "/var", "/var/run", "/dev", "/proc", "/sys"):
        layer.folder(name)
    layer.folder("/tmp", 0o1777)
    layer.file("/bin/busybox", Path("/usr/bin/busybox"), 0o755)
    # Debian's busybox ash drops environment names like `data-1`, which tests use; bash keeps them.
    layer.file("/bin/bash", Path("/usr/bin/bash-static"), 0o755)
    layer.link("/bin/sh", "bash")
    made = {"bin/sh", "bin/bash", "bin/busybox"}
    applets = subprocess.run(["/usr/bin/busybox", "--list-full"], capture_output=True, text=True, check=True).stdout
    for path in applets.split():
        # Found in /bin too, whatever folder Debian thinks of.
        for place in {path, "bin/" + path.rpartition("/")[2]}:
            if place not in made and place.partition("/")[0] in ("bin", "sbin", "usr"):
                made.add(place)
                layer.link("/" + place, "/bin/busybox")
    layer.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
    layer.file("/etc/group", "root:x:0:\nnogroup:x:65534:\n")
    return layer.close()


def _agnhost_layer(folder: Path, debian: Path) -> Path:
    layer = LayerWriter(folder / "agnhost.tar")
    layer.file("/agnhost", tools.location("agnhost"), 0o755)
    layer.link("/agnhost-2", "agnhost")
    layer.file("/coredns", tools.location("coredns"), 0o755)  # agnhost's dns tests start it
    layer.folder("/uploads")
    run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "localhost.key", "-out", folder / "localhost.crt"])
    layer.file("/localhost.crt", folder / "localhost.crt")
    layer.file("/localhost.key", folder / "localhost.key")
    # Tests of supplementalGroupsPolicy look for these two.
    layer.file("/etc/passwd", debian.with_suffix(".passwd").read_text()
               + "user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n")
    layer.file("/etc/group", debian.with_suffix(".group").read_text()
               + "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")
    return layer.close()


def _served_picture(folder: Path, name: str) -> Path:
    layer = LayerWriter(folder / f"{name}.tar")
    layer.file("/data.json", f'{{\n  "image": "{name}.jpg"\n}}\n')
    layer.file(f"/{name}.jpg", f"not really a picture of a {name}\n")
    return layer.close()


def _nginx_layer(folder: Path) -> Path:
    layer = LayerWriter(folder / "nginx.tar")
    layer.link("/var/log/nginx/access.log", "/dev/stdout")
    layer.link("/var/log/nginx/error.log", "/dev/stderr")
    return layer.close()


def _coredns_layer(folder: Path) -> Path:
    layer = LayerWriter(folder / "coredns.tar")
    layer.file("/coredns", tools.location("coredns"), 0o755)
    return layer.close()
