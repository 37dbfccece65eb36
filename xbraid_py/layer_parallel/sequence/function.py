"""A sequence as one node of autograd's graph: its windows forwards, and backwards in the opposite order.

Shape letters: `L` steps, `n` of a window owned here, `B` batch, `H` hidden size, `F` inputs, `D` stacked layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbraid_py.layer_parallel.function import graph_is_kept
from xbraid_py.layer_parallel.sequence.window import LayerWeights, Window
from xbraid_py.mgrit import Solution

if TYPE_CHECKING:
    from xbraid_py.layer_parallel.sequence.gru import ParallelGRU


@dataclass(frozen=True)
class SequenceRecord:
    """What the solves of one call did; tuples have a place for each layer of each window, the windows in order.

    Attributes
    ----------
    forward_sweeps, adjoint_sweeps : tuple of int
        Relaxations of the finest level; the latter empty before the backward pass.
    forward_residuals, adjoint_residuals : tuple of float
        Relative residuals, 0 for a sequential sweep.
    """

    forward_sweeps: tuple[int, ...]
    forward_residuals: tuple[float, ...]
    adjoint_sweeps: tuple[int, ...] = ()
    adjoint_residuals: tuple[float, ...] = ()


class Run:
    """One call of a `ParallelGRU`: the windows of its forward pass, and the backward pass that belongs to it.

    Parameters
    ----------
    gru : ParallelGRU
    x : (L, B, F) tensor
    start : (D, B, H) tensor
    weights : tuple of Tensor
        In the order of the module's parameters.
    exact : bool
        One step after the other.
    keep : bool
        Whether there will be a backward pass. It has the solves of a single window still, and makes those of several
        again, each from its start.
    """

    def __init__(
        self, gru: ParallelGRU, x: Tensor, start: Tensor, weights: tuple[Tensor, ...], exact: bool, keep: bool
    ):
        self.gru, self.comm, self.x, self.exact = gru, gru.comm, x.detach(), exact
        self.plan = gru.plan(len(x))
        given = [weight.detach() for weight in weights]
        size = len(given) // gru.num_layers
        self.weights = [
            LayerWeights(*(given[first : first + size] + [None, None])[:4]) for first in range(0, len(given), size)
        ]
        states = list(start.detach().unbind(0))
        self.starts: list[list[Tensor]] = []
        self.kept: Window | None = None
        self.solutions: list[Solution] = []
        outputs = []
        for index in range(self.plan.num_windows):
            window = self._window(index, states)
            if keep:
                self.starts.append(states)
            states = window.ends
            self.solutions += window.solutions
            if gru.output != "last":
                outputs.append(self._shared(window.outputs, index, gru.output == "all"))
            if keep and self.plan.num_windows == 1:
                self.kept = window
        self.output = torch.cat(outputs) if outputs else None
        self.end = torch.stack(states)

    def _window(self, index: int, starts: list[Tensor]) -> Window:
        gru = self.gru
        own = self.plan.own(index, self.comm.rank)
        x = self._padded(self.x[own.start : own.stop])
        how = {"dt": gru.dt, "coarse": gru.coarse, "exact": self.exact}
        return Window(self.plan, index, gru.cell, self.weights, x, starts, **how)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows of the sequence, with zeros for the steps owned here that pad it."""
        found = rows.new_zeros((self.plan.partition.count(self.comm.rank), *rows.shape[1:]))
        found[: len(rows)] = rows
        return found

    def _shared(self, rows: Tensor, index: int, everywhere: bool) -> Tensor:
        """What the ranks have of a window (n, B, ...), without padding: on all ranks, or what is owned here."""
        if everywhere:
            return self.comm.allgather(rows, self.plan.partition.counts)[: self.plan.count(index)]
        return rows[: len(self.plan.own(index, self.comm.rank))]

    def _slopes(self, index: int, slope: Tensor | None, used: bool, before: int) -> Tensor | None:
        """Gradient of the outputs of a window owned here, from that of the call; `before` rows are of earlier ones."""
        if not used:
            return None
        own = self.plan.own(index, self.comm.rank)
        first = own.start if self.gru.output == "all" else before
        rows = self.x.new_zeros((len(own), *self.end.shape[1:])) if slope is None else slope[first : first + len(own)]
        return self._padded(rows)

    def backward(
        self, slope: Tensor | None, of_end: Tensor | None, with_input: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor], SequenceRecord]:
        """Gradients of the input (L, B, F), if asked for, of the start (D, B, H) and of the weights, on every rank.

        Parameters
        ----------
        slope : (L, B, H) tensor or None
            Gradient of the output; the steps owned here if the output has no others.
        of_end : (D, B, H) tensor or None
            Gradient of the states behind the sequence.
        with_input : bool
        """
        # What one rank does not use another may.
        flag = torch.tensor([int(slope is not None)])
        used = bool(self.comm.allgather(flag, (1,) * self.comm.size).any())
        carry = list((torch.zeros_like(self.end) if of_end is None else of_end).unbind(0))
        total: list[Tensor] | None = None
        of_input: list[Tensor] = []
        solutions: list[Solution] = []
        before = sum(len(self.plan.own(index, self.comm.rank)) for index in range(self.plan.num_windows))
        for index in reversed(range(self.plan.num_windows)):
            before -= len(self.plan.own(index, self.comm.rank))
            window = self.kept or self._window(index, self.starts[index])
            slopes = self._slopes(index, slope, used, before)
            gradients, rows, found = window.backward(slopes, carry, with_input)
            solutions = found + solutions
            flat = [part for layer in gradients for part in layer]
            total = flat if total is None else [a.add_(b) for a, b in zip(total, flat, strict=True)]
            if with_input:
                of_input.insert(0, self._shared(rows, index, True))
        record = SequenceRecord(*_summary(self.solutions), *_summary(solutions))
        wanted = [part for number, part in enumerate(total) if self.gru.bias or number % 4 < 2]
        return torch.cat(of_input) if with_input else None, torch.stack(carry), wanted, record


