"""The steps u + h F(u, theta_i) of any torch module F, or of one that gives the next state: values, transposed
Jacobians, and graphs that are kept.

Shape letters: `n` rows (layers) owned here, `m` intervals of `c` rows, `S` shape of a state, `p` numbers of a row of
weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.norm_dropout import Moments, NormInputs
from xbraid_py.layers.steps import coarse_rows, halved_rows, sweep
from xbraid_py.mgrit.protocols import StateTransfer


@dataclass
class _Graph:
    """What autograd has kept of some rows: from `start` and the `weights` (columns of all rows) to `end`."""

    start: Tensor
    weights: list[Tensor]
    end: Tensor


@dataclass
class Tape:
    """Graphs of the last recorded relaxation, so that adjoints need not evaluate the layers again.

    Attributes
    ----------
    graphs : dict of int to _Graph
        By the first row they stand for; batched, by its place in an interval.
    length : int
        Rows of each graph.
    keep : bool
        Whether adjoints may come through a graph more than once.
    """

    graphs: dict[int, _Graph] = field(default_factory=dict)
    length: int = 0
    keep: bool = True

    def clear(self, length: int) -> None:
        """Forget all graphs, before those of so many rows are recorded."""
        self.graphs.clear()
        self.length = length


@dataclass(frozen=True)
class ModuleSteps:
    """The steps of consecutive layers of one kind; the same interface as `ResidualSteps`.

    Parameters
    ----------
    block : ModuleBlock
        F; or of the form "map" B, and F(u) is B(u) - u. Where h is 1 a step is B(u) itself then, to the last bit.
    theta : (n parts, p) tensor
        Weights, a row for each part of each step.
    h : float
        Step size.
    layers : tuple of int
        Numbers of the layers the rows come from, which fix the masks of dropout.
    draw : int
        Number of the update, which fixes them too.
    vmap : bool
        Evaluate all intervals in one call (`torch.func.vmap`), or one after the other.
    tape : Tape, optional
        Keeps the graphs of recorded relaxations.
    moments : Moments, optional
        Gets the statistics of the batch from recorded relaxations.
    transfers : tuple of StateTransfer
        The finest first: a step adds h P F(R u) with restrictions R and interpolations P, F(u) without any.
    scheme, parts
        As of `ResidualSteps`.
    """

    block: ModuleBlock
    theta: Tensor
    h: float | Tensor
    layers: tuple[int, ...]
    draw: int = 0
    vmap: bool = False
    tape: Tape | None = None
    moments: Moments | None = None
    transfers: tuple[StateTransfer, ...] = ()
    scheme: str = "euler"
    parts: int = 1

    @property
    def cost(self) -> float:
        """Evaluations of F in one step."""
        return self.parts * (1.0 if self.scheme == "euler" else 2.0)

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> ModuleSteps:
        """See `ResidualSteps.coarsen`."""
        length = cfactor * self.parts // parts
        if length == 1:
            return replace(self, parts=parts, tape=None)
        theta, h = coarse_rows(self.theta, self.h, length, weights)
        layers = self.layers[::length]
        return replace(self, theta=theta, layers=layers, h=h, scheme=scheme, parts=parts, tape=None)

    def halved(self, halves: Tensor | None = None) -> Self:
        """See `ResidualSteps.halved`; both halves drop what the whole drops."""
        theta, h = halved_rows(self.theta, self.h, halves)
        layers = tuple(layer for layer in self.layers for _ in range(2))
        return replace(self, theta=theta, h=h, layers=layers, tape=None)

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        source, target = source.refine(self.parts), target.refine(self.parts)
        theta = comm.redistribute(self.theta.contiguous(), source, target)
        numbers = torch.tensor(self.layers, dtype=torch.int64)
        layers = tuple(comm.redistribute(numbers, source, target).tolist())
        h = comm.redistribute(self.h, source, target) if isinstance(self.h, Tensor) else self.h
        return replace(self, theta=theta, layers=layers, h=h, tape=None)

    def relax(
        self,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        record: bool = False,
    ) -> Tensor:
        """`cfactor` steps from the beginning of each interval (m, *S) to its end, tau (m c, *S) added to each.

        The input of each step is written to `inputs` (m c, *S). With `record` the tape keeps the graphs.
        """
        length = cfactor * self.parts
        tape, moments = (self.tape, self.moments) if record else (None, None)
        if tape is not None:
            tape.clear(length)
        ends = torch.empty_like(points)
        if not len(points):
            return ends
        columns = self.block.split(self.theta.detach())
        is_plain = tau is None and inputs is None and moments is None and self._is_plain
        with torch.set_grad_enabled(tape is not None):
            # Batched, all intervals are one long state; else one interval after the other.
            for k in [slice(None)] if self.vmap else range(len(points)):
                first = k * length if isinstance(k, int) else 0
                x = start = points[k].detach().requires_grad_() if tape is not None else points[k]
                leaves, weights = self._of_interval(columns, first, length, tape is not None)

                def advance(x: Tensor, part: int, first=first, weights=weights) -> Tensor:
                    row = self._place(first, part, length)
                    if moments is None:
                        return self._advanced(weights[part], x, row, None)
                    norm_inputs = NormInputs(moments.start)
                    x = self._advanced(weights[part], x, row, norm_inputs)
                    moments.take(row, norm_inputs)
                    return x

                if is_plain:
                    x = self.block.along(weights, x, cast(float, self.h))
                else:
                    place = partial(self._place, first // self.parts, length=cfactor)
                    x = sweep(x, range(cfactor), self.parts, advance, place, tau, inputs)
                if tape is not None:
                    tape.graphs[first] = _Graph(start, leaves, x)
                ends[k] = x.detach()
        return ends

    def relax_adjoint(
        self,
        states: Tensor,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """The same backwards, at the given states (m c parts, *S); see `kernels.relax_adjoint`."""
        length = cfactor * self.parts
        ends = torch.empty_like(points)
        if not len(points):
            return ends
        columns = None if gradient is None else self._differentiable(gradient)
        taped = self._taped(length) if tau is None and inputs is None else 0
        rows = None if taped else self._rows(self.theta)
        for k in [slice(None)] if self.vmap else range(len(points)):
            first = k * length if isinstance(k, int) else 0
            v = points[k]
            if taped:
                for start in reversed(range(first, first + length, taped)):
                    assert self.tape is not None
                    v = self._through(self.tape.graphs[start], v, columns, start, taped)
                ends[k] = v
                continue

            def advance(v: Tensor, part: int, first=first) -> Tensor:
                row = self._place(first, part, length)
                return self._back(rows, row, states[row], v, columns)

            place = partial(self._place, first // self.parts, length=cfactor)
            ends[k] = sweep(v, range(cfactor)[::-1], self.parts, advance, place, tau, inputs)
        return ends

    def _place(self, first: int, number: int, length: int) -> int | slice:
        """Where number `number` of an interval that begins at `first` lies; batched, that of all intervals."""
        return slice(number, None, length) if self.vmap else first + number

    def _taped(self, length: int) -> int:
        """Rows of each graph on the tape, if graphs make up intervals of that length; else 0."""
        if self.tape is None or not self.tape.graphs or length % self.tape.length:
            return 0
        return self.tape.length if length == self.tape.length or not self.vmap else 0

    def _through(self, graph: _Graph, v: Tensor, columns: list[Tensor] | None, first: int, length: int) -> Tensor:
        """v (*S) through the transposed Jacobian of a graph; the gradient of its rows goes to `columns`."""
        wanted = () if columns is None else [leaf for leaf in graph.weights if leaf.requires_grad]
        # A solve comes back with other adjoints. Where none does, memory is given back on the way.
        assert self.tape is not None
        options = {"retain_graph": self.tape.keep, "allow_unused": True, "materialize_grads": True}
        back, *found = torch.autograd.grad(graph.end, (graph.start, *wanted), v, **options)
        for column, part in zip(columns or (), found, strict=True):
            if self.vmap:
                column.unflatten(0, (-1, length)).copy_(part)
            else:
                column[first : first + length] = part
        return back

    def _back(self, rows, row: int | slice, u: Tensor, v: Tensor, columns: list[Tensor] | None) -> Tensor:
        """v (*S) through the transposed Jacobian of one step at u (*S), evaluated anew."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            weights = [column[row] for column in rows] if columns is None else self._leaves(rows, row)
            change = self._next(weights, u, row) if self._is_whole else self._increment(weights, u, row)
        if not change.requires_grad:
            return torch.zeros_like(v) if self._is_whole else v
        wanted = [leaf for leaf in weights if leaf.requires_grad]
        back, *found = torch.autograd.grad(change, (u, *wanted), v, allow_unused=True, materialize_grads=True)
        if columns is not None:
            for column, part in zip(columns, found, strict=True):
                column[row] = part
        return back if self._is_whole else v + back

    @property
    def _is_whole(self) -> bool:
        """Whether a step is what the block gives, and not a sum."""
        if not self.block.is_map or isinstance(self.h, Tensor):
            return False
        return self.h == 1.0 and self.scheme == "euler" and not self.transfers

    @property
    def _is_plain(self) -> bool:
        """Whether all steps are u + h F(u), or what the block gives, of a plain module."""
        if self.vmap or self.transfers or self.scheme != "euler" or isinstance(self.h, Tensor):
            return False
        return self.block.is_plain

    def _advanced(
        self, weights: Sequence[Tensor], u: Tensor, row: int | slice, norm_inputs: NormInputs | None
    ) -> Tensor:
        """One step on from u (*S)."""
        if self._is_whole:
            return self._next(weights, u, row, norm_inputs)
        return u + self._increment(weights, u, row, norm_inputs)

    def _next(
        self, weights: Sequence[Tensor], u: Tensor, row: int | slice, norm_inputs: NormInputs | None = None
    ) -> Tensor:
        """What the block gives for u (*S)."""
        if self.vmap:
            return self.block.batched(weights, u, norm_inputs)
        assert isinstance(row, int)
        return self.block(weights, u, self.draw, self.layers[row], norm_inputs)

    def _increment(
        self, weights: Sequence[Tensor], u: Tensor, row: int | slice, norm_inputs: NormInputs | None = None
    ) -> Tensor:
        """What a step adds to u (*S): h F(u), or h F(u + h/2 F(u))."""

        def field_of(x: Tensor) -> Tensor:
            for transfer in self.transfers:
                x = transfer.restrict(x)
            end = self._next(weights, x, row, norm_inputs)
            x = end - x if self.block.is_map else end
            for transfer in reversed(self.transfers):
                x = transfer.interpolate(x)
            return x

        h = self.h
        if isinstance(h, Tensor):
            h = h[row].view(-1, *(1,) * (u.dim() - 1)) if self.vmap else h[row]
        change = field_of(u)
        if self.scheme == "midpoint":
            change = field_of(u + h / 2 * change)
        return h * change

    def _of_interval(self, columns: list[Tensor], first: int, length: int, graph: bool) -> tuple[list, list]:
        """The columns of an interval (length, *shape), batched (m, length, *shape), and the weights of each row."""
        # For a graph the columns are its leaves: a leaf for each row and column takes as long as a small block.
        leaves = []
        for column, kind in zip(columns, self.block.columns, strict=True):
            part = column.unflatten(0, (-1, length)) if self.vmap else column[first : first + length]
            leaves.append(part.detach().requires_grad_(graph and kind.is_parameter))
        return leaves, list(zip(*(leaf.unbind(int(self.vmap)) for leaf in leaves), strict=True))

    def _rows(self, theta: Tensor) -> list:
        """Columns of the rows: batched as (n, *shape), else unbound into one tensor for each row."""
        columns = self.block.split(theta.detach())
        return columns if self.vmap else [column.unbind(0) for column in columns]

    def _leaves(self, rows, row: int | slice) -> list[Tensor]:
        """The weights of a row as leaves of a graph of their own."""
        kinds = self.block.columns
        return [
            column[row].detach().requires_grad_(kind.is_parameter) for column, kind in zip(rows, kinds, strict=True)
        ]

    def _differentiable(self, gradient: Tensor) -> list[Tensor]:
        """The columns of the parameters in a gradient (n, p); frozen statistics have none, theirs are set to 0."""
        found = []
        for column, kind in zip(self.block.split(gradient), self.block.columns, strict=True):
            if kind.is_parameter:
                found.append(column)
            else:
                column.zero_()
        return found


def has_batched_form(block: ModuleBlock, u: Tensor) -> bool:
    """Whether `torch.func.vmap` has a batched form of all that a block does with states like u (*S), and backwards.

    It refuses some operations, such as a look at a number, and makes others one after the other, with a warning.
    """
    theta = block.join([tensor[None] for tensor in block.tensors_of(block.module)]).repeat(2, 1)
    points = torch.randn((2, *u.shape), dtype=u.dtype, generator=torch.Generator().manual_seed(0)).to(u.device)
    steps = ModuleSteps(block, theta, 1e-3, (0, 1), vmap=True, tape=Tape())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            steps.relax(points, 1, record=True)
            steps.relax_adjoint(points, points, 1, gradient=torch.empty_like(theta))
        except RuntimeError:
            return False
    return not any("performance drop" in str(each.message) for each in said)
