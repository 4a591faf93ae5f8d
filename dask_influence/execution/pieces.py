"""What the pieces of a run are called in its ledger, and which of them make it complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask_influence.execution.plan import Plan

FACTORS = "factors-"
"""Prefix of the ledger entries of factor tasks."""

RESIDUAL = "residual"
"""Ledger entry of the residuals of all factors."""


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
    plan = Plan.from_json(run["plan"])
    if run["fingerprint"].get("kind") == "factors":
        return factor_names(plan)
    return score_names(plan, solves=run.get("solves", False))
