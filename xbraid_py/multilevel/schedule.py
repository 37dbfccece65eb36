"""The steps of a cycle of MG/OPT on each level (paper 000), and what they cost.

Shape letters: `L` levels. Lists over the levels begin with the finest, level 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

CYCLES = {"V": 1, "W": 2}  # visits to the next coarser level
MOST_LEVELS = 64  # of which each has half as much as the one above it
_EXAMPLE = "[(1), 1, 1, 2, 2, {2}]"
_ENTRY = re.compile(r"(?P<both>\d+)|\((?P<down>\d+)\)|(?P<pre>\d+)/(?P<post>\d+)|\{(?P<coarse>\d+)\}")


@dataclass(frozen=True)
class Schedule:
    """Steps of the level optimizers in the list notation of paper 000 (section 4), and their cost.

    Parameters
    ----------
    pre, post : tuple of int
        mu_1 and mu_2, on the way down and up, of all levels but the coarsest.
    coarse : int
        Steps on the coarsest level, at least 1.
    """

    pre: tuple[int, ...]
    post: tuple[int, ...]
    coarse: int

    def __post_init__(self):
        if len(self.pre) != len(self.post):
            raise ValueError(
                f"pre={list(self.pre)} and post={list(self.post)} must have one number for each level but the "
                f"coarsest; use post={[0] * len(self.pre)}"
            )
        for name in ("pre", "post"):
            if any(steps < 0 for steps in getattr(self, name)):
                raise ValueError(f"{name}={list(getattr(self, name))} must all be at least 0; use 1")
        if self.coarse < 1:
            raise ValueError(f"coarse={self.coarse} must be at least 1; use 2")

    @property
    def levels(self) -> int:
        """L."""
        return len(self.pre) + 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `[(1), 1, 1, 2, 2, {2}]`, the finest level first; `ValueError` for another form names the entry.

        `n` are n steps on the way down and n on the way up, `(n)` none on the way up, `{n}` those of the coarsest
        level. `m/n`, which the paper has not, are m on the way down and n on the way up.
        """
        words = text.strip()
        if not (words.startswith("[") and words.endswith("]")):
            raise ValueError(f"schedule={text!r} must be a list in square brackets; use {_EXAMPLE}")
        entries = [word.strip() for word in words[1:-1].split(",")]
        found: list[re.Match[str]] = []
        for number, word in enumerate(entries, 1):
            entry = _ENTRY.fullmatch("".join(word.split()))
            if entry is None:
                raise ValueError(
                    f"schedule={text!r}: entry {number}, {word!r}, must be n, (n), m/n or, for the coarsest level, "
                    f"{{n}}; use {_EXAMPLE}"
                )
            if (entry["coarse"] is None) == (number == len(entries)):
                raise ValueError(
                    f"schedule={text!r}: entry {number}, {word!r}: the last entry and no other stands in curly "
                    f"brackets, for the coarsest level; use {_EXAMPLE}"
                )
            found.append(entry)
        above = [entry.groupdict() for entry in found[:-1]]
        return cls(
            tuple(int(entry["both"] or entry["down"] or entry["pre"]) for entry in above),
            tuple(int(entry["both"] or entry["post"] or 0) for entry in above),
            int(found[-1]["coarse"]),
        )

    @classmethod
    def of_paper(cls, levels: int) -> Self:
        """The setup of table 1: two steps on the coarser half of the levels, one on the others, (1) on the finest."""
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1; use 8")
        if levels == 1:
            return cls((), (), 1)
        # The paper counts from the coarsest level, 1: those up to L/2 make two steps.
        pre = tuple(2 if levels - index <= levels / 2 else 1 for index in range(levels - 1))
        return cls((1, *pre[1:]), (0, *pre[1:]), 2)

    def __str__(self) -> str:
        return f"[{', '.join([*map(_entry, self.pre, self.post), f'{{{self.coarse}}}'])}]"

    def below(self, level: int) -> Schedule:
        """The schedule of the levels from `level` on (0 is the finest)."""
        return Schedule(self.pre[level:], self.post[level:], self.coarse)

    def work(self, cycle: str = "V", costs: Sequence[float] | None = None) -> float:
        """Work units of a cycle, one being a gradient on the finest level (paper 000, eq. 10).

        Each level makes its steps and one gradient more, for the coupling term below it; the gradient that the
        coupling term above it needs is that of its own first step. With W-cycles level l is visited 2^l times.
        `costs` are those of a gradient on each level; by default a level costs half of the finer one.
        """
        visits = CYCLES[cycle]
        last = self.levels - 1
        costs = [0.5**level for level in range(self.levels)] if costs is None else costs
        work = self.coarse * visits ** max(0, last - 1) * costs[last]
        for level, (pre, post) in enumerate(zip(self.pre, self.post, strict=True)):
            work += (pre + post + 1) * visits**level * costs[level]  # eq. 10
        return work

    def full_multigrid_work(self, cycles: int, cycle: str = "V", costs: Sequence[float] | None = None) -> float:
        """Work units of a full-multigrid start with so many cycles on each level."""
        costs = [0.5**level for level in range(self.levels)] if costs is None else costs
        starts = (cycles * self.below(level).work(cycle, costs[level:]) for level in range(self.levels - 1))
        return sum(starts) + self.coarse * costs[-1]


def _entry(pre: int, post: int) -> str:
    if pre == post:
        return f"{pre}"
    return f"({pre})" if post == 0 else f"{pre}/{post}"
