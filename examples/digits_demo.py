"""Which training images made this network misread that digit? From training to a picture, on a Dask cluster.

Trains a small network on scikit-learn's digits, starts two worker processes on this machine, and scores
every training image for every test image: with the exact Hessian, and with a sketch of its leading
eigenvectors. Scores and per-pixel sensitivities go to Zarr; the most helpful and the most harmful images are
printed, checked by training again without them, and drawn.

    python examples/digits_demo.py [--output demo-output] [--help]
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import xarray as xr
from distributed import Client, LocalCluster
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence, DirectInfluence

mpl.use("Agg")  # a picture file, on machines without a screen too
import matplotlib.pyplot as plt

DECAY = 0.01
"""Weight decay of the training, and the λ of the influences.

Training minimises mean loss + DECAY/2 ‖θ‖², whose second derivative is H + λI with λ = DECAY: positive definite
at a minimum, and the matrix that says where the minimum moves when a training image is left out.
"""

LEFT_OUT = 10
"""Most harmful images that the check leaves out."""


# -- data and network -------------------------------------------------------------------
@dataclass(frozen=True)
class Digits:
    """Images (n, 8, 8) with pixels in [0, 1], their labels, and their numbers in scikit-learn's set."""

    x: Tensor
    y: Tensor
    ids: np.ndarray

    @classmethod
    def load(cls) -> Digits:
        """All 1,797 digits in a random but fixed order."""
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.from_numpy(digits.images / 16).float()
        return cls(images[order], torch.from_numpy(digits.target)[order], order.numpy())

    def __getitem__(self, which: slice | np.ndarray) -> Digits:
        return Digits(self.x[which], self.y[which], self.ids[which])


def network(hidden: int) -> nn.Sequential:
    """64 pixels, hidden units, 10 digits: 2,410 parameters with 32 hidden units."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def train(data: Digits, start: nn.Module) -> nn.Module:
    """A network at a minimum of mean loss + decay, reached from ``start``.

    L-BFGS in float64, because influence functions speak about minima: they assume a gradient of zero.
    """
    model = copy.deepcopy(start).double()
    x, weights = data.x.double(), list(model.parameters())
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=3000,
        max_eval=4000,
        history_size=50,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(model(x), data.y) + DECAY / 2 * sum((w**2).sum() for w in weights)
        value.backward()
        return value

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)
    return model.float()


@torch.no_grad()
def closest_calls(model: nn.Module, test: Digits, count: int) -> list[int]:
    """Positions of the misread test images that came closest to being read right, then of near misses."""
    logits = model(test.x)
    right = logits.gather(1, test.y[:, None])[:, 0]
    others = logits.scatter(1, test.y[:, None], -torch.inf).amax(1)
    order = np.lexsort([(right - others).abs().numpy(), (right > others).numpy()])
    return order[:count].tolist()


@torch.no_grad()
def reading(model: nn.Module, data: Digits, position: int) -> tuple[int, float]:
    """What the network reads at ``position``, and its loss there."""
    logits = model(data.x[position : position + 1])
    return int(logits.argmax()), float(cross_entropy(logits, data.y[position : position + 1]))


# -- what the scores say ----------------------------------------------------------------
def agreement(sketch: xr.DataArray, exact: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson and Spearman correlation of the two rows of scores of every test image."""
    pairs = list(zip(sketch.values, exact.values, strict=True))
    pearson = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    spearman = np.array([spearmanr(a, b).statistic for a, b in pairs])
    return pearson, spearman


def ranked(scores: xr.DataArray, test_id: int) -> xr.DataArray:
    """Scores of all training images for one test image, the most helpful first."""
    row = scores.sel(test=test_id).load()
    return row.isel(train=np.argsort(-row.values))


