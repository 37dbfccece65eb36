"""One call of a recurrent network: its forward pass through all windows, layers and directions, and the way back.

Layers of one direction follow each other within each window, where a rank hands on what it has. With two directions
each layer needs the last outputs of the one below first, so the layers are gone through one after the other, each in
all of its windows, and all ranks have the outputs in between.

Shape letters: `L` steps, `n` of a window owned here, `B` batch, `F` inputs of a step, `H` hidden size, `S` numbers of a
state, `D` stacked layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from xbraid_py.comm.base import present
from xbraid_py.layer_parallel.sequence.plan import How, LayerWeights, Masks, SequencePlan
from xbraid_py.layer_parallel.sequence.window import SequenceWindow
from xbraid_py.mgrit.levels import Solution


class Pass(Protocol):
    """A forward pass, and the backward pass that belongs to it.

    Attributes
    ----------
    output : tensor or None
        What the network makes: (L, B, H or 2 H), or the steps owned here, or nothing.
    end : (D or 2 D, B, S) tensor
        States behind the sequence.
    solutions : list of Solution
    """

    output: Tensor | None
    end: Tensor
    solutions: list[Solution]

    def backward(
        self, slope: Tensor | None, of_end: Tensor | None, with_input: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor], list[Solution]]:
        """Gradients of the input (L, B, F), if asked for, of the start and of all weights, on every rank; solutions.

        Parameters
        ----------
        slope : tensor or None
            Gradient of the output.
        of_end : tensor or None
            Gradient of the states behind the sequence.
        with_input : bool
        """
        ...


class OneDirection:
    """Stacked layers of one direction.

    Parameters
    ----------
    plan : SequencePlan
    how : How
    weights : sequence of LayerWeights
    x : (L, B, F) tensor
    start : (D, B, S) tensor
    output : {"all", "last", "own"}
        As of `ParallelRecurrent`.
    keep : bool
        Whether there will be a backward pass. It has the solves of a single window still, and makes those of several
        again, each from its start.
    """

    def __init__(
        self,
        plan: SequencePlan,
        how: How,
        weights: Sequence[LayerWeights],
        x: Tensor,
        start: Tensor,
        output: str,
        keep: bool,
    ):
        self.plan, self.how, self.comm, self.weights, self.x = plan, how, plan.solvers.comm, weights, x
        self.is_shared = output != "own"
        states = list(start.unbind(0))
        self.starts: list[list[Tensor]] = []
        self.kept: SequenceWindow | None = None
        self.solutions: list[Solution] = []
        outputs = []
        for index in range(plan.num_windows):
            window = self._window(index, states)
            if keep:
                self.starts.append(states)
            states = window.ends
            self.solutions += window.solutions
            if output != "last":
                outputs.append(self._shared(window.outputs, index, self.is_shared))
            if keep and plan.num_windows == 1:
                self.kept = window
        self.output = torch.cat(outputs) if outputs else None
        self.end = torch.stack(states)

    def _window(self, index: int, starts: list[Tensor]) -> SequenceWindow:
        own = self.plan.own(index, self.comm.rank)
        return SequenceWindow(
            self.plan, index, self.how, self.weights, self._padded(self.x[own.start : own.stop]), starts
        )

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
        first = own.start if self.is_shared else before
        shape = (len(own), self.x.shape[1], self.how.cell.hidden_size)
        return self._padded(self.x.new_zeros(shape) if slope is None else slope[first : first + len(own)])

    def backward(
        self, slope: Tensor | None, of_end: Tensor | None, with_input: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor], list[Solution]]:
        # What one rank does not use another may.
        flag = torch.tensor([int(slope is not None)])
        used = bool(self.comm.allgather(flag, (1,) * self.comm.size).any())
        carry = [torch.zeros_like(each) for each in self.starts[0]] if of_end is None else list(of_end.unbind(0))
        total: list[Tensor] = []
        of_input: list[Tensor] = []
        solutions: list[Solution] = []
        before = sum(len(self.plan.own(index, self.comm.rank)) for index in range(self.plan.num_windows))
        for index in reversed(range(self.plan.num_windows)):
            before -= len(self.plan.own(index, self.comm.rank))
            window = self.kept or self._window(index, self.starts[index])
            gradients, rows, found = window.backward(self._slopes(index, slope, used, before), carry, with_input)
            solutions = found + solutions
            flat = [part for layer in gradients for part in layer]
            total = [a.add_(b) for a, b in zip(total, flat, strict=True)] if total else flat
            if rows is not None:
                of_input.insert(0, self._shared(rows, index, True))
        return torch.cat(of_input) if with_input else None, torch.stack(carry), total, solutions


class BothDirections:
    """Stacked layers, each of one that reads the sequence forwards and one that reads it from its end.

    Parameters are as of `OneDirection`; weights and starts are those of both directions of the lowest layer, then of
    the next one.
    """

    def __init__(
        self,
        plan: SequencePlan,
        how: How,
        weights: Sequence[LayerWeights],
        x: Tensor,
        start: Tensor,
        output: str,
        keep: bool,
    ):
        self.how, self.layers = how, []
        self.solutions: list[Solution] = []
        ends = []
        for number in range(0, len(weights), 2):
            if number and how.masks is not None:
                x = x * self._masks(how.masks, number // 2 - 1, x)
            asked = output if number == len(weights) - 2 else "all"
            runs = [
                OneDirection(plan, how, weights[i : i + 1], self._turned(x, i % 2), start[i : i + 1], asked, keep)
                for i in (number, number + 1)
            ]
            self.layers.append(runs)
            ends += [run.end for run in runs]
            self.solutions += [solution for run in runs for solution in run.solutions]
            self.output: Tensor | None = None
            if asked != "last":
                x = self.output = torch.cat([self._turned(present(run.output), i) for i, run in enumerate(runs)], -1)
            for run in runs:
                run.output = None
        self.end = torch.cat(ends)

    def _turned(self, rows: Tensor, direction: int) -> Tensor:
        """Rows (L, B, ...) in the order of a direction: from the end of each sample for the second one; and back."""
        if not direction:
            return rows
        if self.how.lengths is None:
            return rows.flip(0)
        steps = torch.arange(len(rows), device=rows.device)[:, None]
        lengths = self.how.lengths.to(rows.device)
        order = torch.where(steps < lengths, lengths - 1 - steps, steps)
        return rows.gather(0, order[..., None].expand_as(rows))

    def _masks(self, masks: Masks, layer: int, like: Tensor) -> Tensor:
        """Factors (L, B, 2 H) of dropout behind a layer; `like` (L, B, 2 H) may have the first samples only."""
        return masks.behind(layer, range(len(like)), like)[:, : like.shape[1]]

    def backward(
        self, slope: Tensor | None, of_end: Tensor | None, with_input: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor], list[Solution]]:
        total: list[Tensor] = []
        carries: list[Tensor] = []
        solutions: list[Solution] = []
        for layer in reversed(range(len(self.layers))):
            parts = (None, None) if slope is None else slope.chunk(2, -1)
            of_x: Tensor | None = None
            weights, before, found = [], [], []
            for direction, (run, part) in enumerate(zip(self.layers[layer], parts, strict=True)):
                number = 2 * layer + direction
                turned = None if part is None else self._turned(part, direction)
                ends = None if of_end is None else of_end[number : number + 1]
                rows, carry, gradients, solved = run.backward(turned, ends, with_input or layer > 0)
                weights, before, found = weights + gradients, [*before, carry], found + solved
                if rows is not None:
                    rows = self._turned(rows, direction)
                    of_x = rows if of_x is None else of_x + rows
            total, carries, solutions = weights + total, before + carries, found + solutions
            slope = of_x
            if layer and self.how.masks is not None and slope is not None:
                slope = slope * self._masks(self.how.masks, layer - 1, slope)
        return slope, torch.cat(carries), total, solutions
