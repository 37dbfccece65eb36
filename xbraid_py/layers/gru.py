"""A gated recurrent unit as a time step, plain and implicit, with hand-written adjoints; its steps along a sequence.

With the gates of `torch.nn.GRU`, r = σ(a_r + g_r), z = σ(a_z + g_z), n = tanh(a_n + r g_n), where a = W_ih x + b_ih is
the input's part and g = W_hh h + b_hh the state's, a step of size 1 is h + (1 - z) (n - h): forward Euler for
h' = (1 - z) (n - h). All steps here have the form h + s (n - h), the share s a function of the rate q = 1 - z.

Shape letters: `m` steps made at once, or `m` intervals of `c` of `n` steps owned here, `B` batch, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

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
    """How long steps are: h (m,), 0 where a step leaves the state as it is.

    With `counts` (m,) each stands for so many of size h / count, all with the gates of the first; None where it is one.
    """

    h: Tensor
    counts: Tensor | None = None

    def __getitem__(self, rows: slice) -> Sizes:
        return Sizes(self.h[rows], None if self.counts is None else self.counts[rows])


@dataclass(frozen=True)
class Linearized:
    """The Jacobians of steps at given states.

    Attributes
    ----------
    decay : (m, B, H) tensor
        What of a change of the state stays directly, 1 - s.
    state : (m, B, 3, H) tensor
        Derivatives of the new state by g_r, g_z and g_n.
    candidate : (m, B, H) tensor
        Derivative by a_n; those by a_r and a_z are those by g_r and g_z.
    reset : (m, B, H) tensor
        The gate r: a derivative by g_n is that by a_n times r.
    """

    decay: Tensor
    state: Tensor
    candidate: Tensor
    reset: Tensor

    def back(self, v: Tensor, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Transposed Jacobians of some steps applied to v (m, B, H): the product (m, B, H), and g's part (m, B, 3, H).

        `weight` (3 H, H) is W_hh.
        """
        slopes = self.state[rows] * v[..., None, :]
        direct = self.decay[rows] * v
        return torch.baddbmm(direct, slopes.flatten(-2), weight.expand(len(v), *weight.shape)), slopes

    def of_input(self, v: Tensor, slopes: Tensor, rows: slice, out: Tensor) -> None:
        """The gradient of a, written to `out` (m, B, 3 H); `slopes` come from `back`."""
        width = v.shape[-1]
        out[..., : 2 * width] = slopes[..., :2, :].flatten(-2)
        torch.mul(self.candidate[rows], v, out=out[..., 2 * width :])


@dataclass(frozen=True)
class GruCell:
    """A gated recurrent unit with H hidden numbers.

    Parameters
    ----------
    hidden_size : int
        H, at least 1.
    kind : {"plain", "implicit"}
        How h' = (1 - z) (n - h) is stepped. Plain: forward Euler, with step size 1 the equations of `torch.nn.GRU`.
        Implicit: the state on the right is the new one, the gates are those of the old one,
        (1 + dt (1 - z)) h_new = h + dt (1 - z) n, which is stable for every step size (Moon and Cyr, "Parallel
        training of GRU networks with a multi-grid solver for long sequences", ICLR 2022, the implicit GRU).

    Raises
    ------
    ValueError
        If there is no hidden number, or no such kind.
    """

    hidden_size: int
    kind: str = "plain"

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size={self.hidden_size} must be at least 1; use 64")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be plain or implicit; use implicit")

    def step(self, h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        """States h (m, B, H) one step on; a new tensor.

        `a` (m, B, 3 H) is W_ih x + b_ih, gates in the order r, z, n; weight (3 H, H) and bias (3 H,) or None are W_hh
        and b_hh.
        """
        _, rate, candidate, _ = self._gates(h, a, weight, bias)
        share, _ = self._share(rate, sizes, with_slope=False)
        return h.lerp(candidate, share)

    def linearize(self, h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Linearized:
        """The Jacobians of the same steps; arguments as of `step`."""
        reset, rate, candidate, g_n = self._gates(h, a, weight, bias)
        share, slope = self._share(rate, sizes, with_slope=True)
        by_a_n = share * (1 - candidate.square())
        by_r = by_a_n * g_n * (reset * (1 - reset))
        by_z = (h - candidate) * slope * (rate * (1 - rate))  # the rate falls as z rises
        return Linearized(1 - share, torch.stack([by_r, by_z, by_a_n * reset], -2), by_a_n, reset)

    def _gates(self, h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """r, 1 - z, n and g_n, each (m, B, H)."""
        g = affine(h, weight, bias)
        width = self.hidden_size
        r, z = g[..., : 2 * width].add_(a[..., : 2 * width]).sigmoid_().split(width, -1)
        g_n = g[..., 2 * width :]
        return r, 1 - z, torch.addcmul(a[..., 2 * width :], r, g_n).tanh_(), g_n

    def _share(self, rate: Tensor, sizes: Sizes, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """s (m, B, H) for rates q, and its derivative by q."""
        if sizes.counts is not None:
            return self._composed(rate, sizes, with_slope)
        h = sizes.h[:, None, None]
        move = rate * h
        if self.kind == "plain":
            return move, h.expand_as(move) if with_slope else None
        divisor = 1 + move
        return move / divisor, h / divisor.square() if with_slope else None

    def _composed(self, rate: Tensor, sizes: Sizes, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """The same for several steps with the same gates: each leaves a factor 1 - h q, or 1 / (1 + h q), of n - h."""
        counts = sizes.counts[:, None, None]
        h = sizes.h[:, None, None] / counts.clamp_min(1)
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
        """The same backwards, at the given states (m c parts, B, H); the sources are added behind each part.

        The gradient of theta is written to `gradient` (m c parts, B, 3 H).
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
