"""What the pieces of a run are called in its ledger, which of them make it complete, and what their entries say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask_influence.errors import CorruptStoreError
from dask_influence.execution.plan import Plan
from dask_influence.execution.tree import strip_name
from dask_influence.storage.results import RUN_KEY
from dask_influence.storage.shapes import (
    Shape,
    count,
    either,
    flag,
    holding,
    items,
    listed,
    misshapen,
    text,
    whole,
)

FACTORS = "factors-"
"""Prefix of the ledger entries of factor tasks."""

RESIDUAL = "residual"
"""Ledger entry of the residuals of all factors."""

_WORK: dict[str, Shape] = {
    "tests": count,
    "trains": count,
    "features": listed(whole),
    "parameters": whole,
    "rank": either(None, whole),
    "itemsize": whole,
    "activations": whole,
    "sample_bytes": whole,
    "regularizations": either(None, count),
    "kept": either(None, holding(text=text, axis=either(None, "test", "train"), nbytes=whole, diagonal=flag)),
    "inverse_bytes": whole,
    "paired": either(None, holding(numbers=whole, products=whole, itemsize=whole)),
}
_PLAN: dict[str, Shape] = {
    "work": holding(tests=count, trains=count),
    "query_rows": count,
    "tile": items(count, count),
    "strip_columns": count,
    "batch": count,
    "factor_rows": count,
}


def planned(run: Mapping[str, Any]) -> Plan:
    """The plan of the run with this record.

    Raises
    ------
    CorruptStoreError
        The record holds none.
    """
    values = run["plan"]
    wrong = misshapen(values, _PLAN) or misshapen(values.get("work", {}), _WORK)
    try:
        if not wrong:
            return Plan.from_json(values)
    except (KeyError, TypeError) as error:  # fields that are not there, or that none has
        wrong = [str(error)]
    raise CorruptStoreError(
        f"the plan in {RUN_KEY!r} is not one that a run writes: look at its {', '.join(wrong)}; "
        "pass overwrite=True to replace the run"
    )


def score_names(plan: Plan, *, solves: bool) -> set[str]:
    """Ledger entries that make a run of scores complete, one that ``solves`` its factors or one that was given them."""
    names = {plan.strip(index).name for index in range(plan.strips)}
    if plan.work.kept is not None:
        names |= {
            plan.tree.name(node) for root in plan.tree.roots() for node in (root, *plan.tree.below(root))
        }
    if plan.work.diagonal:
        return names
    return names | (factor_names(plan) if solves else {RESIDUAL})


def factor_names(plan: Plan) -> set[str]:
    """Ledger entries that make a run of factors complete."""
    return {RESIDUAL, *(factor_name(index) for index in range(len(plan.factor_chunks)))}


def factor_name(index: int) -> str:
    """Ledger entry of one factor task."""
    return f"{FACTORS}{index:06d}"


def expected_pieces(run: Mapping[str, Any]) -> set[str]:
    """Ledger entries that make the run with this record complete."""
    plan = planned(run)
    if run["fingerprint"].get("kind") == "factors":
        return factor_names(plan)
    return score_names(plan, solves=run.get("solves", False))


# -- what an entry says ------------------------------------------------------------------
def misfit(plan: Plan, name: str, entry: Mapping[str, Any]) -> str | None:
    """What shows that ``entry`` was not written for the piece ``name`` of this plan's run; None where nothing does.

    An entry that was copied over another one is whole, and its checksum right; but it says of which samples it is,
    or what it joins.
    """
    index = int(digits) if (digits := name.rpartition("-")[2]).isdecimal() else -1
    if 0 <= index < plan.strips and name == strip_name(index):
        return _misfit_of_strip(plan, index, entry)
    if 0 <= index < len(plan.factor_chunks) and name == factor_name(index):
        return _misfit_of_factors(plan, index, entry)
    if name == RESIDUAL:
        own = all(key.startswith("factor_residual/") for key, *_ in entry.get("shards", ()))
        return _first(
            None if own else "names shards of another piece",
            _no_shards(entry),
            _foreign(entry, range(plan.work.tests)),
        )
    node = None if plan.work.kept is None else plan.tree.merge(name)
    if node is None:
        return "is of no piece of its run"
    merged = [plan.tree.name(child) for child in plan.tree.children(node)]
    last = node == plan.tree.root(node.cell)  # of others the part may be gone, and forgotten
    return _first(_other(entry, merged=merged), _no_shards(entry) if last else _other_part(name, entry))


def _misfit_of_strip(plan: Plan, index: int, entry: Mapping[str, Any]) -> str | None:
    strip = plan.strip(index)
    other = _other(entry, rows=_bounds(strip.rows), columns=_bounds(strip.columns))
    if other is not None:
        return other
    if plan.work.kept is None:
        tiles = sum(1 for _ in plan.rows(strip)) * sum(1 for _ in plan.columns(strip)) * plan.work.copies
        held = len(entry.get("shards", ()))
        wrong = None if held == tiles else f"names {held} shards of {tiles}"
    elif "part" in entry:
        wrong = _other_part(strip.name, entry)
    else:
        wrong = _no_shards(entry)
    return _first(wrong, _foreign(entry, strip.columns))


def _misfit_of_factors(plan: Plan, index: int, entry: Mapping[str, Any]) -> str | None:
    rows = plan.factor_chunks[index]
    if len(entry.get("residual", ())) != len(rows) * plan.work.copies:
        return f"lacks residuals of its {len(rows)} test points"
    if ("digest" in entry) != ("nbytes" in entry):
        return "names half an artifact"
    # entries of earlier versions do not say their rows
    return _first(_other(entry, rows=_bounds(rows)) if "rows" in entry else None, _foreign(entry, rows))


def _first(*wrong: str | None) -> str | None:
    return next((one for one in wrong if one is not None), None)


def _bounds(samples: range) -> list[int]:
    return [samples.start, samples.stop]


def _other(entry: Mapping[str, Any], **fields: Any) -> str | None:
    lacking = [field for field in fields if field not in entry]
    if lacking:
        return f"lacks {' and '.join(lacking)}"
    wrong = [field for field, own in fields.items() if entry[field] != own]
    return f"is the entry of another piece, by its {' and '.join(wrong)}" if wrong else None


def _other_part(name: str, entry: Mapping[str, Any]) -> str | None:
    own = "part" not in entry or entry["part"][0].endswith(f"/{name}.safetensors")
    return None if own else "names the part of another piece"


def _no_shards(entry: Mapping[str, Any]) -> str | None:
    return None if entry.get("shards") else "names no shards"


def _foreign(entry: Mapping[str, Any], samples: range) -> str | None:
    """Missing samples that are none of the piece's."""
    if all(one["sample"] in samples for one in entry.get("missing", ())):
        return None
    return "names missing samples of another piece"
