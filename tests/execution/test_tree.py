"""The tree of a reduction covers every strip once, and its schedule does every node once, after its parts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_influence.execution.reduce import Schedule
from dask_influence.execution.tree import FAN_IN, Axis, Node, Tree
from dask_influence.storage.results import ShardRecord

SIZES = st.integers(1, 40)
AXES = st.sampled_from(["test", "train", None])


def every(tree: Tree) -> list[Node]:
    """All nodes, parts before what joins them."""
    found: list[Node] = []

    def visit(node: Node) -> None:
        for child in tree.children(node):
            visit(child)
        found.append(node)

    for root in tree.roots():
        visit(root)
    return found


def record(tree: Tree, node: Node) -> ShardRecord | None:
    """What a task of ``node`` leaves: None at the last one of a cell."""
    return None if node == tree.root(node.cell) else ShardRecord(tree.name(node), 1, "")


@given(SIZES, SIZES, AXES)
def test_every_strip_is_a_leaf_of_one_cell(blocks: int, runs: int, axis: Axis) -> None:
    tree = Tree(blocks, runs, axis)
    leaves = [node for node in every(tree) if node.level == 0]
    assert sorted(tree.strip(leaf) for leaf in leaves) == list(range(blocks * runs))
    for leaf in leaves:
        block, run = divmod(tree.strip(leaf), runs)
        assert leaf.cell == {"test": block, "train": run, None: 0}[axis]


@given(SIZES, SIZES, AXES)
def test_names_parents_and_counts(blocks: int, runs: int, axis: Axis) -> None:
    tree = Tree(blocks, runs, axis)
    nodes = every(tree)
    assert len({tree.name(node) for node in nodes}) == len(nodes) == tree.nodes
    assert all(len(tree.children(node)) <= FAN_IN for node in nodes)
    assert all(tree.parent(child) == node for node in nodes for child in tree.children(node))


@pytest.mark.parametrize(("strips", "nodes"), [(1, 1), (2, 3), (16, 17), (17, 20), (256, 273), (257, 277)])
def test_a_cell_of_one_strip_has_no_merge(strips: int, nodes: int) -> None:
    assert Tree(1, strips, "test").nodes == nodes


@given(SIZES, SIZES, AXES)
def test_strips_are_joined_in_order(blocks: int, runs: int, axis: Axis) -> None:
    """The order of points along the axis that is reduced, which ties and sums depend on."""
    tree = Tree(blocks, runs, axis)
    for root in tree.roots():
        level = [root]
        while level[0].level:
            level = [child for node in level for child in tree.children(node)]
        strips = [tree.strip(leaf) for leaf in level]
        assert strips == sorted(strips)


@given(SIZES, SIZES, AXES, st.data())
def test_a_schedule_does_what_is_missing(blocks: int, runs: int, axis: Axis, drawn: st.DataObject) -> None:
    tree = Tree(blocks, runs, axis)
    names = {tree.name(node): node for node in every(tree)}
    held = drawn.draw(st.sets(st.sampled_from(sorted(names)), max_size=30), label="held")
    recorded = held | {tree.name(below) for name in held for below in tree.below(names[name])}
    schedule = Schedule(tree, {name: record(tree, names[name]) for name in held}, recorded)
    assert not schedule.lost
    done: Counter[str] = Counter()
    present = set(held)
    while schedule:
        running = list(zip(range(drawn.draw(st.integers(1, 5))), schedule.ready(), strict=False))
        for _, (node, parts) in running:
            assert [part.key for part in parts] == [tree.name(child) for child in tree.children(node)]
            assert all(part.key in present for part in parts)
            done[tree.name(node)] += 1
            present.add(tree.name(node))
            schedule.finished(node, record(tree, node))
    assert all(tree.name(root) in present for root in tree.roots())
    assert not set(done) & held
    assert set(done.values()) <= {1}
    assert schedule.left == 0
    if not held:
        assert len(done) == tree.nodes


@given(SIZES)
def test_few_parts_wait(strips: int) -> None:
    """One node at a time, as in one process: the parts that exist are those of one path to the root."""
    tree = Tree(1, strips, "test")
    schedule, waiting, most = Schedule(tree, {}, ()), 0, 0
    for node, parts in schedule.ready():
        waiting += (node != tree.root(0)) - len(parts)
        most = max(most, waiting)
        schedule.finished(node, record(tree, node))
    assert waiting == 0
    assert most <= FAN_IN * 2


@given(SIZES, AXES, st.data())
def test_lost_entries_below_what_is_done_are_found(strips: int, axis: Axis, drawn: st.DataObject) -> None:
    """Strips are done again; entries of merges, whose data went into what is done, are told."""
    tree = Tree(1, strips, axis)
    roots = {tree.name(root): record(tree, root) for root in tree.roots()}
    below = {tree.name(node): node for root in tree.roots() for node in tree.below(root)}
    lost = drawn.draw(
        st.sets(st.sampled_from(sorted(below)), max_size=9) if below else st.just(set()), label="lost"
    )
    recorded = {*roots, *below} - lost
    schedule = Schedule(tree, roots, recorded)
    assert {tree.name(node) for node in schedule.lost} == {name for name in lost if below[name].level}
    again = set()
    for node, parts in schedule.ready():
        assert not parts
        again.add(tree.name(node))
        schedule.finished(node, record(tree, node))
    assert again == {name for name in lost if not below[name].level}
