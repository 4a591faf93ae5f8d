"""The command line: ``dask-influence``, also ``dask influence``, over a job file.

========  =====================================================================================
code      what it says
========  =====================================================================================
0         done; the store is complete, or as it should be
1         the run failed, for a reason outside the job: the same call may succeed, and resumes
2         the job or the command line was refused: the same call would be refused again
3         the store is incomplete or damaged (``run``, ``status``, ``verify``, ``top``, ``report``)
128 + n   stopped by signal n (130 by Ctrl-C, 143 by SIGTERM); the same call resumes
========  =====================================================================================

The job file
    Data are a Zarr group, ``.npy`` files (``npy: {x: x.npy, y: y.npy}``), Parquet (``parquet: {path: t.parquet,
    x: [a, b], y: label}``, extra ``parquet``), or what a function of yours returns; on this machine or in an object
    store. Weights are safetensors or a checkpoint of tensors alone: nothing is ever unpickled.
    ``reduce: {name: TopK, k: 10}`` and ``hessian_regularizations: [0.01, 0.1]`` are as in Python. A mistake is named
    with its line, its field and what is allowed; ``dask-influence schema`` prints the JSON schema.
Secrets
    ``${NAME}`` and ``${NAME:-default}`` are taken from the environment after parsing; what they stand for, and
    everything in ``storage_options`` but endpoint and region, is never shown.
Schedulers
    ``--scheduler-address`` (or ``DASK_SCHEDULER_ADDRESS``), ``--scheduler-file`` and the ``--tls-`` options join a
    scheduler that is there; otherwise workers of this machine are started as ``cluster`` says.
Progress
    A bar on a terminal and lines elsewhere (``--log-format json``), kept in the store for ``status``, and served to
    Prometheus with ``--metrics-port`` (extra ``metrics``); ``--performance-report`` keeps Dask's own (extra
    ``dashboard``).
Signals
    Ctrl-C and SIGTERM leave a store that the same call completes, with the same bits.

Modules: :mod:`~dask_influence.cli.document` (YAML with lines and variables) carries
:mod:`~dask_influence.cli.job` (the schema), :mod:`~dask_influence.cli.loading` (what its strings
mean) and :mod:`~dask_influence.cli.cluster` (who does the work); :mod:`~dask_influence.cli.status`
and :mod:`~dask_influence.cli.progress` tell how far it is; :mod:`~dask_influence.cli.session` has
logs, secrets and exit codes, :mod:`~dask_influence.cli.places` which store is meant,
:mod:`~dask_influence.cli.validate` what a validation is,
:mod:`~dask_influence.cli.commands` what each command does. Nothing of it is imported
before a command runs: every ``dask`` command loads this module.
"""

from __future__ import annotations

import functools
import importlib
import signal
from collections.abc import Callable
from typing import Any

import click

from dask_influence import __version__

__all__ = ["cli"]


class _Codes(click.Group):
    """A group whose help ends with the exit codes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [
                    ("0", "done; the store is complete, or as it should be"),
                    (
                        "1",
                        "the run failed for a reason outside the job; the same call may succeed, and resumes",
                    ),
                    ("2", "job or command line refused; the same call would be refused again"),
                    ("3", "the store is incomplete or damaged"),
                    ("130, 143", "stopped by Ctrl-C, by SIGTERM; the same call resumes"),
                ]
            )


@click.group(
    name="influence",
    cls=_Codes,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def cli() -> None:
    """Influence functions of PyTorch models on a Dask cluster, from a job file.

    A STORE is the path or URL of what a run wrote, or the job file (.yaml, .yml) that names it.
    """


def _command(name: str) -> Callable[..., Any]:
    """What the command does, imported when it runs; ``status`` without what computes, which takes seconds."""
    module = "places" if name == "status" else "commands"
    return getattr(importlib.import_module(f"dask_influence.cli.{module}"), name)


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command for what is said on standard error, and a session that it runs in."""
    name = function.__name__.removeprefix("_")

    @click.option("-v", "--verbose", is_flag=True, help="Debug messages, and tracebacks of errors.")
    @click.option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]"
    )
    @click.option("--log-format", type=click.Choice(["text", "json"]), help="[default: text]")
    @functools.wraps(function)
    def told(verbose: bool, log_level: str | None, log_format: str | None, **arguments: Any) -> None:
        try:
            _command(name)  # with it Dask, whose loggers the session takes over
            from dask_influence.cli.session import session
        except KeyboardInterrupt:  # imports take seconds
            raise SystemExit(128 + signal.SIGINT) from None

        with session(verbose, log_level, log_format) as opened:
            function(opened, **arguments)

    return told


