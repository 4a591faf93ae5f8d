"""Manifests as they are rendered: valid to the last field, without rights, and with commands that exist."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from dask.utils import parse_bytes
from distributed.cli.dask_scheduler import main as dask_scheduler
from distributed.cli.dask_worker import main as dask_worker
from helm_python import HelmError, lint

import dask_influence
from dask_influence import settings
from dask_influence.cli import cli, loading
from dask_influence.cli.job import Job
from dask_influence.cli.session import Exit
from tests.deploy.manifests import (
    CHART,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    VALUES,
    Object,
    Pod,
    held_by,
    helm,
    kustomize,
    one,
    pods,
    quantity,
    rendered,
)

KUBERNETES_VERSION = "1.37"
ALL = [*OVERLAYS, *VALUES]


# -- schemas -------------------------------------------------------------------------------
def crds() -> dict[str, Object]:
    """The operator's own schemas by kind, every object closed but where the schema leaves it open."""
    origin = importlib.util.find_spec("dask_kubernetes")
    assert origin is not None, "pip install --no-deps -c constraints.txt dask-kubernetes"
    assert origin.origin is not None
    folder = Path(origin.origin).parent / "operator/deployment/helm/dask-kubernetes-operator/crds"
    found = {}
    for file in folder.glob("*.yaml"):
        for crd in yaml.safe_load_all(file.read_text()):
            if crd is not None:
                (version,) = crd["spec"]["versions"]
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
                schema["properties"]["metadata"] = {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": True,
                }
                found[crd["spec"]["names"]["kind"]] = closed(schema)
    return found


def closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden, as a server that prunes them silently would not tell."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    named = isinstance(made.get("properties"), dict) and made.get("type", "object") == "object"
    if named and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


CRDS = crds()


def validate(one_object: Object) -> None:
    """Raises what a strict server would."""
    if one_object["kind"] in CRDS:
        assert one_object["apiVersion"] == "kubernetes.dask.org/v1"
        jsonschema.Draft202012Validator(CRDS[one_object["kind"]]).validate(one_object)
        for _, spec in pods([one_object]):  # pods of the operator become pods of Kubernetes
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
    else:
        kubernetes_validate.validate(one_object, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_valid(name: str) -> None:
    objects = rendered(name)
    assert len(objects) > 5
    for each in objects:
        validate(each)
        assert each["metadata"].get("namespace") == "dask-influence"


def test_secrets_are_valid_and_hold_no_secret() -> None:
    files = sorted((KUBERNETES / "secrets").glob("*.yaml"))
    assert len(files) == 2
    for file in files:
        secret = yaml.safe_load(file.read_text())
        validate(secret)
        assert {"..."} <= set(secret["stringData"].values())


def _with(path: tuple[Any, ...]) -> Callable[[Object], None]:
    def plant(given: Object) -> None:
        for part in path:
            given = given[part]
        given["unheardOf"] = 1

    return plant


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("cpu", "Deployment", ("spec", "template", "spec", "containers", 0, "securityContext")),
        ("cpu", "Job", ("spec", "podFailurePolicy")),
        ("cpu", "NetworkPolicy", ("spec", "egress", 0)),
        ("operator-cluster", "DaskCluster", ("spec",)),
        ("operator-cluster", "DaskCluster", ("spec", "worker", "spec", "containers", 0, "resources")),
        ("operator-cluster", "DaskAutoscaler", ("spec",)),
        ("operator-job", "DaskJob", ("spec", "job", "spec", "securityContext")),
    ],
)
def test_an_unknown_field_is_seen(overlay: str, kind: str, path: tuple[Any, ...]) -> None:
    """Or the test of every object would say little."""
    found = copy.deepcopy(next(each for each in rendered(overlay) if each["kind"] == kind))
    validate(found)
    _with(path)(found)
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        validate(found)


# -- rights --------------------------------------------------------------------------------
PODS = [
    pytest.param(name, role, spec, id=f"{name}-{role}") for name in ALL for role, spec in pods(rendered(name))
]


