"""A line of the page of the four papers, and the rule of its color."""

from __future__ import annotations

from dataclasses import dataclass

from studies.statistics import Summary

GREEN, YELLOW, RED, NOT_RUN = "green", "yellow", "**red**", "not run"


@dataclass(frozen=True)
class Line:
    """A line of the page.

    Attributes
    ----------
    item, paper, ours : str
        The table or figure, and what it says there and here.
    size, seeds, source : str
        Of our run: its size and what differs from the paper's, its seeds, the command and the rows.
    holds : bool or None
        None if it was not run.
    full : bool
        Run at the size and by the method of the paper.
    """

    item: str
    paper: str
    ours: str = ""
    size: str = ""
    seeds: str = ""
    source: str = ""
    holds: bool | None = None
    full: bool = False

    @property
    def color(self) -> str:
        """By the rule of the page."""
        if self.holds is None:
            return NOT_RUN
        return (GREEN if self.full else YELLOW) if self.holds else RED


def near(ours: float, paper: float) -> bool:
    """Whether a count or an error holds: the smaller the better."""
    return ours <= 1.1 * paper


def ahead(ours: Summary) -> bool:
    """Whether a difference is above zero beyond doubt."""
    return ours.low > 0


def source(command: str, rows: str) -> str:
    """The cell of the command and of the rows."""
    return f"`python drivers/{command}`; {rows}"
