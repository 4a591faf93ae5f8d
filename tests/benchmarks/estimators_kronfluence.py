"""kronfluence's side of the comparison of estimators: EK-FAC, with its defaults but for λ.

Its Fisher matrix is that of labels drawn from the model, or with ``empirical`` of the data's own:
only then are two implementations to agree to rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import protocol
import torch
from estimators_problem import Setting, Settings
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

FIT_BATCH, QUERY_BATCH, TRAIN_BATCH = 256, 64, 256


class Classification(Task):
    """Cross-entropy of logits."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            labels = torch.multinomial(torch.softmax(logits.detach(), dim=1), 1).flatten()
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class Kronfluence:
    """One analyzer for each problem, with everything of size in the dtype asked for."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.setting, task = setting, Classification()
        self.analyzer = Analyzer(
            analysis_name=f"{setting.name}-{setting.dtype}".replace("torch.", ""),
            model=prepare_model(setting.model, task),
            task=task,
            cpu=True,
            output_dir=str(folder),
            disable_tqdm=True,
        )
        self.train = TensorDataset(*setting.train)

    def fit(self, *, empirical: bool = False) -> None:
        dtype = self.setting.dtype
        self.analyzer.fit_all_factors(
            "factors",
            self.train,
            per_device_batch_size=FIT_BATCH,
            factor_args=FactorArguments(
                use_empirical_fisher=empirical,
                activation_covariance_dtype=dtype,
                gradient_covariance_dtype=dtype,
                per_sample_gradient_dtype=dtype,
                lambda_dtype=dtype,
            ),
            overwrite_output_dir=True,
        )

    def scores(self, tests: int) -> Tensor:
        dtype = self.setting.dtype
        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            TensorDataset(*self.setting.test(tests)),
            self.train,
            per_device_query_batch_size=QUERY_BATCH,
            per_device_train_batch_size=TRAIN_BATCH,
            score_args=ScoreArguments(
                damping_factor=self.setting.regularization,
                per_sample_gradient_dtype=dtype,
                precondition_dtype=dtype,
                score_dtype=dtype,
            ),
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores("scores")["all_modules"]


def main() -> None:
    own, settings = Path(sys.argv[1]), Settings(Path(sys.argv[2]))
    sides: dict[Setting, Kronfluence] = {}

    def answer(request: dict[str, Any]) -> protocol.Measured:
        setting = settings.of(request)
        if setting not in sides:
            sides[setting] = Kronfluence(own, setting)
        if request["work"] == "fit":
            seconds, _ = protocol.timed(sides[setting].fit, **request["options"])
            return seconds, {}
        seconds, values = protocol.timed(sides[setting].scores, request["tests"])
        return seconds, {"values": values.numpy()}

    protocol.serve(("kronfluence",), answer)


if __name__ == "__main__":
    main()
