"""What gated recurrent units share as time steps: kinds and sizes of steps, and their steps along a sequence.

A unit moves its state by a share s of the way to where its gates draw it; the share is a function of a rate q, which is
what the unit does not keep in a step of size 1. Forward Euler has s = h q.

Shape letters: `m` steps made at once, or `m` intervals of `c` of `n` steps owned here, `B` batch, `F` inputs, `H`
hidden size, `S` numbers of a state, `G` gates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.steps import coarse_rows, sums, sweep

KINDS = ("plain", "implicit")
COARSE = ("compose", "euler")
_AT_ONCE = 1 << 16  # numbers of the gates that are linearized next: they are to stay in the cache


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b of m steps: x (m, B, F), weight (G, F), bias (G,) or None, to (m, B, G)."""
    # A product for each step, and not one for all: their bits would depend on how many there are.
    columns = weight.t().expand(len(x), *reversed(weight.shape))
    return torch.bmm(x, columns) if bias is None else torch.baddbmm(bias, x, columns)


@dataclass(frozen=True)
class Sizes:
    """How long steps are: h (m,), or (m, B) where samples differ; 0 where a step leaves the state as it is.

    With `counts`, alike, each stands for so many of size h / count, all with the gates of the first; None where it is
    one.
    """

    h: Tensor
    counts: Tensor | None = None

    def __getitem__(self, rows: slice) -> Sizes:
        return Sizes(self.h[rows], None if self.counts is None else self.counts[rows])

    @property
    def columns(self) -> tuple[Tensor, Tensor | None]:
        """Both as (m, 1 or B, 1)."""
        shape = (len(self.h), -1, 1) if len(self.h) else (0, 1, 1)
        return self.h.reshape(shape), None if self.counts is None else self.counts.reshape(shape)


