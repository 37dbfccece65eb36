"""One window of a sequence through stacked layers of one direction, and back.

Shape letters: `n` steps of a window owned here in `K` intervals of `c`, `B` batch, `H` hidden size, `S` numbers of a
state, the first H of which are the output, `G` gates, `F` inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.base import present
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.pipeline import Portions
from xbraid_py.layer_parallel.sequence.plan import How, LayerWeights, Masks, SequencePlan
from xbraid_py.layers.gated import GatedSteps, affine
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.levels import Solution
from xbraid_py.mgrit.pipeline import follow

_AT_ONCE = 1 << 22  # numbers of the summands of all intervals that are held at once


@dataclass(frozen=True)
class _Layer:
    """What a layer leaves for its adjoint: its input (n, B, F), its steps, the states (n, B, S) they start from."""

    x: Tensor
    steps: GatedSteps
    states: Tensor


# What is told of a solve that is none: one step after the other.
_SWEPT = Solution((), None, [], [], 0.0, 1, torch.empty(0))


class _Adjoint(Adjoint):
    """The adjoints of a sequence: affine in those behind each step, since every output may have a slope."""

    def correct(self, before: Tensor, after: Tensor, coarse: Adjoint) -> None:
        # A change of the adjoints goes through the linear part alone.
        steps = cast(GatedSteps, coarse.steps)  # as on all levels of a sequence
        super().correct(before, after, replace(coarse, steps=replace(steps, sources=None)))


class SequenceWindow:
    """One window: made by its forward solves.

    Parameters
    ----------
    plan : SequencePlan
    index : int
        Number of the window.
    how : How
    weights : sequence of LayerWeights
        Of all layers, the lowest first.
    x : (n, B, F) tensor
        Inputs of the steps owned here; those that pad the sequence are not read.
    starts : sequence of (B, S) tensor
        States of the layers before the window; read on the first rank.

    Attributes
    ----------
    outputs : (n, B, H) tensor
        Of the uppermost layer.
    ends : list of (B, S) tensor
        States of the layers behind the window, on every rank.
    solutions : list of Solution
        Of the layers.
    """

    def __init__(
        self,
        plan: SequencePlan,
        index: int,
        how: How,
        weights: Sequence[LayerWeights],
        x: Tensor,
        starts: Sequence[Tensor],
    ):
        self.plan, self.how, self.comm, self.weights = plan, how, plan.solvers.comm, weights
        self.index, self.first = index, plan.partition.first(self.comm.rank)
        # Steps of the sequence; those behind them leave the state as it is.
        self.count = plan.count(index)
        h = how.sizes(self._steps, range(index * plan.window, index * plan.window + self.count), x)
        solver = plan.solvers.sequential if how.exact else plan.solvers.forward_at(how.level)
        self.layers: list[_Layer] = []
        self.ends: list[Tensor] = []
        self.solutions: list[Solution] = []
        if plan.solvers.are_pipelined:
            self._follow(x, starts, h)
            return
        for number, (layer, start) in enumerate(zip(weights, starts, strict=True)):
            if number and how.masks is not None:
                x = x * self._masks(how.masks, number - 1, x)
            steps, states = self._made(x, layer, h)
            solution = solver.solve(Forward(steps, states, start), start)
            self.layers.append(_Layer(x, steps, states))
            self.solutions.append(replace(solution, warm=()))
            self.ends.append(self._from_owner(solution.end, start, plan.window - 1))
            x = self._outputs(self._of(states), self._of(self.ends[-1]))
        self.outputs = x

    @property
    def _steps(self) -> range:
        """Numbers of the steps owned here, in the sequence."""
        return self.plan.steps(self.index, self.comm.rank)

    def _made(self, x: Tensor, layer: LayerWeights, h: Tensor) -> tuple[GatedSteps, Tensor]:
        """The steps of a layer for inputs (n, B, F), and room for the states they start from."""
        a, cell = affine(x, layer.of_input, layer.input_bias), self.how.cell
        steps = GatedSteps(cell, a, layer.of_state, layer.state_bias, h, self.how.coarse)
        return steps, x.new_empty((*x.shape[:2], cell.state_size))

    def _of(self, states: Tensor) -> Tensor:
        """The outputs (..., H) of states (..., S)."""
        return states[..., : self.how.cell.hidden_size]

    def _masks(self, masks: Masks, layer: int, like: Tensor) -> Tensor:
        """Factors (n, B, H) of dropout behind a layer; `like` (n, B, H) may have the first samples only."""
        return masks.behind(layer, self._steps, like)[:, : like.shape[1]]

    # ---- Portions of the samples

    def _portions(self, samples: int) -> Portions:
        """Of the second axis, which is the samples' in all that is handed on."""
        return Portions.of(samples, self.plan.solvers.options.portions_of(samples), 1)

    def _follow(self, x: Tensor, starts: Sequence[Tensor], h: Tensor) -> None:
        """The forward solves, exactly: each portion through the steps of a rank, in all layers, and on to the next."""
        portions, first = self._portions(x.shape[1]), torch.stack(list(starts))
        self.parts: list[list[_Layer]] = [[] for _ in range(len(portions))]
        self.outputs = x.new_empty((*x.shape[:2], self.how.cell.hidden_size))
        masks = self._masks_between(self.outputs)
        # The steps from the last one of the sequence on have one output; see `_outputs`.
        tail = max(0, self.count - 1 - self.first)

        def through(number: int, states: Tensor) -> Tensor:
            rows, ends = portions.part(x, number), torch.empty_like(states)
            sizes = h if h.dim() == 1 else portions.part(h, number)
            for d, (layer, start, end) in enumerate(zip(self.weights, states, ends, strict=True)):
                if d and masks:
                    rows = rows * portions.part(masks[d - 1], number)
                steps, kept = self._made(rows, layer, sizes)
                end.copy_(steps.relax(start[None], len(x), None, kept)[0])
                self.parts[number].append(_Layer(rows, steps, kept))
                made, out = self._of(kept), self._of(end)
                rows = torch.empty_like(made, memory_format=torch.contiguous_format)
                rows[:-1], rows[-1] = made[1:], out
                rows[tail:] = out
            portions.put(self.outputs, number, rows)
            return ends

        last = torch.empty_like(first)
        self._hand_on(+1, portions, first, last, through)
        root = self.plan.partition.owner(self.plan.window - 1)
        self.ends = list(self.comm.broadcast(last, root).unbind(0))
        self.solutions = [_SWEPT] * len(self.weights)

    def _masks_between(self, like: Tensor) -> list[Tensor]:
        """The factors of all layers but the last; none without dropout."""
        masks = self.how.masks
        return [] if masks is None else [self._masks(masks, d, like) for d in range(len(self.weights) - 1)]

    def _hand_on(self, direction: int, portions: Portions, first: Tensor, last: Tensor, through) -> None:
        """All portions one way, from the states (D, B, S) `first` to `last`."""
        follow(
            self.comm,
            self.plan.partition,
            direction,
            range(len(portions)),
            begin=lambda number: portions.part(first, number),
            template=lambda number: portions.empty(first, number),
            through=through,
            end=lambda number, states: portions.put(last, number, states),
        )

    def _follow_back(
        self, slopes: Tensor | None, carry: list[Tensor], with_input: bool
    ) -> tuple[list[tuple[Tensor, ...]], Tensor | None, list[Solution]]:
        """As `backward`."""
        x = self.outputs
        portions, first = self._portions(x.shape[1]), torch.stack(carry)
        depth, wide = len(self.weights), self.how.cell.gates * x.shape[-1]
        masks = self._masks_between(x)
        # Gradients of the two affine maps of all samples: products with them are made of all portions together, so
        # that the sum over samples is that of one call. The last ranks make them while the first still propagate.
        of_input, of_state = ([x.new_empty((*x.shape[:2], wide)) for _ in range(depth)] for _ in range(2))
        width = self.weights[0].of_input.shape[1]
        of_x = x.new_empty((*x.shape[:2], width)) if with_input else None

        def through(number: int, after: Tensor) -> Tensor:
            above = None if slopes is None else portions.part(slopes, number)
            before = torch.empty_like(after)
            for d in reversed(range(depth)):
                layer = self.parts[number][d]
                steps, v = layer.steps, after[d]
                gradient = torch.empty_like(steps.theta)
                if above is not None:
                    above = self.how.of_state(above)
                    # Of the output of the last step owned here, the state behind it; of those before, see `_sources`.
                    # The end of the window is what all steps from the last one of the sequence on give.
                    v = v + self._of_last(above)
                    steps = replace(steps, sources=self._sources_here(above))
                before[d] = steps.relax_adjoint(layer.states, v[None], len(x), None, None, gradient)[0]
                portions.put(of_input[d], number, gradient)
                portions.put(of_state[d], number, steps.weight_slopes(layer.states, gradient))
                steps.forget()
                if d or with_input:
                    above = affine(gradient, self.weights[d].of_input.t(), None)
                    if d and masks:
                        above = above * portions.part(masks[d - 1], number)
            if of_x is not None and above is not None:
                portions.put(of_x, number, above)
            return before

        last = torch.empty_like(first)
        self._hand_on(-1, portions, first, last, through)
        found = []
        for number in range(depth):
            whole = [
                torch.cat([of(part[number]) for part in self.parts], 1)
                if self.parts[0]
                else x.new_empty((0, x.shape[1], size))
                for of, size in (
                    (lambda layer: layer.x, self.weights[number].of_input.shape[1]),
                    (lambda layer: self._of(layer.states), x.shape[-1]),
                )
            ]
            pairs = zip((of_input[number], of_state[number]), whole, strict=True)
            by_x, by_h = (weight_gradient(g, values, self.plan.intervals, self.comm) for g, values in pairs)
            found.append((by_x[0], by_h[0], by_x[1], by_h[1]))
        root = self.plan.partition.first_owner
        carry[:] = self.comm.broadcast(last, root).unbind(0)
        return found, of_x, [_SWEPT] * depth

    def _of_last(self, slopes: Tensor) -> Tensor | float:
        """Gradient of the state behind the steps owned here, by the outputs that are that state."""
        row = self.count - 1 - self.first
        if row < 0:
            return 0.0  # all steps here pad the sequence
        return slopes[min(row, len(slopes) - 1)]

    def _sources_here(self, slopes: Tensor) -> Tensor:
        """As `_sources`, but that the slope of what another rank hands over is that rank's own (`_of_last`)."""
        found = torch.zeros_like(slopes)
        found[1:] = slopes[:-1]
        found[max(0, self.count - self.first) :] = 0
        return found

    # ---- All samples at once

    def _from_owner(self, state: Tensor | None, like: Tensor, row: int) -> Tensor:
        """A state of the owner of a step, on every rank."""
        root = self.plan.partition.owner(row)
        own = self.comm.rank == root
        return self.comm.broadcast(present(state).contiguous() if own else torch.empty_like(like), root)

    def _outputs(self, states: Tensor, end: Tensor) -> Tensor:
        """What the steps make (n, B, H): the input of each one's successor, and the window's end."""
        found = torch.empty_like(states, memory_format=torch.contiguous_format)
        following = self.comm.shift(states[:1].contiguous(), self.plan.partition, -1) if len(states) else None
        if len(states):
            found[:-1] = states[1:]
            if following is not None:
                found[-1:] = following
        # The steps from the last one of the sequence on have one output, the corrected one of the solve.
        found[max(0, self.count - 1 - self.first) :] = end
        return found

    def backward(
        self, slopes: Tensor | None, carry: list[Tensor], with_input: bool
    ) -> tuple[list[tuple[Tensor, ...]], Tensor | None, list[Solution]]:
        """Gradients of the weights of each layer, and of the inputs (n, B, F) if asked for; the adjoint solutions.

        Parameters
        ----------
        slopes : (n, B, H) tensor or None
            Gradient of the outputs; those of the steps that pad the sequence are ignored.
        carry : list of (B, S) tensor
            Gradients of the ends of the layers, the same on every rank; replaced by those of the starts.
        with_input : bool
        """
        if self.plan.solvers.are_pipelined:
            return self._follow_back(slopes, carry, with_input)
        plan, comm = self.plan, self.comm
        solver = plan.solvers.sequential if self.how.exact else plan.solvers.adjoint_at(self.how.level)
        found: list[tuple[Tensor, ...]] = []
        solutions = []
        for number in reversed(range(len(self.layers))):
            layer, weights, start = self.layers[number], self.weights[number], carry[number]
            steps = layer.steps
            if slopes is not None:
                slopes = self.how.of_state(slopes)
                row = self.count - 1
                last = slopes[row - self.first] if comm.rank == plan.partition.owner(row) else None
                start = start + self._from_owner(last, start, row)
                steps = replace(steps, sources=self._sources(slopes))
            gradient = torch.empty_like(steps.theta)
            solution = solver.solve(_Adjoint(steps, layer.states, gradient), start)
            solutions.append(solution)
            carry[number] = self._from_owner(solution.end, start, 0)
            of_input = weight_gradient(gradient, layer.x, plan.intervals, comm)
            state_slopes = steps.weight_slopes(layer.states, gradient)
            of_state = weight_gradient(state_slopes, self._of(layer.states), plan.intervals, comm)
            steps.forget()
            found.append((of_input[0], of_state[0], of_input[1], of_state[1]))
            slopes = affine(gradient, weights.of_input.t(), None) if number or with_input else None
            if number and self.how.masks is not None and slopes is not None:
                slopes = slopes * self._masks(self.how.masks, number - 1, slopes)
        return found[::-1], slopes, solutions[::-1]

    def _sources(self, slopes: Tensor) -> Tensor:
        """What the adjoint gets behind each step: the gradient of the output of the step before."""
        found = torch.zeros_like(slopes)
        before = self.comm.shift(slopes[-1:], self.plan.partition, +1) if len(slopes) else None
        if len(slopes):
            found[1:] = slopes[:-1]
            if before is not None:
                found[:1] = before
        # The output of the last step of the sequence is the end of the window; that of padding is nobody's.
        found[max(0, self.count - self.first) :] = 0
        return found


