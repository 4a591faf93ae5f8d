"""The accuracy that is claimed, on a third of the data: what ``make accuracy`` measures on all of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dask_influence.cli import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def validated(folder: Path, name: str, change: Any) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Findings of a job of the examples, made small by ``change``."""
    shutil.copy(EXAMPLES / "digits_validation.py", folder)
    job = yaml.safe_load((EXAMPLES / name).read_text())
    job["cluster"] = {"workers": 0}
    change(job)
    (folder / name).write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(cli, ["validate", str(folder / name), "--json"])
    assert result.exit_code == 0, result.stderr
    return {
        (one["part"], one["estimator"], one["hessian_regularization"]): one["result"]
        for one in json.loads(result.stdout)["findings"]
    }


def keep(section: dict[str, Any], *names: str) -> None:
    """Only these estimators."""
    for field in ("estimators", "references"):
        section[field] = {name: section[field][name] for name in names}


def test_exact_scores_of_logistic_regression_are_the_effect_of_training_again(tmp_path: Path) -> None:
    """In size too; without curvature they are not."""

    def small(job: dict[str, Any]) -> None:
        job["model"] = {"factory": job["model"], "arguments": {"count": 479}}
        job["data"]["train"]["arguments"]["count"] = 479
        section = job["validation"]
        section |= {
            "leave_one_out": {"points": 12},
            "linear_datamodeling_score": {"subsets": 10, "seeds": [0]},
            "finite_difference_response": {"points": 5, "weight": 1e-5},
        }
        keep(section, "exact", "gradient dot")

    found = validated(tmp_path, "digits_logistic.yaml", small)
    loo, lds, response = ("leave_one_out", "linear_datamodeling_score", "finite_difference_response")
    exact, plain = (
        {part: found[part, name, 0.01] for part in (loo, lds, response)} for name in ("exact", "gradient dot")
    )
    assert exact[loo]["value"] >= 0.999
    assert exact[loo]["slope"] == pytest.approx(1, abs=0.2)
    assert exact[lds]["value"] >= 0.93
    assert exact[response]["value"] >= 0.999999
    assert exact[response]["slope"] == pytest.approx(1, abs=1e-3)
    assert plain[loo]["value"] < 0.9
    assert plain[lds]["value"] < 0.85
    assert found["mislabel_detection", "exact", 0.01]["self influence"]["value"] > 0.95


def test_gauss_newton_scores_of_a_network_rank_subsets_and_match_the_proximal_response(
    tmp_path: Path,
) -> None:
    def small(job: dict[str, Any]) -> None:
        job["model"]["arguments"]["steps"] = 600
        job["data"]["test"]["arguments"]["count"] = 60
        job["hessian_regularizations"] = [0.001, 0.1]
        section = job["validation"]
        section["training"]["optimizer"]["steps"] = 250
        section |= {
            "linear_datamodeling_score": {"subsets": 10, "seeds": [0]},
            "proximal_bregman_response": {"points": 4},
        }
        keep(section, "GGN")
        section["references"] = {}

    found = validated(tmp_path, "digits_network.yaml", small)
    assert found["linear_datamodeling_score", "GGN", 0.001]["value"] > 0.4
    assert found["proximal_bregman_response", "GGN", 0.1]["value"] > 0.95
