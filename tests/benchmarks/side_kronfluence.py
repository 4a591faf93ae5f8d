"""kronfluence's side of the comparisons: EK-FAC, with its defaults but for λ.

Its Fisher matrix is that of labels drawn from the model, or with ``empirical`` of the data's own:
only then are two implementations to agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from problems import Setting
from protocol import Measured, timed
from side import Case, Side, serve
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


class Kronfluence(Side):
    """One analyzer for each problem, with everything of size in the dtype asked for."""

    packages = ("kronfluence",)

    def __init__(self, folder: Path, problems: Path) -> None:
        super().__init__(folder, problems)
        self._analyzers: dict[Setting, Analyzer] = {}

    def analyzer(self, setting: Setting) -> Analyzer:
        """Of a problem in one dtype."""
        if setting not in self._analyzers:
            task = Classification()
            self._analyzers[setting] = Analyzer(
                analysis_name=f"{setting.name}-{setting.dtype}".replace("torch.", ""),
                model=prepare_model(setting.model, task),
                task=task,
                cpu=True,
                output_dir=str(self.folder),
                disable_tqdm=True,
            )
        return self._analyzers[setting]

    def fitting(self, case: Case) -> Callable[[], None]:
        """Covariances, eigendecompositions, and the eigenvalues corrected."""
        setting, dtype = case.setting, case.setting.dtype
        analyzer, train = self.analyzer(setting), TensorDataset(*setting.train)
        arguments = FactorArguments(
            use_empirical_fisher=case.options.get("empirical", False),
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        )
        return lambda: analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=FIT_BATCH,
            factor_args=arguments,
            overwrite_output_dir=True,
        )

    def scores(self, case: Case, tests: int) -> Measured:
        """From the factors fitted last."""
        analyzer, dtype = self.analyzer(case.setting), case.setting.dtype
        arguments = ScoreArguments(
            damping_factor=case.setting.regularization,
            per_sample_gradient_dtype=dtype,
            precondition_dtype=dtype,
            score_dtype=dtype,
        )
        self.fitted(case)
        seconds, _ = timed(
            analyzer.compute_pairwise_scores,
            "scores",
            "factors",
            TensorDataset(*case.setting.test(tests)),
            TensorDataset(*case.setting.train),
            per_device_query_batch_size=QUERY_BATCH,
            per_device_train_batch_size=TRAIN_BATCH,
            score_args=arguments,
            overwrite_output_dir=True,
        )
        return seconds, {"values": analyzer.load_pairwise_scores("scores")["all_modules"].numpy()}


if __name__ == "__main__":
    serve(Kronfluence)
