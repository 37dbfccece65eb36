"""Predictions on the screen: a table on a terminal, aligned rows elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import ceil

from rich.console import Console
from rich.table import Table

from xbraid_py.planner.machine import Link
from xbraid_py.planner.predict import Planner, Prediction
from xbraid_py.planner.probe import Workload

_TITLES = ("ranks", "nodes", "plan", "states", "adjoints", "optim.", "update ms", "speedup", "effic.", "memory MB")


def headings(workload: Workload, planner: Planner) -> str:
    """What was measured, and what was assumed, in a few lines."""
    costs, machine = planner.costs, planner.machine
    us = 1e6
    return "\n".join(
        (
            f"{workload.num_layers} layers of width {workload.architecture.width}, {workload.batch} samples, "
            f"{str(workload.dtype).removeprefix('torch.')}; milliseconds of an update by its parts",
            f"layer here: state {us * costs.states.record.each:.3g} us, adjoint with gradient "
            f"{us * costs.adjoints.record.each:.3g} us; coarse {us * costs.states.coarse.each:.3g} and "
            f"{us * costs.adjoints.coarse.each:.3g} us; with all {machine.cores} cores of a node busy "
            f"{machine.contention:.2f} times that",
            f"messages within a node: {_link(machine.shared)}",
            f"messages between nodes: {_link(machine.network)}",
        )
    )


def _link(link: Link) -> str:
    return f"latency {1e6 * link.latency:.3g} us, {1e-9 * link.bandwidth:.3g} GB/s ({link.source})"


def lines(predictions: Sequence[Prediction], num_layers: int, ranks_per_node: int) -> list[tuple[str, ...]]:
    """A line of texts for every prediction, under a line of titles."""
    found = [_TITLES]
    for each in predictions:
        milliseconds = (each.states, each.adjoints, each.optimizer, each.seconds)
        found.append(
            (
                str(each.num_ranks),
                str(ceil(each.num_ranks / ranks_per_node)),
                each.plan.text(num_layers),
                *(f"{1e3 * seconds:.2f}" for seconds in milliseconds),
                f"{each.speedup:.2f}",
                f"{100 * each.efficiency:.1f}%",
                f"{each.memory / 1e6:.0f}",
            )
        )
    return found


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print lines of texts: the first are titles, the third column is words, the others numbers."""
    if sys.stdout.isatty():
        table = Table()
        for number, title in enumerate(rows[0]):
            table.add_column(title, justify="left" if number == 2 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                f"{text:<{w}}" if i == 2 else f"{text:>{w}}"
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
        )
