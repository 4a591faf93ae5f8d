"""What is made of a tensor is made once, and goes with it."""

from __future__ import annotations

import gc
import weakref

import torch

from dask_influence.core.derived import derived, held_in

CPU = torch.device("cpu")


def test_made_once_for_each_tensor_and_key() -> None:
    tensor, other, calls = torch.ones(3), torch.ones(3), []

    def make() -> list[int]:
        calls.append(1)
        return [len(calls)]

    found = [derived(one, key, make) for one in (tensor, other) for key in ("a", "b", "a")]
    assert [value[0] for value in found] == [1, 2, 1, 3, 4, 3]


def test_goes_with_its_tensor() -> None:
    tensor = torch.ones(3, dtype=torch.float64)
    narrow = weakref.ref(held_in(tensor, torch.float32, CPU))
    assert narrow() is held_in(tensor, torch.float32, CPU)
    del tensor
    gc.collect()
    assert narrow() is None


def test_no_wider_copy_is_kept() -> None:
    tensor = torch.ones(3, dtype=torch.float32)
    assert held_in(tensor, torch.float32, CPU) is tensor
    wide = held_in(tensor, torch.float64, CPU)
    assert wide.dtype == torch.float64
    assert held_in(tensor, torch.float64, CPU) is not wide
