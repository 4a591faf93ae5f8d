"""Acceptance of deploy/: the overlay s3-tls as containers, with the manifests' own commands, users and limits.

Not collected by default: ``make test-deploy`` runs it. A bridge network stands for the cluster's, and this
process for what starts pods again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from dask_influence import open_influences, verify
from dask_influence.errors import StoreError
from dask_influence.execution.ledger import Ledger
from dask_influence.storage.stores import Location
from tests.deploy.docker import IMAGE, Engine, missing_tools
from tests.deploy.manifests import KUBERNETES, ROOT, Pod, held_by, kustomize, one, tool
from tests.s3.server import KEY, SECRET

MODEL = """
import time
import torch
from example import classifier

class Slow(torch.nn.Module):
    '''A model of which a pass takes its time, so that there is some to do harm in.'''

    def __init__(self, seconds):
        super().__init__()
        self.inner, self.seconds = classifier(), seconds

    def forward(self, x):
        if self.seconds:
            time.sleep(self.seconds)
        return self.inner(x)

def net(seconds):
    return Slow(seconds)

def wide(width):
    return torch.nn.Sequential(torch.nn.Linear(20, width), torch.nn.Tanh(), torch.nn.Linear(width, 5))
"""

SECONDS = float(os.environ.get("DEPLOY_SECONDS", "0.1"))
"""Of one pass of the model over one chunk."""

WEED = ("-s3", "-s3.port=8333", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.config=/config/s3.json")


def wait(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.2)


@dataclass
class Stage:
    """A network with an object store, and pods of the overlay on it."""

    engine: Engine
    folder: Path
    port: int
    held: dict[tuple[str, str], dict[str, str]]
    objects: list[dict[str, object]]
    said: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, what: str) -> None:
        self.said.append(f"{time.monotonic() - self.began:7.1f} s  {what}")
        print(self.said[-1], flush=True)

    # -- pods ------------------------------------------------------------------------------
    def pod(self, kind: str, name: str) -> Pod:
        return Pod(one(self.objects, kind, f"dask-influence-{name}")["spec"]["template"]["spec"], self.held)

    @property
    def scheduler(self) -> Pod:
        return self.pod("Deployment", "scheduler")

    @property
    def worker(self) -> Pod:
        return self.pod("Deployment", "worker")

    @property
    def job(self) -> Pod:
        return self.pod("Job", "job")

    def start(self, pod: Pod, name: str, *more: str, job: str | None = None) -> None:
        """Start a pod; ``job`` is the job file in place of the overlay's."""
        held = dict(pod.held)
        if job is not None:
            held["ConfigMap", "dask-influence-job"] = {
                **pod.held["ConfigMap", "dask-influence-job"],
                "job.yaml": job,
            }
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        arguments = Pod(pod.spec, held).arguments(folder)
        self.engine("run", "--detach", f"--name={name}", "--network=cluster", *more, *arguments)

    def state(self, name: str, field_of: str = ".State.Running") -> str:
        return self.engine("inspect", f"--format={{{{{field_of}}}}}", name)

    def logs(self, name: str) -> str:
        ran = self.engine.run("logs", name)
        return ran.stdout + ran.stderr

    def ended(self, name: str, seconds: float = 600) -> int:
        """Exit code of a container that ends by itself."""
        wait(lambda: self.state(name) == "false", f"end of {name}", seconds)
        return int(self.state(name, ".State.ExitCode"))

    def probe(self, pod: Pod, name: str, which: str = "startupProbe") -> bool:
        """Whether a probe of the manifest holds, asked from inside."""
        asked = pod.container[which]["httpGet"]
        port = {each["name"]: each["containerPort"] for each in pod.container["ports"]}[asked["port"]]
        code = f"import urllib.request as r; r.urlopen('http://localhost:{port}{asked['path']}', timeout=5)"
        return self.engine.run("exec", name, "python", "-c", code).returncode == 0

    # -- the store -------------------------------------------------------------------------
    @property
    def options(self) -> dict[str, object]:
        """Of the object store as this process reaches it."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}",
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }

    def place(self, name: str) -> Location:
        return Location.of(f"s3://bucket/{name}", self.options)

    def strips(self, name: str) -> dict[str, dict[str, object]]:
        """Ledger entries of a run."""
        return Ledger(self.place(name)).entries("strip-")

    def job_file(self, name: str, **changed: object) -> str:
        """The overlay's job file with more data and a model that is slower, and a store of the test's own."""
        content = yaml.safe_load(self.held["ConfigMap", "dask-influence-job"]["job.yaml"])
        content["model"] = {"factory": "slow:net", "arguments": {"seconds": SECONDS}}
        content["data"]["train"]["arguments"]["count"] = 20_000
        content["output"] = {"store": f"s3://bucket/{name}", "tile_bytes": "64 KiB"}
        content["artifacts"] = f"s3://bucket/{name}-fit"
        return yaml.safe_dump(content | changed)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    missing = missing_tools()
    if missing:
        pytest.fail(f"apt-get install --no-install-recommends {' '.join(missing)}")
    with Engine(ROOT / "build" / "docker").running() as running:
        began = time.monotonic()
        running.build()
        size = int(running("inspect", "--format={{.Size}}", IMAGE))
        print(
            f"\nimage: {size / 1e6:,.0f} MB, built in {time.monotonic() - began:.0f} s (layers may be there)"
        )
        yield running


@pytest.fixture(scope="module")
def stage(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The overlay, its Secrets filled in, and an object store that enforces credentials."""
    folder = tmp_path_factory.mktemp("stage")
    objects = kustomize(KUBERNETES / "overlays" / "s3-tls")
    held = held_by(objects)
    held["ConfigMap", "dask-influence-job"]["slow.py"] = MODEL
    subprocess.run(
        [KUBERNETES / "secrets" / "make-tls.sh", folder / "certificates"], check=True, capture_output=True
    )
    held["Secret", "dask-influence-tls"] = {
        name: (folder / "certificates" / name).read_text() for name in ("ca.crt", "tls.crt", "tls.key")
    }
    held["Secret", "dask-influence-s3"] = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "AWS_ALLOW_HTTP": "true",  # no certificate for a server of a test
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
    }
    engine("network", "create", "cluster")
    identity = {
        "name": "suite",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3").mkdir()
    (folder / "s3" / "s3.json").write_text(json.dumps({"identities": [identity]}))
    port = _free_port()
    engine(
        *("run", "--detach", "--name=s3", "--network=cluster", f"--publish=127.0.0.1:{port}:8333"),
        *(
            f"--mount=type=bind,source={tool('weed')},destination=/weed,readonly",
            "--mount=type=tmpfs,destination=/data",
        ),
        *(
            f"--mount=type=bind,source={folder / 's3'},destination=/config,readonly",
            "--user=0",
            "--entrypoint=/weed",
        ),
        *(IMAGE, "server", "-dir=/data", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-filer", *WEED),
        *("-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false"),
    )
    made = Stage(engine, folder, port, held, objects)
    wait(lambda: _writable(made.place("ready")), "object store")
    yield made
    for name in engine("ps", "--all", "--format={{.Names}}").split():
        (ROOT / "build" / f"test-deploy-{name}.log").write_text(made.logs(name))
    engine.remove_all()


@pytest.fixture(scope="module")
def cluster(stage: Stage) -> Stage:
    """Scheduler and workers, as many as the manifest asks for."""
    stage.began = time.monotonic()
    stage.start(stage.scheduler, "scheduler", "--network-alias=dask-influence-scheduler")
    replicas = one(stage.objects, "Deployment", "dask-influence-worker")["spec"]["replicas"]
    assert replicas == 3
    for number in range(replicas):
        stage.start(stage.worker, f"worker-{number}")
    stage.note("docker run of the scheduler and three workers")
    wait(lambda: stage.probe(stage.scheduler, "scheduler"), "startup probe of the scheduler")
    stage.note("startup probe of the scheduler holds")
    for number in range(replicas):
        wait(lambda n=number: stage.probe(stage.worker, f"worker-{n}"), "startup probe of a worker")
    stage.note("startup probes of the workers hold")
    return stage


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _writable(place: Location) -> bool:
    with suppress(StoreError):
        place.check_writable()
        return True
    return False


# -- what pods may do ----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["scheduler", "worker-0"])
def test_pods_have_no_rights(cluster: Stage, name: str) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in cluster.engine("exec", name, "cat", "/proc/1/status").splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split()[0] == "10001"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    written = cluster.engine.run("exec", name, "touch", "/opt/dask-influence/mine")
    assert "Read-only file system" in written.stderr


def test_probes_of_the_manifest_hold(cluster: Stage) -> None:
    assert cluster.probe(cluster.scheduler, "scheduler", "readinessProbe")
    assert cluster.probe(cluster.scheduler, "scheduler", "livenessProbe")
    assert cluster.probe(cluster.worker, "worker-0", "livenessProbe")


# -- what is refused -----------------------------------------------------------------------
def test_the_scheduler_speaks_tls_alone(cluster: Stage) -> None:
    pod = cluster.job
    pod.container["args"] = [each for each in pod.container["args"] if not each.startswith("--tls")]
    (address,) = (each for each in pod.container["env"] if each["name"] == "DASK_SCHEDULER_ADDRESS")
    address["value"] = address["value"].replace("tls://", "tcp://")
    cluster.start(pod, "plain", job=cluster.job_file("plain"))
    assert cluster.ended("plain") == 1
    assert "no scheduler answers" in _only_error(cluster, "plain")
    cluster.objects[:] = kustomize(KUBERNETES / "overlays" / "s3-tls")


def test_another_authority_is_not_trusted(cluster: Stage) -> None:
    folder = cluster.folder / "others"
    subprocess.run([KUBERNETES / "secrets" / "make-tls.sh", folder], check=True, capture_output=True)
    held = {name: (folder / name).read_text() for name in ("ca.crt", "tls.crt", "tls.key")}
    pod = Pod(cluster.job.spec, {**cluster.held, ("Secret", "dask-influence-tls"): held})
    cluster.start(pod, "stranger", job=cluster.job_file("stranger"))
    assert cluster.ended("stranger") == 1
    assert "no scheduler answers" in _only_error(cluster, "stranger")


def test_wrong_credentials_are_one_line(cluster: Stage) -> None:
    wrong = cluster.held["Secret", "dask-influence-s3"] | {
        "AWS_SECRET_ACCESS_KEY": "another-secret-than-the-right-one"
    }
    pod = Pod(cluster.job.spec, {**cluster.held, ("Secret", "dask-influence-s3"): wrong})
    cluster.start(pod, "wrong", job=cluster.job_file("wrong"))
    assert cluster.ended("wrong") != 0
    assert "cannot write" in _only_error(cluster, "wrong")
    assert not cluster.place("wrong").list()


def test_what_does_not_fit_is_refused_by_its_plan(cluster: Stage) -> None:
    """104,005 parameters: a Hessian of 80.6 GiB and its factorisation, for workers of 3.5 GiB."""
    direct = {"name": "DirectInfluence", "hessian_regularization": 0.01}
    model = {"factory": "slow:wide", "arguments": {"width": 4000}}
    cluster.start(cluster.job, "large", job=cluster.job_file("large", model=model, estimator=direct))
    assert cluster.ended("large") == 2
    assert "a task needs 161.7 GiB" in _only_error(cluster, "large")
    assert not cluster.place("large").list()
    for name in ("scheduler", "worker-0", "worker-1", "worker-2"):
        assert cluster.state(name) == "true"
        assert cluster.state(name, ".State.OOMKilled") == "false"


def _only_error(stage: Stage, name: str) -> str:
    """The one line that says what is wrong: JSON, and no traceback."""
    records = [json.loads(line) for line in stage.logs(name).splitlines() if line.strip()]
    (error,) = (record["message"] for record in records if record["level"] == "error")
    print(f"{name}: {error}")
    assert "Traceback" not in error
    return str(error)


# -- what comes out ------------------------------------------------------------------------
def test_the_job_of_the_manifests_is_that_of_one_process(cluster: Stage, tmp_path: Path) -> None:
    """As an overlay renders it, in nothing changed."""
    stage, began = cluster, time.monotonic()
    stage.start(stage.job, "job")
    wait(lambda: stage.strips("scores.zarr") or _going(stage, "job"), "first strip")
    print(f"\nfrom docker run of the job to the first strip: {time.monotonic() - began:.1f} s", flush=True)
    assert stage.ended("job") == 0, stage.logs("job")[-3000:]
    _compare(stage, "scores.zarr", stage.held["ConfigMap", "dask-influence-job"]["job.yaml"], tmp_path)


def test_faults_change_no_bit(cluster: Stage, tmp_path: Path) -> None:
    """A worker is evicted, the job is killed and started again, a worker is cut off the network."""
    stage, job = cluster, cluster.job_file("faults.zarr")
    stage.said.clear()
    stage.began = time.monotonic()
    stage.start(stage.job, "job-0", job=job)
    _more_strips(stage, "job-0")

    stage.engine("network", "disconnect", "cluster", "worker-1")
    stage.note("worker-1 cut off the network")
    stage.engine("stop", f"--time={stage.worker.grace}", "worker-0")
    stage.note(f"worker-0 evicted: SIGTERM, exit code {stage.state('worker-0', '.State.ExitCode')}")
    stage.start(stage.worker, "worker-3")
    stage.note("worker-3 takes its place")
    _more_strips(stage, "job-0")

    stage.engine("kill", "--signal=KILL", "job-0")
    before = stage.strips("faults.zarr")
    stage.note(f"job killed (SIGKILL) after {len(before)} strips")
    stage.start(stage.job, "job-1", job=job)
    stage.note("job started again")
    assert stage.ended("job-1") == 0, stage.logs("job-1")[-3000:]
    after = stage.strips("faults.zarr")
    assert len(after) > len(before)
    assert all(after[name] == entry for name, entry in before.items())
    stage.note(f"job complete: {len(after)} strips, the {len(before)} from before the kill untouched")
    wait(lambda: stage.state("worker-1") == "false", "death timeout of the worker that is cut off", 300)
    stage.note("worker-1 ended by itself: it had nobody to work for")

    _compare(stage, "faults.zarr", job, tmp_path)
    for name in ("job-0", "job-1", "scheduler", "worker-0", "worker-1", "worker-2", "worker-3"):
        assert SECRET not in stage.logs(name)
        assert stage.state(name, ".State.OOMKilled") == "false"
    print("\nlog of faults\n" + "\n".join(stage.said))


def _compare(stage: Stage, name: str, job: str, folder: Path) -> None:
    """Scores in the store are those of one process, bit for bit, and as they were written."""
    place = stage.place(name)
    assert verify(place).ok
    scores = open_influences(place)["influence"].values
    expected = _locally(stage, job, folder)
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    assert (scores.dtype, scores.shape) == (expected.dtype, expected.shape)
    assert scores.tobytes() == expected.tobytes()
    stage.note(f"{scores.shape[0]} × {scores.shape[1]} scores equal those of one process, bit for bit")


def _going(stage: Stage, name: str) -> bool:
    """False, as long as the job is there to wait for."""
    assert stage.state(name) == "true", stage.logs(name)[-3000:]
    return False


def _more_strips(stage: Stage, name: str) -> None:
    """Wait for one more."""
    there = len(stage.strips("faults.zarr"))
    wait(lambda: len(stage.strips("faults.zarr")) > there or _going(stage, name), "another strip", 300)
    stage.note(f"{len(stage.strips('faults.zarr'))} strips are in the ledger")


def _locally(stage: Stage, job: str, folder: Path) -> np.ndarray:
    """Scores of the same job in one process of this host, without a cluster and in no hurry to be slow."""
    for name, content in stage.held["ConfigMap", "dask-influence-job"].items():
        (folder / name).write_text(content)
    content = yaml.safe_load(job)
    if isinstance(content["model"], dict):
        content["model"]["arguments"]["seconds"] = 0.0
    content["output"]["store"] = "scores.zarr"
    del content["artifacts"]
    content["cluster"] = {"workers": 0}
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    settings = {name: value for name, value in stage.job.environment().items() if "INFLUENCE" in name}
    command = [sys.executable, "-m", "dask_influence.cli", "run", "job.yaml"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **settings}, check=True)
    return open_influences(folder / "scores.zarr")["influence"].values