def describe(row: xr.DataArray, labels: dict[int, int]) -> str:
    """Training images as ``label (number) score``."""
    cells = (
        f"{labels[int(i)]} (#{int(i):<4}) {score:+7.1f}"
        for i, score in zip(row.train.values, row.values, strict=True)
    )
    return "   ".join(cells)


def without_harmful(model: nn.Module, data: Digits, row: xr.DataArray) -> nn.Module:
    """The network trained again without the most harmful images of ``row``."""
    left = row.train.values[-LEFT_OUT:]
    return train(data[~np.isin(data.ids, left)], model)


# -- the picture ------------------------------------------------------------------------
INK, HELPS, HARMS = "#222222", "#2166ac", "#b2182b"


@dataclass(frozen=True)
class Row:
    """What one row of the picture shows; images and captions from the most helpful to the most harmful."""

    image: np.ndarray
    caption: str
    outcome: str
    images: list[np.ndarray]
    captions: list[str]
    maps: tuple[np.ndarray, np.ndarray]


def draw(path: Path, rows: list[Row], columns: int) -> None:
    """Each test image with its most helpful and most harmful training images and two perturbation maps."""
    widths = [1, 0.3, *[1] * columns, 0.3, *[1] * columns, 0.3, 1, 1]
    height = 1.58 * len(rows) + 0.62
    figure, axes = plt.subplots(
        len(rows), len(widths), figsize=(1.12 * sum(widths), height), width_ratios=widths, squeeze=False
    )
    figure.subplots_adjust(0.01, 0.36 / height, 0.99, 1 - 0.5 / height, wspace=0.08, hspace=0.42)
    for axis in axes.flat:
        axis.axis("off")
    helpful, harmful, maps = 2, 3 + columns, 4 + 2 * columns
    for line, row in zip(axes, rows, strict=True):
        _digit(line[0], row.image, row.caption, INK)
        line[0].set_xlabel(row.outcome, fontsize=7, color=INK, labelpad=3)
        for k in range(columns):
            _digit(line[helpful + k], row.images[k], row.captions[k], HELPS)
            _digit(line[harmful + k], row.images[-1 - k], row.captions[-1 - k], HARMS)
        limit = max(np.abs(values).max() for values in row.maps)
        _pixels(line[maps], row.images[0], row.maps[0] / limit, "first that helps")
        _pixels(line[maps + 1], row.images[-1], row.maps[1] / limit, "first that harms")
    for first, last, text, colour in (
        (0, 0, "test image", INK),
        (helpful, harmful - 2, "training images that help most", HELPS),
        (harmful, maps - 2, "training images that harm most", HARMS),
        (maps, maps + 1, "pixel by pixel", INK),
    ):
        middle = (axes[0, first].get_position().x0 + axes[0, last].get_position().x1) / 2
        figure.text(middle, 1 - 0.2 / height, text, ha="center", fontsize=10, color=colour, weight="bold")
    legend = "more ink here would make the image help more (blue) or less (red)"
    figure.text(0.99, 0.06 / height, legend, ha="right", fontsize=7.5, color=INK)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def _digit(axis: plt.Axes, image: np.ndarray, caption: str, colour: str) -> None:
    axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    _frame(axis, caption, colour)


def _pixels(axis: plt.Axes, image: np.ndarray, strength: np.ndarray, caption: str) -> None:
    """The image in pale ink under squares whose area is the strength of each pixel, within ±1."""
    axis.imshow(image, cmap="gray_r", vmin=0, vmax=3)
    for (i, j), value in np.ndenumerate(strength):
        side = 0.96 * abs(value) ** 0.5
        colour = HELPS if value > 0 else HARMS
        axis.add_patch(plt.Rectangle((j - side / 2, i - side / 2), side, side, color=colour, linewidth=0))
    _frame(axis, caption, INK)


def _frame(axis: plt.Axes, caption: str, colour: str) -> None:
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    axis.set_title(caption, fontsize=8, color=colour, pad=3)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=1.2)


