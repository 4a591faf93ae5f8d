"""A zoo of small models with data: one of each kind of layer that torch differentiates in its own way.

``ZOO`` maps a name to a :class:`Specimen`. Sizes are small primes, so that axes and batches
cannot be confused; all inputs and models are float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from dask_influence.core.objective import Objective
from tests import data

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Specimen:
    """A model, its loss, and a function from a number of samples to that many of them."""

    build: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    samples: Callable[[int], Pair]
    perturbable: bool = True
    rounding: float = 1e-12
    """Relative error of torch's own first-order gradient: its hardsigmoid holds 1/6 in float32."""

    def model(self) -> nn.Module:
        return data.seeded(self.build).double().eval()

    def objective(self) -> Objective:
        return Objective.of(self.model(), self.loss)


class Classifier(nn.Module):
    """A body over (n, 5, 4) sequences, then a linear head over its flattened output."""

    def __init__(self, body: nn.Module, width: int, classes: int = 3) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.body, nn.MultiheadAttention):
            hidden = self.body(x, x, x, need_weights=False)[0]
        elif isinstance(self.body, nn.RNNBase):
            hidden = self.body(x)[0]
        else:
            hidden = self.body(x)
        return self.head(hidden.flatten(1))


class WeightedAttention(nn.Module):
    """Attention that returns its weights, which takes another path in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]


class Causal(nn.Module):
    """scaled_dot_product_attention as a function of user code, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Functional(nn.Module):
    """Fused operations called as functions, with parameters of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.slope = nn.Parameter(torch.tensor([0.3]))
        self.mix = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(x, (4,), self.scale)
        return torch.prelu(F.glu(self.mix(hidden)), self.slope)


class Pairs(nn.Module):
    """Two inputs, one of them integer: a tuple of positional or a mapping of keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 3), nn.Bilinear(4, 3, 5), nn.Linear(5, 2)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(dense, self.embed(ids))))


class Tokens(nn.Module):
    """Token ids to classes, with the embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids).mean(1))))


class Bags(nn.Module):
    """Bags of token ids, summed and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum = nn.EmbeddingBag(7, 4), nn.EmbeddingBag(7, 3, mode="sum")
        self.head = nn.Linear(7, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.mean(ids), self.sum(ids)], 1)))


