"""Models and losses are told apart by what they compute, and by nothing else."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import DirectInfluence, GradientDotInfluence
from dask_influence.core.content import Content, contents, octets
from dask_influence.errors import StoreMismatchError

WEIGHTS = torch.ones(3)
X = torch.randn(90, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(90) // 30


def weighted(weights: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: (
        functional.cross_entropy(output, target, reduction="none")
        * torch.tensor(weights, dtype=output.dtype)[target]
    ).mean()


def reads_a_global(output: Tensor, target: Tensor) -> Tensor:
    return (functional.cross_entropy(output, target, reduction="none") * WEIGHTS[target]).mean()


def scaled(output: Tensor, target: Tensor, *, table: Tensor) -> Tensor:
    return functional.cross_entropy(output, target) * table.sum()


class Buffered(nn.Module):
    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return weighted(self.weights.tolist())(output, target)


class Counting:
    def __init__(self, scale: float) -> None:
        self.scale, self.calls = scale, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(output, target) * self.scale


class Net(nn.Module):
    """Remembers its last activations, as models that show their attention do."""

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.bound, self.last = nn.Linear(4, 3).double(), bound, None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last.clamp(-self.bound, self.bound)


def table(at: int) -> Tensor:
    return torch.ones(2_000).index_fill(0, torch.tensor([at]), 3.0)


LOSSES: dict[str, Callable[[bool], Any]] = {
    "closure": lambda other: weighted([1.0, 5.0, 9.0] if other else [1.0, 1.0, 1.0]),
    "buffer": lambda other: Buffered([1.0, 5.0, 9.0] if other else [1.0, 1.0, 1.0]),
    "module": lambda other: nn.CrossEntropyLoss(label_smoothing=0.1 if other else 0.0),
    "partial": lambda other: functools.partial(scaled, table=table(1_000 if other else 900)),
    "attribute": lambda other: Counting(2.0 if other else 1.0),
    "code": lambda other: (lambda o, t: functional.cross_entropy(o, t) * 2) if other else reads_a_global,
    "default": lambda other: (
        (lambda o, t, by=2.0: functional.cross_entropy(o, t) * by)
        if other
        else (lambda o, t, by=1.0: functional.cross_entropy(o, t) * by)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_differ_differ_and_equal_ones_do_not(name: str) -> None:
    first, again, other = (contents(Net(), LOSSES[name](which)) for which in (False, False, True))
    assert first == again
    assert any(first[path] != other.get(path) for path in first if path.startswith("loss"))


def test_a_global_that_a_loss_reads_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(Net(), reads_a_global)
    monkeypatch.setitem(globals(), "WEIGHTS", torch.tensor([1.0, 5.0, 9.0]))
    after = contents(Net(), reads_a_global)
    assert [path for path in before if before[path] != after[path]] == ["loss"]


def test_attributes_of_models_are_part_of_them() -> None:
    one, other = contents(Net(1.0), functional.cross_entropy), contents(Net(2.0), functional.cross_entropy)
    assert [path for path in one if one[path] != other[path]] == ["model.bound"]
    slopes = [nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(slope)) for slope in (0.1, 0.2)]
    one, other = (contents(net, functional.mse_loss) for net in slopes)
    assert [path for path in one if one[path] != other[path]] == ["model.1.negative_slope"]


class Owned(nn.Module):
    """Knows the model it is part of, beside the table of modules."""

    def __init__(self, owner: nn.Module, bound: float) -> None:
        super().__init__()
        self.owner, self.bound = [owner], bound


def cyclic(bound: float) -> nn.Module:
    net = Net()
    net.part = Owned(net, bound)
    net.forward = types.MethodType(lambda self, x: self.layer(x).clamp(-bound, bound), net)  # type: ignore[method-assign]
    return net


def test_modules_that_hold_what_holds_them() -> None:
    one, again, other = (contents(cyclic(bound), functional.cross_entropy) for bound in (1.0, 1.0, 2.0))
    assert one == again
    assert [path for path in one if one[path] != other[path]] == ["model.part.bound", "model.forward"]


def test_what_calls_change_is_left_out() -> None:
    net, loss = Net(), Counting(1.0)
    fresh = contents(net, loss)
    seen = [fresh]
    for part in (slice(0, 9), slice(9, 20)):
        loss(net(X[part]), Y[part])
        seen.append(contents(net, loss))
    content = Content.of(*seen)
    assert not {"loss.calls", "model.last"} & content.parts.keys()
    assert {"loss.scale", "model.bound"} <= content.parts.keys()
    assert content.differing(fresh) == []
    assert content.differing(contents(Net(2.0), Counting(3.0))) == ["loss.scale", "model.bound"]


@pytest.mark.parametrize(("folder", "by_name"), [("site-packages", True), ("project", False)])
def test_packages_of_another_environment_go_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, by_name: bool
) -> None:
    name = f"losses_in_{folder.replace('-', '_')}"
    (tmp_path / folder).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    seen = []
    for factor in (1, 2):
        (tmp_path / folder / f"{name}.py").write_text(
            f"def loss(output, target):\n    return {factor} * output\n"
        )
        monkeypatch.delitem(sys.modules, name, raising=False)
        seen.append(contents(Net(), importlib.import_module(name).loss))
    assert (seen[0] == seen[1]) == by_name


def test_digests_are_those_of_every_session() -> None:
    code = (
        "from tests.core.test_content import *\n"
        "print({name: contents(Net(), loss(True)) for name, loss in LOSSES.items()} == eval(input()))"
    )
    here = repr({name: contents(Net(), loss(True)) for name, loss in LOSSES.items()})
    done = subprocess.run(
        [sys.executable, "-c", code], input=here, capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("name", ["closure", "buffer"])
def test_no_stale_sum_store_or_save_is_taken(tmp_path: Path, name: str) -> None:
    """The first samples, all of one class, show nothing of the weights."""
    one, other = (LOSSES[name](which) for which in (False, True))
    how = {"artifacts": tmp_path / "kept", "chunk_size": 30}
    DirectInfluence(Net(9.0), one, 1.0, **how).fit((X, Y))
    second = DirectInfluence(Net(9.0), one, 1.0, **how).fit((X, Y))
    third = DirectInfluence(Net(9.0), other, 1.0, **how)
    third.fit((X, Y))
    assert (second.diagnostics["restored"], third.diagnostics["restored"]) == (1, 0)
    for loss in (one, other):
        dot = GradientDotInfluence(Net(9.0), loss, 1.0, chunk_size=30).fit((X, Y))
        if loss is one:
            dot.influences_to_zarr(tmp_path / "run", (X[:3], Y[:3]), (X, Y))
        else:
            with pytest.raises(StoreMismatchError, match="model_and_loss"):
                dot.influences_to_zarr(tmp_path / "run", (X[:3], Y[:3]), (X, Y))
    second.save(tmp_path / "saved")
    DirectInfluence.load(tmp_path / "saved", Net(9.0), LOSSES[name](False))
    with pytest.raises(StoreMismatchError, match="loss"):
        DirectInfluence.load(tmp_path / "saved", Net(9.0), other)
    with pytest.raises(StoreMismatchError, match=r"model\.bound"):
        DirectInfluence.load(tmp_path / "saved", Net(8.0), LOSSES[name](False))


def test_bytes_of_one_entry_whatever_its_stride() -> None:
    one = torch.arange(10.0)[::5][1:]
    assert one.stride() == (5,)
    assert octets(one).tobytes() == torch.tensor([5.0]).numpy().tobytes()
    assert octets(torch.ones(3, 2).mT).tobytes() == torch.ones(6).numpy().tobytes()
