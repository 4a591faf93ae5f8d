"""Precision of float32 products: one at a time in a process, nothing left behind, refused where it does nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dask_influence.core import precision
from dask_influence.core.precision import PRECISIONS, check_products, matmul_precision, rounding
from dask_influence.errors import ConfigurationError


def settings() -> list[str]:
    return [place.fp32_precision for place, _ in precision._operations()]


@pytest.fixture
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("own", PRECISIONS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_it_holds_inside_whatever_the_process_has_and_leaves_that_as_it_was(own: str, name: str) -> None:
    torch.set_float32_matmul_precision(own)
    before = settings()
    with matmul_precision(name):
        with matmul_precision(name):
            pass
        assert settings() == [names[name] for _, names in precision._operations()]
    assert settings() == before
    assert torch.get_float32_matmul_precision() == own


def test_it_is_left_where_the_body_raises() -> None:
    before = settings()
    with pytest.raises(KeyError), matmul_precision("medium"):
        raise KeyError
    assert settings() == before
    with matmul_precision("high"):  # nobody is counted as inside
        assert settings() != before


def test_threads_of_one_precision_are_in_together_and_another_waits() -> None:
    inside, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with matmul_precision("medium"):
            inside.set()
            leave.wait(30)
            order.append("first")

    def other() -> None:
        with matmul_precision("highest"):
            order.append("other")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(30)
    threads.append(threading.Thread(target=other))
    threads[1].start()
    with matmul_precision("medium"):  # at once
        order.append("second")
    threads[1].join(0.2)
    assert threads[1].is_alive()
    leave.set()
    for thread in threads:
        thread.join(30)
    assert order == ["second", "first", "other"]


def test_one_thread_does_not_wait_for_itself() -> None:
    with (
        matmul_precision("medium"),
        pytest.raises(RuntimeError, match=r"'high'\) within 'medium'"),
        matmul_precision("high"),
    ):
        pass
    with matmul_precision("high"):
        pass


def test_rounding_is_that_of_operands_of_float32_alone() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert rounding(dtype) == torch.finfo(dtype).eps
    with matmul_precision("medium"):
        assert rounding(torch.float32) == torch.finfo(torch.bfloat16).eps
        assert rounding(torch.float64) == torch.finfo(torch.float64).eps
    with matmul_precision("high"):
        assert torch.finfo(torch.float32).eps < rounding(torch.float32) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["high", "medium"])
def test_the_probe_says_what_products_show(name: str) -> None:
    """On each machine one side of it; the other below."""
    left, right = torch.randn(2, 300, 300)
    with matmul_precision("highest"):
        full = left @ right
    with matmul_precision(name):
        found = left @ right
    rounds = bool((found - full).norm() > 1e-5 * full.norm())
    assert precision._rounds(name, "cpu") == rounds
    if rounds:
        check_products(name, torch.device("cpu"))
    else:
        with pytest.raises(
            ConfigurationError, match=f"matmul_precision='{name}' does nothing here: this CPU"
        ):
            check_products(name, torch.device("cpu"))


@pytest.mark.parametrize("rounds", [True, False])
def test_a_precision_is_refused_where_it_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, *, rounds: bool
) -> None:
    monkeypatch.setattr(precision, "_rounds", lambda name, kind: rounds)
    check_products("highest", torch.device("cpu"))
    if rounds:
        check_products("medium", torch.device("cpu"))
        return
    with pytest.raises(ConfigurationError, match="no bfloat16 products of float32 operands"):
        check_products("medium", torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="no TF32 products"):
        check_products("high", torch.device("cpu"))