# -- the whole way ----------------------------------------------------------------------
@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    print(f"\n{what}", flush=True)
    began = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - began:.1f} s", flush=True)


@dataclass(frozen=True)
class Setting:
    """How much of the demo to run, and where to."""

    output: Path
    train: int
    test: int
    hidden: int
    rank: int
    shown: int

    @classmethod
    def parse(cls) -> Setting:
        """What the command line asks for."""
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of all results")
        parser.add_argument("--train", type=int, default=1437, help="training images (default 1437)")
        parser.add_argument("--test", type=int, default=360, help="test images (default 360)")
        parser.add_argument("--hidden", type=int, default=32, help="hidden units (default 32)")
        parser.add_argument("--rank", type=int, default=100, help="eigenpairs of the sketch (default 100)")
        parser.add_argument("--shown", type=int, default=3, help="test images explained (default 3)")
        return cls(**vars(parser.parse_args()))


@dataclass(frozen=True)
class Scores:
    """The three stores, opened."""

    exact: xr.Dataset
    sketch: xr.Dataset
    pixels: xr.Dataset


def start_cluster() -> LocalCluster:
    """Two worker processes on this machine."""
    return LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit="2GiB",
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,  # workers that a busy machine is slow to end are no news here
    )


def score(model: nn.Module, known: Digits, new: Digits, shown: list[int], setting: Setting) -> Scores:
    """Fit both estimators on a cluster, and write what they say about ``new``."""
    training, testing, few = (known.x, known.y), (new.x, new.y), new[np.array(shown)]
    options = {"train_ids": known.ids, "overwrite": True, "progress": True}
    pairs = f"{len(new.ids):,} × {len(known.ids):,} pairs of images"
    with timed("Starting two worker processes"):
        cluster = start_cluster()
    with cluster, Client(cluster) as client:
        with timed("Fitting the exact Hessian on them"):
            exact = DirectInfluence(model, cross_entropy, DECAY, client=client).fit(training)
            print(f"  {exact.diagnostics['parameters']:,} eigenvalues", end=" ")
            print(f"from {exact.diagnostics['smallest_eigenvalue']:.4f}", end=" ")
            print(f"to {exact.diagnostics['largest_eigenvalue']:.2f}; λ = {DECAY}")
        with timed(f"Fitting a sketch of its {setting.rank} leading eigenvectors"):
            sketch = ArnoldiInfluence(
                model, cross_entropy, DECAY, rank=setting.rank, complement=True, client=client
            ).fit(training)
            print(f"  {sketch.diagnostics['passes']} passes over the training images")
        folder = setting.output
        with timed(f"Scoring {pairs} with the exact Hessian"):
            scores = exact.influences_to_zarr(
                folder / "exact.zarr", testing, training, test_ids=new.ids, **options
            )
        with timed(f"Scoring {pairs} with the sketch"):
            sketched = sketch.influences_to_zarr(
                folder / "sketch.zarr", testing, training, test_ids=new.ids, **options
            )
        with timed(f"Scoring every pixel of every training image for {len(shown)} test images"):
            pixels = exact.influences_to_zarr(
                folder / "pixels.zarr",
                (few.x, few.y),
                training,
                mode="perturbation",
                test_ids=few.ids,
                **options,
            )
    return Scores(scores, sketched, pixels)


@dataclass(frozen=True)
class Finding:
    """What the scores say about one test image, and whether training again bears them out."""

    position: int
    read: int
    loss: float
    scores: xr.DataArray
    expected: float
    read_without: int
    loss_without: float

    @classmethod
    def about(
        cls, model: nn.Module, known: Digits, new: Digits, position: int, scores: xr.DataArray
    ) -> Finding:
        """Rank the training images, and train again without the most harmful ones."""
        row = ranked(scores, int(new.ids[position]))
        read, loss = reading(model, new, position)
        # leaving a training image out raises the loss by its score / n
        expected = loss + float(row[-LEFT_OUT:].sum()) / len(known.ids)
        again = without_harmful(model, known, row)
        return cls(position, read, loss, row, expected, *reading(again, new, position))


