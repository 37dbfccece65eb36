"""What a check of a propagator tries, slow literal versions of it included, and what it finds, as data and as a table.

Shape letters: `n` rows (steps), `m` intervals of `c` rows, `S` shape of a state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.checking.methods import said
from xbraid_py.mgrit.protocols import Propagator


class Excerpt(SerialCommunicator):
    """Stands in for the communicator of one rank of several, where each has the rows of all of them.

    So the rows that a rank is to get are there without a message.
    """

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size = rank, size

    def redistribute(self, rows: Tensor, source: Partition, target: Partition) -> Tensor:
        return rows[target.bounds[self.rank] : target.bounds[self.rank + 1]].contiguous()


@runtime_checkable
class Recording(Protocol):
    """A propagator that shows the inputs of its steps: those it has recorded, or is linearized at."""

    states: Tensor | None


@dataclass
class Subject:
    """A propagator and the states that it is tried with.

    Attributes
    ----------
    propagator : Propagator
    x : (n, *S) tensor
        One before each row, in its direction.
    cfactor : int
        c, which divides n.
    tolerance : float
        Of results that may differ by rounding alone, relative to the largest number in them.
    direction : int
        That the propagator is to have.
    generator : torch.Generator
        Of all that is drawn.
    """

    propagator: Propagator
    x: Tensor
    cfactor: int
    tolerance: float
    direction: int
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def held(self) -> Tensor | None:
        """States that the propagator shows."""
        return self.propagator.states if isinstance(self.propagator, Recording) else None

    def random(self, like: Tensor) -> Tensor:
        """Normal random numbers; drawn in double precision on the processor, so that they are the same everywhere."""
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(like.device, like.dtype)

    def random_points(self, c: int) -> Tensor:
        """Beginnings of intervals of c rows (n / c, *S), of the size of the states."""
        points = self.points(c)
        return points + 0.1 * self.random(points)

    def points(self, c: int) -> Tensor:
        """The states where intervals of c rows begin, in the direction of propagation."""
        return self.x[self.rows(0, c)].clone()

    def rows(self, step: int, c: int) -> slice:
        """The rows that each interval of c rows comes through in its step of that number."""
        return slice(step if self.direction > 0 else c - 1 - step, None, c)

    def step(self, x: Tensor) -> Tensor:
        """All rows one step on; x is kept, whatever the propagator does with it."""
        return self.propagator.step(x.clone())

    def relax(self, points: Tensor, c: int, tau: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """The propagator's relaxation; the arguments are kept."""
        return self.propagator.relax(points.clone(), c, None if tau is None else tau.clone(), False, inputs)

    def literal(self, points: Tensor, c: int, tau: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ends (m, *S) and inputs (n, *S) of the same, one step after the other by `step`."""
        at, inputs = points.clone(), torch.empty_like(self.x)
        for number in range(c):
            rows = self.rows(number, c)
            x = self.x.clone()
            inputs[rows] = x[rows] = at
            at = self.step(x)[rows]
            if tau is not None:
                at = at + tau[rows]
        return at, inputs

    def part(self, rank: int, bounds: tuple[int, ...]) -> Propagator:
        """The propagator with the rows of one of the ranks between whom the bounds share them."""
        size = len(bounds) - 1
        source = Partition((0,) + (len(self.x),) * size)
        return self.propagator.redistribute(Excerpt(rank, size), source, Partition(bounds))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected; not-a-number if there is one, or other shapes."""
    if found.shape != expected.shape:
        return float("nan")
    if not found.numel():
        return 0.0
    size = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / (size if size > 0.0 else 1.0)


def worst(figures: list[float]) -> float:
    """The largest of them; not-a-number if there is one."""
    return float("nan") if any(map(isnan, figures)) else max(figures, default=0.0)


def different(a: Tensor, b: Tensor) -> int:
    """How many numbers are not the same bits, where not-a-number is like any other."""
    return int(((a != b) & ~((a != a) & (b != b))).sum())


def bad_cost(name: str, cost) -> list[str]:
    """What is wrong with a cost."""
    right = isinstance(cost, int | float) and 0.0 < cost and isfinite(cost)
    return [] if right else [f"{name}={cost!r} is not a positive number"]


def differs(name: str, found, expected: tuple[int, ...], like: Tensor) -> list[str]:
    """In what a result is not a tensor of that shape, with the type and the device of `like`."""
    if not isinstance(found, Tensor):
        return [f"{name} gives {type(found).__name__} instead of a tensor"]
    if found.shape != expected:
        return [f"{name} gives the shape {tuple(found.shape)} instead of {tuple(expected)}"]
    if found.dtype != like.dtype or found.device != like.device:
        return [f"{name} gives {found.dtype} on {found.device} instead of {like.dtype} on {like.device}"]
    return []


@dataclass(frozen=True)
class Check:
    """One check of a propagator.

    Attributes
    ----------
    name : str
        Of which propagator, and what was looked at: "adjoint: transposed Jacobian".
    measured, bound : float
        A relative error, or how often something was wrong, and what it may be at most.
    passed : bool
        Whether it is; not-a-number is not.
    note, meaning : str
        What was seen, where a number does not say it; what a failure means, and where to look.
    """

    name: str
    measured: float
    bound: float
    passed: bool
    note: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class PropagatorReport:
    """What `check_propagator` found; `print` shows it as a table.

    Attributes
    ----------
    subject : str
        What was checked.
    checks : tuple of Check
        In the order in which they were made.
    left_out : tuple of (str, str)
        Names of checks that were not made, and why.
    """

    subject: str
    checks: tuple[Check, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing that was checked has failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that have failed."""
        return tuple(check for check in self.checks if not check.passed)

    def __getitem__(self, name: str) -> Check:
        """The check of that name; `KeyError` if it was not made."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def require(self) -> None:
        """Raise `ValueError`, with what failed and what it means, unless everything has passed."""
        if not self.passed:
            raise ValueError("\n".join([f"{self.subject} failed {self._count(len(self.failures))}", *self._failed()]))

    def __str__(self) -> str:
        width = max(map(len, (check.name for check in self.checks)), default=0)
        lines = [f"{self.subject}: {self._count(len(self.checks))}, {len(self.failures)} failed"]
        lines.append(f"  {'':{width}s}  {'measured':>9s}  {'bound':>9s}")
        for check in self.checks:
            figures = f"{_figure(check.measured):>9s}  {_figure(check.bound):>9s}"
            lines.append(f"  {check.name:{width}s}  {figures}  {'ok' if check.passed else 'FAILED'}")
        lines += self._failed()
        lines += [f"  left out: {name} ({why})" for name, why in self.left_out]
        return "\n".join(lines)

    def _failed(self) -> list[str]:
        found = []
        for check in self.failures:
            seen = f" ({check.note})" if check.note else ""
            text = f"{check.name}: {check.meaning}{seen}"
            found.append(textwrap.fill(text, 116, initial_indent="  ", subsequent_indent="    "))
        return found

    @staticmethod
    def _count(number: int) -> str:
        return f"{number} check" + "s" * (number != 1)


def _figure(number: float) -> str:
    if _is_count(number):
        return f"{number:.0f}"
    return f"{number:.2f}" if 0.01 <= abs(number) < 1000 else f"{number:.1e}"


def _is_count(number: float) -> bool:
    return abs(number) < 10_000 and number == int(number)


class Found(NamedTuple):
    """What a rule measures."""

    measured: float
    bound: float
    note: str = ""


def faults(found: list[str]) -> Found:
    """What is wrong, in words: nothing may be."""
    return Found(len(found), 0, "; ".join(found))


@dataclass(frozen=True)
class Rule:
    """A check that can be made.

    `measure(what is checked)` gives what is `Found`, or the reason why there is nothing to measure; `meaning` is that
    of a failure, in plain words. `needs` are rules that have to hold first: what follows from a failure would tell
    nothing new.
    """

    name: str
    measure: Callable[[Any], Found | str]
    meaning: str
    needs: tuple[str, ...] = ()


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives; whatever is raised in it is `Found`, and never a number that passes."""
    try:
        return function(*arguments)
    except Exception as error:
        return Found(float("nan"), 0, said(error))


def examine(
    who: str, rules: Collection[Rule], subject: Any, held: set[str]
) -> tuple[list[Check], list[tuple[str, str]]]:
    """Checks by all rules, and those that were left out; the names of rules that hold are added to `held`."""
    checks, left_out = [], []
    for rule in rules:
        name = f"{who}: {rule.name}"
        missing = [need for need in rule.needs if need not in held]
        found = f"needs {missing[0]!r}" if missing else attempt(rule.measure, subject)
        if isinstance(found, str):
            left_out.append((name, found))
            continue
        passed = bool(found.measured <= found.bound)
        checks.append(Check(name, float(found.measured), float(found.bound), passed, found.note, rule.meaning))
        if passed:
            held.add(rule.name)
    return checks, left_out
