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
ESTIMATORS = "Estimators do not know each other"

PLANTED = [
    pytest.param("core/objective.py", "import dask.array", {PURE_CORE}, id="core-imports-dask"),
    pytest.param("core/moments.py", "import xarray", {PURE_CORE}, id="core-imports-xarray"),
    pytest.param("grid.py", "import zarr", {PURE_CORE}, id="grid-imports-zarr"),
    pytest.param("core/moments.py", "import dask_influence.execution", {FLOORS}, id="core-imports-execution"),
    pytest.param("core/moments.py", "import dask_influence.storage", {FLOORS}, id="core-imports-storage"),
    pytest.param(
        "storage/__init__.py", "import dask_influence.core.moments", {FLOORS}, id="storage-imports-core"
    ),
    pytest.param("grid.py", "import dask_influence.core.moments", {FLOORS}, id="grid-imports-core"),
    pytest.param("errors.py", "import dask_influence.grid", {FLOORS}, id="errors-imports-grid"),
    pytest.param("attic.py", "import dask_influence.errors", {FLOORS}, id="module-without-a-floor"),
    pytest.param(
        "storage/planted.py", "import distributed", {ONE_SCHEDULER_FILE}, id="storage-imports-distributed"
    ),
    pytest.param(
        "execution/plan.py", "import dask_influence.execution.tasks", {EXECUTION}, id="plan-imports-tasks"
    ),
    pytest.param(
        "execution/tasks.py", "import dask_influence.execution.drive", {EXECUTION}, id="tasks-import-drive"
    ),
    pytest.param(
        "core/objective.py", "import dask_influence.core.curvature", {CORE}, id="objective-imports-curvature"
    ),
    pytest.param(
        "core/estimators/arnoldi.py",
        "import dask_influence.core.estimators.direct",
        {ESTIMATORS},
        id="estimator-imports-estimator",
    ),
]


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


def plant(folder: Path, module: str, statement: str) -> None:
    """Put ``statement`` at the end of ``module``, which is made where it does not exist."""
    path = folder / "dask_influence" / module
    imported = statement.removeprefix("import ")
    if imported.startswith("dask_influence."):
        target = folder / Path(*imported.split("."))
        if not target.is_dir():
            target.with_suffix(".py").touch()
    with path.open("a") as file:
        file.write(f"\n{statement}\n")


def test_the_repository_keeps_every_contract() -> None:
    found = contracts(ROOT)
    assert set(found) == {FLOORS, PURE_CORE, ONE_SCHEDULER_FILE, EXECUTION, CORE, ESTIMATORS}
    assert set(found.values()) == {"KEPT"}


def test_an_untouched_copy_keeps_every_contract(copy: Path) -> None:
    assert set(contracts(copy).values()) == {"KEPT"}


@pytest.mark.parametrize(("module", "statement", "broken"), PLANTED)
def test_a_planted_import_breaks_its_contract(
    copy: Path, module: str, statement: str, broken: set[str]
) -> None:
    plant(copy, module, statement)
    found = contracts(copy)
    assert broken <= {name for name, state in found.items() if state == "BROKEN"}


def test_only_the_dask_executor_may_import_distributed(copy: Path) -> None:
    plant(copy, "execution/dask.py", "import distributed")
    assert contracts(copy)[ONE_SCHEDULER_FILE] == "KEPT"
