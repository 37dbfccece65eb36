"""Portions of the samples that follow each other through the layers of the ranks: exact propagation in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition

Portion = TypeVar("Portion")
State = TypeVar("State")


def follow(
    comm: Communicator,
    rows: Partition,
    direction: int,
    portions: Sequence[Portion],
    *,
    begin: Callable[[Portion], State],
    template: Callable[[Portion], Tensor],
    through: Callable[[Portion, State | Tensor], State | Tensor],
    end: Callable[[Portion, State], None],
) -> None:
    """Hand each portion from rank to rank: while one rank works on a portion, the rank before it works on the next.

    With M portions and P ranks of equal work this takes (M + P - 1) / (M P) of the time of one rank. Nothing is summed
    over portions here, and each meets the same operations on any number of ranks.

    Parameters
    ----------
    comm : Communicator
    rows : Partition
        Owners of the layers; a rank without any takes no part.
    direction : int
        +1 from the first layer to the last, -1 back.
    portions : sequence
        Whatever stands for them, in the order in which they go; the same number on all ranks.
    begin : callable
        The state of a portion where the propagation begins, on that rank; a tensor, or what `through` makes one of.
    template : callable
        A tensor of the shape and type of its states, that is received into.
    through : callable
        Its state behind the layers owned here, from that before them: tensors from rank to rank.
    end : callable
        Takes its state where the propagation ends, on that rank.
    """
    if not rows.count(comm.rank) or not portions:
        return
    ahead, behind = rows.neighbor(comm.rank, direction), rows.neighbor(comm.rank, -direction)
    # The next state travels while the present one is worked on.
    arriving = None if behind is None else comm.irecv(template(portions[0]), behind)
    sent = []
    for number, portion in enumerate(portions, 1):
        state = begin(portion) if arriving is None else arriving()
        if behind is not None and number < len(portions):
            arriving = comm.irecv(template(portions[number]), behind)
        state = through(portion, state)
        if ahead is None:
            end(portion, cast(State, state))  # as it began
        else:
            sent.append(comm.isend(cast(Tensor, state), ahead))
    for wait in sent:
        wait()