@pytest.mark.parametrize(("name", "role", "spec"), PODS)
def test_pods_have_no_rights(name: str, role: str, spec: Object) -> None:
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    own = container["securityContext"]
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "USER 10001:10001" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert all("hostPath" not in volume for volume in spec["volumes"])
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert "/tmp" in mounted
    assert ("/scratch" in mounted) == (role == "worker")


@pytest.mark.parametrize(("name", "role", "spec"), PODS)
def test_resources_fit_each_other(name: str, role: str, spec: Object) -> None:
    (container,) = spec["containers"]
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests["memory"] == limits["memory"]
    assert requests["cpu"] == limits["cpu"]
    if role != "worker":
        return
    options = dict(each.removeprefix("--").split("=", 1) for each in container["args"])
    assert options["nthreads"] == "1"
    assert int(options["death-timeout"]) > 0
    told, held = parse_bytes(options["memory-limit"]), quantity(limits["memory"])
    assert 0.8 * held <= told <= held - 256 * 2**20
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert {environment[f"{library}_NUM_THREADS"] for library in ("OMP", "MKL", "OPENBLAS")} == {
        str(limits["cpu"]) if "gpu" not in name else environment["OMP_NUM_THREADS"]
    }
    job = next(spec for role, spec in pods(rendered(name)) if role == "job" or re.match(r"\d", role))
    sent = {each["name"]: each["value"] for each in job["containers"][0]["env"]}
    assert sent["DASK_INFLUENCE__TORCH_THREADS"] == environment["OMP_NUM_THREADS"]


# -- what refers to what ---------------------------------------------------------------------
SECRETS = {"dask-influence-s3", "dask-influence-tls"}


@pytest.mark.parametrize("name", ALL)
def test_references_are_met(name: str) -> None:
    objects = rendered(name)
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    there |= {("Secret", secret) for secret in SECRETS} | {("PersistentVolumeClaim", "mine")}
    for _, spec in pods(objects):
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        volumes = {each["name"]: each for each in spec["volumes"]}
        (container,) = spec["containers"]
        assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            for kind, key, field in (
                ("ConfigMap", "configMap", "name"),
                ("Secret", "secret", "secretName"),
                ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
            ):
                if key in volume:
                    assert (kind, volume[key][field]) in there
        for source in container.get("envFrom", []):
            assert ("Secret", source["secretRef"]["name"]) in there
        ports = {each["name"] for each in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                assert container[probe]["httpGet"]["port"] in ports
        for each in container.get("env", []):
            if each["name"] == "DASK_SCHEDULER_ADDRESS":
                tls, host = re.fullmatch(r"(tls|tcp)://([a-z-]+):8786", each["value"]).groups()  # type: ignore[union-attr]
                assert (tls == "tls") == ("tls" in volumes)
                clusters = {"DaskCluster", "DaskJob"} & {kind for kind, _ in there}
                made = {("Service", f"{n}-scheduler") for kind, n in there if kind in clusters}
                assert ("Service", host) in there | made


@pytest.mark.parametrize("name", ALL)
def test_selectors_find_their_pods(name: str) -> None:
    objects = rendered(name)
    labels = list(_labels(objects))
    assert {each["app.kubernetes.io/component"] for each in labels} == {"scheduler", "worker", "job"}
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Deployment":
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        if each["kind"] == "PodDisruptionBudget":
            found = [one for one in labels if spec["selector"]["matchLabels"].items() <= one.items()]
            assert [one["app.kubernetes.io/component"] for one in found] == ["worker"]
        if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == "dask-influence":
            chosen = spec["podSelector"]["matchLabels"].items()
            assert all(chosen <= one.items() for one in labels)
            ports = {port["port"] for port in spec["ingress"][0]["ports"]}
            assert ports == {8786, 8788, 8789} == {port["port"] for port in spec["egress"][0]["ports"]}


def _labels(objects: list[Object]) -> Iterator[dict[str, str]]:
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] in ("Deployment", "Job"):
            yield spec["template"]["metadata"]["labels"]
        if each["kind"] == "DaskJob":
            yield spec["job"]["metadata"]["labels"]
            spec = spec["cluster"]["spec"]
        if each["kind"] in ("DaskCluster", "DaskJob"):
            yield spec["scheduler"]["metadata"]["labels"]
            yield spec["worker"]["metadata"]["labels"]


