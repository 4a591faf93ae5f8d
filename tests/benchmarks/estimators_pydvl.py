"""pyDVL's side of the comparison of estimators, at the chunks and settings that serve it best.

It averages batch means without weights, so the fitted batches are all of one size. It solves the
factors of all test points in one call, once, and multiplies them with the training gradients of
256 samples at a time: its calculators would solve them again for each chunk of training data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import protocol
import torch
from estimators_problem import Setting, Settings
from pydvl.influence import torch as pydvl
from torch.utils.data import DataLoader, TensorDataset

FIT_BATCH = {"digits": 1437, "large": 512}
SCORE_BATCH = 256


def unfitted(setting: Setting, estimator: str, options: dict[str, Any]) -> Any:
    kind = getattr(pydvl, estimator)
    if estimator == "EkfacInfluence":
        return kind(setting.model, hessian_regularization=setting.regularization, **options)
    return kind(setting.model, setting.loss, regularization=setting.regularization, **options)


def scores(fitted: Any, setting: Setting, tests: int) -> torch.Tensor:
    factors = fitted.influence_factors(*setting.test(tests))
    batches = DataLoader(TensorDataset(*setting.train), batch_size=SCORE_BATCH)
    return torch.cat([fitted.influences_from_factors(factors, x, y) for x, y in batches], dim=1)


def main() -> None:
    settings = Settings(Path(sys.argv[2]))

    def answer(request: dict[str, Any]) -> protocol.Measured:
        setting = settings.of(request)
        if request["work"] == "fit":
            model = unfitted(setting, request["estimator"], request["options"])
            data = DataLoader(TensorDataset(*setting.train), batch_size=FIT_BATCH[setting.name])
            seconds, settings.fitted = protocol.timed(model.fit, data)
            return seconds, {}
        if request["work"] == "factors":
            seconds, values = protocol.timed(
                settings.fitted.influence_factors, *setting.test(request["tests"])
            )
        else:
            seconds, values = protocol.timed(scores, settings.fitted, setting, request["tests"])
        return seconds, {"values": values.detach().numpy()}

    protocol.serve(("pyDVL",), answer)


if __name__ == "__main__":
    main()
