"""Writing a report: what is asked for checked, the page made in memory, one file put in its place."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dask_influence.arguments import digest_of, labels_of
from dask_influence.errors import ConfigurationError, StoreMismatchError
from dask_influence.report.data import Samples
from dask_influence.report.facts import Array, Facts
from dask_influence.report.samples import Depiction, Kind
from dask_influence.report.scores import OWN, Layout, Own, Scores, known_ids
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.sources import as_source
from dask_influence.storage.stores import Location

MOST_TESTS, MOST_TOP = 100, 50
"""What one page may be asked for; a longer one is no page."""

_IDS = str | int | float | np.generic

Store = str | os.PathLike[str] | Location


def report(
    store: Store,
    output: str | os.PathLike[str],
    *,
    tests: Sequence[Any] | None = None,
    top: int = 5,
    regularization: float | None = None,
    perturbation: Store | None = None,
    self_influence: Store | None = None,
    test: Any = None,
    train: Any = None,
    test_ids: Any = None,
    train_ids: Any = None,
    kind: Kind | None = None,
    image_shape: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
    vocabulary: Sequence[str] | Mapping[int, str] | Callable[[int], str] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    test_tokens: Sequence[Sequence[str]] | None = None,
    train_tokens: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """One HTML file that says what a store holds and whether it can be trusted, readable without a network.

    For some test points it shows the training points that help and harm most, drawn as what they are; how all scores
    are distributed; training points to look at again; residuals, spectrum, time, memory and provenance. A store that is
    incomplete or reduced gets the report that it allows, which says what it lacks. The same store and
    arguments give the same bytes.

    Of a large store little is read: the rows of the test points shown, and at most 32 MiB of the other scores.

    Parameters
    ----------
    store : path or URL
        What ``influences_to_zarr`` or ``influence_factors_to_zarr`` wrote.
    output : path
        The file, which is replaced; its folder is there.
    tests : sequence of ids, optional
        Whose lists are shown; by default six with the most harmful scores among those read. Of sums over groups
        of test points, these groups; of ``TopK(k, per="train")``, training points.
    top : int
        Training points of either side in each list.
    regularization : float, optional
        Which λ of several; the first by default.
    perturbation : path or URL, optional
        Scores of the same training data in perturbation mode: what each pixel, token or feature does. Not needed
        where ``store`` holds them itself.
    self_influence : path or URL, optional
        What ``reduce=SelfInfluence()`` left for the same model and training data: suspected mislabels, duplicates.
    test, train : pair, Dataset, DataLoader, path or URL, optional
        The data of the run, as they were given to it. Only samples that are drawn are read.
    test_ids, train_ids : sequence, optional
        Those of the run, where the store lists points by ids of yours without the other ones (``TopK``).
    kind : "image", "text" or "tabular", optional
        What a sample is; by default its shape says.
    image_shape : tuple of int, optional
        (H, W), (C, H, W) or (H, W, C) of images that are kept flat.
    feature_names : sequence of str, optional
        Of a row of features.
    vocabulary : sequence, mapping or callable, optional
        Token of each integer of a text.
    class_names : sequence of str or mapping, optional
        Name of each integer target.
    test_tokens, train_tokens : sequence of sequence of str, optional
        Tokens of each text, where samples are embeddings (T, E): a token's strength is ⟨score, embedding⟩, the
        derivative of the score in the scale of that embedding.
    title : str, optional
        Of the page.
    storage_options : mapping, optional
        Credentials for the stores and the data.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ConfigurationError
        An argument cannot be used, an id does not exist, or matplotlib is not installed.
    DataError
        Data or ids are not those of the run.
    StoreError
        No store is there, or it cannot be read; ``CorruptStoreError`` where it is damaged.
    StoreMismatchError
        The other stores are of another model or other data; nothing is written after any of these errors.

    Examples
    --------
    >>> import tempfile, torch
    >>> from dask_influence import DirectInfluence
    >>> x, y = torch.eye(5), torch.tensor([0, 1, 1, 0, 1])
    >>> infl = DirectInfluence(torch.nn.Linear(5, 2), torch.nn.functional.cross_entropy, 0.1).fit((x, y))
    >>> scores = infl.influences_to_zarr("memory://report-example", (x[:2], y[:2]), (x, y))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = report("memory://report-example", f"{folder}/report.html", train=(x, y))
    ...     "<!DOCTYPE html>" in path.read_text()
    True
    """
    _check_libraries()
    path = _writable(output)
    top = check_integer("top", top, most=MOST_TOP)
    if regularization is not None:
        check_number("regularization", regularization)
    if title is not None and not isinstance(title, str):
        raise ConfigurationError(f"title must be text; got {title!r}")
    wanted = _tests(tests)
    shape: Any = tuple(image_shape) if isinstance(image_shape, Sequence | np.ndarray) else image_shape
    depiction = Depiction(kind, shape, feature_names, vocabulary, class_names)
    facts = Facts.of(store, regularization, storage_options)
    data = {"test": test, "train": train}
    texts = {"test": test_tokens, "train": train_tokens}
    samples = {}
    for side, given in data.items():
        source = None if given is None else as_source(given, side, storage_options)
        samples[side] = Samples(side, source, texts[side], depiction)
        samples[side].check(facts)
    named = {"test": test_ids, "train": train_ids}
    ids = {side: labels_of(given, f"{side}_ids") for side, given in named.items() if given is not None}
    from dask_influence.report.asked import Asked  # with Jinja and matplotlib
    from dask_influence.report.contents import page
    from dask_influence.report.page import rendered

    scores, notes = _scores(facts, ids), list[str]()
    other = partial(_opened, facts, storage_options, notes)
    features = _perturbation(facts, scores, perturbation, other)
    own = _own(facts, self_influence, other)
    asked = Asked(facts, scores, features, own, samples, wanted, top, title, notes)
    _put(path, rendered(page(asked)))
    return path


# -- what is asked for ------------------------------------------------------------------------
def _check_libraries() -> None:
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"a report takes {' and '.join(missing)}: pip install 'dask_influence[report]'"
        )


def _writable(output: str | os.PathLike[str]) -> Path:
    if not isinstance(output, str | os.PathLike):
        raise ConfigurationError(f"output must be a path; got {output!r}")
    if "://" in str(output):
        raise ConfigurationError(f"output must be a file of this machine; got {str(output)!r}")
    path = Path(output)
    try:
        path = path.expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, the home of nobody
        raise ConfigurationError(f"output cannot be a file: {error}") from error
    if path.is_dir():
        raise ConfigurationError(f"output must be a file; {path} is a folder")
    if not path.parent.is_dir():
        raise ConfigurationError(f"output: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigurationError(f"output: the folder {path.parent} cannot be written to")
    return path


def _tests(given: Sequence[Any] | None) -> list[Any] | None:
    if given is None:
        return None
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | np.ndarray):
        raise ConfigurationError(f"tests must be a sequence of ids; got {given!r}")
    listed = np.asarray(given).tolist() if isinstance(given, np.ndarray) else list(given)
    unusable = [one for one in listed if isinstance(one, bool) or not isinstance(one, _IDS)]
    if unusable:
        raise ConfigurationError(f"tests must hold ids, numbers or texts; got {unusable[0]!r}")
    if len(listed) > MOST_TESTS:
        raise ConfigurationError(f"tests names {len(listed):,} points; a page shows at most {MOST_TESTS}")
    return listed


# -- the stores ------------------------------------------------------------------------------
def _scores(facts: Facts, ids: dict[str, Array]) -> Scores | None:
    for side in ("test", "train"):  # refused also where nothing asks for them
        known_ids(facts, side, ids)
    layout = Layout.of(facts)
    return None if layout is None else Scores(facts, layout, ids)


def _perturbation(
    facts: Facts, scores: Scores | None, given: Store | None, opened: Callable[[str, Store], Facts]
) -> Scores | None:
    if given is None:
        return (
            scores
            if scores is not None and scores.layout.features and scores.layout.columns == "train"
            else None
        )
    other = opened("perturbation", given)
    layout = Layout.of(other)
    if layout is None or not layout.features or (layout.rows, layout.columns) != ("test", "train"):
        raise ConfigurationError(
            f'perturbation: {other.location.url} holds no scores of mode "perturbation" for single training points'
        )
    _check_same("perturbation", facts, other)
    held = other.fingerprint
    positions = held.get("test_ids") == digest_of(np.arange(other.plan.work.tests))
    if held.get("test") != facts.digest("test") and positions:
        raise StoreMismatchError(
            f"perturbation: {other.location.url} is of other test data than {facts.location.url}, and names its test "
            "points by position: write it with test_ids= that say which of these they are"
        )
    return Scores(other, layout, {})


def _own(facts: Facts, given: Store | None, opened: Callable[[str, Store], Facts]) -> Own | None:
    if given is None:
        return Own.of(facts)
    other = opened("self_influence", given)
    if OWN not in other.dataset:
        raise ConfigurationError(f"self_influence: {other.location.url} was not reduced with SelfInfluence()")
    _check_same("self_influence", facts, other)
    return Own.of(other)


def _opened(
    facts: Facts, storage_options: Mapping[str, Any] | None, notes: list[str], argument: str, given: Store
) -> Facts:
    """Another store, at the λ of the first one where it has that; else a note says so."""
    other = Facts.of(given, None, storage_options, argument)
    if facts.damping in other.regularizations and facts.damping != other.regularization:
        other = Facts.of(given, facts.damping, storage_options, argument)
    if other.damping != facts.damping:
        notes.append(
            f"{argument} at λ = {facts.damping}: {other.location.url} was computed at λ = {other.damping}, "
            "and that is shown."
        )
    return other


def _check_same(argument: str, facts: Facts, other: Facts) -> None:
    """Refuse a store about other weights or other training data."""
    for name in ("model", "train", "train_ids"):
        held, found = facts.fingerprint.get(name), other.fingerprint.get(name)
        if held is not None and found != held:
            raise StoreMismatchError(
                f"{argument}: {other.location.url} is of another run: {name} differs from that of {facts.location.url}"
            )


def _put(path: Path, text: str) -> None:
    """The whole file or nothing; what a text holds beyond Unicode is written as a reference."""
    content = text.encode("utf-8", "xmlcharrefreplace")
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".report-")
    except OSError as error:
        raise ConfigurationError(f"output: {path} cannot be written: {error}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
