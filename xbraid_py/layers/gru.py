"""The cell of a gated recurrent unit as a time step, plain and implicit: values and hand-written transposed Jacobians.

With the gates of `torch.nn.GRU`, r = σ(a_r + g_r), z = σ(a_z + g_z), n = tanh(a_n + r g_n), where a = W_ih x + b_ih is
the input's part and g = W_hh h + b_hh the state's, a step of size 1 is h + (1 - z) (n - h): forward Euler for
h' = (1 - z) (n - h). All steps here have the form h + s (n - h), the share s a function of the rate q = 1 - z.

Shape letters: `m` steps made at once, `B` batch, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("plain", "implicit")


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b of m steps: x (m, B, F), weight (G, F), bias (G,) or None, to (m, B, G)."""
    # A product for each step, and not one for all: their bits would depend on how many there are.
    columns = weight.t().expand(len(x), *reversed(weight.shape))
    return torch.bmm(x, columns) if bias is None else torch.baddbmm(bias, x, columns)


@dataclass(frozen=True)
class Sizes:
    """How long steps are.

    Parameters
    ----------
    h : (m,) tensor
        Step sizes; where one is 0 the step leaves the state as it is.
    counts : (m,) tensor or None
        Each step stands for so many of size h / count, all with the gates of the first; None where it is one step of
        size h.
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

        Parameters
        ----------
        a : (m, B, 3 H) tensor
            W_ih x + b_ih, gates in the order r, z, n.
        weight, bias : (3 H, H) and (3 H,) tensors
            W_hh and b_hh; no bias if that is None.
        sizes : Sizes
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
