"""A command's session: its logs on standard error, its exit code, and nothing secret in either."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import IntEnum
from types import FrameType
from typing import Any

import click

from dask_influence.cli.document import Secrets
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceError,
    CorruptStoreError,
    DataError,
    DerivativeError,
    IncompleteRunError,
    InfluenceError,
    LossError,
    MemoryLimitError,
    SampleMixingError,
    SingularCurvatureError,
    StoreMismatchError,
)

log = logging.getLogger(__name__)

OURS, DASKS = "dask_influence", "distributed"
"""Loggers whose records are said here, instead of by handlers of their own."""


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    INCOMPLETE = 3
    SIGNAL = 128
    """Plus the number of the signal: 130 for Ctrl-C, 143 for SIGTERM."""


REFUSALS = (
    ConfigurationError,
    ConvergenceError,
    DataError,
    DerivativeError,
    LossError,
    MemoryLimitError,
    SampleMixingError,
    SingularCurvatureError,
    StoreMismatchError,
    click.UsageError,
)
"""Errors of what was asked for: the same job would be refused again."""


def exit_code(error: BaseException) -> Exit:
    """The exit code of a command that ended with ``error``.

    >>> exit_code(ConfigurationError("…")).name, exit_code(CorruptStoreError("…")).name, exit_code(OSError()).name
    ('REFUSED', 'INCOMPLETE', 'FAILED')
    """
    if isinstance(error, IncompleteRunError | CorruptStoreError):  # some are errors of the data too
        return Exit.INCOMPLETE
    return Exit.REFUSED if isinstance(error, REFUSALS) else Exit.FAILED


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    A KeyboardInterrupt, so that what cleans up after Ctrl-C does so after SIGTERM too.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Session:
    """Logs and secrets of one command.

    Parameters
    ----------
    verbose : bool
        Show tracebacks, and debug messages of this package.
    level, form : str, optional
        Of the logs; where they are None the job file says.
    """

    def __init__(self, verbose: bool = False, level: str | None = None, form: str | None = None) -> None:
        self.secrets = Secrets()
        self.fields: dict[str, Any] = {}
        self._verbose, self._level, self._form = verbose, level, form
        self.handler = _Handler(self, form or "text")

    def settle(self, level: str = "info", form: str = "text") -> None:
        """Take level and format of the job file, where the command line says nothing."""
        chosen = "debug" if self._verbose else self._level or level
        self.handler.setLevel(chosen.upper())
        self.handler.form = self._form or form
        logging.getLogger(OURS).setLevel(chosen.upper())
        # Dask tells of every connection: that is for whoever looks for a fault.
        logging.getLogger(DASKS).setLevel("INFO" if self._verbose else "WARNING")

    def explain(self, error: BaseException) -> None:
        """Say what went wrong, with a traceback where asked for or where nobody foresaw it."""
        shown = error if isinstance(error, InfluenceError) or str(error) else repr(error)
        foreseen = isinstance(error, InfluenceError | click.ClickException)
        message = error.format_message() if isinstance(error, click.ClickException) else str(shown)
        log.error(message if foreseen else f"{type(error).__name__}: {message}")
        if self._verbose or not foreseen:
            click.echo(self.secrets.hide("".join(traceback.format_exception(error))), err=True, nl=False)


class _Handler(logging.Handler):
    """Records as lines of text or of JSON, without secrets, to what standard error is at the time."""

    def __init__(self, session: Session, form: str) -> None:
        super().__init__()
        self._session, self.form = session, form

    def emit(self, record: logging.LogRecord) -> None:
        fields = {**self._session.fields, **getattr(record, "fields", {})}
        when = datetime.fromtimestamp(record.created, UTC)
        message = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        message = self._session.secrets.hide(message)
        if self.form == "json":
            content = {
                "time": when.isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "logger": record.name,
                **fields,
                "message": message,
            }
            click.echo(json.dumps(content, default=str), err=True)
        else:
            click.echo(f"{when:%Y-%m-%d %H:%M:%S} {record.levelname:<7} {message}", err=True)


@contextmanager
def session(verbose: bool = False, level: str | None = None, form: str | None = None) -> Iterator[Session]:
    """A session whose end is the process's exit code."""
    opened = Session(verbose, level, form)
    with _logging_to(opened.handler):
        opened.settle()
        try:
            yield opened
        except Stopped as stop:
            log.error("stopped by %s; run the same job again, and it goes on where it was", stop)
            raise SystemExit(Exit.SIGNAL + stop.number) from None
        except KeyboardInterrupt:
            log.error("stopped; run the same job again, and it goes on where it was")
            raise SystemExit(Exit.SIGNAL + signal.SIGINT) from None
        except click.exceptions.Exit:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is becomes an exit code
            opened.explain(error)
            raise SystemExit(exit_code(error)) from None


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    names = [name for name in logging.root.manager.loggerDict if name.startswith(f"{DASKS}.")]
    loggers = [logging.getLogger(name) for name in (OURS, DASKS, *names)]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        top = logger.name in (OURS, DASKS)
        logger.handlers, logger.propagate = [handler] if top else [], not top
    shown, warnings.showwarning = warnings.showwarning, _warned
    try:
        yield
    finally:
        warnings.showwarning = shown
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def _warned(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as a line of the log: where it was issued says nothing to whoever runs a job."""
    log.warning("%s: %s", category.__name__, message)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise :class:`Stopped`, once: what cleans up is not disturbed by a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping: list[int] = []
    home = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != home:  # a forked worker: dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if stopping:
            log.warning("stopping already")
            return
        stopping.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
