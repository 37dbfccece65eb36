"""The parts of the study of multilevel training in width: which runs each is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from studies.width.case import Case

ETAS = (1.0, sqrt(2), 2.0, 2 * sqrt(2), 4.0)
# "Stability tuning" of the paper's section 8.3; section 8.2.1 is without it, which we read as no damping at all.
DAMPED = {"eta": 2 * sqrt(2), "gamma": 0.125, "alpha_m": 0.2}
UNDAMPED = {"eta": 1.0, "gamma": 1.0, "alpha_m": 1.0}
# Most steps on the coarse level, where they are cheap, and little that holds it back.
COARSE = {"steps": 1, "coarse_steps": 32, "tau": "none", "eta": 1.0, "alpha_m": 0.0}
# What the scan changes of the two-level method: the last two are of one level. Where a neuron's gradient has been 0,
# Adam's second moment is 0 too, and the momentum of its partner, prolonged, makes a step of any size: none is carried.
SCAN = {
    "two levels": {},
    "no tau": {"tau": "none"},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 1": {"gamma": 1.0},
    "alpha_m 0": {"alpha_m": 0.0},
    "alpha_m 1": {"alpha_m": 1.0},
    "no damping": UNDAMPED,
    "eq. 32": {"scaling": "mean"},
    "sums": {"scaling": "sums"},
    "other minibatches for tau": {"tau": "other"},
    "eta 1": {"eta": 1.0},
    "mutual matching": {"matching": "mutual"},
    "coarse steps": COARSE,
    "coarse steps, levels 3": COARSE | {"levels": 3},
    "adam": {"method": "adam", "alpha_m": 0.0},
    "adam, no tau": {"method": "adam", "alpha_m": 0.0, "tau": "none"},
    "adam, coarse steps": COARSE | {"method": "adam"},
    "sgd alone": {"levels": 1},
    "adam alone": {"method": "adam", "levels": 1},
}


@dataclass(frozen=True)
class Bases:
    """What the parts change one thing of.

    Attributes
    ----------
    poisson, darcy : Case
        The two-level method with the fully-connected network, with all sizes.
    poisson_conv, darcy_conv : Case
        The same with the convolutional one.
    rates, adam_rates : tuple of float
        Learning rates to choose from.
    methods : tuple of str
        Names of `SCAN`.
    tuning_work : float
        Work units of a run that tunes.
    """

    poisson: Case
    darcy: Case
    poisson_conv: Case
    darcy_conv: Case
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    adam_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    methods: tuple[str, ...] = tuple(SCAN)
    tuning_work: float = 10_000.0

    def __post_init__(self):
        for name in self.methods:
            if name not in SCAN:
                raise ValueError(f"methods={name} is none of {', '.join(SCAN)}; use {list(SCAN)[:2]}")


def _levels(base: Case, counts: Sequence[int]) -> Iterator[Case]:
    for levels in counts:
        yield replace(base, levels=levels)


def table1(bases: Bases) -> Iterator[Case]:
    """Levels 1 to 4 at the paper's learning rate (table 1, figure 3)."""
    yield from _levels(bases.poisson, (1, 2, 3, 4))


def table1_conv(bases: Bases) -> Iterator[Case]:
    """The same with convolutions (figure 4)."""
    yield from _levels(bases.poisson_conv, (1, 2, 3, 4))


def table2(bases: Bases) -> Iterator[Case]:
    """Two levels without damping (table 2, figure 6)."""
    yield from _levels(replace(bases.darcy, **UNDAMPED), (1, 2))


def table2_conv(bases: Bases) -> Iterator[Case]:
    """The same with convolutions (figure 7)."""
    yield from _levels(replace(bases.darcy_conv, **UNDAMPED), (1, 2))


def table3(bases: Bases) -> Iterator[Case]:
    """Levels 1 to 5, damped (table 3, figure 8)."""
    yield from _levels(replace(bases.darcy, **DAMPED), (1, 2, 3, 4, 5))


def table3_conv(bases: Bases) -> Iterator[Case]:
    """The same with convolutions."""
    yield from _levels(replace(bases.darcy_conv, **DAMPED), (1, 2, 3, 4, 5))


def table4(bases: Bases) -> Iterator[Case]:
    """Learning rates on the levels of four (table 4, figure 9)."""
    for eta in ETAS:
        yield replace(bases.darcy, levels=4, **(DAMPED | {"eta": eta}))


FIXED: dict[str, Callable[[Bases], Iterator[Case]]] = {
    "table1": table1,
    "table1_conv": table1_conv,
    "table2": table2,
    "table2_conv": table2_conv,
    "table3": table3,
    "table3_conv": table3_conv,
    "table4": table4,
}
# Each method with the best of several learning rates.
TUNED = ("tuned", "tuned_conv", "tuned_darcy", "scan")


def competitors(bases: Bases, part: str) -> dict[str, tuple[Case, tuple[float, ...]]]:
    """By the name of a method: the case, and the learning rates to choose from."""
    if part == "scan":
        changed = {name: replace(bases.poisson, **SCAN[name]) for name in bases.methods}
    else:
        base, counts = {
            "tuned": (bases.poisson, (1, 2, 3, 4)),
            "tuned_conv": (bases.poisson_conv, (1, 2)),
            "tuned_darcy": (replace(bases.darcy, **DAMPED), (1, 2, 3, 4, 5)),
        }[part]
        changed = {f"levels {case.levels}": case for case in _levels(base, counts)}
    return {name: (case, bases.adam_rates if case.method == "adam" else bases.rates) for name, case in changed.items()}
