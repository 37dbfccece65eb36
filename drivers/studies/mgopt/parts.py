"""The parts of the study of MG/OPT in depth: which runs each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from studies.mgopt.case import Case

LEVELS = (1, 2, 4, 6, 8)
SCHEDULES = (
    "[1, 1, 1, 1, 1, 1, 1, {1}]",
    "[1, 1, 1, 1, 1, 1, 1, {2}]",
    "[1, 1, 1, 1, 1, 1, 1, {5}]",
    "[1, 1, 1, 1, 1, 1, 1, {10}]",
    "[1, 1, 1, 1, 2, 2, 2, {2}]",
    "[(1), 1, 1, 1, 2, 2, 2, {2}]",
)
# The methods of the levels: what changes, and the learning rates to choose from.
_GD, _L2 = (0.1, 0.2, 0.5, 1.0, 2.0), (0.01, 0.02, 0.05, 0.1, 0.2)
_MOMENTUM, _ADAM = (0.02, 0.05, 0.1, 0.2), (0.003, 0.01, 0.03, 0.1)
METHODS = {
    "gd": ({}, _GD),
    "gd, L2": ({"metric": "L2"}, _L2),
    "momentum": ({"method": "momentum"}, _MOMENTUM),
    "momentum, L2": ({"method": "momentum", "metric": "L2"}, _L2),
    "momentum anew": ({"method": "momentum", "keep": False}, _GD),
    "momentum carried": ({"method": "momentum", "carry": 1.0}, _MOMENTUM),
    "adam": ({"method": "adam"}, _ADAM),
    "adam anew": ({"method": "adam", "keep": False}, _ADAM),
    "adam carried": ({"method": "adam", "carry": 1.0}, _ADAM),
    "lbfgs": ({"method": "lbfgs"}, (1.0,)),
    "lbfgs, L2": ({"method": "lbfgs", "metric": "L2"}, (1.0,)),
    "lbfgs anew": ({"method": "lbfgs", "keep": False}, (1.0,)),
}


@dataclass(frozen=True)
class Bases:
    """What the parts change one thing of: the 8-level method on each problem; and the depths of figure 5."""

    circles: Case
    peaks: Case
    mnist: Case
    blocks: tuple[int, ...]


def table1(bases: Bases) -> Iterator[Case]:
    """Numbers of levels (table 1, figure 4)."""
    for levels in LEVELS:
        yield replace(bases.circles, levels=levels)


def figure5(bases: Bases) -> Iterator[Case]:
    """Depths, by the paper's six levels and by eight."""
    for levels, blocks in product((6, 8), bases.blocks):
        yield replace(bases.circles, num_layers=blocks, levels=levels)


def table2(bases: Bases) -> Iterator[Case]:
    """Steps of the optimizers on the levels."""
    for schedule in SCHEDULES:
        yield replace(bases.circles, schedule=schedule)


def hyper(bases: Bases) -> Iterator[Case]:
    """The nine settings of the paper's section 4.1."""
    for rate, beta, levels in product((0.05, 0.1, 0.5), (1e-3, 1e-4, 1e-5), (1, 8)):
        yield replace(bases.circles, learning_rate=rate, beta=beta, levels=levels)


def sampling(bases: Bases) -> Iterator[Case]:
    """The other reading of the data: points uniform in the square, no gap between the classes."""
    for levels in LEVELS:
        yield replace(bases.circles, sampling="square", levels=levels)


def transfers(bases: Bases) -> Iterator[Case]:
    """Restriction of the weights, interpolation, line search on the correction."""
    for restriction, interpolation, search in product(
        ("inject", "average", "transpose"), ("constant", "linear"), (False, True)
    ):
        how = {"restriction": restriction, "interpolation": interpolation, "correction_search": search}
        yield replace(bases.circles, **how)


def ablation(bases: Bases) -> Iterator[Case]:
    """Which weights may move on which level: what does the work?"""
    for moves in (("all", "all"), ("ends", "ends"), ("all", "layers"), ("all", "ends"), ("layers", "layers")):
        for levels in (1, 4, 8):
            yield replace(bases.circles, fine_moves=moves[0], coarse_moves=moves[1], levels=levels)


def on_mnist(bases: Bases) -> Iterator[Case]:
    """Table 1 on MNIST; methods of more levels are given less work, as they need less."""
    for levels, share in zip(LEVELS, (1.0, 1.0, 0.7, 0.5, 0.45), strict=True):
        yield replace(bases.mnist, levels=levels, max_work=share * bases.mnist.max_work)


def mnist_blocks(bases: Bases) -> Iterator[Case]:
    """Figure 5 on MNIST: depths, by eight levels, to 70 %."""
    for blocks in bases.blocks:
        yield replace(bases.mnist, num_layers=blocks, goal=0.7, max_work=0.2 * bases.mnist.max_work)


def mnist_epochs(bases: Bases) -> Iterator[Case]:
    """Table 1 on MNIST to the paper's 93 %, with few blocks: 15 times the work, some 460 epochs of a single level."""
    for levels in LEVELS:
        work = 15 * bases.mnist.max_work
        yield replace(bases.mnist, levels=levels, num_layers=min(bases.blocks), goal=0.93, max_work=work)


PARTS: dict[str, Callable[[Bases], Iterator[Case]]] = {
    "table1": table1,
    "figure5": figure5,
    "table2": table2,
    "hyper": hyper,
    "sampling": sampling,
    "transfers": transfers,
    "ablation": ablation,
    "mnist": on_mnist,
    "mnist_blocks": mnist_blocks,
    "mnist_epochs": mnist_epochs,
}
METHOD_PARTS = ("methods_circles", "methods_peaks", "methods_mnist")


def competitors(bases: Bases, part: str) -> dict[tuple[str, int], tuple[Case, tuple[float, ...]]]:
    """By method and number of levels: the case, and the learning rates to choose from."""
    base = getattr(bases, part.removeprefix("methods_"))
    names = list(METHODS)
    if base.problem == "mnist":
        # Short runs, and those methods that minibatches suit: pairs of L-BFGS hold for one minibatch.
        base, names = replace(base, max_work=0.1 * base.max_work), ["gd", "momentum", "momentum carried", "adam"]
    found = {}
    # With T=5 two layers on the coarsest of eight levels would be no discretization of anything.
    for name, levels in product(names, (1, 4) if base.problem == "peaks" else (1, 8)):
        changes, rates = METHODS[name]
        # On a single level nothing is left of momentum that begins anew at every step, and none is carried.
        if levels > 1 or not name.endswith(("anew", "carried")):
            found[name, levels] = replace(base, levels=levels, **changes), rates
    return found
