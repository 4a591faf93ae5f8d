"""Samples drawn as what they are: pictures, text, rows of features; with what each part of them does to a score."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optree

from dask_influence.errors import ConfigurationError
from dask_influence.scalars import check_integer

Array = np.ndarray[Any, Any]

Kind = Literal["image", "text", "tabular"]
KINDS = ("image", "text", "tabular")

LARGEST_SIDE = 192
"""Pixels of a picture in the page; larger ones are made smaller."""

MOST_TOKENS = 160
MOST_FEATURES = 12

HELPS, HARMS = (52, 120, 204), (212, 62, 66)
"""Colours of maps, which stand on the page's own ground."""


# -- what is drawn ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Picture:
    """An image as a PNG.

    Attributes
    ----------
    uri : str
        ``data:`` URI.
    height, width : int
        Pixels of the PNG.
    """

    uri: str
    height: int
    width: int
    kind: str = "image"

    @property
    def coarse(self) -> bool:
        """Whether pixels are to be seen as squares."""
        return max(self.height, self.width) <= 64


@dataclass(frozen=True)
class Token:
    """A token, and its strength from −1 to 1, 0 where nothing is known."""

    text: str
    strength: float = 0.0


@dataclass(frozen=True)
class Text:
    """Tokens, and how many were left out at the end."""

    tokens: tuple[Token, ...]
    more: int = 0
    kind: str = "text"


@dataclass(frozen=True)
class Feature:
    """A feature with its value as text, and its strength from −1 to 1 (None: not known)."""

    name: str
    value: str
    strength: float | None = None


@dataclass(frozen=True)
class Features:
    """Features, the strongest first where strengths are known, and how many were left out."""

    features: tuple[Feature, ...]
    more: int = 0
    kind: str = "tabular"


@dataclass(frozen=True)
class Plain:
    """What is neither: said in words."""

    text: str
    kind: str = "plain"


Drawing = Picture | Text | Features | Plain