def chained_sum(rows: Tensor, partition: Partition, comm: Communicator) -> Tensor:
    """Sum over the rows (K, ...) of all ranks, one after the other, on every rank.

    Bitwise the same on any number of ranks, as with `Communicator.ordered_sum`; here only the sum so far travels, from
    each rank to the next, and not the summands: they are as large as the weights.
    """
    total = rows.new_zeros(rows.shape[1:])
    if len(rows):
        behind, ahead = (partition.neighbor(comm.rank, direction) for direction in (-1, +1))
        if behind is not None:
            comm.recv(total, behind)
        for row in rows:
            total += row
        if ahead is not None:
            comm.isend(total, ahead)()
    return comm.broadcast(total, partition.last_owner)


def weight_gradient(slopes: Tensor, values: Tensor, partition: Partition, comm: Communicator) -> tuple[Tensor, Tensor]:
    """The gradients of W (G H, F) and b (G H,) from those of W x + b at all steps.

    Parameters
    ----------
    slopes : (K c, B, G H) tensor
        Gradients of W x + b.
    values : (K c, B, F) tensor
        x.
    partition : Partition
        Of the intervals.
    comm : Communicator
    """
    count, width = partition.count(comm.rank), values.shape[-1] + 1
    # The ones make b a column of W.
    values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)
    length = len(values) // max(count, 1) * values.shape[1]
    values, slopes = values.reshape(count, length, width), slopes.reshape(count, length, slopes.shape[-1])
    # The same pieces on any number of ranks.
    at_once = max(1, _AT_ONCE // (partition.num_rows * width))
    found = []
    for first in range(0, slopes.shape[-1], at_once):
        rows = torch.bmm(slopes[..., first : first + at_once].transpose(1, 2), values)
        found.append(chained_sum(rows, partition, comm))
    both = torch.cat(found)
    return both[:, :-1].contiguous(), both[:, -1].contiguous()
