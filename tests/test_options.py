"""``compile=`` and ``matmul_precision=``: refused where a process lacks them, in force in every task."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client, LocalCluster
from torch import Tensor, nn

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradientDotInfluence,
    InfluenceFunctionModel,
    open_influences,
)
from dask_influence.core import precision
from dask_influence.errors import ConfigurationError, InfluenceWarning, StoreMismatchError
from tests import data, oracles

COARSE = pytest.mark.filterwarnings("ignore:matmul_precision.*:dask_influence.errors.InfluenceWarning")


def doubled_where_coarse(output: Tensor, target: Tensor) -> Tensor:
    """A loss that tells in which precision its process multiplies: twice as large where it is not the highest."""
    coarse = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return nn.functional.mse_loss(output, target) * (2 if coarse else 1)


def capable() -> None:
    """This process is taken to have every product."""
    precision._rounds = lambda name, kind: True  # type: ignore[assignment]


def lacking() -> None:
    """This process is taken to have none but float32's."""
    precision._rounds = lambda name, kind: False  # type: ignore[assignment]


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_rounds", lambda name, kind: True)


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_rounds", lambda name, kind: False)


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces in place of compiled programs: what the compiler makes of them is tested below."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


def single(case: data.Case) -> tuple[nn.Module, data.Pair, data.Pair]:
    """The case in float32, its model not shared."""
    model = copy.deepcopy(case.model).float()
    train, test = (
        tuple(leaf.float() if leaf.is_floating_point() else leaf for leaf in pair)
        for pair in (case.train, case.test)
    )
    return model, train, test


# -- arguments -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"compile": "yes"}, "compile must be True or False"),
        (
            {"matmul_precision": "bf16"},
            "matmul_precision must be one of 'highest', 'high', 'medium'; got 'bf16'",
        ),
        ({"matmul_precision": None}, "matmul_precision must be one of"),
    ],
)
def test_other_values_are_refused_by_every_estimator(asked: dict[str, Any], message: str) -> None:
    for kind in InfluenceFunctionModel.__subclasses__():
        with pytest.raises(ConfigurationError, match=message):
            kind(nn.Linear(2, 1), nn.functional.mse_loss, 0.1, **asked)


@pytest.mark.usefixtures("able")
def test_a_precision_of_float32_products_is_refused_for_other_dtypes() -> None:
    case = data.linear_regression()
    asked = GradientDotInfluence(case.model, case.loss, matmul_precision="medium")
    with pytest.raises(ConfigurationError, match=r"the model computes in float64; .*dtype=torch.float32"):
        asked.fit(case.train)


@pytest.mark.usefixtures("unable")
def test_hardware_without_such_products_is_refused_before_any_task(tmp_path: Path) -> None:
    model, train, _ = single(data.linear_regression())
    asked = DirectInfluence(
        model, nn.functional.mse_loss, 0.1, matmul_precision="medium", artifacts=tmp_path / "artifacts"
    )
    with pytest.raises(ConfigurationError, match="matmul_precision='medium' does nothing here"):
        asked.fit(train, progress=lambda *_: pytest.fail("a pass was made"))
    assert not (tmp_path / "artifacts").exists()
    DirectInfluence(model, nn.functional.mse_loss, 0.1).fit(train)


@pytest.mark.usefixtures("able")
def test_a_worker_without_them_is_refused_by_its_address(client: Client) -> None:
    """This process has them (it is said), the worker has not."""
    model, train, _ = single(data.linear_regression())
    client.run(lacking)
    try:
        asked = DirectInfluence(model, nn.functional.mse_loss, 0.1, matmul_precision="high", client=client)
        with pytest.raises(
            ConfigurationError, match=r"worker tcp://.*: matmul_precision='high' does nothing here"
        ):
            asked.fit(train)
    finally:
        client.run(capable)


