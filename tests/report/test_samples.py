"""Samples are drawn as what they are, by their shape or as they are said to be."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dask_influence.report.samples import (
    Depiction,
    Features,
    Picture,
    Plain,
    Text,
    picture,
    strength_map,
)


def decoded(drawn: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.uri.partition(",")[2]))))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((8, 8), "f4", Picture),
        ((3, 9, 7), "f4", Picture),
        ((9, 7, 3), "u1", Picture),
        ((1, 9, 7), "f4", Picture),
        ((12,), "i8", Text),
        ((12,), "f8", Features),
        ((2, 9, 7), "f4", Plain),
        ((), "f4", Plain),
        ((3, 2), "f4", Plain),
    ],
)
def test_kinds_by_shape(shape: tuple[int, ...], dtype: str, kind: type) -> None:
    assert isinstance(Depiction().draw(np.zeros(shape, dtype)), kind)


def test_pixels_are_kept() -> None:
    values = np.random.default_rng(0).random((3, 9, 7))
    for one in (values, np.moveaxis(values, 0, -1)):
        np.testing.assert_array_equal(decoded(picture(one)), np.rint(255 * np.moveaxis(values, 0, -1)))
    octets = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(picture(octets)), octets)
    centred = decoded(picture(np.array([[-2.0] * 4, [0.0] * 4, [2.0] * 4, [np.nan] * 4])))
    assert centred[:, 0].tolist() == [0, 128, 255, 128]
    assert set(decoded(picture(np.full((4, 4), 7.0))).ravel()) == {0}


def test_large_images_are_made_smaller() -> None:
    drawn = picture(np.zeros((400, 600)))
    assert (drawn.height, drawn.width) == (128, 192)
    assert not drawn.coarse
    assert picture(np.zeros((28, 28))).coarse


def test_maps_show_sign_and_strength() -> None:
    drawn = decoded(strength_map(np.array([[2.0, -2.0], [0.5, 0.0]])))
    assert drawn[0, 0, 2] > drawn[0, 0, 0]  # blue helps
    assert drawn[0, 1, 0] > drawn[0, 1, 2]  # red harms
    assert drawn[0, 0, 3] == drawn[0, 1, 3] == 255
    assert 0 == drawn[1, 1, 3] < drawn[1, 0, 3] < 255


def test_colours_of_an_image_are_summed_in_its_map() -> None:
    values = np.zeros((3, 5, 5))
    values[0, 1, 2], values[1, 1, 2] = 1.0, -3.0
    drawn = Depiction().map(np.zeros((3, 5, 5)), values)
    assert drawn is not None
    pixels = decoded(drawn)
    assert pixels[1, 2, 3] == 255
    assert pixels[1, 2, 0] > pixels[1, 2, 2]
    assert Depiction().map(np.zeros(7), np.zeros(7)) is None


def test_long_rows_and_texts_are_cut_and_say_so() -> None:
    row = Depiction().draw(np.arange(100.0), strength=np.r_[np.zeros(70), -5.0, np.zeros(29)])
    assert isinstance(row, Features)
    assert (row.features[0].name, row.features[0].strength, row.more) == ("x70", -1.0, 88)
    text = Depiction().draw(np.arange(1000))
    assert isinstance(text, Text)
    assert (len(text.tokens), text.more, text.tokens[159].text) == (160, 840, "159")


def test_targets_and_tokens_out_of_range_stay_numbers() -> None:
    named = Depiction(class_names=["a"], vocabulary={1: "one"})
    assert [named.target(np.int64(at)) for at in (0, 1, -1)] == ["a", "1", "-1"]
    assert named.target(np.float32(0.25)) == "0.25"
    assert named.target(np.zeros((2, 3))) == "a target of shape 2 × 3"
    text = named.draw(np.array([1, 2]))
    assert isinstance(text, Text)
    assert [token.text for token in text.tokens] == ["one", "2"]
    called = Depiction(vocabulary=lambda number: f"#{number}").draw(np.array([3]))
    assert isinstance(called, Text)
    assert called.tokens[0].text == "#3"


def test_of_several_arrays_the_tokens_are_drawn() -> None:
    x = {"attention_mask": np.ones(3, dtype=int), "input_ids": np.array([7, 8, 9])}
    drawn = Depiction().draw(x)
    assert isinstance(drawn, Text)
    assert [token.text for token in drawn.tokens] == ["7", "8", "9"]