class Packed(nn.Module):
    """A GRU over packed sequences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][-1])


class Cells(nn.Module):
    """Recurrent cells stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm, self.rnn = nn.GRUCell(4, 3), nn.LSTMCell(3, 2), nn.RNNCell(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = state = last = None
        for step in x.unbind(1):
            hidden = self.gru(step, hidden)
            state = self.lstm(hidden, state)
            last = self.rnn(state[0], last)
        assert last is not None
        return last


class OldStyleCube(torch.autograd.Function):
    """x³ in the style that ``torch.func`` cannot transform: no ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OldStyleCube.apply(x)


def _vectors(n: int) -> Pair:
    return data.normal(101, n, 6), data.classes(102, n, 3)


def _sequences(n: int) -> Pair:
    return data.normal(103, n, 5, 4), data.classes(104, n, 3)


def _images(n: int) -> Pair:
    return data.normal(105, n, 2, 5, 5), data.classes(106, n, 3)


def _token_ids(n: int) -> Pair:
    ids = torch.randint(7, (n, 5), generator=torch.Generator().manual_seed(107))
    return ids, data.classes(108, n, 7)


def _pairs(n: int) -> Pair:
    return (data.normal(109, n, 4), data.classes(110, n, 7)), data.normal(111, n, 2)


def _named_pairs(n: int) -> Pair:
    (dense, ids), y = _pairs(n)
    return {"ids": ids, "dense": dense}, y


def _ragged(n: int) -> Pair:
    x, y = _sequences(n)
    return (x, 1 + data.classes(112, n, 5)), y


def _regression(n: int) -> Pair:
    return data.normal(113, n, 6), data.normal(114, n, 2)


def _mlp(*between: nn.Module, width: int = 6, middle: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(width, middle), *between, nn.Linear(middle, 3))


def _convolutional(*after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), *after, nn.Flatten(), nn.LazyLinear(3))


def _settled(net: nn.Module, x: Tensor) -> nn.Module:
    """The net after a forward pass in training mode: lazy sizes known, running statistics filled."""
    net.train()(x)
    return net


def _frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3))
    net[2].requires_grad_(False)
    return net


def _image_net(*after: nn.Module) -> Callable[[], nn.Module]:
    return lambda: _settled(_convolutional(*copy.deepcopy(after)), _images(7)[0].float())


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.3, batch_first=True, **options)


def _of(build: Callable[[], nn.Module]) -> Specimen:
    return Specimen(build, F.cross_entropy, _vectors)


def _over_sequences(body: Callable[[], nn.Module], width: int = 20) -> Specimen:
    return Specimen(lambda: Classifier(body(), width), F.cross_entropy, _sequences)


def _over_images(*after: nn.Module) -> Specimen:
    return Specimen(_image_net(*after), F.cross_entropy, _images)


ZOO: dict[str, Specimen] = {
    "linear": Specimen(lambda: nn.Linear(6, 2), F.mse_loss, _regression),
    "mlp": _of(lambda: _mlp(nn.Tanh())),
    "mlp_relu": _of(lambda: _mlp(nn.ReLU())),
    "mlp_elu": _of(lambda: _mlp(nn.ELU())),
    "mlp_gelu": _of(lambda: _mlp(nn.GELU())),
    "mlp_softmax": _of(lambda: _mlp(nn.Softmax(-1))),
    "mlp_smooth_l1": Specimen(
        lambda: _mlp(nn.SiLU())[:2].append(nn.Linear(5, 2)), F.smooth_l1_loss, _regression
    ),
    "frozen": _of(_frozen),
    "dropout": _of(lambda: _mlp(nn.Tanh(), nn.Dropout(0.5))),
    "batch_norm": _of(lambda: _settled(_mlp(nn.BatchNorm1d(5), nn.Tanh()), _vectors(11)[0].float())),
    "conv1d": _over_sequences(lambda: nn.Sequential(nn.Conv1d(5, 3, 2), nn.Tanh()), 9),
    "conv2d": _over_images(nn.Tanh(), nn.AvgPool2d(2)),
    "max_pool": _over_images(nn.ReLU(), nn.MaxPool2d(2)),
    "instance_norm": _over_images(nn.InstanceNorm2d(3, affine=True), nn.Tanh()),
    "instance_norm_tracking": _over_images(nn.InstanceNorm2d(3, track_running_stats=True), nn.Tanh()),
    "group_norm": _over_images(nn.GroupNorm(3, 3), nn.Tanh()),
    "local_response_norm": _over_images(nn.LocalResponseNorm(2), nn.Tanh()),
    "layer_norm": _of(lambda: _mlp(nn.LayerNorm(5), nn.Tanh())),
    "layer_norm_plain": _over_sequences(lambda: nn.LayerNorm((5, 4), elementwise_affine=False)),
    "rms_norm": _of(lambda: _mlp(nn.RMSNorm(5), nn.Tanh())),
    "prelu": _of(lambda: _mlp(nn.PReLU())),
    "prelu_per_channel": _over_images(nn.PReLU(3)),
    "hardsigmoid": Specimen(lambda: _mlp(nn.Hardsigmoid()), F.cross_entropy, _vectors, rounding=1e-7),
    "rrelu": _of(lambda: _mlp(nn.RReLU())),
    "glu": _over_sequences(lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), 15),
    "weight_norm": _of(lambda: nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))),
    "weight_norm_whole": _over_sequences(lambda: weight_norm(nn.Conv1d(5, 3, 2), dim=None), 9),
    "spectral_norm": _of(lambda: nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))),
    "attention": _over_sequences(lambda: nn.MultiheadAttention(4, 2, batch_first=True)),
    "attention_weights": _over_sequences(WeightedAttention),
    "scaled_dot_product": _over_sequences(Causal),
    "transformer": _over_sequences(_encoder),
    "transformer_norm_first": _over_sequences(lambda: _encoder(norm_first=True, activation="gelu")),
    "functional": _over_sequences(Functional),
    "rnn": _over_sequences(lambda: nn.RNN(4, 2, batch_first=True, nonlinearity="relu"), 10),
    "gru": _over_sequences(lambda: nn.GRU(4, 2, batch_first=True, bidirectional=True)),
    "lstm": _over_sequences(lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True, proj_size=2), 10),
    "cells": Specimen(Cells, F.cross_entropy, _sequences),
    "packed": Specimen(Packed, F.cross_entropy, _ragged),
    "bilinear_tuple": Specimen(Pairs, F.mse_loss, _pairs),
    "bilinear_mapping": Specimen(Pairs, F.mse_loss, _named_pairs),
    "tied_tokens": Specimen(Tokens, F.cross_entropy, _token_ids, perturbable=False),
    "token_bags": Specimen(Bags, F.cross_entropy, _token_ids, perturbable=False),
    "old_style_function": _of(lambda: _mlp(Cubed())),
}
"""Every specimen by name."""
