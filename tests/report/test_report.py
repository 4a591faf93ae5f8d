"""A report of every kind of store: what it shows, what it says that it cannot, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence, EkfacInfluence, GroupSum, SelfInfluence, TopK, open_influences
from dask_influence.core.estimators import estimates
from dask_influence.errors import (
    ConfigurationError,
    CorruptStoreError,
    DataError,
    InfluenceWarning,
    StoreError,
    StoreMismatchError,
)
from dask_influence.report import report, scores, writing
from tests.report.document import Element, cases, check, listed, notes, parsed
from tests.report.stores import COPY, ORIGINAL, TESTS, TRAINS, WRONG, Stores, problem

Make = Callable[..., Element]


# -- what it shows -------------------------------------------------------------------------
def test_lists_are_those_of_the_scores(stores: Stores, made: Make) -> None:
    values = stores.scores()
    document = made("scores.zarr", tests=["t4", "t1"], top=4)
    found = cases(document)
    assert list(found) == ["Test point t4", "Test point t1"]
    for name, row in (("Test point t4", 4), ("Test point t1", 1)):
        order = np.argsort(-values[row], kind="stable")
        assert listed(found[name]) == [list(map(str, order[:4])), list(map(str, order[::-1][:4]))]
        shown = [one.one("b").text for one in found[name].all("p", "score")]
        assert shown[0] == f"{values[row].max():+.4g}"
        assert shown[4] == f"{values[row].min():+.4g}".replace("-", "−")
        effect = f"loss {values[row].max() / TRAINS:+.2g}"
        assert effect in found[name].all("p", "score")[0].text
    assert f"{TESTS - 2} of {TESTS} test points" in notes(document)


def test_by_default_the_most_harmed_test_points_are_shown(
    stores: Stores, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dask_influence.report.lists.TESTS", 3)
    lowest = np.argsort(stores.scores().min(axis=1), kind="stable")[:3]
    assert list(cases(made("scores.zarr"))) == [f"Test point t{row}" for row in lowest]
    assert list(cases(made("top.zarr"))) == [f"Test point t{row}" for row in lowest]
    assert cases(made("scores.zarr", tests=[])) == {}


def test_images_are_the_samples(stores: Stores, made: Make) -> None:
    data = {"test": stores.test, "train": stores.train, "image_shape": (8, 8)}
    case = cases(made("scores.zarr", tests=["t2"], top=2, **data))["Test point t2"]
    pictures = [pixels_of(image) for image in case.all("img")]
    assert len(pictures) == 5
    expected = np.rint(255 * stores.test[0][2].double().numpy().reshape(8, 8))
    np.testing.assert_array_equal(pictures[0], expected)
    best = int(stores.scores()[2].argmax())
    np.testing.assert_array_equal(
        pictures[1], np.rint(255 * stores.train[0][best].double().numpy().reshape(8, 8))
    )
    assert f"target {int(stores.test[1][2])}" in case.text
    assert notes_of_samples(made("scores.zarr"))
    assert not notes_of_samples(made("scores.zarr", **data))


def test_maps_beside_images_are_the_perturbation_scores(stores: Stores, made: Make) -> None:
    data = {"test": stores.test, "train": stores.train, "image_shape": (8, 8)}
    document = made("scores.zarr", tests=["t3", "t5"], top=2, perturbation=stores / "pixels.zarr", **data)
    with_map, without = cases(document).values()
    assert len(with_map.all("img")) == 1 + 2 * 4
    assert len(without.all("img")) == 1 + 4  # t5 is not in that store
    best = int(stores.scores()[3].argmax())
    values = stores.scores("pixels.zarr")[1, best].reshape(8, 8)
    drawn = pixels_of(with_map.all("img")[2])
    strongest = np.unravel_index(np.abs(values).argmax(), (8, 8))
    assert drawn[..., 3].argmax() == np.ravel_multi_index(strongest, (8, 8))
    seen = drawn[..., 3] > 0
    np.testing.assert_array_equal(drawn[..., 2][seen] > drawn[..., 0][seen], values[seen] > 0)


def test_a_perturbation_store_ranks_by_norm_and_draws_bars(stores: Stores, made: Make) -> None:
    names = [f"pixel <{at}>" for at in range(64)]
    options = {"train": stores.train, "kind": "tabular", "feature_names": names}
    document = made("pixels.zarr", tests=["t2"], top=3, **options)
    values = stores.scores("pixels.zarr")[0]
    order = np.argsort(-np.linalg.norm(values.astype(float), axis=1), kind="stable")
    case = cases(document)["Test point t2"]
    assert listed(case) == [list(map(str, order[:3]))]
    table = case.all("table", "features")[0]
    strongest = np.argsort(-np.abs(values[order[0]]), kind="stable")
    rows = [row.one("th").text for row in table.all("tr")[1:-1]]
    assert rows == [names[at] for at in strongest[: len(rows)]]
    signs = [("up" in bar.attributes["class"]) for bar in table.all("i")]
    assert signs == [bool(values[order[0], at] >= 0) for at in strongest[: len(rows)]]
    assert "52 more features" in table.text


def test_text_is_shaded_token_by_token(made: Make, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, 3, generator=generator), torch.tensor([0, 1] * 4 + [0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    infl = DirectInfluence(model, cross_entropy, 0.1).fit((x, y))
    infl.influences_to_zarr(tmp_path / "words.zarr", (x[:1], y[:1]), (x, y), mode="perturbation")
    words = [[f"w{j}{t}" for t in range(4)] for j in range(9)]
    words[3][0] = "<b>&"
    document = made(tmp_path / "words.zarr", train=(x, y), train_tokens=words, top=9)
    found = open_influences(tmp_path / "words.zarr")["influence"].to_numpy()[0]
    expected = np.einsum("jte,jte->jt", found, x.numpy())
    case = cases(document)["Test point 0"]
    order = list(map(int, listed(case)[0]))
    for text, j in zip(case.all("p", "text"), order, strict=True):
        spans = text.all("span", "token")
        assert [one.text for one in spans] == words[j]
        assert ["up" in one.attributes["class"] for one in spans] == (expected[j] > 0).tolist()


def test_tokens_without_their_embeddings_are_not_shaded(made: Make, tmp_path: Path) -> None:
    x, y = torch.arange(24.0).reshape(4, 2, 3).sin(), torch.tensor([0, 1, 1, 0])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))
    infl = DirectInfluence(model, cross_entropy, 0.1).fit((x, y))
    infl.influences_to_zarr(tmp_path / "words.zarr", (x[:1], y[:1]), (x, y), mode="perturbation")
    document = made(tmp_path / "words.zarr", train_tokens=[["a", "b"]] * 4)
    texts = document.all("p", "text")
    assert [text.text for text in texts] == ["a b"] * 4
    assert not any(one.attributes.get("style") for text in texts for one in text.all("span", "token"))


def test_a_vocabulary_that_fails_is_refused(made: Make, tmp_path: Path) -> None:
    x, y = torch.arange(8).reshape(4, 2) % 3, torch.tensor([0, 1, 1, 0])
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    infl = DirectInfluence(model, cross_entropy, 0.5, curvature="ggn").fit((x, y))
    infl.influences_to_zarr(tmp_path / "tokens.zarr", (x[:1], y[:1]), (x, y))
    with pytest.raises(ConfigurationError, match=r"vocabulary failed for the token \d \(KeyError"):
        made(tmp_path / "tokens.zarr", train=(x, y), vocabulary={}.__getitem__)


def test_integers_are_text_and_the_vocabulary_names_them(made: Make, tmp_path: Path) -> None:
    x, y = torch.arange(24).reshape(6, 4) % 5, torch.tensor([0, 1, 0, 1, 0, 1])
    model = torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    infl = DirectInfluence(model, cross_entropy, 0.5, curvature="ggn").fit((x, y))
    infl.influences_to_zarr(tmp_path / "tokens.zarr", (x[:1], y[:1]), (x, y))
    vocabulary = ["the", "cat", "<s>", "sat", "on"]
    document = made(
        tmp_path / "tokens.zarr", test=(x[:1], y[:1]), vocabulary=vocabulary, class_names={0: "no"}
    )
    case = cases(document)["Test point 0"]
    assert case.all("p", "text")[0].text == "the cat <s> sat"
    assert "target no" in case.text


def test_suspects_and_duplicates(stores: Stores, made: Make) -> None:
    document = made("scores.zarr", self_influence=stores / "own.zarr", train=stores.train, tests=["t0", "t1"])
    look = section(document, "own")
    own = open_influences(stores / "own.zarr")["self_influence"].to_numpy()
    suspects = [name.all("b")[0].text for name in look.all("p", "name")]
    assert suspects == list(map(str, np.argsort(-own, kind="stable")[: len(suspects)]))
    assert str(WRONG) in suspects[:3]
    groups = [cell.text for cell in look.all("td") if "," in cell.text]
    label = int(stores.train[1][ORIGINAL])
    assert groups == [f"{ORIGINAL}, {COPY}", f"{label}, {label}"]
    alone = made("own.zarr")
    assert "Possible duplicates" in alone.text
    assert f"{ORIGINAL}, {COPY}" in alone.text
    assert "self_influence=" in notes(made("scores.zarr"))


def test_certificates_and_provenance(stores: Stores, made: Make) -> None:
    document = made("sketch.zarr")
    dataset = open_influences(stores / "sketch.zarr")
    known = dataset.attrs["diagnostics"]
    assert len(known["eigenvalues"]) == 12
    assert f"{known['captured_spectrum']:.1%} of the curvature" in document.text
    worst = int(np.argmax(dataset["factor_residual"].values))
    assert f"{dataset['factor_residual'].values[worst]:.2g}, at test point {worst}" in document.text
    run = json.loads((stores / "sketch.zarr" / "_run" / "run.json").read_text())
    table = document.one("table", "provenance").text
    for name in ("model", "train", "test", "fit"):
        assert run["fingerprint"][name] in table
    labels = {one.attributes["aria-label"] for one in document.all("svg")}
    assert {"Eigenvalues", "Histogram of residuals", "Tasks at work over time"} <= labels


def test_residuals_that_were_estimated_say_so(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "EXACT", 0.0)
    own = problem(tmp_path)
    infl = EkfacInfluence(own.model, cross_entropy, 0.05).fit(own.train)
    few = tuple(part[: estimates.MOST] for part in own.train)
    for name, test, said in (("few", few, "measured"), ("all", own.train, "estimated")):
        infl.influences_to_zarr(tmp_path / f"{name}.zarr", test, own.train)
        document = made(tmp_path / f"{name}.zarr")
        assert f"what is left of it {said}" in document.text
        assert ("Estimated from 32 random vectors" in document.text) == (said == "estimated")


def test_the_same_store_gives_the_same_bytes(stores: Stores, tmp_path: Path) -> None:
    options = {"train": stores.train, "test": stores.test, "image_shape": (8, 8)}
    options |= {"self_influence": stores / "own.zarr", "perturbation": stores / "pixels.zarr"}
    first = report(stores / "scores.zarr", tmp_path / "a.html", **options)
    second = report(stores / "scores.zarr", tmp_path / "b.html", **options)
    assert first.read_bytes() == second.read_bytes()
    assert report(stores / "scores.zarr", tmp_path / "b.html").read_bytes() != first.read_bytes()


NASTY = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&amp;",
    "$\\frac{",
    "]]>",
    "{{ 7 * 7 }}",
    "né\u2028",
]


def test_ids_titles_and_names_are_escaped(stores: Stores, made: Make, tmp_path: Path) -> None:
    trains = [f"{NASTY[j % len(NASTY)]}{j}" for j in range(TRAINS)]
    stores.direct().influences_to_zarr(
        tmp_path / "nasty.zarr", stores.test, stores.train, test_ids=NASTY, train_ids=trains
    )
    options = {
        "test": stores.test,
        "class_names": [f"<i>{c}</i>" for c in range(10)],
        "title": "</title><script>",
    }
    document = made(tmp_path / "nasty.zarr", tests=NASTY, **options)
    assert {one.removeprefix("Test point ") for one in cases(document)} == {
        " ".join(name.split()) for name in NASTY
    }
    assert document.one("title").text == "</title><script>"
    assert not document.all("i", None) or all(
        one.parent and one.parent.tag == "span" for one in document.all("i")
    )
    assert any("<i>" in one.text for one in document.all("p"))


# -- what it says that it cannot ------------------------------------------------------------
def test_an_incomplete_run_is_shown_as_far_as_it_is(stores: Stores, made: Make, tmp_path: Path) -> None:
    store = tmp_path / "part.zarr"
    shutil.copytree(stores / "scores.zarr", store)
    ledger = sorted((store / "_run" / "ledger").glob("strip-*"))
    for entry in ledger[1:3]:
        for key, _, _ in json.loads(entry.read_text())["shards"]:
            (store / key).unlink()
        entry.unlink()
    record = store / "_run" / "run.json"
    record.write_text(record.read_text().replace('"state": "complete"', '"state": "running"'))
    with pytest.warns(InfluenceWarning, match="not complete"):
        values = open_influences(store)["influence"].to_numpy()
    lacking = int(np.isnan(values[2]).sum())
    assert 0 < lacking < TRAINS
    document = made(store, tests=["t2"], top=TRAINS - 10)
    case = cases(document)["Test point t2"]
    held = np.flatnonzero(~np.isnan(values[2]))
    order = held[np.argsort(-values[2][held], kind="stable")]
    assert listed(case)[0] == list(map(str, order[: TRAINS - 10]))
    assert f"{lacking} scores are not there" in case.text
    assert "The run is running" in notes(document)
    done = document.one("span", "badge").text
    assert done.startswith("running: ")
    assert "partial" in document.one("span", "badge").attributes["class"]


def test_a_run_that_has_just_begun_has_a_report(stores: Stores, made: Make, tmp_path: Path) -> None:
    store = tmp_path / "begun.zarr"
    shutil.copytree(stores / "scores.zarr", store)
    shutil.rmtree(store / "influence" / "c")
    shutil.rmtree(store / "_run" / "ledger")
    record = store / "_run" / "run.json"
    record.write_text(record.read_text().replace('"state": "complete"', '"state": "running"'))
    document = made(store)
    assert cases(document) == {}
    assert "none is there yet" in notes(document)


def test_samples_that_could_not_be_scored_are_named(made: Make, tmp_path: Path) -> None:
    own = problem(tmp_path)
    x, y = own.train[0], own.train[1].clone()
    infl = own.direct()
    y[5] = 99  # a label that the loss raises of
    with pytest.warns(InfluenceWarning):
        infl.influences_to_zarr(tmp_path / "lacking.zarr", own.test, (x, y), on_missing="warn")
    document = made(tmp_path / "lacking.zarr", tests=[0], train=(x, y), image_shape=(8, 8), top=50)
    assert "1 training points could not be scored: 5 (" in notes(document)
    assert "5" not in listed(cases(document)["Test point 0"])[0]
    assert "1 scores are not there" in document.text
    assert document.one("span", "badge").text == "incomplete"


def test_lists_of_a_reduced_store(stores: Stores, made: Make, tmp_path: Path) -> None:
    document = made("top.zarr", tests=["t6"], train=stores.train, image_shape=(8, 8))
    values = stores.scores()[6]
    order = np.argsort(-values, kind="stable")
    case = cases(document)["Test point t6"]
    assert listed(case) == [list(map(str, order[:3])), list(map(str, order[::-1][:3]))]
    assert len(case.all("img")) == 6
    assert "TopK(3)" in notes(document)
    assert "Duplicates" not in [one.text for one in document.all("h3")]

    names = [f"image {j}" for j in range(TRAINS)]
    stores.direct().influences_to_zarr(
        tmp_path / "named.zarr", stores.test, stores.train, reduce=TopK(2), train_ids=names
    )
    options = {"tests": [6], "train": stores.train, "image_shape": (8, 8)}
    assert not made(tmp_path / "named.zarr", **options).all("img")
    drawn = made(tmp_path / "named.zarr", train_ids=names, **options)
    assert len(drawn.all("img")) == 4
    assert listed(cases(drawn)["Test point 6"])[0] == [f"image {j}" for j in order[:2]]


def test_lists_of_test_points_for_training_points(stores: Stores, made: Make) -> None:
    document = made("per_train.zarr", tests=[9], test=stores.test)
    values = stores.scores()[:, 9]
    order = np.argsort(-values, kind="stable")
    expected = [[f"t{i}" for i in order[:2]], [f"t{i}" for i in order[::-1][:2]]]
    assert listed(cases(document)["Training point 9"]) == expected


def test_sums_over_groups(stores: Stores, made: Make) -> None:
    document = made("groups.zarr", tests=["t0"], top=2)
    sums = open_influences(stores / "groups.zarr")["group_influence"].sel(test="t0")
    best = sums.group.values[np.argsort(-sums.values, kind="stable")[:2]]
    assert listed(cases(document)["Test point t0"])[0] == list(map(str, best))


def test_stores_without_scores_of_pairs(made: Make) -> None:
    factors = made("factors.zarr")
    assert "factors, and no scores" in notes(factors)
    assert not factors.all("article")
    assert "Relative residuals" in factors.text
    own = made("own.zarr")
    assert "SelfInfluence()" in notes(own)
    assert "Residuals of the factors: the store holds none." in notes(own)


def test_several_regularizations(stores: Stores, made: Make) -> None:
    both = open_influences(stores / "swept.zarr")["influence"].to_numpy()
    for asked, row in ((None, both[0, 1]), (0.5, both[1, 1])):
        document = made("swept.zarr", tests=["t1"], regularization=asked)
        assert listed(cases(document)["Test point t1"])[0] == list(
            map(str, np.argsort(-row, kind="stable")[:5])
        )
        other = "0.5" if asked is None else "0.05"
        assert f"The scores at other λ ({other})" in notes(document)
    assert not np.array_equal(np.argsort(-both[0, 1])[:5], np.argsort(-both[1, 1])[:5])


def test_other_stores_are_shown_at_the_same_regularization_or_say_theirs(
    stores: Stores, made: Make, tmp_path: Path
) -> None:
    both = {"reduce": SelfInfluence(), "hessian_regularization": [0.5, 0.05]}
    stores.direct().influences_to_zarr(tmp_path / "both.zarr", None, stores.train, **both)
    alone, swept = made("own.zarr"), made("scores.zarr", self_influence=tmp_path / "both.zarr")
    strongest = [one.all("p", "score")[0].text for one in (section(alone, "own"), section(swept, "own"))]
    assert strongest[0] == strongest[1]
    assert "was computed at" not in notes(swept)
    stores.direct(0.5).influences_to_zarr(tmp_path / "other.zarr", None, stores.train, reduce=SelfInfluence())
    other = made("scores.zarr", self_influence=tmp_path / "other.zarr")
    assert "was computed at λ = 0.5" in notes(other)
    assert section(other, "own").all("p", "score")[0].text != strongest[0]


def test_lists_at_several_regularizations_and_sums_over_both_sides(
    stores: Stores, made: Make, tmp_path: Path
) -> None:
    both = stores.scores("swept.zarr")
    options = {"hessian_regularization": [0.05, 0.5], "test_ids": stores.test_ids}
    infl = stores.direct()
    infl.influences_to_zarr(tmp_path / "lists.zarr", stores.test, stores.train, reduce=TopK(4), **options)
    document = made(tmp_path / "lists.zarr", tests=["t1"], regularization=0.5)
    assert listed(cases(document)["Test point t1"])[0] == list(
        map(str, np.argsort(-both[1, 1], kind="stable")[:4])
    )
    labels = {"labels": stores.train[1].numpy(), "test_labels": ["a", "b", "a", "b", "a", "b", "a"]}
    infl.influences_to_zarr(tmp_path / "sums.zarr", stores.test, stores.train, reduce=GroupSum(**labels))
    sums = open_influences(tmp_path / "sums.zarr")["group_influence"]
    case = cases(made(tmp_path / "sums.zarr", tests=["b"], top=3))["Test group b"]
    best = sums.group.values[np.argsort(-sums.sel(test_group="b").values, kind="stable")[:3]]
    assert listed(case)[0] == list(map(str, best))


def test_blocks_with_their_own_regularization(stores: Stores, made: Make, tmp_path: Path) -> None:
    blocks = {"weight": 0.05, "bias": 0.5}
    infl = DirectInfluence(stores.model, cross_entropy, blocks, block_structure="parameter").fit(stores.train)
    infl.influences_to_zarr(tmp_path / "blocks.zarr", stores.test, stores.train)
    document = made(tmp_path / "blocks.zarr", tests=[0])
    assert "at λ = one for each block" in document.text
    assert "Eigenvalues" in {one.attributes["aria-label"] for one in document.all("svg")}


def test_pictures_in_colour_and_their_maps(made: Make, tmp_path: Path) -> None:
    x, y = torch.rand(8, 3, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(24, 2)
    )
    infl = DirectInfluence(model, cross_entropy, 1.0, curvature="ggn").fit((x, y))
    infl.influences_to_zarr(tmp_path / "scores.zarr", (x[:1], y[:1]), (x, y))
    infl.influences_to_zarr(tmp_path / "maps.zarr", (x[:1], y[:1]), (x, y), mode="perturbation")
    document = made(
        tmp_path / "scores.zarr",
        perturbation=tmp_path / "maps.zarr",
        test=(x[:1], y[:1]),
        train=(x, y),
        top=1,
    )
    own, image, strengths, *_ = [pixels_of(one) for one in document.all("img")]
    np.testing.assert_array_equal(own, np.rint(255 * x[0].double().permute(1, 2, 0).numpy()))
    assert image.shape == (6, 5, 3)
    best = int(open_influences(tmp_path / "scores.zarr")["influence"].to_numpy()[0].argmax())
    values = open_influences(tmp_path / "maps.zarr")["influence"].to_numpy()[0, best].sum(axis=0)
    assert strengths[..., 3].argmax() == np.abs(values).argmax()


def test_maps_of_unnamed_other_test_points_are_refused(stores: Stores, tmp_path: Path) -> None:
    x, y = stores.test
    infl = stores.direct()
    infl.influences_to_zarr(tmp_path / "maps.zarr", (x[2:4], y[2:4]), stores.train, mode="perturbation")
    infl.influences_to_zarr(tmp_path / "plain.zarr", stores.test, stores.train)
    with pytest.raises(StoreMismatchError, match="names its test points by position"):
        report(tmp_path / "plain.zarr", tmp_path / "r.html", perturbation=tmp_path / "maps.zarr")
    assert not (tmp_path / "r.html").exists()


def test_data_of_another_run_are_doubted(stores: Stores, made: Make) -> None:
    x, y = stores.train
    document = made("scores.zarr", train=(x + 0.01, y), image_shape=(8, 8))
    assert "Whether the train samples drawn here" in notes(document)
    assert "Whether the train samples" not in notes(
        made("scores.zarr", train=stores.train, image_shape=(8, 8))
    )


def test_of_a_large_store_little_is_read(stores: Stores, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()
    own = scores.Stored.read

    def counted(self: scores.Stored, *box: Any) -> np.ndarray:
        found = own(self, *box)
        read.append(found.size)
        return found

    monkeypatch.setattr(scores.Stored, "read", counted)
    whole = made("scores.zarr", tests=["t2"])
    assert sum(read) == TESTS * TRAINS + TRAINS
    assert "All 371 pairs" in whole.text
    monkeypatch.setattr(scores, "SAMPLE_BYTES", 1300)
    monkeypatch.setattr(scores, "BLOCK_BYTES", 600)
    monkeypatch.setattr(scores, "ROW_BYTES", 700)
    read.clear()
    document = made("scores.zarr", tests=["t2"])
    assert sum(read) < 0.95 * (TESTS * TRAINS + TRAINS)
    assert "An even draw of" in document.text
    assert "rows are too long to be read whole" in notes(document)


# -- what is refused --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("store", "options", "error", "message"),
    [
        ("scores.zarr", {"tests": ["t9"]}, ConfigurationError, "'t9' is not in .* holds 7 test ids: t0, t1"),
        ("scores.zarr", {"tests": "t1"}, ConfigurationError, "sequence of ids"),
        ("scores.zarr", {"tests": [None]}, ConfigurationError, "numbers or texts"),
        ("scores.zarr", {"tests": ["t1"] * 101}, ConfigurationError, "at most 100"),
        ("scores.zarr", {"top": 0}, ConfigurationError, "from 1 to 50"),
        ("scores.zarr", {"top": 51}, ConfigurationError, "from 1 to 50"),
        ("scores.zarr", {"regularization": 0.1}, ConfigurationError, "holds one"),
        ("swept.zarr", {"regularization": 0.1}, ConfigurationError, "one of 0.05, 0.5; got 0.1"),
        ("swept.zarr", {"regularization": "0.5"}, ConfigurationError, "must be a number"),
        ("scores.zarr", {"title": 3}, ConfigurationError, "title must be text"),
        ("scores.zarr", {"kind": "video"}, ConfigurationError, "kind must be one of"),
        ("scores.zarr", {"image_shape": 8}, ConfigurationError, r"image_shape must be \(H, W\)"),
        ("scores.zarr", {"image_shape": (5, 5, 5)}, ConfigurationError, "1, 3 or 4 channels"),
        ("scores.zarr", {"class_names": "cat"}, ConfigurationError, "class_names must be a sequence"),
        ("scores.zarr", {"perturbation": "scores.zarr"}, ConfigurationError, "no scores of mode"),
        (
            "scores.zarr",
            {"self_influence": "scores.zarr"},
            ConfigurationError,
            "not reduced with SelfInfluence",
        ),
        ("scores.zarr", {"self_influence": "none.zarr"}, StoreError, "self_influence: .* holds no run"),
        ("scores.zarr", {"train_ids": list(range(1, 54))}, DataError, "train_ids are not those"),
        ("scores.zarr", {"train_tokens": ["a"]}, DataError, "train_tokens holds 1 samples"),
        ("scores.zarr", {"train_tokens": ["abc"] * 53}, ConfigurationError, "sequence of tokens"),
        ("scores.zarr", {"train_tokens": [["a"]] * 52 + [3]}, ConfigurationError, "sequence of tokens.*int"),
        ("scores.zarr", {"train_tokens": iter([["a"]])}, ConfigurationError, "must be a sequence"),
        ("scores.zarr", {"tests": [True]}, ConfigurationError, "tests must hold ids"),
        ("none.zarr", {}, StoreError, "holds no run"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    stores: Stores, tmp_path: Path, store: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name in ("perturbation", "self_influence"):
        if name in options:
            options = {**options, name: stores / options[name]}
    with pytest.raises(error, match=message):
        report(stores / store, tmp_path / "report.html", **options)
    assert list(tmp_path.iterdir()) == []


def test_data_that_do_not_fit_are_refused(stores: Stores, tmp_path: Path) -> None:
    x, y = stores.train
    with pytest.raises(DataError, match=r"train holds 52 samples, .* was written for 53"):
        report(stores / "scores.zarr", tmp_path / "r.html", train=(x[:-1], y[:-1]))
    with pytest.raises(ConfigurationError, match=r"test: .* no test points; leave their data out"):
        report(stores / "own.zarr", tmp_path / "r.html", test=stores.test)
    with pytest.raises(ConfigurationError, match=r"image_shape=.* does not fit"):
        report(stores / "scores.zarr", tmp_path / "r.html", train=stores.train, image_shape=(8, 9))
    with pytest.raises(ConfigurationError, match="feature_names holds 2 names"):
        report(stores / "scores.zarr", tmp_path / "r.html", train=stores.train, feature_names=["a", "b"])
    with pytest.raises(ConfigurationError, match='kind="image" does not fit'):
        report(stores / "scores.zarr", tmp_path / "r.html", train=stores.train, kind="image")
    assert list(tmp_path.iterdir()) == []


def test_stores_of_another_model_are_refused(stores: Stores, tmp_path: Path) -> None:
    other = torch.nn.Linear(64, 10)
    infl = DirectInfluence(other, cross_entropy, 0.05).fit(stores.train)
    infl.influences_to_zarr(tmp_path / "other.zarr", stores.test, stores.train, mode="perturbation")
    with pytest.raises(StoreMismatchError, match=r"perturbation: .* is of another run: model differs"):
        report(stores / "scores.zarr", tmp_path / "r.html", perturbation=tmp_path / "other.zarr")
    assert not (tmp_path / "r.html").exists()


def test_places_that_cannot_be_written_are_refused(stores: Stores, tmp_path: Path) -> None:
    for output, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "r.html", "there is no folder"),
        ("s3://bucket/r.html", "a file of this machine"),
        (3, "must be a path"),
        (tmp_path / ("r" * 300), "cannot be a file"),
        ("a\0b", "cannot be a file"),
        ("/proc/r.html", "/proc/r.html cannot be written"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            report(stores / "scores.zarr", output)  # type: ignore[arg-type]


def test_without_the_extra_the_error_says_so(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = writing.importlib.util.find_spec
    monkeypatch.setattr(
        writing.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(ConfigurationError, match=r"takes matplotlib: pip install 'dask_influence\[report\]'"):
        report(stores / "scores.zarr", tmp_path / "r.html")


def test_a_report_that_fails_leaves_the_old_one(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ConfigurationError):
        report(stores / "scores.zarr", path, tests=["t9"])
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            report(stores / "scores.zarr", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert report(stores / "scores.zarr", path) == path
    check(parsed(path.read_text()))


def test_a_damaged_shard_is_named(stores: Stores, tmp_path: Path) -> None:
    store = tmp_path / "damaged.zarr"
    shutil.copytree(stores / "scores.zarr", store)
    shard = next(one for one in sorted((store / "influence" / "c").rglob("*")) if one.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"'influence' of .* cannot be decoded"):
        report(store, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("influence/c", "'influence' of .* is complete, and scores of it are gone"),
        ("test/c", "'test' of .* is not what was written"),
        ("train/c", "'train' of .* is not what was written"),
    ],
)
def test_objects_that_are_gone_are_no_scores_and_no_ids(
    stores: Stores, tmp_path: Path, gone: str, message: str
) -> None:
    shutil.copytree(stores / "scores.zarr", tmp_path / "damaged.zarr")
    shutil.rmtree(tmp_path / "damaged.zarr" / gone)
    with pytest.raises(CorruptStoreError, match=message):
        report(tmp_path / "damaged.zarr", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# -- reading a page ---------------------------------------------------------------------------
def section(document: Element, name: str) -> Element:
    return next(one for one in document.all("section") if one.attributes["id"] == name)


def pixels_of(image: Element) -> np.ndarray:
    head, _, content = image.attributes["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def notes_of_samples(document: Element) -> bool:
    return "What the points look like" in notes(document)
