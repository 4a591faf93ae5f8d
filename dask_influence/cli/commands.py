"""What each command does, once its options are known."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from dask.utils import parse_bytes

from dask_influence import arguments
from dask_influence.cli import cluster, loading, progress
from dask_influence.cli import top as lists
from dask_influence.cli.cluster import Scheduler
from dask_influence.cli.findings import Findings, folder_for_plots
from dask_influence.cli.job import Job
from dask_influence.cli.job import schema as job_schema
from dask_influence.cli.places import place, read
from dask_influence.cli.session import Exit, Session, Stopped, exit_code, stoppable
from dask_influence.cli.status import NOT_BEGUN, Report, StatusFile
from dask_influence.cli.validate import Validator
from dask_influence.errors import ConfigurationError, IncompleteRunError, InfluenceWarning
from dask_influence.execution import verify as verification
from dask_influence.execution.dask import DaskExecutor
from dask_influence.execution.stored import StoredFactors
from dask_influence.report import report as write_report
from dask_influence.storage.results import open_influences
from dask_influence.storage.sources import Source, as_source
from dask_influence.storage.stores import Location

log = logging.getLogger(__name__)

SCHEDULER = ("scheduler_address", "scheduler_file", "tls_ca_file", "tls_cert", "tls_key")


# -- plan and run --------------------------------------------------------------------------
def plan(
    session: Session,
    job: str,
    workers: int | None,
    threads_per_worker: int | None,
    worker_memory: str | None,
    bandwidth: str | None,
    **scheduler: str | None,
) -> None:
    """Print the plan of a job; a scheduler is asked for its workers, and none is started."""
    with ExitStack() as stack:
        asked = read(session, job)
        where = _scheduler(scheduler)
        machines = asked.cluster
        client = stack.enter_context(cluster.cluster(machines, where)) if where.given else None
        if client is None and machines.workers:
            workers = workers or machines.workers
            threads_per_worker = threads_per_worker or machines.threads_per_worker
        memory = _nbytes("--worker-memory", worker_memory) or (None if client else machines.memory_limit)
        model = loading.influence(asked, client)
        forecast = model.plan(
            loading.data(asked, "test"),
            _train(asked),
            **_asked_for(asked),
            workers=workers,
            threads_per_worker=threads_per_worker,
            worker_memory=memory,
            bandwidth=_nbytes("--bandwidth", bandwidth),
            before_fit=True,
        )
        click.echo(forecast)
        forecast.validate(asked.output.memory_limit or forecast.cluster.memory_limit)


def run(
    session: Session,
    job: str,
    resume: bool,
    overwrite: bool,
    repair: bool,
    performance_report: str | None,
    metrics_port: int | None,
    **scheduler: str | None,
) -> None:
    """Fit, score, and say in the store how far it is."""
    with stoppable():
        asked = read(session, job)
        where = _scheduler(scheduler)
        store = loading.output(asked)
        session.fields["run"] = name = uuid.uuid4().hex[:12]
        status = StatusFile(store, name, _digest(asked), session.secrets.hide)
        log.info("run %s of %s into %s", name, job, store.url)
        try:
            with ExitStack() as stack:
                sinks: list[progress.Sink] = [status]
                if metrics_port is not None:
                    sinks.append(metrics := progress.Metrics(metrics_port, name))
                    stack.callback(metrics.close)
                client = stack.enter_context(cluster.cluster(asked.cluster, where, performance_report))
                report = stack.enter_context(progress.shown(sinks, lambda: cluster.memory(client)))
                _carry_out(asked, client, store, report, resume=resume, overwrite=overwrite, repair=repair)
        except BaseException as error:
            _ended(status, error)
            raise
        found = Report.of(store)
        status.end("complete" if found.complete else "incomplete")
        click.echo(Report.of(store))
        if not found.complete:
            raise SystemExit(Exit.INCOMPLETE)


def _carry_out(
    asked: Job,
    client: Any,
    store: Location,
    report: progress.Relay,
    *,
    overwrite: bool,
    **how: Any,
) -> None:
    # What can be refused is refused before the first pass over the data, which may take hours.
    store.check_writable()
    if client is not None:
        DaskExecutor(client, store).check_reach(store)
    model = loading.influence(asked, client)
    test, train = loading.data(asked, "test"), _train(asked)
    labels = _ids(asked, test, train)
    asked_for = _asked_for(asked)
    forecast = model.plan(test, train, **asked_for, before_fit=True)
    forecast.validate(asked.output.memory_limit or forecast.cluster.memory_limit)
    model.fit(train, progress=report)
    model.influences_to_zarr(
        store,
        test,
        train,
        **asked_for,
        **labels,
        overwrite=overwrite or asked.output.overwrite,
        on_missing=asked.output.on_missing,
        progress=report,
        **how,
    )


def _ended(status: StatusFile, error: BaseException) -> None:
    """Say in the store how a run ended that is not complete."""
    if isinstance(error, Stopped):
        status.end("interrupted", f"stopped by {error}")
    elif isinstance(error, KeyboardInterrupt):
        status.end("interrupted", "stopped")
    elif isinstance(error, Exception):
        state = "incomplete" if isinstance(error, IncompleteRunError) else "failed"
        status.end(state, f"{type(error).__name__}: {error}")
        if exit_code(error) is Exit.REFUSED:
            status.withdraw()


def _train(asked: Job) -> Any:
    train = loading.data(asked, "train")
    with loading.at(asked, "data", "train"):
        return as_source(train, "train")


def _ids(asked: Job, test: Any, train: Source) -> dict[str, Any]:
    """Coordinates as the job gives them, known to be one for each point."""
    points = {"train": train, "test": test}
    if isinstance(test, Location):
        points["test"] = StoredFactors.found(test, None) or as_source(test, "test")
    labels = {f"{side}_ids": loading.ids(asked, side) for side in points}
    for side, source in points.items():
        if source is not None:
            with loading.at(asked, "output", f"{side}_ids"):
                arguments.ids(labels[f"{side}_ids"], source, f"{side}_ids")
    return labels


def _asked_for(asked: Job) -> dict[str, Any]:
    """What scores are asked for, and how they are cut: what ``plan`` and ``influences_to_zarr`` share."""
    return {
        "mode": asked.mode,
        "reduce": loading.reduction(asked),
        "hessian_regularization": asked.hessian_regularizations,
        "tile_bytes": asked.output.tile_bytes,
        "memory_limit": asked.output.memory_limit,
    }


def _digest(asked: Job) -> str:
    """Names the job: the file as it is written, so that nothing of the environment is in it."""
    content = json.dumps(asked.document.raw, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _scheduler(given: Mapping[str, str | None]) -> Scheduler:
    return Scheduler(**{name.removeprefix("scheduler_"): given[name] for name in SCHEDULER})


def _nbytes(option: str, given: str | None) -> int | None:
    try:
        return None if given is None else int(parse_bytes(given))
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{option} must be a number of bytes, such as 8GiB; got {given!r}") from None


# -- validate ------------------------------------------------------------------------------
def validate(
    session: Session,
    job: str,
    plots: str | None,
    as_json: bool,
    **scheduler: str | None,
) -> None:
    """Measure what scores are worth, and print it."""
    with stoppable():
        asked = read(session, job)
        where, folder = _scheduler(scheduler), folder_for_plots(plots)
        validator, found = Validator.of(asked), Findings()
        try:
            with ExitStack() as stack:
                client = stack.enter_context(cluster.cluster(asked.cluster, where))
                report = stack.enter_context(progress.shown([], lambda: cluster.memory(client)))
                for one in validator.findings(client, report):
                    found.all.append(one)
                    log.info(one.told())
                    if folder is not None:
                        one.plot(folder)
            validator.keep(found)
        finally:  # what is known is said, whatever became of the rest
            if found.all:
                click.echo(json.dumps(found.to_json(), indent=1) if as_json else found)


# -- what a store holds --------------------------------------------------------------------
def verify(session: Session, store: str, repair: bool, as_json: bool, **scheduler: str | None) -> None:
    """Print what is damaged; 3 where anything is. Workers read where a scheduler is given."""
    where, held = _scheduler(scheduler), place(session, store)
    begun = Report.of(held)
    if begun.state == NOT_BEGUN:
        click.echo(json.dumps(begun.to_json(), indent=1) if as_json else begun)
        raise SystemExit(Exit.INCOMPLETE)
    with ExitStack() as stack:
        client = stack.enter_context(where.join()) if where.given else None
        found = verification.verify(held, repair=repair, client=client)
    if as_json:
        damaged = [vars(one) for one in found.damaged]
        click.echo(json.dumps({**vars(found), "damaged": damaged, "ok": found.ok}, indent=1))
    else:
        click.echo(found)
    if not found.ok or found.unfinished:
        raise SystemExit(Exit.INCOMPLETE)


def top(
    session: Session,
    store: str,
    tests: tuple[str, ...],
    count: int,
    regularization: float | None,
    as_json: bool,
) -> None:
    """Print the most helpful and the most harmful training points; 3 where some scores are not there yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)  # said below, of the rows that are asked for
        scores = open_influences(place(session, store))
    found = lists.top(scores, tests, count, regularization)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], indent=1))
    else:
        click.echo("\n\n".join(map(str, found)))
    missing = [one for one in found if one.missing]
    if missing:
        rows = ", ".join(f"{one.test} ({one.missing})" for one in missing)
        log.warning("scores of these test points are not there yet: %s", rows)
        raise SystemExit(Exit.INCOMPLETE)


