"""Tree: in which order the parts of a reduced result meet, as integers.

The result of a reduction falls into *cells*: one for each query block where test points are
kept, one for each run of training points where those are, a single one where neither is. A
cell is joined from its strips by nodes of ``FAN_IN`` consecutive parts each, so the shape,
and with it every bit of a sum, depends on the plan alone, and few parts exist at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

FAN_IN = 16
"""Parts that one node joins."""

Axis = Literal["test", "train"] | None
"""The axis that a reduction keeps."""


@dataclass(frozen=True)
class Node:
    """A strip (level 0), or what joins up to ``FAN_IN`` nodes of the level below; ``index`` counts in its cell."""

    cell: int
    level: int
    index: int


@dataclass(frozen=True)
class Tree:
    """The nodes of all cells.

    Parameters
    ----------
    blocks, runs : int
        Query blocks, and runs of training points; strip b·runs + r is their pair (b, r).
    axis : "test", "train" or None
        What is kept.

    Examples
    --------
    >>> tree = Tree(blocks=2, runs=17, axis="test")
    >>> tree.cells, tree.root(1), [tree.name(node) for node in tree.children(tree.root(1))]
    (2, Node(cell=1, level=2, index=0), ['merge-000001-1-000000', 'merge-000001-1-000001'])
    >>> [tree.strip(leaf) for leaf in tree.children(Node(1, 1, 1))]
    [33]
    >>> tree.nodes
    40
    """

    blocks: int
    runs: int
    axis: Axis

    @property
    def cells(self) -> int:
        """Parts that the result is written in."""
        return {"test": self.blocks, "train": self.runs, None: 1}[self.axis]

    @property
    def leaves(self) -> int:
        """Strips of one cell."""
        return self.blocks * self.runs // self.cells

    @property
    def nodes(self) -> int:
        """Strips and merges of all cells."""
        count, level = self.leaves, self.leaves
        while level > 1:
            level = -(-level // FAN_IN)
            count += level
        return self.cells * count

    @property
    def _depth(self) -> int:
        depth, reach = 0, 1
        while reach < self.leaves:
            depth, reach = depth + 1, reach * FAN_IN
        return depth

    def roots(self) -> Iterator[Node]:
        """The node of each cell that writes its result."""
        return (self.root(cell) for cell in range(self.cells))

    def root(self, cell: int) -> Node:
        """The node that writes the result of ``cell``: its only strip, or its last merge."""
        return Node(cell, self._depth, 0)

    def children(self, node: Node) -> list[Node]:
        """The nodes that ``node`` joins, in the order of their points; none for a strip."""
        if node.level == 0:
            return []
        below = -(-self.leaves // FAN_IN ** (node.level - 1))
        first = node.index * FAN_IN
        return [Node(node.cell, node.level - 1, at) for at in range(first, min(first + FAN_IN, below))]

    def parent(self, node: Node) -> Node:
        """The node that joins ``node`` with its neighbours."""
        return Node(node.cell, node.level + 1, node.index // FAN_IN)

    def below(self, node: Node) -> Iterator[Node]:
        """All nodes that ``node`` joins, directly or not."""
        for child in self.children(node):
            yield child
            yield from self.below(child)

    def above(self, names: Collection[str]) -> list[str]:
        """Names of the nodes that join, directly or not, one of those named; roots come first.

        >>> Tree(blocks=2, runs=17, axis="test").above(["strip-000033"])
        ['merge-000001-2-000000', 'merge-000001-1-000001']
        """
        found = []

        def touched(node: Node) -> bool:
            own = [touched(child) for child in self.children(node)]
            if any(own):
                found.append(self.name(node))
            return any(own) or self.name(node) in names

        for root in self.roots():
            touched(root)
        return found[::-1]

    def strip(self, leaf: Node) -> int:
        """Index of the strip at a leaf."""
        if self.axis == "train":
            return leaf.index * self.runs + leaf.cell
        return leaf.cell * self.leaves + leaf.index

    def name(self, node: Node) -> str:
        """Name of its ledger entry."""
        if node.level == 0:
            return strip_name(self.strip(node))
        return f"merge-{node.cell:06d}-{node.level}-{node.index:06d}"

    def merge(self, name: str) -> Node | None:
        """The merge with the ledger entry ``name``; None where there is none.

        >>> tree = Tree(blocks=2, runs=17, axis="test")
        >>> tree.merge("merge-000001-1-000001"), tree.merge("merge-000001-1-000002"), tree.merge("strip-000001")
        (Node(cell=1, level=1, index=1), None, None)
        """
        numbers = name.split("-")[1:]
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            return None
        node = Node(*map(int, numbers))
        known = node.cell < self.cells and 1 <= node.level <= self._depth
        known = known and node.index < -(-self.leaves // FAN_IN**node.level)
        return node if known and self.name(node) == name else None


def strip_name(index: int) -> str:
    """Name of the ledger entry of a strip."""
    return f"strip-{index:06d}"
