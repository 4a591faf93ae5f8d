"""The import contracts of pyproject.toml hold, and each of them refuses a planted import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = "Floors of the package"
PURE_CORE = "Core is pure torch"
ONE_SCHEDULER_FILE = "Only execution.dask knows a scheduler"
EXECUTION = "Floors of execution"
CORE = "Floors of core"
SETTINGS = "Tasks read no configuration"
JOB_FILES = "Only the command line reads job files"
COMMAND_LINE = "Floors of the command line"
ESTIMATORS = "Estimators do not know each other"

PLANTED = {
    "core-imports-dask": ("core/objective.py", "dask.array", PURE_CORE),
    "core-imports-xarray": ("core/moments.py", "xarray", PURE_CORE),
    "grid-imports-zarr": ("grid.py", "zarr", PURE_CORE),
    "core-imports-execution": ("core/moments.py", "dask_influence.execution", FLOORS),
    "core-imports-storage": ("core/moments.py", "dask_influence.storage", FLOORS),
    "storage-imports-core": ("storage/stores.py", "dask_influence.core.moments", FLOORS),
    "storage-imports-execution": ("storage/stores.py", "dask_influence.execution.plan", FLOORS),
    "grid-imports-core": ("grid.py", "dask_influence.core.moments", FLOORS),
    "errors-imports-grid": ("errors.py", "dask_influence.grid", FLOORS),
    "module-without-a-floor": ("attic.py", "dask_influence.errors", FLOORS),
    "storage-imports-distributed": ("storage/stores.py", "distributed", ONE_SCHEDULER_FILE),
    "commands-import-distributed": ("cli/commands.py", "distributed", ONE_SCHEDULER_FILE),
    "tasks-import-settings": ("execution/tasks.py", "dask_influence.settings", SETTINGS),
    "runs-import-pydantic": ("runs.py", "pydantic", JOB_FILES),
    "influence-imports-click": ("influence.py", "click", JOB_FILES),
    "influence-imports-cli": ("influence.py", "dask_influence.cli.job", FLOORS),
    "document-imports-loading": ("cli/document.py", "dask_influence.cli.loading", COMMAND_LINE),
    "influence-imports-distributed": ("influence.py", "distributed", ONE_SCHEDULER_FILE),
    "plan-imports-tasks": ("execution/plan.py", "dask_influence.execution.tasks", EXECUTION),
    "tasks-import-drive": ("execution/tasks.py", "dask_influence.execution.drive", EXECUTION),
    "drive-imports-dask": ("execution/drive.py", "dask_influence.execution.dask", EXECUTION),
    "objective-imports-curvature": ("core/objective.py", "dask_influence.core.curvature", CORE),
    "arnoldi-imports-direct": (
        "core/estimators/arnoldi.py",
        "dask_influence.core.estimators.direct",
        ESTIMATORS,
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts, in a folder where imports may be planted."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dask_influence", tmp_path / "dask_influence", ignore=ignore)
    return tmp_path


def contracts(folder: Path) -> dict[str, str]:
    """KEPT or BROKEN by the name of the contract, as lint-imports sees ``folder``."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
    ]
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = dict(re.findall(r"^(.+?) (KEPT|BROKEN)\b", run.stdout, flags=re.MULTILINE))
    assert found, run.stdout + run.stderr
    assert (run.returncode == 0) == (set(found.values()) == {"KEPT"}), run.stdout
    return found


def plant(folder: Path, module: str, imported: str) -> None:
    """Make ``module`` import ``imported``; either is made where the package does not hold it."""
    if imported.startswith("dask_influence."):
        target = folder / Path(*imported.split("."))
        if not target.is_dir():
            target.with_suffix(".py").touch()
    with (folder / "dask_influence" / module).open("a") as file:
        file.write(f"\nimport {imported}\n")


def test_the_repository_keeps_every_contract() -> None:
    found = contracts(ROOT)
    assert set(found) == {
        FLOORS,
        PURE_CORE,
        ONE_SCHEDULER_FILE,
        EXECUTION,
        CORE,
        ESTIMATORS,
        SETTINGS,
        JOB_FILES,
        COMMAND_LINE,
    }
    assert set(found.values()) == {"KEPT"}


def test_an_untouched_copy_keeps_every_contract(copy: Path) -> None:
    assert set(contracts(copy).values()) == {"KEPT"}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_import_breaks_its_contract(copy: Path, case: str) -> None:
    module, imported, contract = PLANTED[case]
    plant(copy, module, imported)
    assert contracts(copy)[contract] == "BROKEN"


def test_the_dask_executor_may_import_distributed(copy: Path) -> None:
    plant(copy, "execution/dask.py", "distributed")
    assert contracts(copy)[ONE_SCHEDULER_FILE] == "KEPT"