def report(
    session: Session,
    store: str,
    output: str,
    tests: tuple[str, ...],
    count: int,
    perturbation: str | None,
    self_influence: str | None,
    image_shape: str | None,
    feature_names: str | None,
    class_names: str | None,
    vocabulary: str | None,
    **more: Any,
) -> None:
    """Write the report, with samples where a job file names them; 3 where the store is not complete."""
    held, given = place(session, store), dict[str, Any](more)
    if Path(store).suffix in (".yaml", ".yml"):
        given |= _data_of(read(session, store))
    for name, other in {"perturbation": perturbation, "self_influence": self_influence}.items():
        given[name] = None if other is None else place(session, other)
    names = {"feature_names": feature_names, "class_names": class_names, "vocabulary": vocabulary}
    given |= {name: None if file is None else _lines(name, file) for name, file in names.items()}
    given["image_shape"] = None if image_shape is None else _extents(image_shape)
    path = write_report(held, output, tests=tests or None, top=count, **given)
    click.echo(path)
    found = Report.of(held)
    if not found.complete:
        log.warning("the store is %s; the report says what it lacks", found.state)
        raise SystemExit(Exit.INCOMPLETE)


def _data_of(asked: Job) -> dict[str, Any]:
    """Samples and ids as the job gives them; factors in a store are no samples."""
    given: dict[str, Any] = {side: loading.data(asked, side) for side in ("test", "train")}
    if isinstance(given["test"], Location) and StoredFactors.found(given["test"], None):
        given["test"] = None
    return given | {f"{side}_ids": loading.ids(asked, side) for side in ("test", "train")}


def _extents(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(extent) for extent in given.lower().split("x"))
    except ValueError:
        raise ConfigurationError(f"--image-shape must be such as 28x28 or 3x32x32; got {given!r}") from None


def _lines(name: str, file: str) -> list[str]:
    try:
        return Path(file).read_text("utf-8").splitlines()
    except ValueError as error:
        raise ConfigurationError(
            f"--{name.replace('_', '-')}: {file} is no text in UTF-8 ({error})"
        ) from None


def schema() -> None:
    """Print the JSON schema of job files."""
    click.echo(json.dumps(job_schema(), indent=1))
