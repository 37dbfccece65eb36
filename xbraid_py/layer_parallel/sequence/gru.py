"""A gated recurrent network as a torch module, parallel over the steps of its sequences.

A call is one node of autograd's graph: the windows of the sequence forwards, and backwards in the opposite order.

Shape letters: `L` steps, `n` of a window owned here, `B` batch, `F` inputs of a step, `H` hidden size, `D` stacked
layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, same_arguments, together
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.habits import compare_inputs
from xbraid_py.layer_parallel.sequence.window import LayerWeights, SequencePlan, SequenceWindow
from xbraid_py.layer_parallel.solves import check_portions, for_adjoint, graph_is_kept
from xbraid_py.layers.autocast import cast_again, cast_kept
from xbraid_py.layers.gated import COARSE, KINDS
from xbraid_py.layers.gru import GruCell
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.mgrit.levels import Solution
from xbraid_py.mgrit.options import MGRIT

OUTPUTS = ("all", "last", "own")
_PLANS = 64  # lengths whose plans are kept


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


class ParallelGRU(nn.Module):
    """Stacked gated recurrent units whose time steps are solved for all at once, by MGRIT, on all ranks.

    The arguments, the weights and their names are those of `torch.nn.GRU`, and with kind="plain" and dt=1 so are the
    results when the solver has converged; a `state_dict()` goes from one to the other. There is one direction, and no
    dropout, projection or packed sequence.

    Every rank of the communicator makes the module, with the same weights on each, calls it with the same batch, and
    calls `backward`: gradients of the weights are summed over the ranks, in an order that does not depend on their
    number, so the same optimizer does the same on every rank. What lies around the module is computed on every rank
    alike. The length of the sequence may differ from call to call, and no number of ranks need divide it.

    In training mode, and with gradients, propagation is by MGRIT; in evaluation mode without gradients it is exact, one
    step after the other, rank after rank (with `MGRIT(cycle="pipeline")` always, in portions of the samples).

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        F, H and D.
    bias : bool
    batch_first : bool
        Inputs and outputs are (B, L, F) and (B, L, H), not (L, B, F) and (L, B, H).
    comm : Communicator or mpi4py.MPI.Comm, optional
        A serial run without.
    mgrit : MGRIT, optional
        Of the states. The default, `MGRIT(tol=0.1)`, solves until the relative change is below 0.1, which leaves errors
        of some percent in the gradient; 1e-2 leaves some thousandths. `MGRIT(cycle="pipeline")` is exact: portions of
        the samples follow each other through the steps of the ranks, in all layers at once.
    adjoint : MGRIT, optional
        Of the adjoints; what it leaves at its default is taken from `mgrit`.
    kind : {"plain", "implicit"}
        See `xbraid_py.layers.gru.GruCell`.
    dt : float
        Step size, above 0; 1 is that of `torch.nn.GRU`.
    output : {"all", "last", "own"}
        The first result: the whole output sequence on every rank; None; or the steps owned here (see `own_steps`).
        With "own" the loss is the sum of what the ranks make of their steps, and the second result, the states behind
        the sequence, has no gradient.
    windows : int
        The sequence is cut in so many stretches, solved one after the other by all ranks. Only the state before each is
        kept, and the backward pass solves it again: memory of one window, for one more forward solve.
    coarse : {"compose", "euler"}
        Coarse steps; see `xbraid_py.layers.gated.GatedSteps`.
    seed : int
        Of initial weights.
    device, dtype
        Of the weights.

    Attributes
    ----------
    record : SequenceRecord or None
        What the last forward and backward solves did.

    Raises
    ------
    ValueError
        If an argument has no such value, or the ranks do not pass the same.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        comm: Any = None,
        mgrit: MGRIT | None = None,
        adjoint: MGRIT | None = None,
        kind: Literal["plain", "implicit"] = "plain",
        dt: float = 1.0,
        output: Literal["all", "last", "own"] = "all",
        windows: int = 1,
        coarse: Literal["compose", "euler"] = "compose",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.comm: Communicator = as_communicator(comm)
        options = mgrit or MGRIT(tol=0.1)
        backwards = for_adjoint(adjoint, options)
        with together(self.comm):
            for name, value in (
                ("input_size", input_size),
                ("hidden_size", hidden_size),
                ("num_layers", num_layers),
                ("windows", windows),
            ):
                if not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}={value!r} must be a whole number, at least 1; use 1")
            for name, word, words in (("kind", kind, KINDS), ("output", output, OUTPUTS), ("coarse", coarse, COARSE)):
                if word not in words:
                    raise ValueError(f"{name}={word!r} must be {' or '.join(words)}; use {words[0]}")
            if not 0.0 < dt < float("inf"):
                raise ValueError(f"dt={dt} must be positive and finite; use 1.0, the step of torch.nn.GRU")
            for name, given in (("mgrit", options), ("adjoint", backwards)):
                if given.coarse_step == "midpoint":
                    raise ValueError(f"coarse_step='midpoint' of {name}: a gated unit has no such step; leave it out")
            check_portions(options, backwards)
            with own_random_numbers(seed):
                made = nn.GRU(input_size, hidden_size, num_layers, bias, device=device, dtype=dtype)
        arguments = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "bias": bias}
        arguments |= {"batch_first": batch_first, "mgrit": options, "adjoint": backwards, "kind": kind, "dt": dt}
        arguments |= {"output": output, "windows": windows, "coarse": coarse, "seed": seed}
        same_arguments(self.comm, arguments, kernels=BACKEND)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.output, self.windows = bias, batch_first, output, windows
        self.cell, self.dt, self.coarse = GruCell(hidden_size, kind), dt, coarse
        self.record: SequenceRecord | None = None
        for name, parameter in made.named_parameters():
            self.register_parameter(name, parameter)
        # A coarse step of a unit is what `coarse` says, whatever the cycle.
        options, backwards = (replace(each, coarse_step="euler") for each in (options, backwards))
        self._options, self._plans = (options, backwards), {}

    # ---- What a user meets

    def own_steps(self, length: int) -> Tensor:
        """Numbers (n,) of the steps of a sequence of `length` that belong to this rank, in order."""
        plan = self.plan(length)
        return torch.tensor([i for window in range(plan.num_windows) for i in plan.own(window, self.comm.rank)]).long()

    def table(self, length: int) -> str:
        """The levels of the solver for sequences of `length` as text."""
        solvers = self.plan(length).solvers
        return solvers.hierarchy.table(solvers.options)

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Output of the uppermost layer, as `output` says, and the states (D, B, H) behind the sequence.

        Collective: every rank calls it, with inputs of the same shape, in the same mode.

        Parameters
        ----------
        x : (L, B, F) or (B, L, F) tensor
        h_0 : (D, B, H) tensor, optional
            States before the sequence; 0 without.

        Raises
        ------
        ValueError
            If a tensor does not fit, or the ranks differ in shape, type or mode.
        """
        kind = self.weight_ih_l0.device.type
        if torch.is_autocast_enabled(kind):
            # Nothing is cast: states and adjoints are in the type of the weights.
            x, h_0 = (t.to(self.weight_ih_l0.dtype) if isinstance(t, Tensor) else t for t in (x, h_0))
            with torch.autocast(kind, enabled=False):
                return self.forward(x, h_0)
        self._agree(x, h_0)
        compare_inputs(self.comm, x, h_0)
        if self.batch_first:
            x = x.transpose(0, 1)
        start = x.new_zeros((self.num_layers, x.shape[1], self.hidden_size)) if h_0 is None else h_0
        weights = tuple(self.parameters())
        if torch.is_grad_enabled() or self.training:
            output, end = _PropagateSequence.apply(self, x, start, *weights)
        else:
            call = _Call(self, x, start, weights, True, False)
            output, end = call.output, call.end
        return output.transpose(0, 1) if self.batch_first and output is not None else output, end

    def plan(self, length: int) -> SequencePlan:
        """Windows and owners of the steps of a sequence of `length`."""
        if length not in self._plans:
            found = SequencePlan.make(*self._options, length, self.windows, self.dt, self.comm)
            if len(self._plans) == _PLANS:
                self._plans.clear()
            self._plans[length] = found
        return self._plans[length]

    def extra_repr(self) -> str:
        found = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, kind={self.cell.kind}"
        return f"{found}, dt={self.dt}, output={self.output}, windows={self.windows}"

    # ---- How it goes

    def _agree(self, x: Tensor, h_0: Tensor | None) -> None:
        """Raise the same error on all ranks unless they all go on with such a call."""
        message = self._problem(x, h_0)
        call = None
        if message is None:
            # All ranks take part in the adjoint solve, and in spreading the gradients of what asks for them.
            wanted = tuple(t is not None and t.requires_grad for t in (x, h_0, *self.parameters()))
            call = (tuple(x.shape), h_0 is None, torch.is_grad_enabled(), self.training, wanted)
        agree(self.comm, (message, call), "shape and mode of the input")
        if message is not None:
            raise ValueError(message)
        length = x.shape[self.batch_first]
        if length not in self._plans:
            with together(self.comm):
                self.plan(length)

    def _problem(self, x: Tensor, h_0: Tensor | None) -> str | None:
        """What is wrong with the arguments of a call."""
        axes = "(B, L, F)" if self.batch_first else "(L, B, F)"
        if not isinstance(x, Tensor):
            return f"x={type(x).__name__} must be a tensor {axes}; sequences of unlike length are to be padded"
        if x.dim() != 3 or x.shape[-1] != self.input_size or not x.shape[0] * x.shape[1]:
            return f"x has shape {tuple(x.shape)}; it must be {axes} with F=input_size={self.input_size}, and not empty"
        weight = self.weight_ih_l0
        found = (self.num_layers, x.shape[1 - self.batch_first], self.hidden_size)
        for name, tensor in (("x", x), ("h_0", h_0)):
            if isinstance(tensor, Tensor) and (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
                what = f"{name} is {tensor.dtype} on {tensor.device}, the weights are {weight.dtype} on {weight.device}"
                return f"{what}; use {name}.to(...)"
        if h_0 is not None and (not isinstance(h_0, Tensor) or h_0.shape != found):
            shape = tuple(h_0.shape) if isinstance(h_0, Tensor) else type(h_0).__name__
            return f"h_0={shape} must be a tensor with the shape (D, B, H)={found}"
        return None


class _Call:
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
        self.kept: SequenceWindow | None = None
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

    def _window(self, index: int, starts: list[Tensor]) -> SequenceWindow:
        gru = self.gru
        own = self.plan.own(index, self.comm.rank)
        x = self._padded(self.x[own.start : own.stop])
        how = {"dt": gru.dt, "coarse": gru.coarse, "exact": self.exact}
        return SequenceWindow(self.plan, index, gru.cell, self.weights, x, starts, **how)

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
        shape = self.starts[0][0].shape
        rows = self.x.new_zeros((len(own), *shape)) if slope is None else slope[first : first + len(own)]
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
        carry = [torch.zeros_like(each) for each in self.starts[0]] if of_end is None else list(of_end.unbind(0))
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


class _PropagateSequence(torch.autograd.Function):
    """`apply(gru, x, start, *weights)` gives the output and the states behind the sequence."""

    @staticmethod
    @cast_kept
    def forward(ctx, gru: ParallelGRU, x: Tensor, start: Tensor, *weights: Tensor):
        """Output (L, B, H), or the steps owned here, or None; and states (D, B, H)."""
        keep = any(ctx.needs_input_grad)
        call = _Call(gru, x, start, weights, False, keep)
        gru.record = SequenceRecord(*_summary(call.solutions))
        if keep:
            # For torch to notice if they are overwritten before the backward pass.
            ctx.save_for_backward(x, start, *weights)
            ctx.gru, ctx.call = gru, call
        ctx.set_materialize_grads(False)
        # Held by the call they would hold the graph, and with it the call: nobody could ever free it.
        output, end, call.output, call.end = call.output, call.end, None, None
        if gru.output == "own":
            ctx.mark_non_differentiable(end)
        return output, end

    @staticmethod
    @cast_again
    def backward(ctx, slope: Tensor | None, of_end: Tensor | None):
        """Gradients of the input, of the states before the sequence, and of the weights."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a ParallelGRU has no second derivatives; use torch.nn.GRU, whose weights it shares"
            )
        _ = ctx.saved_tensors
        of_end = None if ctx.gru.output == "own" else of_end
        of_x, of_start, weights, ctx.gru.record = ctx.call.backward(slope, of_end, ctx.needs_input_grad[1])
        if not graph_is_kept():
            # A loss that is still around would otherwise hold all states during the next forward pass.
            ctx.call = None
        wanted = ctx.needs_input_grad
        of_weights = (found if want else None for found, want in zip(weights, wanted[3:], strict=True))
        return None, of_x, of_start if wanted[2] else None, *of_weights
