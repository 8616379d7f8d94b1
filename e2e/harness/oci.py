"""Writes OCI images: layers are tar files, and one archive holds any number of images for `ctr images import`."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_CREATED = "2026-01-01T00:00:00Z"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LayerWriter:
    """A layer put together entry by entry; all owned by root unless said otherwise, all times zero."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)
        self._folders: set[str] = set()

    def folder(self, name: str, mode: int = 0o755) -> None:
        if name not in self._folders:
            self._folders.add(name)
            self._add(name, mode, tarfile.DIRTYPE)

    def file(self, name: str, content: bytes | str | Path, mode: int = 0o644) -> None:
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, str):
            content = content.encode()
        self._add(name, mode, tarfile.REGTYPE, content=content)

    def link(self, name: str, target: str) -> None:
        self._add(name, 0o777, tarfile.SYMTYPE, target=target)

    def _add(self, name: str, mode: int, kind: bytes, content: bytes = b"", target: str = "") -> None:
        entry = tarfile.TarInfo(name.lstrip("/"))
        entry.mode, entry.type, entry.size, entry.linkname = mode, kind, len(content), target
        self._tar.addfile(entry, io.BytesIO(content))

    def close(self) -> Path:
        self._tar.close()
        return self.path


@dataclass
class Image:
    name: str
    layers: list[Path]
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    user: str = ""
    environment: list[str] = field(default_factory=list)
    working_dir: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def write_archive(images: list[Image], target: Path, scratch: Path) -> None:
    """Writes all images into one OCI archive; a layer that several share is in it once."""
    blobs = scratch / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = {layer: _keep(layer, blobs) for image in images for layer in image.layers}
    manifests = [_image(image, layers, blobs) for image in images]
    (scratch / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (scratch / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "mediaType": _INDEX, "manifests": manifests}))
    partial = target.with_suffix(".tmp")
    with tarfile.open(partial, "w") as archive:
        for name in ("oci-layout", "index.json", "blobs"):
            archive.add(scratch / name, name)
    partial.rename(target)


def _image(image: Image, layers: dict[Path, dict], blobs: Path) -> dict:
    settings: dict = {"Env": [_PATH, *image.environment]}
    for key, value in (("Entrypoint", image.entrypoint), ("Cmd", image.command), ("User", image.user),
                       ("WorkingDir", image.working_dir), ("Labels", image.labels)):
        if value:
            settings[key] = value
    used = [layers[layer] for layer in image.layers]
    config = {"created": _CREATED, "architecture": "amd64", "os": "linux", "config": settings,
              "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in used]},
              "history": [{"created": _CREATED, "created_by": "e2e/harness/images.py"} for _ in used]}
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "layers": used,
                "config": _blob(json.dumps(config).encode(), _CONFIG, blobs)}
    described = _blob(json.dumps(manifest).encode(), _MANIFEST, blobs)
    described["annotations"] = {"io.containerd.image.name": image.name,
                                "org.opencontainers.image.ref.name": image.name.rpartition(":")[2]}
    described["platform"] = {"architecture": "amd64", "os": "linux"}
    return described


def _keep(layer: Path, blobs: Path) -> dict:
    digest = hashlib.sha256()
    with open(layer, "rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    shutil.copyfile(layer, blobs / digest.hexdigest())
    return {"mediaType": _LAYER, "digest": f"sha256:{digest.hexdigest()}", "size": layer.stat().st_size}


def _blob(data: bytes, kind: str, blobs: Path) -> dict:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}