# -- commands --------------------------------------------------------------------------------
def parse(command: list[str], files: Path) -> click.Context:
    """What the real command line makes of a command, files of volumes looked for below ``files``."""
    places = [re.sub(r"(^|=)/(tls|job)/", rf"\1{files}/\2/", each) for each in command]
    mains = {("dask", "scheduler"): dask_scheduler, ("dask", "worker"): dask_worker}
    if tuple(command[:2]) in mains:
        return mains[tuple(command[:2])].make_context(command[1], places[2:])  # type: ignore[index]
    assert command[0] == "dask-influence"
    return cli.commands[command[1]].make_context(command[1], places[2:])


def unknown(context: click.Context) -> tuple[str, ...]:
    """Options that are none: ``dask worker`` takes them for its scheduler or for those of preloaded modules."""
    return (*context.params.get("preload_argv", ()), *filter(None, [context.params.get("scheduler")]))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("tls/ca.crt", "tls/tls.crt", "tls/tls.key", "job/job.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(("name", "role", "spec"), PODS)
def test_commands_are_those_of_the_command_line(name: str, role: str, spec: Object, files: Path) -> None:
    command = Pod(spec, {}).command
    context = parse(command, files)
    assert context.params.get("tls_ca_file") == (str(files / "tls/ca.crt") if "tls" in str(command) else None)
    assert not unknown(context)
    try:
        assert unknown(parse([*command, "--unheard-of=1"], files))
    except click.UsageError:
        assert role != "worker"
    ports = {each["containerPort"] for each in spec["containers"][0]["ports"]}
    given = [context.params.get(each) for each in ("port", "worker_port", "nanny_port", "metrics_port")]
    dashboard = context.params.get("dashboard_address")
    assert ports == {int(str(each).rpartition(":")[2]) for each in (*given, dashboard) if each is not None}


@pytest.mark.parametrize("name", ALL)
def test_settings_in_variables_are_there(name: str) -> None:
    held = yaml.safe_load(settings.DEFAULTS.read_text())["influence"]
    for _, spec in pods(rendered(name)):
        for each in spec["containers"][0].get("env", []):
            if each["name"].startswith("DASK_INFLUENCE__"):
                assert each["name"].removeprefix("DASK_INFLUENCE__").lower().replace("_", "-") in held


@pytest.mark.parametrize("name", ALL)
def test_exit_codes_of_a_job_that_is_not_started_again(name: str) -> None:
    for each in rendered(name):
        if each["kind"] == "Job":
            rule, evicted = each["spec"]["podFailurePolicy"]["rules"]
            assert rule["onExitCodes"]["values"] == [Exit.REFUSED, Exit.INCOMPLETE]
            assert (
                rule["onExitCodes"]["containerName"]
                == each["spec"]["template"]["spec"]["containers"][0]["name"]
            )
            assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


# -- job files -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_job_files_are_jobs(name: str, tmp_path: Path) -> None:
    """Read, and everything in them made: model, loss and both sides of the data."""
    (held,) = (held for (kind, _), held in held_by(rendered(name)).items() if kind == "ConfigMap")
    for file, content in held.items():
        (tmp_path / file).write_text(content)
    _try(tmp_path / "job.yaml")


def test_job_files_of_examples_are_jobs() -> None:
    folders = [ROOT / "examples", ROOT / "deploy"]
    files = [file for folder in folders for file in folder.rglob("*.yaml") if _is_job(file)]
    assert len(files) >= 4
    for file in files:
        Job.read(file)


def _is_job(file: Path) -> bool:
    return "templates" not in file.parts and {"model", "data", "estimator"} <= set(
        yaml.safe_load(file.read_text().partition("\n---")[0]) or ()
    )


def _try(file: Path) -> None:
    asked = Job.read(file)
    loading.influence(asked, None)
    loading.output(asked)
    for side in ("train", "test"):
        assert len(loading.data(asked, side)) > 0  # type: ignore[arg-type]


# -- one thing said twice ---------------------------------------------------------------------
def test_versions_are_that_of_the_package() -> None:
    version = importlib.metadata.version("dask_influence")
    assert version == dask_influence.__version__
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    for name in ALL:
        tag = f"{version}-gpu" if "gpu" in name else version
        for _, spec in pods(rendered(name)):
            assert spec["containers"][0]["image"] == f"dask-influence:{tag}"


@pytest.mark.parametrize(("overlay", "chart"), [("cpu", "chart"), ("s3-tls", "chart-s3-tls")])
def test_chart_and_overlays_make_the_same_pods(overlay: str, chart: str) -> None:
    ours = {role: _normal(spec) for role, spec in pods(rendered(overlay))}
    charts = {("job" if role.isdigit() else role): _normal(spec) for role, spec in pods(rendered(chart))}
    assert set(ours) == {"scheduler", "worker", "job"}
    for role in ours:
        assert charts[role] == ours[role], role


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _normal(spec: Object) -> Object:
    """Quantities as numbers, lists without order, and without what only one side says."""
    made = copy.deepcopy(spec)
    (container,) = made["containers"]
    container.pop("imagePullPolicy", None)
    for kind in ("requests", "limits"):
        held = container["resources"][kind]
        held.pop("ephemeral-storage", None)
        container["resources"][kind] = {name: quantity(value) for name, value in held.items()}
    for each in made.get("topologySpreadConstraints", []):
        each["labelSelector"]["matchLabels"].pop("app.kubernetes.io/instance", None)
    for each in ("args", "env", "volumeMounts", "ports"):
        container[each] = sorted(container.get(each, []), key=_text)
    made["volumes"] = sorted(made["volumes"], key=_text)
    return made


def test_chart_and_base_have_one_job() -> None:
    for name in ("job.yaml", "example.py"):
        assert (CHART / "job" / name).read_text() == (KUBERNETES / "base" / "job" / name).read_text()


def test_operator_pods_are_those_of_the_deployments() -> None:
    plain = dict(pods(rendered("cpu")))
    for name in ("operator-cluster", "operator-job"):
        for role, spec in pods(rendered(name)):
            made = copy.deepcopy(spec)
            if role == "worker":
                made["containers"][0]["args"].remove("--name=$(DASK_WORKER_NAME)")
            if role == "scheduler":
                del made["containers"][0]["env"]
            assert made == plain[role], (name, role)


# -- the chart's own checks --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wrokers": {}}, "wrokers"),
        ({"workers": {"gpus": 2}}, "gpus"),
        ({"workers": {"memoryMiB": "4Gi"}}, "memoryMiB"),
        ({"job": {"files": {"model.py": ""}}}, "job.yaml"),
        ({"persistence": {"size": "much"}}, "size"),
        ({"persistence": {"enabled": False}}, "enable persistence"),
        ({"operator": {"enabled": True, "minimum": 5, "maximum": 2}}, "operator.minimum"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: Object, said: str) -> None:
    with pytest.raises(HelmError, match=re.escape(said)):
        helm(values)


def test_chart_is_clean() -> None:
    found = lint(str(CHART), strict=True)
    assert found["errors"] == []
    assert [each for each in found["messages"] if "icon" not in each["error"]] == []


def test_every_component_is_in_an_overlay() -> None:
    """Nothing is shipped that nothing renders."""
    used = "".join(file.read_text() for file in KUBERNETES.rglob("kustomization.yaml"))
    for folder in (KUBERNETES / "components").iterdir():
        assert re.search(rf"/{folder.name}\b", used), folder
    for file in KUBERNETES.rglob("*.yaml"):
        if file.name != "kustomization.yaml" and file.parent.name != "secrets":
            assert file.name in used, file


def test_the_base_alone_renders() -> None:
    for each in kustomize(KUBERNETES / "base"):
        validate(each)
    assert one(kustomize(KUBERNETES / "base"), "Deployment", "dask-influence-worker")
