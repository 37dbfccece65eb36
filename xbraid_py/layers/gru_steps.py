"""The steps of a gated recurrent unit along a sequence: shared weights, and an input for each step.

Shape letters: `n` steps owned here, `m` intervals of `c` steps, `B` batch, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.gru import GruCell, Linearized, Sizes
from xbraid_py.layers.rows import coarse_rows, sums

COARSE = ("compose", "euler")
_AT_ONCE = 1 << 16  # numbers of the gates that are linearized next: they are to stay in the cache


@dataclass
class _Memory:
    """The last linearization, and the states it belongs to."""

    states: Tensor | None = None
    version: int = -1
    found: Linearized | None = None


@dataclass(frozen=True)
class GruSteps:
    """The steps h_{i+1} = step(h_i, a_i) of a sequence; the same interface as `ResidualSteps`.

    Parameters
    ----------
    cell : GruCell
    theta : (n parts, B, 3 H) tensor
        What differs from step to step, the input's part of the gates, W_ih x_i + b_ih.
    weight : (3 H, H) tensor
        W_hh, of all steps.
    bias : (3 H,) tensor or None
        b_hh.
    h : (n parts,) tensor
        Step sizes; 0 where a step leaves the state as it is.
    coarse : {"compose", "euler"}
        What a coarse step is: as many fine steps as it stands for, with the gates of the first (their product is
        known in closed form), or one step of the sum of their sizes.
    counts : (n parts,) tensor or None
        Fine steps that each step stands for; None on the finest level, and everywhere with "euler".
    sources : (n parts, B, H) tensor or None
        Added to the adjoint behind each step: the gradient of a loss by the states that the steps start from.
    parts : int
        A step is that many smaller ones, each with a row of theta of its own.
    """

    cell: GruCell
    theta: Tensor
    weight: Tensor
    bias: Tensor | None
    h: Tensor
    coarse: str = "compose"
    counts: Tensor | None = None
    sources: Tensor | None = None
    parts: int = 1
    _memory: _Memory = field(default_factory=_Memory, compare=False, repr=False)

    @property
    def cost(self) -> float:
        """Evaluations of the cell in one step."""
        return float(self.parts)

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.h, self.counts)

    def relax(
        self,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        record: bool = False,
    ) -> Tensor:
        """`cfactor` steps from the beginning of each interval (m, B, H) to its end, tau (m c, B, H) added to each.

        The input of each step is written to `inputs` (m c, B, H). `record` needs nothing done.
        """
        x = points
        length, sizes = cfactor * self.parts, self._sizes
        for j in range(cfactor):
            step = slice(j, None, cfactor)
            if inputs is not None:
                inputs[step] = x
            for part in range(j * self.parts, (j + 1) * self.parts):
                rows = slice(part, None, length)
                x = self.cell.step(x, self.theta[rows], self.weight, self.bias, sizes[rows])
            if tau is not None:
                x += tau[step]
        return x

    def relax_adjoint(
        self,
        states: Tensor,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """The same backwards, at the given states (m c parts, B, H); the sources are added behind each part.

        The gradient of theta is written to `gradient` (m c parts, B, 3 H).
        """
        v = points
        length, local = cfactor * self.parts, self.linearized(states)
        for j in reversed(range(cfactor)):
            step = slice(j, None, cfactor)
            if inputs is not None:
                inputs[step] = v
            for part in reversed(range(j * self.parts, (j + 1) * self.parts)):
                rows = slice(part, None, length)
                after, slopes = local.back(v, self.weight, rows)
                if gradient is not None:
                    local.of_input(v, slopes, rows, gradient[rows])
                v = after if self.sources is None else after.add_(self.sources[rows])
            if tau is not None:
                v += tau[step]
        return v

    def linearized(self, states: Tensor) -> Linearized:
        """The Jacobians of all rows at their states (n parts, B, H), computed once for the same states."""
        memory = self._memory
        if memory.states is not states or memory.version != states._version:
            memory.found = self._linearize(states)
            memory.states, memory.version = states, states._version
        return memory.found

    def forget(self) -> None:
        """Give the memory of the last linearization back."""
        self._memory.states = self._memory.found = None

    def _linearize(self, states: Tensor) -> Linearized:
        batch, width = states.shape[1:]
        shape = states.shape
        found = Linearized(
            states.new_empty(shape),
            states.new_empty((*shape[:-1], 3, width)),
            states.new_empty(shape),
            states.new_empty(shape),
        )
        at_once = max(1, _AT_ONCE // (3 * width * max(1, batch)))
        for first in range(0, len(states), at_once):
            rows = slice(first, first + at_once)
            piece = self.cell.linearize(states[rows], self.theta[rows], self.weight, self.bias, self._sizes[rows])
            for name in ("decay", "state", "candidate", "reset"):
                getattr(found, name)[rows] = getattr(piece, name)
        return found

    def weight_slopes(self, states: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of W_hh h + b_hh (n, B, 3 H) from that of theta (n, B, 3 H), at the given states."""
        width = states.shape[-1]
        found = gradient.clone()
        found[..., 2 * width :] *= self.linearized(states).reset
        return found

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> GruSteps:
        """One step for every `cfactor` steps, as long as these together, made in `parts` parts.

        `weights` is "inject" (the input of the first step of each part) or "average" (their mean over the part; steps
        of size 0 do not count). `scheme` says nothing: a coarse step is what `coarse` says.
        """
        length = cfactor * self.parts // parts
        if length == 1:
            return replace(self, parts=parts, _memory=_Memory())
        counts = (self.h > 0).to(self.h.dtype) if self.counts is None else self.counts
        theta, h = coarse_rows(self.theta, self.h, length, weights)
        return replace(
            self,
            theta=theta,
            h=h,
            counts=sums(counts, length) if self.coarse == "compose" else None,
            sources=None if self.sources is None else sums(self.sources, length),
            parts=parts,
            _memory=_Memory(),
        )

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        source, target = source.refine(self.parts), target.refine(self.parts)

        def moved(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else comm.redistribute(rows.contiguous(), source, target)

        theta, h, counts, sources = (moved(rows) for rows in (self.theta, self.h, self.counts, self.sources))
        return replace(self, theta=theta, h=h, counts=counts, sources=sources, _memory=_Memory())
