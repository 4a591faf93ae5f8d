"""The samples behind the ids: read one by one, as few as the page draws, and known to be those of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree

from dask_influence.errors import ConfigurationError, DataError
from dask_influence.report.facts import Array, Facts
from dask_influence.report.samples import Depiction, Drawing, Picture
from dask_influence.storage.sources import ArraySource, Source, ZarrSource

KNOWN_BY_DIGEST = (ArraySource, ZarrSource)
"""Kinds whose digest is quickly had: of arrays in memory, and of a listing."""


@dataclass
class Samples:
    """The points of one side, drawn.

    Parameters
    ----------
    side : "test" or "train"
        Whose they are.
    source : Source or None
        Their data, where they are at hand.
    tokens : sequence of sequence of str or None
        Their texts, token by token.
    depiction : Depiction
        How they are drawn.
    """

    side: str
    source: Source | None
    tokens: Sequence[Sequence[str]] | None
    depiction: Depiction
    _read: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def drawable(self) -> bool:
        """Whether there is anything to draw."""
        return self.source is not None or self.tokens is not None

    def check(self, facts: Facts) -> None:
        """Refuse data that cannot be those of the run, or cannot be drawn as was asked.

        Raises
        ------
        DataError
            They are too many or too few.
        ConfigurationError
            They cannot be drawn like this.
        """
        work = facts.plan.work
        if self.tokens is not None and not isinstance(self.tokens, Sequence | np.ndarray):
            raise ConfigurationError(
                f"{self.side}_tokens must be a sequence, of the tokens of each sample; got "
                f"{type(self.tokens).__name__}"
            )
        count = {"test": work.tests, "train": work.trains}[self.side]
        if self.side == "test" and work.diagonal and self.drawable:
            raise ConfigurationError(
                f"test: {facts.location.url} holds each training point scored on itself, and no test points; leave "
                "their data out"
            )
        given = {self.side: self.source, f"{self.side}_tokens": self.tokens}
        for argument, points in given.items():
            if points is not None and len(points) != count:
                raise DataError(
                    f"{argument} holds {len(points):,} samples, and {facts.location.url} was written for {count:,}; "
                    "give those of the run"
                )
        for text in () if self.tokens is None else self.tokens:
            if isinstance(text, str) or not isinstance(text, Sequence | np.ndarray):
                raise ConfigurationError(
                    f"{self.side}_tokens must hold a sequence of tokens for each sample; got {type(text).__name__}"
                )
        if self.source is not None:
            self.depiction.check(self.of(0)[0], self.side)

    def doubtful(self, facts: Facts) -> bool:
        """Whether the data are not known to be those that the run read."""
        written = facts.digest(self.side)
        if not isinstance(self.source, KNOWN_BY_DIGEST) or written is None:
            return False
        return bool(self.source.digest() != written)

    def of(self, position: int) -> Any:
        """x and y of one sample."""
        assert self.source is not None
        if position not in self._read:
            pair = self.source.read(position, position + 1)
            self._read[position] = optree.tree_map(lambda leaf: leaf[0], pair)
        return self._read[position]

    def drawing(self, position: int | None, strength: Array | None = None) -> Drawing | None:
        """A sample, or None where there is nothing to draw it from."""
        if position is None or not self.drawable:
            return None
        tokens = None if self.tokens is None else self.tokens[position]
        x = np.zeros(0) if self.source is None else self.of(position)[0]
        return self.depiction.draw(x, strength, tokens)

    def map(self, position: int | None, strength: Array | None) -> Picture | None:
        """What each pixel of an image does."""
        if position is None or strength is None or self.source is None or self.tokens is not None:
            return None
        return self.depiction.map(self.of(position)[0], strength)

    def target(self, position: int | None) -> str | None:
        """The target in words."""
        if position is None or self.source is None:
            return None
        return self.depiction.target(self.of(position)[1])

    def same(self, positions: Sequence[int]) -> list[tuple[int, ...]]:
        """Groups among ``positions`` of which the inputs are the same, byte by byte; as given without data."""
        if self.source is None:
            return [tuple(positions)]
        groups: dict[bytes, list[int]] = {}
        for position in positions:
            leaves = optree.tree_leaves(self.of(position)[0])
            groups.setdefault(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves), []).append(
                position
            )
        return [tuple(group) for group in groups.values() if len(group) > 1]
