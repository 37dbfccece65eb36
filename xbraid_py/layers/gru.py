"""A gated recurrent unit as a time step, plain and implicit, with hand-written adjoints.

With the gates of `torch.nn.GRU`, r = σ(a_r + g_r), z = σ(a_z + g_z), n = tanh(a_n + r g_n), where a = W_ih x + b_ih is
the input's part and g = W_hh h + b_hh the state's, a step of size 1 is h + (1 - z) (n - h): forward Euler for
h' = (1 - z) (n - h). All steps here have the form h + s (n - h), the share s a function of the rate q = 1 - z.

Shape letters: `m` steps made at once, `B` batch, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xbraid_py.layers.gated import GatedCell, Sizes, affine


@dataclass(frozen=True)
class LinearizedGru:
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
        slopes = self.state[rows] * v[..., None, :]
        direct = self.decay[rows] * v
        return torch.baddbmm(direct, slopes.flatten(-2), weight.expand(len(v), *weight.shape)), slopes

    def of_input(self, v: Tensor, slopes: Tensor, rows: slice, out: Tensor) -> None:
        width = v.shape[-1]
        out[..., : 2 * width] = slopes[..., :2, :].flatten(-2)
        torch.mul(self.candidate[rows], v, out=out[..., 2 * width :])

    def of_gates(self, gradient: Tensor) -> Tensor:
        found = gradient.clone()
        found[..., 2 * self.reset.shape[-1] :] *= self.reset
        return found


@dataclass(frozen=True)
class GruCell(GatedCell):
    """A gated recurrent unit with H hidden numbers; its gates are r, z, n, in this order.

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

    gates = 3
    tensors = ("h",)

    def step(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        _, rate, candidate, _ = self._gates(state, a, weight, bias)
        share, _ = self.share(rate, sizes, with_slope=False)
        return state.lerp(candidate, share)

    def linearize(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> LinearizedGru:
        reset, rate, candidate, g_n = self._gates(state, a, weight, bias)
        share, slope = self.share(rate, sizes, with_slope=True)
        assert slope is not None
        by_a_n = share * (1 - candidate.square())
        by_r = by_a_n * g_n * (reset * (1 - reset))
        by_z = (state - candidate) * slope * (rate * (1 - rate))  # the rate falls as z rises
        return LinearizedGru(1 - share, torch.stack([by_r, by_z, by_a_n * reset], -2), by_a_n, reset)

    def _gates(self, h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """r, 1 - z, n and g_n, each (m, B, H)."""
        g = affine(h, weight, bias)
        width = self.hidden_size
        r, z = g[..., : 2 * width].add_(a[..., : 2 * width]).sigmoid_().split(width, -1)
        g_n = g[..., 2 * width :]
        return r, 1 - z, torch.addcmul(a[..., 2 * width :], r, g_n).tanh_(), g_n
