"""A long short-term memory unit as a time step, plain and implicit, with hand-written adjoints.

With the gates of `torch.nn.LSTM`, i, f, o = σ(a + g) and n = tanh(a_n + g_n), where a = W_ih x + b_ih is the input's
part and g = W_hh h + b_hh the state's, a step of size 1 is c + i n - (1 - f) c, then h = o tanh(c): forward Euler for
c' = i n - (1 - f) c, with h a function of the new c. So c moves by a share s of the way to i n / q, at the rate
q = 1 - f, and steps of any size are made as those of a GRU are; h has no step size, and is that of the last c.

Shape letters: `m` steps made at once, `B` batch, `H` hidden size. A state (m, B, 2 H) is h, then c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xbraid_py.layers.gated import GatedCell, Sizes, affine


@dataclass(frozen=True)
class LinearizedLstm:
    """The Jacobians of steps at given states.

    Attributes
    ----------
    decay : (m, B, H) tensor
        Derivative of the new c by the old one, 1 - s.
    cell : (m, B, 3, H) tensor
        Derivatives of the new c by g_i, g_f and g_n.
    through : (m, B, H) tensor
        Derivative of the new h by the new c.
    output : (m, B, H) tensor
        Derivative of the new h by g_o.
    kept : (m, B, H) tensor
        Derivative of the new h by the old one beside that through the gates: 1 where a step leaves the state as it is.
    """

    decay: Tensor
    cell: Tensor
    through: Tensor
    output: Tensor
    kept: Tensor

    def back(self, v: Tensor, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        of_h, of_c = v.chunk(2, -1)
        of_c = torch.addcmul(of_c, of_h, self.through[rows])
        slopes = torch.cat([self.cell[rows] * of_c[..., None, :], (self.output[rows] * of_h)[..., None, :]], -2)
        before = torch.baddbmm(self.kept[rows] * of_h, slopes.flatten(-2), weight.expand(len(v), *weight.shape))
        return torch.cat([before, self.decay[rows] * of_c], -1), slopes

    def of_input(self, v: Tensor, slopes: Tensor, rows: slice, out: Tensor) -> None:
        out.copy_(slopes.flatten(-2))

    def of_gates(self, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class LstmCell(GatedCell):
    """A long short-term memory unit with H hidden numbers; its gates are i, f, n, o, in this order.

    Parameters
    ----------
    hidden_size : int
        H, at least 1.
    kind : {"plain", "implicit"}
        How c' = i n - (1 - f) c is stepped. Plain: forward Euler, with step size 1 the equations of `torch.nn.LSTM`.
        Implicit: (1 + dt (1 - f)) c_new = c + dt i n, which is stable for every step size.

    Raises
    ------
    ValueError
        If there is no hidden number, or no such kind.
    """

    gates = 4
    tensors = ("h", "c")

    def step(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        h, c = state.chunk(2, -1)
        i, rate, n, o = self._gates(h, a, weight, bias)
        share, _ = self.share(rate, sizes, with_slope=False)
        c = torch.addcmul(c - share * c, self._length(rate, share, sizes) * i, n)
        return torch.cat([torch.where(self._moves(sizes), o * c.tanh(), h), c], -1)

    def linearize(self, state: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sizes) -> LinearizedLstm:
        h, c = state.chunk(2, -1)
        i, rate, n, o = self._gates(h, a, weight, bias)
        share, slope = self.share(rate, sizes, with_slope=True)
        length = self._length(rate, share, sizes)
        end = torch.addcmul(c - share * c, length * i, n).tanh_()
        by_i = length * n * (i * (1 - i))
        # The rate falls as f rises; the length is s / q, and its derivative (s' - s / q) / q.
        assert slope is not None and length is not None
        by_f = (1 - rate) * (rate * slope * c - (slope - length) * i * n)
        by_n = length * i * (1 - n.square())
        moves = self._moves(sizes).to(c.dtype)
        through = moves * o * (1 - end.square())
        output = moves * end * (o * (1 - o))
        return LinearizedLstm(1 - share, torch.stack([by_i, by_f, by_n], -2), through, output, (1 - moves).expand_as(c))

    def _gates(self, h: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """i, 1 - f, n and o, each (m, B, H)."""
        i, f, n, o = affine(h, weight, bias).add_(a).chunk(4, -1)
        # Of views with a row for each sample: the last numbers of what lies in one piece may be rounded in another way,
        # and which ones they are would depend on the number of steps.
        return i.sigmoid(), f.neg_().sigmoid(), n.tanh(), o.sigmoid()

    def _length(self, rate: Tensor, share: Tensor, sizes: Sizes) -> Tensor:
        """s / q (m, B, H): how long i n is added up for, the step size where nothing is forgotten."""
        h, counts = sizes.columns
        rate = rate.clamp_min(torch.finfo(rate.dtype).tiny)
        if counts is None:
            return h.expand_as(rate) if self.kind == "plain" else h / (1 + h * rate)
        move = h / counts.clamp_min(1) * rate
        # 1 - (1 - h q)^k without a difference of numbers that are nearly the same.
        small = move.clamp_max(0.5)
        logarithm = torch.log1p(-small) if self.kind == "plain" else -torch.log1p(small)
        share = torch.where(move < 0.5, -torch.expm1(counts * logarithm), share)
        return share / rate

    def _moves(self, sizes: Sizes) -> Tensor:
        """Whether a step does not leave the state as it is."""
        return sizes.columns[0] > 0
