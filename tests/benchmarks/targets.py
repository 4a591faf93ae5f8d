"""What has to be faster than a peer, by how much, and how the two sides are told to compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """One piece of work: a method of a side, the estimator, and the arguments of both."""

    work: str
    estimator: str
    options: Options = field(default_factory=dict)
    arguments: Options = field(default_factory=dict)

    def at(self, options: Options) -> Ask:
        """The same with other arguments of the estimator."""
        return Ask(self.work, self.estimator, {**self.options, **options}, self.arguments)


@dataclass(frozen=True)
class Strict:
    """A comparison of values in float64: both sides' arguments, the relative error allowed, where."""

    allowed: float = 1e-8
    ours: Options = field(default_factory=dict)
    theirs: Options = field(default_factory=dict)
    problem: str | None = None
    tests: int | None = None


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes
    ----------
    name, title : str
        For ``--only``, and as printed.
    factor : float
        How many times faster than the peer it is to be.
    problem : str
        ``"digits"`` or ``"large"``.
    ours, theirs : Ask
        What is timed.
    peer : str
        Package.
    check : str
        How results are checked on what was timed, in float32: ``"values"`` against the peer's to
        ``allowed``, ``"eigenpairs"`` or ``"systems"`` by true residuals, of which ours is to be no larger (pairs
        are asked for to the residual that the peer's have);
        ``"tolerance"`` against ours without the argument ``loosened``; or not at all.
    allowed : float
        Relative error of the values.
    strict : Strict, optional
        A comparison in float64 that goes before.
    once : bool
        The peer takes too long to be run again, or to be warmed up.
    minutes : bool
        The peer takes minutes: left out by ``--quick``.
    loosened : str
        The argument of ours that trades accuracy for speed.
    scaled : int
        The peer works test chunk by test chunk, and is given the first 1/``scaled`` of them: its time is
        multiplied, and values are compared on those.
    """

    name: str
    title: str
    factor: float
    problem: str
    ours: Ask
    theirs: Ask
    peer: str = "pydvl"
    check: str = "values"
    allowed: float = 1e-3
    strict: Strict | None = None
    once: bool = False
    minutes: bool = False
    loosened: str = ""
    scaled: int = 1

    def on_cluster(self) -> bool:
        """Whether the sides start workers for it."""
        return self.ours.work.startswith("cluster")


DIRECT = "DirectInfluence"
DIGITS_CHUNKS, LARGE_CHUNKS = {"chunks": (60, 128)}, {"chunks": (64, 256)}
ALL_DIGITS = {"tests": 360}
PERTURBED = {"tests": 64, "trains": 512}
ARNOLDI = {"rank": 20, "tol": 1e-3}
"""The peer's pairs have true residuals of 2e-6 to 7e-5 then, ours those that are asked for."""
AS_TRUE = {"tol": 1e-5}
TIGHT_ARNOLDI = {"tol": 1e-10}
PEER_BLOCK_CG = {"rtol": 1e-4, "solve_simultaneously": True}
CG = {"rtol": 1e-6}
"""Its true residual is then no larger than those of the peer, 2e-6 at both of its settings."""
PEER_CG = {"rtol": 1e-2}
"""It stops at the square of that times a norm; with less, float32 stands still until its iteration limit."""
PAIRS = 2e-2
"""Eigenpairs found to 1e-3 give scores that agree to this; found to 1e-10, they agree to 1e-6."""


def _direct(name: str, title: str, factor: float, ours: Ask, theirs: Ask) -> Target:
    strict = Strict() if ours.work != "fit" else None
    return Target(
        name, title, factor, "digits", ours, theirs, strict=strict, check="values" if strict else ""
    )


def _low_rank(tests: int, factor: float, *, complement: bool = False, loosened: bool = False) -> Target:
    kept, scaled = {"complement": True} if complement else {}, 4 if tests > 1024 else 1
    theirs = Ask(
        "chunked_scores",
        "ArnoldiInfluence",
        ARNOLDI | ({"use_woodbury": True} if complement else {}),
        {"tests": tests // scaled} | LARGE_CHUNKS,
    )
    tolerance = {"direction_tol": 1e-4} if loosened else {}
    strict = Strict(1e-6, kept | TIGHT_ARNOLDI, theirs.options | TIGHT_ARNOLDI, problem="digits", tests=360)
    return Target(
        f"scores-{tests}" + "-complement" * complement + "-factored" * loosened,
        f"{tests:,} x 4,096 scores" + ", complement kept" * complement + ", relative error 1e-4" * loosened,
        factor,
        "large",
        Ask("scores", "ArnoldiInfluence", ARNOLDI | AS_TRUE | kept | tolerance, {"tests": tests}),
        theirs,
        check="tolerance" if loosened else "values",
        allowed=1e-4 if loosened else PAIRS,
        strict=None if loosened else strict,
        once=True,
        minutes=tests > 256,
        loosened="direction_tol" if loosened else "",
        scaled=scaled,
    )


def _solves(name: str, title: str, factor: float, options: Options, *, once: bool) -> Target:
    ours = Ask("factors", "CgInfluence", CG, {"tests": 20})
    theirs = Ask("factors", "CgInfluence", options, {"tests": 20})
    return Target(name, title, factor, "digits", ours, theirs, check="systems", once=once)


TARGETS = (
    _direct("fit", "exact Hessian, digits MLP 64-32-10", 5, Ask("fit", DIRECT), Ask("fit", DIRECT)),
    _direct(
        "chunked-scores",
        "360 x 1,437 scores, chunks 60 / 128, in process",
        60,
        Ask("chunked_scores", DIRECT, arguments=ALL_DIGITS | DIGITS_CHUNKS),
        Ask("chunked_scores", DIRECT, arguments=ALL_DIGITS | DIGITS_CHUNKS),
    ),
    _direct(
        "cluster-scores",
        "the same to Zarr, warm cluster (2 x 1)",
        40,
        Ask("cluster_scores", DIRECT, arguments=ALL_DIGITS),
        Ask("cluster_scores", DIRECT, arguments=ALL_DIGITS | DIGITS_CHUNKS),
    ),
    _direct(
        "one-call",
        "360 x 1,437 in one in-memory call",
        1.5,
        Ask("scores", DIRECT, arguments=ALL_DIGITS),
        Ask("scores_in_one_call", DIRECT, arguments=ALL_DIGITS),
    ),
    _direct(
        "perturbation",
        "perturbation 64 x 512 x 64",
        50,
        Ask("perturbation", DIRECT, arguments=PERTURBED),
        Ask("perturbation", DIRECT, arguments=PERTURBED),
    ),
    _solves("cg", "CG, 20 right-hand sides, beside its own CG", 20, PEER_CG, once=True),
    _solves("cg-block", "the same, beside its block CG", 2, PEER_BLOCK_CG, once=False),
    Target(
        "arnoldi-fit",
        "Arnoldi rank 20 fit, P = 820,874, M = 4,096",
        3,
        "large",
        Ask("fit", "ArnoldiInfluence", ARNOLDI),
        Ask("fit", "ArnoldiInfluence", ARNOLDI),
        check="eigenpairs",
        once=True,
    ),
    _low_rank(256, 5),
    _low_rank(256, 4, complement=True),
    _low_rank(256, 20, loosened=True),
    _low_rank(2048, 30),
    _low_rank(2048, 25, complement=True),
    _low_rank(2048, 60, loosened=True),
    Target(
        "ekfac-fit",
        "EK-FAC fit, P = 820,874, M = 4,096",
        5,
        "large",
        Ask("fit", "EkfacInfluence"),
        Ask("fit", ""),
        peer="kronfluence",
        check="",
        once=True,
        minutes=True,
    ),
    Target(
        "ekfac-scores",
        "EK-FAC 256 x 4,096 scores",
        20,
        "large",
        Ask("scores", "EkfacInfluence", arguments={"tests": 256}),
        Ask("scores", "", arguments={"tests": 256}),
        peer="kronfluence",
        check="",
        strict=Strict(
            1e-6, {"curvature": "empirical_fisher"}, {"empirical": True}, problem="digits", tests=360
        ),
        once=True,
        minutes=True,
    ),
)
