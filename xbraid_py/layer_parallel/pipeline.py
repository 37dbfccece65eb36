"""Exact propagation of a batch through the layers of all ranks, its samples in portions that follow each other.

What is kept when: of a call that keeps its graphs (or states), those of all portions, from the forward to the backward
pass. The loss is the user's and comes in between, so no portion can go back before all of them have gone forwards. What
keeps only the input goes through the layers again in the backward pass; the slopes of all portions are known then, and
each goes back as soon as it can (one forward, one backward): the r-th rank from the end has the graphs of at most r
portions at a time.

Shape letters: `n` layers owned here, `M` portions, `B` batch, `S` shape of a state, `p` numbers of a row of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.base import present
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum
from xbraid_py.layer_parallel.accuracy import Controller, SolveRecord
from xbraid_py.layer_parallel.solves import Solvers, hollow, kept_start
from xbraid_py.layers.module_steps import Tape
from xbraid_py.layers.norm_dropout import Moments, MovingNorm, NormInputs
from xbraid_py.mgrit.pipeline import follow
from xbraid_py.mgrit.protocols import Steps

# Makes the steps of the layers owned here for a portion, and what keeps the graphs of their layers, if asked for.
MakeSteps = Callable[[bool, int], tuple[Steps, Tape | None]]


@dataclass(frozen=True)
class Portions:
    """The portions of a batch in a state.

    Attributes
    ----------
    axis : int
        Of the state, the one that the samples are on.
    rows : Partition
        Of that axis; a "rank" of it is a portion.
    """

    axis: int
    rows: Partition

    @classmethod
    def of(cls, samples: int, count: int, axis: int = 0, width: int = 1) -> Portions:
        """So many portions, whose samples differ by one at most; each sample has `width` rows of the axis."""
        return cls(axis, Partition.balanced(samples, count).refine(width))

    def __len__(self) -> int:
        return self.rows.num_ranks

    def part(self, state: Tensor, number: int) -> Tensor:
        """One portion of a whole state, contiguous."""
        return self._view(state, number).contiguous()

    def put(self, state: Tensor, number: int, part: Tensor) -> None:
        """Write one portion of a whole state."""
        self._view(state, number).copy_(part)

    def empty(self, like: Tensor, number: int) -> Tensor:
        """A tensor for one portion."""
        shape = list(like.shape)
        shape[self.axis] = self.rows.count(number)
        return like.new_empty(shape)

    def _view(self, state: Tensor, number: int) -> Tensor:
        return state.narrow(self.axis, self.rows.first(number), self.rows.count(number))


@dataclass
class _Kept:
    """What a portion leaves for its adjoint: its steps, with their graphs or the states (n, *S)."""

    steps: Steps
    tape: Tape | None
    states: Tensor


class Pipelined:
    """One forward pass of all portions, and the backward pass that belongs to it; the same interface as `Propagation`.

    Gradients of the weights are summed over the portions in one fixed tree: the same bits on any number of ranks.

    Parameters
    ----------
    solvers : Solvers
    controller : Controller
        Gets to know that the gradient is exact.
    make_steps : callable
    num_rows : int
        Layers owned here.
    start : (*S) tensor
        Input of the first layer; read on its owner, elsewhere only the shape counts.
    portions : Portions
    keep : bool
        Whether there will be a backward pass.
    keeper : int, optional
        The rank that keeps the input, and nothing else is kept.
    num_weights : int, optional
        As of `Propagation`.

    Attributes
    ----------
    further : dict of int to (n, q) tensor
        The rest of the rows of the gradient, of each portion.
    """

    checks = False  # it is exact

    def __init__(
        self,
        solvers: Solvers,
        controller: Controller,
        make_steps: MakeSteps,
        num_rows: int,
        start: Tensor,
        portions: Portions,
        keep: bool,
        keeper: int | None = None,
        num_weights: int | None = None,
    ):
        self.num_weights = num_weights
        self.further: dict[int, Tensor] = {}
        self.solvers, self.controller, self.make_steps = solvers, controller, make_steps
        self.num_rows, self.portions, self.keeper = num_rows, portions, keeper
        self.comm: Communicator = solvers.comm
        self.is_kept = keep and keeper is None
        self._kept: dict[int, _Kept] = {}
        self._end = start.new_empty(start.shape) if self._ends(+1) else None
        self._follow(+1, start, self._end, lambda m, state: self._forward(m, state, self.is_kept))
        is_own = keeper is not None and keeper == self.comm.rank
        self.start = start if is_own else hollow(start)

    def take_end(self) -> Tensor | None:
        """Output (*S) of the last layer, on its owner; once, and then it is not held here any more."""
        end, self._end = self._end, None
        return end

    def backward(self, slope: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None, SolveRecord]:
        """The gradient of the weights (n, p), of the input (*S) on the owner of the first layer, and what was done.

        Parameters
        ----------
        slope : (*S) tensor
            Gradient of the output, on the owner of the last layer.
        keep : bool
            Whether this may be called again.
        """
        sums = TreeSum(len(self.portions))
        back = self.start.new_empty(self.start.shape) if self._ends(-1) else None
        if self.is_kept:
            self._follow(-1, slope, back, lambda m, v: self._backward(m, v, sums, keep))
        else:
            start = kept_start(self.start, self.solvers, self.keeper)
            self._forward_and_back(start, slope, back, sums)
        gradient = sums.result() if self.num_rows else self.make_steps(False, 0)[0].theta[:, : self.num_weights]
        self.controller.observe(0.0, None, (1, 1))
        record = SolveRecord(self.controller.update, "exact", 0, 1, 1, 0.0, 0.0, 0.0, False, "")
        return gradient, back, record

    # ---- One portion through the layers owned here

    def _forward(self, number: int, state: Tensor, keep: bool) -> Tensor:
        steps, tape = self.make_steps(keep, number)
        shape = (self.num_rows, *state.shape)
        # Kept graphs hold the states.
        recorded = state.new_empty(shape) if keep and tape is None else None
        end = steps.relax(state[None], self.num_rows, None, recorded, True)[0]
        if keep:
            states = state.new_empty(()).expand(shape) if recorded is None else recorded
            self._kept[number] = _Kept(steps, tape, states)
        return end

    def _backward(self, number: int, slope: Tensor, sums: TreeSum, keep: bool) -> Tensor:
        kept = self._kept[number] if keep else self._kept.pop(number)
        if kept.tape is not None:
            kept.tape.keep = keep
        gradient = torch.empty_like(kept.steps.theta)
        back = kept.steps.relax_adjoint(kept.states, slope[None], self.num_rows, None, None, gradient)[0]
        if self.num_weights is not None:
            self.further[number] = gradient[:, self.num_weights :]
            gradient = gradient[:, : self.num_weights]
        sums.add(number, gradient, take=True)
        return back

    # ---- All portions through the layers of all ranks

    def _ends(self, direction: int) -> bool:
        """Whether the way in that direction ends on this rank."""
        rows, rank = self.solvers.partition, self.comm.rank
        return rows.count(rank) > 0 and rows.neighbor(rank, direction) is None

    def _follow(self, direction: int, first: Tensor | None, last: Tensor | None, through) -> None:
        """All portions one way: from the state `first` where it begins to `last` where it ends."""
        portions, like = self.portions, self.start if first is None else first
        follow(
            self.solvers.neighbors,
            self.solvers.partition,
            direction,
            range(len(portions)),
            begin=lambda number: portions.part(present(first), number),
            template=lambda number: portions.empty(like, number),
            through=through,
            end=lambda number, state: portions.put(present(last), number, state),
        )

    def _forward_and_back(self, start: Tensor, slope: Tensor | None, back: Tensor | None, sums: TreeSum) -> None:
        """Each portion forwards, and back as soon as it can; see the top of this file."""
        comm, rows, portions = self.solvers.neighbors, self.solvers.partition, self.portions
        if not self.num_rows:
            return
        ahead, behind = rows.neighbor(comm.rank, +1), rows.neighbor(comm.rank, -1)
        # None where the way begins; from other ranks the first portion of each is on its way now.
        states, slopes = (None if r is None else _Arrivals(comm, r, portions, start) for r in (behind, ahead))
        sent: list[Callable[[], None]] = []

        def forward(number: int) -> None:
            state = portions.part(start, number) if states is None else states.take()
            end = self._forward(number, state, True)
            if ahead is not None:
                sent.append(comm.isend(end, ahead))

        def backward(number: int) -> None:
            v = portions.part(present(slope), number) if slopes is None else slopes.take()
            v = self._backward(number, v, sums, False)
            if behind is None:
                portions.put(present(back), number, v)
            else:
                sent.append(comm.isend(v, behind))

        # As many portions are ahead as there are ranks for them, this one included.
        under_way = min(len(portions), sum(count > 0 for count in rows.counts[comm.rank :]))
        for number in range(under_way):
            forward(number)
        for number in range(len(portions)):
            backward(number)
            if under_way + number < len(portions):
                forward(under_way + number)
        for wait in sent:
            wait()


class _Arrivals:
    """The portions that come from a rank, in order; the next one is always under way."""

    def __init__(self, comm: Communicator, source: int, portions: Portions, like: Tensor):
        self.comm, self.source, self.portions, self.like = comm, source, portions, like
        self.number = 0
        self.next = self._begin()

    def _begin(self) -> Callable[[], Tensor] | None:
        if self.number == len(self.portions):
            return None
        found = self.comm.irecv(self.portions.empty(self.like, self.number), self.source)
        self.number += 1
        return found

    def take(self) -> Tensor:
        """The next one."""
        found = present(self.next)()
        self.next = self._begin()
        return found


# ---- Statistics of a batch from those of its portions


class PortionMoments(Moments):
    """Mean and unbiased variance of what the norms of n layers were given of a portion; of several by `+`."""

    def __init__(self, norms: Mapping[int, MovingNorm], num_rows: int):
        super().__init__(norms, num_rows)
        self.counts: dict[int, int] = {}  # values of each channel, by the numbers of the norms

    def take(self, rows: int | slice, norm_inputs: NormInputs) -> None:
        super().take(rows, norm_inputs)
        for number, (means, _) in self.found.items():
            self.counts[number] = norm_inputs.inputs[number].numel() // max(1, means.shape[1])

    def __add__(self, other: PortionMoments) -> PortionMoments:
        both = PortionMoments({}, 0)
        for number, (mean, variance) in self.found.items():
            if not len(mean):
                both.found[number] = (mean, variance)
                continue
            more, spread = other.found[number]
            a, b = self.counts[number], other.counts[number]
            apart = more - mean
            squares = variance * (a - 1) + spread * (b - 1) + apart.square() * (a * b / (a + b))
            both.found[number] = (mean + apart * (b / (a + b)), squares / (a + b - 1))
            both.counts[number] = a + b
        return both


def moments_of(parts: list[PortionMoments]) -> Moments:
    """The statistics of a batch from those of all its portions, in one fixed order."""
    sums = TreeSum(len(parts))
    for number, part in enumerate(parts):
        sums.add(number, part)
    return sums.result()