class Linearized(Protocol):
    """The Jacobians of m steps at given states; all fields are tensors with the steps on their first axis."""

    def back(self, v: Tensor, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Transposed Jacobians of some steps applied to v (m, B, S): the product (m, B, S), and g's part (m, B, G, H).

        `weight` (G H, H) is W_hh.
        """
        ...

    def of_input(self, v: Tensor, slopes: Tensor, rows: slice, out: Tensor) -> None:
        """The gradient of a, written to `out` (m, B, G H); `slopes` come from `back`."""
        ...

    def of_gates(self, gradient: Tensor) -> Tensor:
        """The gradient of g (m, B, G H) from that of a, of all steps."""
        ...


@dataclass(frozen=True)
class GatedCell:
    """A unit with H hidden numbers, whose gates are functions of a = W_ih x + b_ih and g = W_hh h + b_hh.

    Parameters
    ----------
    hidden_size : int
        H, at least 1.
    kind : {"plain", "implicit"}
        Plain: s = dt q, with step size 1 the equations of torch. Implicit: s = dt q / (1 + dt q), which is stable for
        every step size.

    Raises
    ------
    ValueError
        If there is no hidden number, or no such kind.
    """

    hidden_size: int
    kind: str = "plain"
    gates: ClassVar[int]
    tensors: ClassVar[tuple[str, ...]]
    """Names of the tensors (B, H) that a state consists of; the first one is the output."""

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size={self.hidden_size} must be at least 1; use 64")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be plain or implicit; use implicit")

    @property
    def state_size(self) -> int:
        """S."""
        return self.hidden_size * len(self.tensors)

    def step(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        """States (m, B, S) one step on; a new tensor.

        `a` (m, B, G H) is W_ih x + b_ih; weight (G H, H) and bias (G H,) or None are W_hh and b_hh.
        """
        raise NotImplementedError

    def linearize(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Linearized:
        """The Jacobians of the same steps; arguments as of `step`."""
        raise NotImplementedError

    def share(self, rate: Tensor, sizes: Sizes, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """s (m, B, H) for rates q, and its derivative by q."""
        h, counts = sizes.columns
        if counts is not None:
            return self._composed(rate, h, counts, with_slope)
        move = rate * h
        if self.kind == "plain":
            return move, h.expand_as(move) if with_slope else None
        divisor = 1 + move
        return move / divisor, h / divisor.square() if with_slope else None

    def _composed(self, rate: Tensor, h: Tensor, counts: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """The same for several steps with the same gates: each leaves a factor 1 - h q, or 1 / (1 + h q)."""
        h = h / counts.clamp_min(1)
        if self.kind == "plain":
            left = 1 - h * rate
            slope = counts * h * left ** (counts - 1).clamp_min(0) if with_slope else None
            return 1 - left**counts, slope
        grown = 1 + h * rate
        power = grown**-counts
        return 1 - power, counts * h * power / grown if with_slope else None


@dataclass
class _Memory:
    """The last linearization, and the states it belongs to."""

    states: Tensor | None = None
    version: int = -1
    found: Linearized | None = None


@dataclass(frozen=True)
class GatedSteps:
    """The steps u_{i+1} = step(u_i, a_i) of a sequence; the same interface as `ResidualSteps`.

    Parameters
    ----------
    cell : GatedCell
    theta : (n parts, B, G H) tensor
        What differs from step to step, the input's part of the gates, W_ih x_i + b_ih.
    weight : (G H, H) tensor
        W_hh, of all steps.
    bias : (G H,) tensor or None
        b_hh.
    h : (n parts,) or (n parts, B) tensor
        Step sizes; 0 where a step leaves the state as it is.
    coarse : {"compose", "euler"}
        What a coarse step is: as many fine steps as it stands for, with the gates of the first (their product is
        known in closed form), or one step of the sum of their sizes.
    counts : tensor as h, or None
        Fine steps that each step stands for; None on the finest level, and everywhere with "euler".
    sources : (n parts, B, S) tensor or None
        Added to the adjoint behind each step: the gradient of a loss by the states that the steps start from.
    parts : int
        A step is that many smaller ones, each with a row of theta of its own.
    """

    cell: GatedCell
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
        """`cfactor` steps from the beginning of each interval (m, B, S) to its end, tau (m c, B, S) added to each.

        The input of each step is written to `inputs` (m c, B, S). `record` needs nothing done.
        """
        length, sizes = cfactor * self.parts, self._sizes

        def advance(x: Tensor, part: int) -> Tensor:
            rows = slice(part, None, length)
            return self.cell.step(x, self.theta[rows], self.weight, self.bias, sizes[rows])

        return sweep(points, range(cfactor), self.parts, advance, lambda j: slice(j, None, cfactor), tau, inputs)

    def relax_adjoint(
        self,
        states: Tensor,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """The same backwards, at the given states (m c parts, B, S); the sources are added behind each part.

        The gradient of theta is written to `gradient` (m c parts, B, G H).
        """
        length, local = cfactor * self.parts, self.linearized(states)

        def advance(v: Tensor, part: int) -> Tensor:
            rows = slice(part, None, length)
            after, slopes = local.back(v, self.weight, rows)
            if gradient is not None:
                local.of_input(v, slopes, rows, gradient[rows])
            return after if self.sources is None else after.add_(self.sources[rows])

        steps = range(cfactor)[::-1]
        return sweep(points, steps, self.parts, advance, lambda j: slice(j, None, cfactor), tau, inputs)

    def linearized(self, states: Tensor) -> Linearized:
        """The Jacobians of all rows at their states (n parts, B, S), computed once for the same states."""
        memory = self._memory
        if memory.states is not states or memory.version != states._version:
            memory.found = self._linearize(states)
            memory.states, memory.version = states, states._version
        assert memory.found is not None
        return memory.found

    def forget(self) -> None:
        """Give the memory of the last linearization back."""
        self._memory.states = self._memory.found = None

    def _linearize(self, states: Tensor) -> Linearized:
        at_once = max(1, _AT_ONCE // max(1, self.theta[:1].numel()))
        found: Any = None
        for first in range(0, max(1, len(states)), at_once):
            rows = slice(first, first + at_once)
            piece: Any = self.cell.linearize(states[rows], self.theta[rows], self.weight, self.bias, self._sizes[rows])
            names = [each.name for each in fields(piece)]
            if found is None:
                shapes = {name: (len(states), *getattr(piece, name).shape[1:]) for name in names}
                found = type(piece)(**{name: states.new_empty(shape) for name, shape in shapes.items()})
            for name in names:
                getattr(found, name)[rows] = getattr(piece, name)
        return found

    def weight_slopes(self, states: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of W_hh h + b_hh (n, B, G H) from that of theta (n, B, G H), at the given states."""
        return self.linearized(states).of_gates(gradient)

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> GatedSteps:
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