def _scheduled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for a scheduler that is there."""
    options = [
        click.option(
            "--scheduler-address",
            envvar="DASK_SCHEDULER_ADDRESS",
            metavar="ADDRESS",
            help="Scheduler to join, such as tcp://host:8786, instead of workers of this machine.",
        ),
        click.option(
            "--scheduler-file",
            type=click.Path(),
            help="The same from what dask scheduler --scheduler-file wrote.",
        ),
        click.option("--tls-ca-file", type=click.Path(exists=True), help="Of encrypted connections."),
        click.option("--tls-cert", type=click.Path(exists=True)),
        click.option("--tls-key", type=click.Path(exists=True)),
    ]
    for option in reversed(options):
        function = option(function)
    return function


_job = click.argument("job", type=click.Path(exists=True, dir_okay=False))
_store = click.argument("store")
_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


@cli.command("plan")
@_job
@_scheduled
@click.option("--workers", type=click.IntRange(min=1), help="A cluster to plan for, which need not exist.")
@click.option("--threads-per-worker", type=click.IntRange(min=1))
@click.option("--worker-memory", metavar="BYTES", help="Of each worker, such as 8GiB.")
@click.option("--bandwidth", metavar="BYTES", help="A second, between store and all workers, such as 1GB.")
@_told
def _plan(session: Any, **arguments: Any) -> None:
    """How JOB would be cut, what it costs and what limits it; nothing is fitted or written."""
    _command("plan")(session, **arguments)


@cli.command("run")
@_job
@_scheduled
@click.option("--resume/--no-resume", default=True, help="Go on where an earlier run stopped, or refuse to.")
@click.option("--overwrite", is_flag=True, help="Delete first what the store holds.")
@click.option("--repair", is_flag=True, help="Read everything again, and recompute what is damaged.")
@click.option("--performance-report", type=click.Path(dir_okay=False), help="HTML of what the cluster did.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), help="Serve progress to Prometheus (extra: metrics)."
)
@_told
def _run(session: Any, **arguments: Any) -> None:
    """Fit and score as JOB says; called again, it goes on where it was."""
    _command("run")(session, **arguments)


@cli.command("status")
@_store
@_json
@_told
def _status(session: Any, **arguments: Any) -> None:
    """How far a run is, from its STORE alone, also while another process runs it."""
    _command("status")(session, **arguments)


@cli.command("verify")
@_store
@click.option(
    "--repair", is_flag=True, help="Withdraw what is damaged, so that the job recomputes just that."
)
@_scheduled
@_json
@_told
def _verify(session: Any, **arguments: Any) -> None:
    """Read every object of a STORE and compare it with what was recorded when it was written.

    Workers of a scheduler read, where one is given, else threads of this process.
    """
    _command("verify")(session, **arguments)


@cli.command("top")
@_store
@click.option(
    "-t", "--test", "tests", multiple=True, required=True, metavar="ID", help="Test point; repeatable."
)
@click.option("-k", "--count", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--regularization", type=float, help="λ, of a store that holds several.")
@_json
@_told
def _top(session: Any, **arguments: Any) -> None:
    """Most helpful and most harmful training points of test points, from a STORE."""
    _command("top")(session, **arguments)


@cli.command("report")
@_store
@click.option("-o", "--output", required=True, type=click.Path(), help="HTML file to write, or to replace.")
@click.option(
    "-t",
    "--test",
    "tests",
    multiple=True,
    metavar="ID",
    help="Test point to show; repeatable. [default: six]",
)
@click.option("-k", "--count", type=click.IntRange(1, 50), default=5, show_default=True, help="Of each list.")
@click.option("--regularization", type=float, help="λ, of a store that holds several.  [default: the first]")
@click.option(
    "--perturbation", metavar="STORE", help="Scores of mode perturbation, of the same training data."
)
@click.option("--self-influence", metavar="STORE", help="What reduce: SelfInfluence left.")
@click.option("--image-shape", metavar="HxW", help="Of images that are kept flat, such as 28x28 or 3x32x32.")
@click.option("--feature-names", type=click.Path(exists=True, dir_okay=False), help="File, a name a line.")
@click.option(
    "--class-names", type=click.Path(exists=True, dir_okay=False), help="The same, by class number."
)
@click.option("--vocabulary", type=click.Path(exists=True, dir_okay=False), help="The same, by token number.")
@click.option("--title", help="Of the page.")
@_told
def _report(session: Any, **arguments: Any) -> None:
    """One HTML file of what a STORE holds, readable without a network (extra: report).

    Of a job file the data are read too, and points are drawn as what they are.
    """
    _command("report")(session, **arguments)


@cli.command("validate")
@_job
@_scheduled
@click.option("--plots", type=click.Path(file_okay=False), metavar="FOLDER", help="Draw each figure into it.")
@_json
@_told
def _validate(session: Any, **arguments: Any) -> None:
    """Are the scores of JOB true? Compare them with training again, as its section validation says.

    Called again, it goes on where it was.
    """
    _command("validate")(session, **arguments)


@cli.command("schema")
def _schema() -> None:
    """JSON schema of job files, for editors."""
    _command("schema")()


@cli.command("version")
def _version() -> None:
    """Versions that results depend on."""
    import platform
    from importlib.metadata import version as installed

    packages = ("torch", "dask", "distributed", "zarr", "numpy")
    click.echo(f"dask_influence {__version__}, Python {platform.python_version()}")
    click.echo(", ".join(f"{name} {installed(name)}" for name in packages))