# -- how ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Depiction:
    """How samples are drawn.

    Parameters
    ----------
    kind : "image", "text", "tabular" or None
        None: by the shape of a sample. Two or three axes, of which one may be 1, 3 or 4 channels in front or at the
        end, are an image; one axis of integers is text; one axis of floats is a row of features.
    image_shape : tuple of int, optional
        (H, W), (C, H, W) or (H, W, C) of samples that are kept flat.
    feature_names : sequence of str, optional
        One for each feature of a row.
    vocabulary : sequence, mapping or callable, optional
        Token of each integer.
    class_names : sequence of str or mapping, optional
        Name of each integer target.

    Raises
    ------
    ConfigurationError
        One of them is of another kind.

    Examples
    --------
    >>> names = Depiction(feature_names=["age", "dose"], class_names=["well", "ill"])
    >>> [(f.name, f.value) for f in names.draw(np.array([61.0, 0.25])).features], names.target(np.int64(1))
    ([('age', '61'), ('dose', '0.25')], 'ill')
    """

    kind: Kind | None = None
    image_shape: tuple[int, ...] | None = None
    feature_names: Sequence[str] | None = None
    vocabulary: Sequence[str] | Mapping[int, str] | Callable[[int], str] | None = None
    class_names: Sequence[str] | Mapping[int, str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, *KINDS):
            raise ConfigurationError(
                f"kind must be one of {', '.join(map(repr, KINDS))} or None; got {self.kind!r}"
            )
        if self.image_shape is not None:
            self._check_image_shape()
        if self.feature_names is not None:
            object.__setattr__(self, "feature_names", _texts("feature_names", self.feature_names))
        for argument in ("class_names", "vocabulary"):
            names = getattr(self, argument)
            if names is None or isinstance(names, Mapping) or (argument == "vocabulary" and callable(names)):
                continue
            object.__setattr__(self, argument, _texts(argument, names))

    def _check_image_shape(self) -> None:
        given = self.image_shape
        if not isinstance(given, tuple | list) or len(given) not in (2, 3):
            raise ConfigurationError(f"image_shape must be (H, W), (C, H, W) or (H, W, C); got {given!r}")
        shape = tuple(check_integer("image_shape", extent) for extent in given)
        if len(shape) == 3 and _channels_first(shape) is None:
            raise ConfigurationError(f"image_shape must have 1, 3 or 4 channels first or last; got {shape}")
        object.__setattr__(self, "image_shape", shape)

    def check(self, x: Any, argument: str) -> None:
        """Refuse samples like ``x`` that cannot be drawn as was asked.

        Raises
        ------
        ConfigurationError
            Names the argument and both shapes.
        """
        leaf = leading(x)
        if self.image_shape is not None and leaf.size != np.prod(self.image_shape):
            raise ConfigurationError(
                f"image_shape={self.image_shape} does not fit: a sample of {argument} has shape {leaf.shape}"
            )
        if self.kind == "image" and self.image_shape is None and _image_shape(leaf.shape) is None:
            raise ConfigurationError(
                f'kind="image" does not fit samples of {argument} of shape {leaf.shape}; give image_shape='
            )
        if self.feature_names is not None and leaf.size != len(self.feature_names):
            raise ConfigurationError(
                f"feature_names holds {len(self.feature_names)} names, and a sample of {argument} has "
                f"{leaf.size} features"
            )

    # -- drawing ------------------------------------------------------------------------
    def draw(self, x: Any, strength: Array | None = None, tokens: Sequence[str] | None = None) -> Drawing:
        """One sample; rows and tokens with the ``strength`` of each part."""
        leaf = leading(x)
        kind = "text" if tokens is not None else self._kind_of(leaf)
        if kind == "image":
            return picture(leaf.reshape(self.image_shape or leaf.shape))
        if kind == "text":
            return self._text(leaf, strength, tokens)
        if kind == "tabular":
            return self._row(leaf.ravel(), strength)
        return Plain(f"an array of shape {' × '.join(map(str, leaf.shape)) or '()'}")

    def map(self, x: Any, strength: Array) -> Picture | None:
        """What each pixel does, on its own scale; None for what is no image."""
        leaf = leading(x)
        if self._kind_of(leaf) != "image" or strength.size != leaf.size:  # which it is of other data
            return None
        shape = self.image_shape or leaf.shape
        first = _channels_first(shape) if len(shape) == 3 else None
        values = strength.reshape(shape)
        if len(shape) == 3:
            values = values.sum(axis=0 if first else -1)
        return strength_map(values)

    def _kind_of(self, leaf: Array) -> str:
        if self.kind is not None:
            return self.kind
        if self.image_shape is not None or _image_shape(leaf.shape) is not None:
            return "image"
        if self.feature_names is not None:
            return "tabular"
        if leaf.ndim == 1:
            return "text" if leaf.dtype.kind in "iu" else "tabular"
        return "plain"

    def _text(self, leaf: Array, strength: Array | None, tokens: Sequence[str] | None) -> Text:
        texts = [self._token(number) for number in leaf.ravel()] if tokens is None else list(map(str, tokens))
        strengths = np.zeros(len(texts))
        if strength is not None and len(strength) >= len(texts):
            # an embedding is scaled as a whole: the derivative of the score in that scale
            own = strength[: len(texts)]
            if own.ndim == 1:
                strengths = _scaled(own)
            elif strength.shape == leaf.shape:  # else, the embeddings are not at hand
                strengths = _scaled((own * leaf[: len(texts)]).reshape(len(texts), -1).sum(axis=1))
        kept = [Token(text, float(s)) for text, s in zip(texts, strengths, strict=True)][:MOST_TOKENS]
        return Text(tuple(kept), len(texts) - len(kept))

    def _token(self, number: Any) -> str:
        given = self.vocabulary
        if given is None:
            return f"{number}"
        if callable(given):
            try:
                return str(given(int(number)))
            except Exception as error:
                raise ConfigurationError(
                    f"vocabulary failed for the token {int(number)} ({type(error).__name__}: {error}); return a text "
                    "for each"
                ) from error
        if isinstance(given, Mapping):
            return str(given.get(int(number), number))
        return str(given[int(number)]) if 0 <= number < len(given) else str(number)

    def _row(self, leaf: Array, strength: Array | None) -> Features:
        names = self.feature_names or [f"x{at}" for at in range(len(leaf))]
        strengths = None if strength is None else _scaled(strength.ravel())
        order = np.arange(len(leaf)) if strengths is None else np.argsort(-np.abs(strengths), kind="stable")
        kept = order[:MOST_FEATURES]
        features = tuple(
            Feature(names[at], f"{leaf[at]:.4g}", None if strengths is None else float(strengths[at]))
            for at in kept
        )
        return Features(features, len(leaf) - len(kept))

    def target(self, y: Any) -> str:
        """A target in words: a class by its name, a number, a shape."""
        leaf = leading(y)
        if leaf.size != 1:
            return f"a target of shape {' × '.join(map(str, leaf.shape))}"
        value = leaf.reshape(())
        if value.dtype.kind not in "iub":
            return f"{float(value):.4g}"
        names, number = self.class_names, int(value)
        if isinstance(names, Mapping):
            return str(names.get(number, number))
        return str(number) if names is None or not 0 <= number < len(names) else names[number]


