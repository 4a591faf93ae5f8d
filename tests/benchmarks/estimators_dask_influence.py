"""This package's side of the comparison of estimators, through its public interface alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import protocol
from estimators_problem import Settings

import dask_influence


def main() -> None:
    settings = Settings(Path(sys.argv[2]))

    def answer(request: dict[str, Any]) -> protocol.Measured:
        setting = settings.of(request)
        if request["work"] == "fit":
            kind = getattr(dask_influence, request["estimator"])
            unfitted = kind(setting.model, setting.loss, setting.regularization, **request["options"])
            seconds, settings.fitted = protocol.timed(unfitted.fit, setting.train)
            return seconds, {"passes": settings.fitted.diagnostics["passes"]}
        fitted, test = settings.fitted, setting.test(request["tests"])
        if request["work"] == "factors":
            seconds, factors = protocol.timed(fitted.influence_factors, *test)
            return seconds, {"values": factors.numpy(), "passes": fitted.diagnostics["solver_passes"]}
        seconds, scores = protocol.timed(fitted.influences, *test, *setting.train)
        # one pass for the training derivatives, and those in which factors were solved
        plan, found = fitted.plan(test, setting.train), fitted.diagnostics
        solving = len(plan.factor_chunks) if "blocks" in found else found.get("solver_passes", 0)
        return seconds, {"values": scores.numpy(), "passes": plan.passes + solving}

    protocol.serve(("dask_influence",), answer)


if __name__ == "__main__":
    main()