def explain(finding: Finding, known: Digits, new: Digits, correlation: float) -> None:
    """Print one finding."""
    row, test_id, label = finding.scores, new.ids[finding.position], int(new.y[finding.position])
    labels = dict(zip(known.ids.tolist(), known.y.tolist(), strict=True))
    print(f"\nTest image #{test_id}, a {label}, is read as {finding.read}")
    print(f"  helped by   {describe(row[:4], labels)}")
    print(f"  harmed by   {describe(row[:-5:-1], labels)}")
    print(f"  sketch and exact scores correlate by {correlation:.3f}")
    print(f"  trained again without the {LEFT_OUT} that harm most: loss {finding.loss:.3f}", end=" ")
    print(f"→ {finding.loss_without:.3f} (the scores said {finding.expected:.3f}),", end=" ")
    print(f"{'now' if finding.read_without != finding.read else 'still'} read as {finding.read_without}")


def picture(finding: Finding, known: Digits, new: Digits, pixels: xr.DataArray, columns: int) -> Row:
    """One row of the picture."""
    row = xr.concat([finding.scores[:columns], finding.scores[-columns:]], dim="train")
    place = {number: k for k, number in enumerate(known.ids.tolist())}
    positions = [place[number] for number in row.train.values.tolist()]
    first, last = pixels.sel(test=new.ids[finding.position], train=row.train.values[[0, -1]]).values
    signed = [f"{value:+.0f}".replace("-", "\N{MINUS SIGN}") for value in row.values]
    return Row(
        new.x[finding.position].numpy(),
        f"a {new.y[finding.position]}, read as {finding.read}",
        f"without the {LEFT_OUT} worst:\nread as {finding.read_without}",
        [known.x[k].numpy() for k in positions],
        [f"a {known.y[k]}   {value}" for k, value in zip(positions, signed, strict=True)],
        (first, last),
    )


def main() -> None:
    """Train, score, explain, draw."""
    torch.set_num_threads(1)  # matrices this small are faster without, whatever else the machine does
    setting = Setting.parse()
    digits = Digits.load()
    new, known = digits[: setting.test], digits[360 : 360 + setting.train]
    with timed(f"Training a 64-{setting.hidden}-10 network on {len(known.ids):,} images of digits"):
        model = train(known, network(setting.hidden))
        right = int((model(new.x).argmax(1) == new.y).sum())
        print(f"  reads {right} of {len(new.ids)} test images right")
    shown = closest_calls(model, new, setting.shown)
    scores = score(model, known, new, shown, setting)

    pearson, spearman = agreement(scores.sketch["influence"], scores.exact["influence"])
    print("\nHow closely the sketch follows the exact Hessian, by test image")
    for name, values in (("Pearson", pearson), ("Spearman", spearman)):
        low, middle, high = np.percentile(values, [10, 50, 90])
        print(f"  {name:<8} median {middle:.3f}; eight of ten between {low:.3f} and {high:.3f}")

    findings = [Finding.about(model, known, new, k, scores.exact["influence"]) for k in shown]
    for finding in findings:
        explain(finding, known, new, pearson[finding.position])
    columns = min(4, len(known.ids) // 2)
    rows = [picture(finding, known, new, scores.pixels["influence"], columns) for finding in findings]
    draw(setting.output / "digits.png", rows, columns)
    print(f"\nPicture: {setting.output / 'digits.png'}")
    print(f"Scores:  {setting.output}/exact.zarr, sketch.zarr and pixels.zarr; open them with")
    print("    from dask_influence import open_influences")
    print(
        f'    open_influences("{setting.output / "exact.zarr"}")["influence"].sel(test={new.ids[shown[0]]})'
    )


if __name__ == "__main__":  # worker processes import this file: only the first one runs it
    main()
