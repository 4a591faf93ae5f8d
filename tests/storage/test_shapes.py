"""Shapes: each predicate on both sides, and nothing that JSON holds makes one raise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_influence.storage import shapes

_NESTED = shapes.holding(sample=shapes.whole, axis=shapes.either(None, "test", shapes.listed(shapes.record)))


@pytest.mark.parametrize(
    ("shape", "right", "wrong"),
    [
        (shapes.text, ["", "λ"], [None, 1, "\ud800"]),
        (shapes.name, ["a", "influence/c/0 0"], ["", "/a", "a//b", "..", "a/./b", "a\0", "\ud800", 1]),
        (shapes.flag, [True, False], [0, None]),
        (shapes.number, [0, -1.5, float("nan")], [True, "1"]),
        (shapes.whole, [0, 7], [-1, 1.0, True]),
        (shapes.count, [1, 7], [0, 1.0, True]),
        (shapes.record, [["k", 0, "crc"]], [["k", 0], ["k", "0", "crc"], ["", 0, "crc"], ("k", 0, "crc"), 5]),
        (shapes.listed(shapes.whole), [[], [1, 2]], [[1, -2], {}, "12"]),
        (shapes.items(shapes.whole, shapes.text), [[1, "a"]], [[1], ["a", 1], [1, "a", 2]]),
        (shapes.mapped(shapes.whole), [{}, {"a": 1}], [{"a": "b"}, []]),
        (
            _NESTED,
            [{"sample": 1, "axis": "test"}, {"sample": 1, "axis": []}],
            [{"sample": 1}, {"axis": None}, []],
        ),
        (shapes.either(None, 3), [None, 3], [False, 3.0, "3"]),
    ],
)
def test_shapes(shape: shapes.Shape, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not shape(value)] == []
    assert [value for value in wrong if shape(value)] == []


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sample", "axis", "a"]), inner)
    ),
    max_leaves=8,
)


@given(value=_JSON)
def test_no_value_makes_a_shape_raise(value: Any) -> None:
    for shape in (_NESTED, shapes.listed(shapes.record), shapes.mapped(_NESTED), shapes.items(shapes.name)):
        assert shape(value) in (True, False)