def _summary(solutions: list[Solution]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(s.sweeps for s in solutions), tuple(s.residual for s in solutions)


class Sequence(torch.autograd.Function):
    """`apply(gru, x, start, *weights)` gives the output and the states behind the sequence."""

    @staticmethod
    def forward(ctx, gru: ParallelGRU, x: Tensor, start: Tensor, *weights: Tensor):
        """Output (L, B, H), or the steps owned here, or None; and states (D, B, H)."""
        keep = any(ctx.needs_input_grad)
        run = Run(gru, x, start, weights, False, keep)
        gru.record = SequenceRecord(*_summary(run.solutions))
        if keep:
            # For torch to notice if they are overwritten before the backward pass.
            ctx.save_for_backward(x, start, *weights)
            ctx.gru, ctx.run = gru, run
        if gru.output == "own":
            ctx.mark_non_differentiable(run.end)
        ctx.set_materialize_grads(False)
        return run.output, run.end

    @staticmethod
    def backward(ctx, slope: Tensor | None, of_end: Tensor | None):
        """Gradients of the input, of the states before the sequence, and of the weights."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a ParallelGRU has no second derivatives; use torch.nn.GRU, whose weights it shares"
            )
        _ = ctx.saved_tensors
        of_end = None if ctx.gru.output == "own" else of_end
        of_x, of_start, weights, ctx.gru.record = ctx.run.backward(slope, of_end, ctx.needs_input_grad[1])
        if not graph_is_kept():
            # A loss that is still around would otherwise hold all states during the next forward pass.
            ctx.run = None
        wanted = ctx.needs_input_grad
        of_weights = (found if want else None for found, want in zip(weights, wanted[3:], strict=True))
        return None, of_x, of_start if wanted[2] else None, *of_weights
