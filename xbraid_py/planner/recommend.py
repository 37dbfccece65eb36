"""What to do: the plan for a job of so many ranks; a table of predictions, and advice in words on how many to take."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from math import ceil

from rich.console import Console
from rich.table import Table

from xbraid_py.comm import Communicator
from xbraid_py.planner.machine import CLUSTER, Link, Machine
from xbraid_py.planner.measure import Slowdowns, Workload, measure_costs
from xbraid_py.planner.messages import assumed_machine, measure_machine, probe_machine
from xbraid_py.planner.modules import ModuleWorkload, measure_module
from xbraid_py.planner.plan import count
from xbraid_py.planner.predict import Planner, Prediction
from xbraid_py.planner.rule import Choice, decide, in_words

_log = logging.getLogger(__name__)
# Fewer ranks are as good as more of them within this.
_MARGIN = 0.05
_TITLES = (
    "ranks",
    "nodes",
    "plan",
    "states",
    "adjoints",
    "optim.",
    "update ms",
    "speedup",
    "effic.",
    "memory MB",
    "next",
)
_WORDS = ("plan", "next")


def measured_planner(
    workload: Workload | ModuleWorkload,
    comm: Communicator,
    network: Link = CLUSTER,
    seconds: float = 3.0,
    more_ranks: bool = True,
) -> Planner:
    """A planner for the machine that this job runs on. Every rank must call it; it takes some seconds.

    Parameters
    ----------
    workload : Workload or ModuleWorkload
    comm : Communicator
        One rank starts a small job of its own for what messages cost, see `probe_machine`; several measure it.
    network : Link
        Between nodes, where it cannot be measured.
    seconds : float
        About how long to time layers that are modules.
    more_ranks : bool
        Whether predictions for more ranks than these are wanted; if not, one rank starts no job.

    Returns
    -------
    Planner
        The same on every rank.
    """
    measure = measure_machine if comm.size > 1 else _probed if more_ranks else _assumed
    if isinstance(workload, ModuleWorkload):
        costs, slowdowns = measure_module(workload, comm, seconds)
        machine = measure(workload.like_dense(), comm, slowdowns, network)
        sweeps = {"sweeps": workload.sweeps, "adjoint_sweeps": workload.adjoint_sweeps}
        return Planner(machine, costs, pairs=0, collectives=0, **sweeps)
    costs, slowdowns = measure_costs(workload, comm)
    return Planner(measure(workload, comm, slowdowns, network), costs, workload.optim.memory)


def _probed(workload: Workload, comm: Communicator, slowdowns: Slowdowns, network: Link) -> Machine:
    return probe_machine(workload, network)


def _assumed(workload: Workload, comm: Communicator, slowdowns: Slowdowns, network: Link) -> Machine:
    return assumed_machine(network)


def measured(workload: Workload | ModuleWorkload, comm: Communicator, cycles: Sequence[str] = ("lagged",)) -> Choice:
    """The plan for this job by what is measured here; beside `choose`, which measures nothing.

    Every rank must call it; it measures for some seconds, and rank 0 decides for all. What it found is in the log.

    Parameters
    ----------
    workload : Workload or ModuleWorkload
    comm : Communicator
    cycles : sequence of str
        Cycles to choose from besides exact propagation: lagged, V, F.

    Returns
    -------
    Choice
        The same on every rank; its `options` are those of the state solves, its `plan.replicas` those of the problem.
    """
    planner = measured_planner(workload, comm)
    choice = None
    if comm.rank == 0:
        found = planner.of_each_kind(workload.num_layers, comm.size, cycles)
        choice = decide(found, workload.num_layers, workload.batch)
        _log.info(
            "plan for %s: %s (%s); an update is predicted to take %.1f ms, with serial propagation %.1f ms",
            *(count(comm.size, "rank"), choice.text.removeprefix("plan: "), choice.reason),
            *(1e3 * choice.prediction.seconds, 1e3 * choice.prediction.serial),
        )
    return comm.bcast(choice)


def advice(predictions: Sequence[Prediction], num_layers: int) -> str:
    """Which of some predictions to take, in a sentence or two.

    Parameters
    ----------
    predictions : sequence of Prediction
        The best plan for each number of ranks.
    num_layers : int
        Layers that they are for.
    """
    limit = min(each.seconds for each in predictions) * (1 + _MARGIN)
    fastest = min((each for each in predictions if each.seconds <= limit), key=lambda each: each.num_ranks)
    if fastest.kind == "serial":
        return (
            f"Serial propagation on one rank is fastest here: {1e3 * fastest.seconds:.3g} ms an update. "
            f"More layers or more samples would be needed for more ranks to pay."
        )
    found = (
        f"Fastest: {fastest.num_ranks} ranks with {fastest.plan.text(num_layers)}, {1e3 * fastest.seconds:.3g} ms an "
        f"update, {fastest.speedup:.3g} times faster than serial propagation on one rank."
    )
    thrifty = [each for each in predictions if each.efficiency >= 0.5 and each.num_ranks > 1]
    if thrifty and (most := max(thrifty, key=lambda each: each.num_ranks)).num_ranks < fastest.num_ranks:
        found += f" Efficiency is at least 50 % up to {most.num_ranks} ranks ({most.speedup:.3g} times faster)."
    return found


def headings(num_layers: int, what: str, planner: Planner) -> str:
    """What was measured, and what was assumed, in a few lines.

    Parameters
    ----------
    num_layers : int
    what : str
        The layers in words.
    planner : Planner
    """
    costs, machine = planner.costs, planner.machine
    us = 1e6
    return "\n".join(
        (
            f"{num_layers} layers: {what}, {costs.samples} samples; milliseconds of an update by its parts",
            f"layer: state {us * costs.states.record.each:.3g} us, adjoint with gradient "
            f"{us * costs.adjoints.record.each:.3g} us; coarse {us * costs.states.coarse.each:.3g} and "
            f"{us * costs.adjoints.coarse.each:.3g} us; with all {machine.cores} cores of a node busy "
            f"{machine.contention:.2f} times that",
            f"messages within a node: {_link(machine.shared)}",
            f"messages between nodes: {_link(machine.network)}",
        )
    )


def _link(link: Link) -> str:
    return f"latency {1e6 * link.latency:.3g} us, {1e-9 * link.bandwidth:.3g} GB/s ({link.source})"


def lines(rows: Sequence[Sequence[Prediction]], num_layers: int, ranks_per_node: int) -> list[tuple[str, ...]]:
    """A line of texts for every number of ranks, under a line of titles.

    Parameters
    ----------
    rows : sequence of sequences of Prediction
        For each number of ranks the best plan, and the best one of another kind, if there is any.
    num_layers, ranks_per_node : int
    """
    found: list[tuple[str, ...]] = [_TITLES]
    for each, *others in rows:
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
                f"{in_words(others[0], num_layers, short=True)}: {others[0].speedup:.2f}" if others else "",
            )
        )
    return found


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print lines of texts: the first are titles, of plans in words and of numbers."""
    is_word = [title in _WORDS for title in rows[0]]
    if sys.stdout.isatty():
        table = Table()
        for number, title in enumerate(rows[0]):
            table.add_column(title, justify="left" if is_word[number] else "right")
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                f"{text:<{w}}" if is_word[i] else f"{text:>{w}}"
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
        )