# -- precision -----------------------------------------------------------------------------
@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("where", ["here", "cluster"])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_it_is_in_force_in_every_task_and_only_there(
    where: str, mode: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, train, test = single(data.linear_regression())
    cluster = None
    if where == "cluster":
        cluster = request.getfixturevalue("client")
        cluster.run(capable)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    plain = GradientDotInfluence(model, doubled_where_coarse).fit(train)
    asked = GradientDotInfluence(model, doubled_where_coarse, matmul_precision="medium", client=cluster)
    with pytest.warns(InfluenceWarning, match=r"gradients are off by 100.0%"):
        asked.fit(train)
    assert asked.diagnostics["matmul_error"]["gradient"] == pytest.approx(1, abs=0.05)
    assert set(asked.diagnostics["matmul_error"]) == {"gradient", "directional", "product"}
    expected = 4 * plain.influences(*test, *train, mode=mode)
    scores = {
        "memory": asked.influences(*test, *train, mode=mode),
        "store": torch.from_numpy(
            asked.influences_to_zarr(tmp_path / "run", test, train, mode=mode)["influence"].values
        ),
        "factors": asked.influences_from_factors(asked.influence_factors(*test), *train, mode=mode),
    }
    for name, found in scores.items():
        assert oracles.relative_error(found, expected) <= 0.05, name
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    assert open_influences(tmp_path / "run").attrs["matmul_precision"] == "medium"


@COARSE
@pytest.mark.usefixtures("able")
def test_two_precisions_at_once_keep_to_themselves() -> None:
    model, train, test = single(data.linear_regression())
    fits = {
        name: GradientDotInfluence(model, doubled_where_coarse, matmul_precision=name).fit(train)
        for name in ("highest", "medium")
    }
    expected = {name: fitted.influences(*test, *train) for name, fitted in fits.items()}
    assert oracles.relative_error(expected["medium"], 4 * expected["highest"]) <= 0.05
    wrong: list[str] = []

    def ask(name: str) -> None:
        found = (fits[name].influences(*test, *train) for _ in range(20))
        wrong.extend(name for scores in found if not torch.equal(scores, expected[name]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("highest", "medium") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_the_process_has_set_is_in_no_task() -> None:
    model, train, test = single(data.linear_regression())
    expected = GradientDotInfluence(model, doubled_where_coarse).fit(train).influences(*test, *train)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = GradientDotInfluence(model, doubled_where_coarse).fit(train).influences(*test, *train)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(("regularization", "warns"), [(1e-3, True), (100.0, False)])
def test_products_that_are_off_by_more_than_the_regularization_covers_are_told(
    regularization: float, *, warns: bool
) -> None:
    """The doubled loss makes products that are off by the whole curvature."""
    model, train, _ = single(data.linear_regression())
    asked = CgInfluence(model, doubled_where_coarse, regularization, matmul_precision="medium")
    with pytest.warns(InfluenceWarning) as issued:
        asked.fit(train)
    told = [str(one.message) for one in issued if "not small against λ" in str(one.message)]
    assert len(told) == warns
    if warns:
        assert "λ = 0.001" in told[0]
        assert "take hessian_regularization ≥" in told[0]


@COARSE
@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("structure", [None, "layer"])
def test_eigenpairs_are_asked_for_no_more_than_rounded_products_tell(structure: str | None) -> None:
    """Or Arnoldi would go on to its last pass, where the hardware does round."""
    case = data.digits_mlp()
    model, train, _ = single(case)

    def passes(tol: float, precision: str) -> int:
        asked = ArnoldiInfluence(
            model, case.loss, 0.1, rank=10, tol=tol, block_structure=structure, matmul_precision=precision
        )
        found = asked.fit(train).diagnostics
        assert "eigenpair_residual" not in found or found["eigenpair_residual"] <= max(tol, 2**-10)
        return found["passes"]

    assert passes(1e-6, "medium") == passes(2**-10, "medium") < passes(1e-6, "highest")


@COARSE
@pytest.mark.usefixtures("able")
def test_a_store_begun_in_another_precision_is_refused_by_that_name(tmp_path: Path) -> None:
    model, train, test = single(data.linear_regression())
    plain = GradientDotInfluence(model, nn.functional.mse_loss).fit(train)
    plain.influences_to_zarr(tmp_path / "run", test, train)
    coarse = GradientDotInfluence(model, nn.functional.mse_loss, matmul_precision="medium").fit(train)
    with pytest.raises(StoreMismatchError, match="matmul_precision"):
        coarse.influences_to_zarr(tmp_path / "run", test, train)


@COARSE
@pytest.mark.usefixtures("able", "_traced")
def test_options_are_saved_with_a_fit(tmp_path: Path) -> None:
    model, train, test = single(data.mlp_regression())
    fitted = EkfacInfluence(
        model, nn.functional.mse_loss, 0.1, compile=True, matmul_precision="medium", curvature="ggn"
    ).fit(train)
    fitted.save(tmp_path / "fit")
    loaded = EkfacInfluence.load(tmp_path / "fit", model, nn.functional.mse_loss)
    assert loaded.compile
    assert loaded.matmul_precision == "medium"
    assert loaded.diagnostics["compiled_error"] == fitted.diagnostics["compiled_error"]
    assert loaded._require_fit().problem.forms == fitted._require_fit().problem.forms
    assert torch.equal(loaded.influences(*test, *train), fitted.influences(*test, *train))


# -- compile -------------------------------------------------------------------------------
class Within(nn.Module):
    """A chain inside of a module of one's own, whose gradients are no chain's."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("kind", [DirectInfluence, ArnoldiInfluence, CgInfluence, GradientDotInfluence])
def test_compiled_scores_are_those_of_the_oracle(kind: Any, tmp_path: Path) -> None:
    case, own = data.mlp_classification(), {"rank": 50} if kind is ArnoldiInfluence else {}
    model = Within(case.model)
    fitted = kind(model, case.loss, case.regularization, compile=True, **own).fit(case.train)
    errors = fitted.diagnostics["compiled_error"]
    assert {"gradient", "directional"} <= set(errors)
    assert max(errors.values()) <= 1e-12
    plain = kind(model, case.loss, case.regularization, **own).fit(case.train)
    assert "compiled_error" not in plain.diagnostics
    found = fitted.influences(*case.test, *case.train)
    assert oracles.relative_error(found, plain.influences(*case.test, *case.train)) <= 1e-9
    written = fitted.influences_to_zarr(tmp_path / "run", case.test, case.train)
    assert oracles.relative_error(written["influence"].values, found) <= 1e-9
    assert written.attrs["compile"]


class Fenced(nn.Module):
    """Asks for the value of a parameter, which no trace knows; ``vmap`` and ``grad`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.scale if self.scale.item() > 0 else 1)


def test_a_model_that_cannot_be_compiled_is_told_and_runs_without() -> None:
    case, model = data.mlp_regression(), Fenced().double()
    asked = GradientDotInfluence(model, case.loss, compile=True)
    with pytest.warns(
        InfluenceWarning, match=r"compile=True: some derivatives .* run uncompiled \(gradient: "
    ):
        asked.fit(case.train)
    assert "gradient" not in asked.diagnostics["compiled_error"]
    assert "gradient" in asked.diagnostics["uncompiled"]
    plain = GradientDotInfluence(model, case.loss).fit(case.train)
    found = asked.influences(*case.test, *case.train)
    assert torch.equal(found, plain.influences(*case.test, *case.train))


def test_a_worker_without_a_compiler_is_refused_before_any_task(tmp_path: Path) -> None:
    case = data.mlp_regression()
    path = {"PATH": str(tmp_path)}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, env=path) as cluster,
        Client(cluster) as bare,
    ):
        asked = DirectInfluence(
            case.model, case.loss, 0.1, compile=True, client=bare, artifacts=tmp_path / "artifacts"
        )
        with pytest.raises(ConfigurationError, match=r"worker tcp://.*: compile=True needs a C\+\+ compiler"):
            asked.fit(case.train)
        assert not (tmp_path / "artifacts").exists()
        DirectInfluence(case.model, case.loss, 0.1, client=bare).fit(case.train)


def test_a_cluster_compiles_and_scores_the_same(client: Client) -> None:
    """The compiler itself, on a worker: one of the slower tests."""
    case = data.linear_regression()
    asked = GradientDotInfluence(case.model, case.loss, compile=True, client=client)
    try:
        asked.fit(case.train)
    except ConfigurationError as lacking:
        pytest.skip(str(lacking))
    assert max(asked.diagnostics["compiled_error"].values()) <= 1e-12
    plain = GradientDotInfluence(case.model, case.loss).fit(case.train)
    expected = plain.influences(*case.test, *case.train)
    assert oracles.relative_error(asked.influences(*case.test, *case.train), expected) <= 1e-12
