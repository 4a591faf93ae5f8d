"""Text: the sentences that taught a transformer what it says about another one.

The text is what ``help("debugger")`` and its like print: a few chapters of Python's own reference, cut into sentences.
A small transformer learns which chapter a sentence is from. Its inputs are integers, so there is nothing to
perturb; ``TopK`` keeps, for each test sentence, the training sentences that helped and harmed most.

The picture shows three test sentences with theirs. They share words and subjects, not the order of words; what
harms uses the same words in another chapter. Without its twenty most helpful sentences, a test
sentence is read much worse; without twenty others of the same chapter, about as well as before.

    python examples/sentences.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence import EkfacInfluence, TopK
from dask_influence.validation import Training

CHAPTERS = ("debugger", "string-methods", "compound", "specialnames")
DECAY = 1e-3
LENGTH = 32
"""Words of a sentence; longer ones are left out."""

LEFT_OUT = 20


@dataclass(frozen=True)
class Text:
    """Sentences, their words as integers (n, LENGTH) with 0 for padding, and their chapters."""

    sentences: list[str]
    x: Tensor
    y: Tensor
    words: int

    @classmethod
    def load(cls) -> Text:
        """All sentences of the chapters, shuffled."""
        found = {sentence: k for k, chapter in enumerate(CHAPTERS) for sentence in sentences(topics[chapter])}
        order = np.random.default_rng(0).permutation(len(found))
        texts, chapters = [list(found)[k] for k in order], [list(found.values())[k] for k in order]
        counts = Counter(word for text in texts for word in split(text))
        number = {word: k for k, word in enumerate((w for w, n in counts.items() if n > 1), start=2)}
        x = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(x, texts, strict=True):
            for k, word in enumerate(split(text)):
                row[k] = number.get(word, 1)  # 1 stands for all words that occur once
        return cls(texts, x, torch.tensor(chapters), len(number) + 2)


def split(sentence: str) -> list[str]:
    """Its words."""
    return re.findall(r"[a-z_]+", sentence.lower())


def sentences(chapter: str) -> list[str]:
    """Sentences of prose in a chapter; headings, grammar and code are left out."""
    paragraphs = (" ".join(part.split()) for part in chapter.split("\n\n") if "::=" not in part)
    parts = (one for text in paragraphs for one in re.split(r"(?<=[.!?]) +(?=[A-Z])", text))
    return [one for one in parts if one[-1:] == "." and ">>>" not in one and 6 <= len(split(one)) <= LENGTH]


class Reader(nn.Module):
    """Words and their places, one encoder layer, the mean over the words, a linear layer."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(LENGTH, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.chapter = nn.Linear(width, len(CHAPTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, chapters) of ``tokens`` (n, LENGTH)."""
        empty = tokens == 0
        places = torch.arange(LENGTH).expand_as(tokens)
        hidden = self.encoder(self.word(tokens) + self.place(places), src_key_padding_mask=empty)
        hidden = hidden.masked_fill(empty[..., None], 0)
        return self.chapter(hidden.sum(1) / (~empty).sum(1, keepdim=True))


def draw(path: Path, text: Text, top: xr.Dataset, shown: list[int], train: int) -> None:
    """Each test sentence over bars for the training sentences that help and harm it most."""
    figure, panels = plt.subplots(len(shown), 1, figsize=(11, 2.6 * len(shown)), layout="constrained")
    for axes, test in zip(panels, shown, strict=True):
        row = top.isel(test=test, rank=slice(0, 3))
        ids = np.concatenate([row.helpful_train.values, row.harmful_train.values[::-1]])
        scores = np.concatenate([row.helpful_score.values, row.harmful_score.values[::-1]])
        labels = [f"{CHAPTERS[text.y[k]]}: {textwrap.shorten(text.sentences[k], 95)}" for k in ids]
        axes.barh(range(6, 0, -1), scores, color=np.where(scores > 0, "tab:blue", "tab:red"))
        axes.set_yticks(range(6, 0, -1), labels, fontsize=8)
        title = f"{CHAPTERS[text.y[train + test]]}: {text.sentences[train + test]}"
        axes.set_title("\n".join(textwrap.wrap(title, 120)), fontsize=9, weight="bold", loc="right")
        axes.axvline(0, color="black", linewidth=0.8)
    panels[-1].set_xlabel("influence")
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Train, keep the top sentences, look at some, leave them out."""
    torch.set_num_threads(1)
    text = Text.load()
    count = len(text.y) * 4 // 5
    train, test = (text.x[:count], text.y[:count]), (text.x[count:], text.y[count:])
    optimizer = partial(torch.optim.Adam, lr=0.01)
    training = Training(partial(Reader, text.words), cross_entropy, optimizer, 60, 128, DECAY)
    model = training(*train, seed=0)
    with torch.no_grad():
        logits = model(test[0])
    losses = cross_entropy(logits, test[1], reduction="none")
    right = (logits.argmax(1) == test[1]).numpy()
    print(f"{count} sentences of {len(CHAPTERS)} chapters, {text.words} words;", end=" ")
    print(f"{right.mean():.0%} of {len(right)} others read right")

    # the residual of a factor is that of the Hessian, which takes passes over the data: not needed here
    influence = EkfacInfluence(model, cross_entropy, DECAY, certify=False).fit(train)
    top = influence.influences_to_zarr(
        folder / "sentences.zarr", test, train, reduce=TopK(LEFT_OUT), overwrite=True
    )
    same = text.y[top.helpful_train.values[:, :5]] == test[1][:, None]
    print(f"of the five that help a test sentence most, {same.double().mean():.0%} are from its chapter")

    shown = np.flatnonzero(right)[np.argsort(-losses[right].numpy())[[0, 5, 10]]].tolist()
    for one in shown:
        print(f"\n{CHAPTERS[test[1][one]]}: {text.sentences[count + one]}")
        for word in ("helpful", "harmful"):
            found = int(top[f"{word}_train"][one, 0])
            print(f"  most {word}, of {CHAPTERS[text.y[found]]}: {text.sentences[found]}")

    one, random = shown[0], np.random.default_rng(0)
    helpful = top.helpful_train.values[one]
    chapter = np.setdiff1d(np.flatnonzero(train[1] == test[1][one]), helpful)
    others = random.choice(chapter, LEFT_OUT, replace=False)
    print(f"\nloss of the first one {losses[one]:.2f}; trained again without {LEFT_OUT} of", end="")
    for which, left in (("its most helpful sentences", helpful), ("others of its chapter", others)):
        kept = np.setdiff1d(np.arange(count), left)
        with torch.no_grad():
            loss = cross_entropy(
                training(train[0][kept], train[1][kept], seed=0)(test[0][[one]]), test[1][[one]]
            )
        print(f" {which} {loss:.2f}", end=";")
    draw(folder / "sentences.png", text, top, shown, count)
    print(f"\npicture: {folder / 'sentences.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("example-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    main(output)
