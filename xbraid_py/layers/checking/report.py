"""What a check of a propagator finds, as data and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Check:
    """One check of a propagator.

    Attributes
    ----------
    name : str
        Of which propagator, and what was looked at: "adjoint: transposed Jacobian".
    measured : float
        A relative error, or how often something was wrong.
    bound : float
        What it may be at most.
    passed : bool
        Whether it is; not-a-number is not.
    note : str
        What was seen, where a number does not say it.
    meaning : str
        What a failure means, and where to look.
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

    Attributes
    ----------
    name : str
    measure : callable
        Of what is checked; gives what is `Found`, or the reason why there is nothing to measure.
    meaning : str
        Of a failure, in plain words.
    needs : tuple of str
        Rules that have to hold first: what follows from a failure would tell nothing new.
    """

    name: str
    measure: Callable[[Any], Found | str]
    meaning: str
    needs: tuple[str, ...] = ()


def examine(
    who: str, rules: Collection[Rule], subject: Any, held: set[str]
) -> tuple[list[Check], list[tuple[str, str]]]:
    """Checks by all rules, and those that were left out; the names of rules that hold are added to `held`."""
    checks, left_out = [], []
    for rule in rules:
        name = f"{who}: {rule.name}"
        missing = [need for need in rule.needs if need not in held]
        found = f"needs {missing[0]!r}" if missing else rule.measure(subject)
        if isinstance(found, str):
            left_out.append((name, found))
            continue
        passed = bool(found.measured <= found.bound)
        checks.append(Check(name, float(found.measured), float(found.bound), passed, found.note, rule.meaning))
        if passed:
            held.add(rule.name)
    return checks, left_out
