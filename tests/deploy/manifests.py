"""Manifests as real tools render them, and their pods as the arguments of ``docker run``."""

from __future__ import annotations

import base64
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

Object = dict[str, Any]


def tool(name: str) -> str:
    """A program that the extra [deploy] brought, or the machine has."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, f"{name} is missing: pip install -c constraints.txt -e '.[deploy]'"
    return found


def kustomize(folder: Path) -> list[Object]:
    """What ``kubectl kustomize`` makes of a folder; no cluster is asked."""
    ran = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [found for found in yaml.safe_load_all(ran.stdout) if found is not None]


def one(objects: Iterable[Object], kind: str, name: str) -> Object:
    (found,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod that the objects make, operator's included: what it is for, and its spec."""
    for each in objects:
        kind, spec = each["kind"], each.get("spec", {})
        if kind in ("Deployment", "Job"):
            yield each["metadata"]["name"].rpartition("-")[2], spec["template"]["spec"]
        if kind == "DaskJob":
            yield "job", spec["job"]["spec"]
            spec = spec["cluster"]["spec"]
        if kind in ("DaskCluster", "DaskJob"):
            yield "scheduler", spec["scheduler"]["spec"]
            yield "worker", spec["worker"]["spec"]


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}


def quantity(given: str | int) -> int:
    """Bytes (or whole units) of a quantity of Kubernetes."""
    for unit, factor in _UNITS.items():
        if str(given).endswith(unit):
            return int(float(str(given)[: -len(unit)]) * factor)
    return int(given)


@dataclass(frozen=True)
class Pod:
    """One pod with one container, and what its volumes and variables refer to.

    Attributes
    ----------
    spec : dict
        As it is rendered.
    held : mapping
        Files and variables of ConfigMaps and Secrets by ``(kind, name)``.
    """

    spec: Object
    held: Mapping[tuple[str, str], Mapping[str, str]] = field(repr=False)

    @property
    def container(self) -> Object:
        (only,) = self.spec["containers"]
        assert "initContainers" not in self.spec
        return only

    @property
    def command(self) -> list[str]:
        return [*self.container["command"], *self.container.get("args", [])]

    @property
    def grace(self) -> int:
        """Seconds from SIGTERM to SIGKILL."""
        return int(self.spec["terminationGracePeriodSeconds"])

    def environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.container.get("envFrom", []):
            (reference,) = source.items()
            assert reference[0] == "secretRef"
            found.update(self.held["Secret", reference[1]["name"]])
        return found | {each["name"]: each["value"] for each in self.container.get("env", [])}

    def arguments(self, folder: Path) -> list[str]:
        """Of ``docker run``, image and command last; files of volumes are written below ``folder``."""
        return [
            *self._rights(),
            *self._limits(),
            *self._variables(folder),
            *self._volumes(folder),
            f"--entrypoint={self.command[0]}",
            self.container["image"],
            *self.command[1:],
        ]

    def _rights(self) -> list[str]:
        pod, container = self.spec["securityContext"], self.container["securityContext"]
        assert pod["seccompProfile"]["type"] == "RuntimeDefault"  # which is what docker takes
        found = [f"--user={pod['runAsUser']}:{pod['runAsGroup']}", f"--group-add={pod['fsGroup']}"]
        if container["readOnlyRootFilesystem"]:
            found.append("--read-only")
        if not container["allowPrivilegeEscalation"]:
            found.append("--security-opt=no-new-privileges")
        return found + [f"--cap-drop={each}" for each in container["capabilities"]["drop"]]

    def _limits(self) -> list[str]:
        limits = self.container["resources"]["limits"]
        memory = quantity(limits["memory"])
        return [f"--cpus={limits['cpu']}", f"--memory={memory}", f"--memory-swap={memory}"]

    def _variables(self, folder: Path) -> list[str]:
        # through a file, so that no secret is in a command line
        file = folder / f"{self.container['name']}.env"
        file.write_text("".join(f"{name}={value}\n" for name, value in self.environment().items()))
        file.chmod(0o600)
        return [f"--env-file={file}"]

    def _volumes(self, folder: Path) -> list[str]:
        volumes = {each["name"]: each for each in self.spec["volumes"]}
        found = []
        for mount in self.container["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "emptyDir" in volume:
                size = quantity(volume["emptyDir"]["sizeLimit"])
                found.append(f"--mount=type=tmpfs,destination={path},tmpfs-mode=1777,tmpfs-size={size}")
                continue
            if "configMap" in volume:
                held, mode = self.held["ConfigMap", volume["configMap"]["name"]], 0o644
            else:
                held = self.held["Secret", volume["secret"]["secretName"]]
                mode = volume["secret"]["defaultMode"]
            place = folder / mount["name"]
            place.mkdir(exist_ok=True)
            for name, content in held.items():
                (place / name).write_text(content)
                (place / name).chmod(mode)
                os.chown(place / name, 0, self.spec["securityContext"]["fsGroup"])
            found.append(f"--mount=type=bind,source={place},destination={path},readonly")
        return found


def held_by(objects: Iterable[Object]) -> dict[tuple[str, str], dict[str, str]]:
    """What ConfigMaps and Secrets hold, as text."""
    found = {}
    for each in objects:
        if each["kind"] in ("ConfigMap", "Secret"):
            data = dict(each.get("data", {}))
            if each["kind"] == "Secret":
                data = {name: base64.b64decode(value).decode() for name, value in data.items()}
                data |= each.get("stringData", {})
            found[each["kind"], each["metadata"]["name"]] = data
    return found


# -- the chart -----------------------------------------------------------------------------
CHART = ROOT / "deploy" / "helm" / "dask-influence"

OBJECT_STORE_JOB = {
    "job.yaml": (KUBERNETES / "components" / "s3" / "job.yaml").read_text(),
    "example.py": (KUBERNETES / "base" / "job" / "example.py").read_text(),
}
VALUES: dict[str, Object] = {
    "chart": {},
    "chart-s3-tls": {
        "tls": {"enabled": True},
        "s3": {"enabled": True},
        "persistence": {"enabled": False},
        "job": {"files": OBJECT_STORE_JOB},
    },
    "chart-gpu": {"workers": {"gpus": 1, "tolerations": [{"key": "ml", "operator": "Exists"}]}},
    "chart-operator": {"operator": {"enabled": True}, "tls": {"enabled": True}},
    "chart-claim": {"persistence": {"existingClaim": "mine", "storageClassName": "fast"}},
}
"""What the chart is rendered with."""


def helm(values: Object) -> list[Object]:
    """What the Helm SDK makes of the chart; no cluster is asked."""
    with Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name="dask-influence", namespace="dask-influence")
    texts = [text for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found is not None]


OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())


@functools.cache
def rendered(name: str) -> list[Object]:
    """The objects of an overlay, or of the chart with the values of that name."""
    return helm(VALUES[name]) if name in VALUES else kustomize(KUBERNETES / "overlays" / name)