def leading(tree: Any) -> Array:
    """The array that is drawn of a sample of several: ``input_ids`` where there are, else the first."""
    if isinstance(tree, Mapping) and "input_ids" in tree:
        return np.asarray(tree["input_ids"])
    return np.asarray(optree.tree_leaves(tree)[0])


# -- pictures ------------------------------------------------------------------------------
def picture(values: Array) -> Picture:
    """(H, W), (C, H, W) or (H, W, C) as a PNG.

    Integers from 0 to 255 and floats from 0 to 1 are shown as they are, other floats on the range of the sample.

    Examples
    --------
    >>> drawn = picture(np.eye(8))
    >>> drawn.width, drawn.uri[:22]
    (8, 'data:image/png;base64,')
    """
    if values.ndim == 3 and _channels_first(values.shape):
        values = np.moveaxis(values, 0, -1)
    if values.dtype.kind in "iub" and values.min() >= 0 and values.max() <= 255:
        shown = values.astype(np.uint8) * (255 if values.dtype.kind == "b" else 1)
    else:
        held = np.nan_to_num(values.astype(np.float64))
        low, high = (0.0, 1.0) if held.min() >= 0 and held.max() <= 1 else (held.min(), held.max())
        shown = np.rint(255 * (held - low) / max(high - low, 1e-12)).astype(np.uint8)
    return _png(shown[..., 0] if shown.ndim == 3 and shown.shape[-1] == 1 else shown)


def strength_map(values: Array) -> Picture:
    """Signed values (H, W) as colour of which the opacity is the strength, so that it stands on any ground."""
    strength = _scaled(values)
    shown = np.zeros((*values.shape, 4), dtype=np.uint8)
    shown[..., :3] = np.where((strength > 0)[..., None], HELPS, HARMS)
    shown[..., 3] = np.rint(255 * np.abs(strength) ** 0.7)
    return _png(shown)


def _png(values: Array) -> Picture:
    from PIL import Image  # comes with matplotlib

    image = Image.fromarray(np.ascontiguousarray(values))
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return Picture(uri, image.height, image.width)


def _scaled(values: Array) -> Array:
    """Values from −1 to 1, the strongest at the end of that range."""
    values = np.nan_to_num(values.astype(np.float64))
    most = np.abs(values).max(initial=0.0)
    return values / most if most > 0 else values


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an image, or None."""
    if len(shape) == 2 and min(shape) >= 4:
        return shape
    return shape if len(shape) == 3 and _channels_first(shape) is not None else None


def _channels_first(shape: tuple[int, ...]) -> bool | None:
    """Whether channels are the first axis of three, or the last; None where neither is of channels."""
    channels = (1, 3, 4)
    if shape[0] in channels:
        return True
    return False if shape[-1] in channels else None


def _texts(argument: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | np.ndarray):
        raise ConfigurationError(f"{argument} must be a sequence of names; got {type(given).__name__}")
    return tuple(map(str, given))
