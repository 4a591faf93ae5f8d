"""Figures draw the numbers that the stores hold."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from dask_influence import open_influences
from dask_influence.core.estimators import direct
from dask_influence.errors import ConfigurationError, IndefiniteCurvatureWarning
from dask_influence.execution.ledger import Ledger
from dask_influence.report import (
    residuals,
    score_distribution,
    self_influence,
    spectrum,
    timing,
    top_scores,
)
from dask_influence.report.facts import Effort
from dask_influence.report.scores import Signal, twins
from dask_influence.storage.stores import Location
from tests.report.stores import TESTS, TRAINS, Stores


def areas(ax: object) -> float:
    """Sum of the heights of all steps of a histogram."""
    return float(sum(np.nansum(patch.get_data().values) for patch in ax.patches))  # type: ignore[attr-defined]


def test_the_distribution_is_of_all_scores(stores: Stores) -> None:
    ax = Figure().subplots()
    assert score_distribution(open_influences(stores / "scores.zarr"), ax=ax) is ax
    assert areas(ax) == pytest.approx(1.0)
    values = stores.scores()
    edges = ax.patches[0].get_data().edges
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()
    negative = float(np.nansum(ax.patches[0].get_data().values))
    assert negative == pytest.approx((values < 0).mean(), abs=0.08)
    pixels = score_distribution(open_influences(stores / "pixels.zarr"))
    assert pixels.patches[0].get_data().edges[0] >= 0
    assert score_distribution(open_influences(stores / "groups.zarr")).get_xlabel() == "score"


def test_bars_are_the_strongest_scores(stores: Stores) -> None:
    values = np.sort(stores.scores()[3])
    for name in ("scores.zarr", "top.zarr"):
        ax = top_scores(open_influences(stores / name), "t3", count=2)
        widths = [bar.get_width() for bar in ax.patches]
        np.testing.assert_allclose(widths, [*values[:2], *values[-2:]], rtol=1e-6)
    with pytest.raises(ConfigurationError, match="'t9' is not among"):
        top_scores(open_influences(stores / "scores.zarr"), "t9")
    with pytest.raises(ConfigurationError, match="no scores of single training points"):
        top_scores(open_influences(stores / "groups.zarr"), "t3")


def test_names_with_dollars_are_no_formulas() -> None:
    scores = xr.Dataset(
        {"influence": (("test", "train"), [[1.0, -1.0]])}, coords={"test": [0], "train": ["$\\frac{$", "b$"]}
    )
    figure = Figure()
    top_scores(scores, 0, ax=figure.subplots())
    figure.canvas.draw()


def test_the_spectrum_is_that_of_the_sketch(stores: Stores) -> None:
    ax = spectrum(open_influences(stores / "sketch.zarr"))
    drawn = np.concatenate([line.get_ydata() for line in ax.lines if line.get_marker() == "."])
    x = torch.cat([stores.train[0].double(), torch.ones(TRAINS, 1, dtype=torch.float64)], dim=1)
    p = stores.model(stores.train[0]).double().softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nij,na,nb->iajb", inner, x, x).reshape(650, 650) / TRAINS
    expected = torch.linalg.eigvalsh(hessian).flip(0)[:12].numpy()
    np.testing.assert_allclose(np.sort(drawn)[::-1], expected, rtol=1e-4)
    extremes = spectrum(open_influences(stores / "scores.zarr"))  # the exact Hessian's ends are known
    assert extremes.lines[0].get_xdata()[1] == pytest.approx(expected[0], rel=1e-4)
    blocks = {"layers": {f"l{i}": {"smallest_eigenvalue": 0.0, "largest_eigenvalue": 1.0} for i in range(15)}}
    many = spectrum(xr.Dataset(attrs={"diagnostics": blocks, "hessian_regularization": 0.1}))
    assert len(many.get_yticks()) == 12
    assert "3 more" in many.get_xlabel()
    with pytest.raises(ConfigurationError, match="no diagnostics"):
        spectrum(xr.Dataset())


def test_what_a_store_keeps_of_the_diagnostics(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = open_influences(stores / "scores.zarr").attrs["diagnostics"]
    own = stores.direct().diagnostics
    assert kept["largest_eigenvalue"] == pytest.approx(own["largest_eigenvalue"], rel=1e-5)
    assert kept["derivatives"]["gradient"]["form"] == own["derivatives"]["gradient"]["form"]
    assert "passes" not in kept  # another client may have made them
    monkeypatch.setattr(direct, "LARGEST_LOOKED_AT", 600)
    for sign in (1.0, -1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IndefiniteCurvatureWarning)
            inverse = direct.DirectInverse(sign * torch.eye(650, dtype=torch.float64), 0.05, 1e-16)
        assert inverse.recorded()["positive_definite"] is (sign > 0)
        assert "largest_eigenvalue" not in inverse.recorded()
        assert "largest_eigenvalue" in inverse.diagnostics()


def test_residuals_are_counted(stores: Stores) -> None:
    for name in ("scores.zarr", "sketch.zarr"):
        assert areas(residuals(open_influences(stores / name))) == TESTS
    with pytest.raises(ConfigurationError, match="no residuals"):
        residuals(open_influences(stores / "own.zarr"))
    assert areas(residuals(xr.Dataset(coords={"factor_residual": ("test", [0.0, 0.0])}))) == 2


def test_several_regularizations_are_refused(stores: Stores) -> None:
    both = open_influences(stores / "swept.zarr")
    for draw in (score_distribution, residuals, self_influence):
        with pytest.raises(ConfigurationError, match="2 λ"):
            draw(both)
    assert areas(residuals(both.isel(regularization=1))) == TESTS
    with pytest.raises(ConfigurationError, match="this figure shows self_influence"):
        self_influence(both.isel(regularization=0))


def test_self_influence_is_sorted_and_thinned() -> None:
    values = np.random.default_rng(0).gamma(0.5, size=3000)
    (line,) = self_influence(xr.Dataset({"self_influence": ("train", values)})).lines
    drawn = line.get_ydata()
    assert len(drawn) <= 400
    assert drawn[0] == values.max()
    assert drawn[-1] == values.min()
    assert (np.diff(drawn) <= 0).all()


# -- the run ----------------------------------------------------------------------------------
def test_what_the_ledger_tells_of_time_and_memory(stores: Stores) -> None:
    folder = stores / "scores.zarr" / "_run" / "ledger"
    entries = [json.loads(path.read_text()) for path in folder.glob("strip-*.json")]
    effort = Effort.of(Ledger(Location.of(stores / "scores.zarr")))
    assert len(effort.seconds) == len(entries) > 2
    assert effort.total == pytest.approx(sum(entry["seconds"] for entry in entries))
    assert effort.peak_bytes == max(entry["peak_bytes"] for entry in entries) > 50e6
    assert (np.diff(effort.ended) >= 0).all()
    edges, working = effort.at_work() or ([], [])
    # times since 1970 are known to a quarter of a microsecond
    assert float(np.sum(working * np.diff(edges))) == pytest.approx(effort.total, abs=1e-6 * len(entries))
    assert effort.wall is not None
    assert effort.wall >= effort.seconds.max()
    assert timing(stores / "scores.zarr").get_ylabel() == "tasks at work"
    with pytest.raises(ConfigurationError, match="no work that is done"):
        timing(stores / "factors.zarr")


def test_work_at_each_time_is_exact() -> None:
    effort = Effort(np.array([2.0, 2.0]), np.array([102.0, 104.0]), {}, 0)
    edges, working = effort.at_work(4) or ([], [])
    assert list(edges) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(working, [1, 1, 1, 1], atol=1e-9)
    overlapping = Effort(np.array([2.0, 3.0]), np.array([102.0, 104.0]), {}, 0)
    np.testing.assert_allclose((overlapping.at_work(4) or ([], []))[1], [1, 2, 1, 1], atol=1e-9)


def test_ledgers_of_older_versions_have_no_times() -> None:
    place = Location.of("memory://report-older")
    Ledger(place).record("strip-0", {"seconds": 1.5, "worker": "a"})
    effort = Effort.of(Ledger(place))
    assert effort.at_work() is None
    assert effort.wall is None
    assert timing(place).get_xlabel() == "seconds of a task"


# -- duplicates ---------------------------------------------------------------------------------
def test_copies_are_found_among_many_and_neighbours_are_not() -> None:
    generator = np.random.default_rng(0)
    own, row = generator.gamma(1.0, size=4000), generator.normal(size=4000)
    for at, copy in ((3, 900), (17, 2500)):
        own[copy], row[copy] = own[at] * (1 + 1e-7), row[at] * (1 - 1e-7)
    own[5] = np.nan
    both = twins([Signal(own), Signal(row, 1e-6)], 1e-5)
    assert both == [(3, 900), (17, 2500)]
    assert len(twins([Signal(own)], 1e-4)) > 100  # by one number alone, many agree
    assert twins([Signal(np.zeros(4))], 1e-6) == []
    assert twins([Signal(np.ones(30))], 1e-6) == []
