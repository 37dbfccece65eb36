"""Recurrent networks as torch modules, parallel over the steps of their sequences: what all kinds of units share.

A call is one node of autograd's graph: the windows of the sequence forwards, and backwards in the opposite order.

Shape letters: `L` steps, `B` batch, `F` inputs of a step, `H` hidden size, `S` numbers of a state, `D` stacked layers
times directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, same_arguments, together
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.accuracy import Controller, GradientControl
from xbraid_py.layer_parallel.alike import Watch, compare_bits
from xbraid_py.layer_parallel.habits import check_not_again
from xbraid_py.layer_parallel.sequence.batch import Sequences, problem_of
from xbraid_py.layer_parallel.sequence.plan import How, LayerWeights, Masks, SequencePlan
from xbraid_py.layer_parallel.sequence.run import BothDirections, OneDirection, Pass
from xbraid_py.layer_parallel.sequence.update import SequenceRecord, Update
from xbraid_py.layer_parallel.solves import check_portions, for_adjoint, graph_is_kept
from xbraid_py.layers.autocast import cast_again, cast_kept
from xbraid_py.layers.gated import COARSE, KINDS, GatedCell
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.mgrit.options import MGRIT

OUTPUTS = ("all", "last", "own")
_PLANS = 64  # lengths whose plans are kept


class ParallelRecurrent(nn.Module):
    """Stacked recurrent units whose time steps are solved for all at once, by MGRIT, on all ranks.

    The arguments, the weights and their names are those of `torch.nn.GRU` or `torch.nn.LSTM`, and with kind="plain" and
    dt=1 so are the results when the solver has converged; a `state_dict()` goes from one to the other. Sequences come
    in a batch, without one (L, F), or packed; there is no projection.

    Every rank of the communicator makes the module, with the same weights on each, calls it with the same batch, and
    calls `backward`: gradients of the weights are summed over the ranks, in an order that does not depend on their
    number, so the same optimizer does the same on every rank. What lies around the module is computed on every rank
    alike. The length of the sequence may differ from call to call, and no number of ranks need divide it.

    In training mode, and with gradients, propagation is by MGRIT; in evaluation mode without gradients it is exact, one
    step after the other, rank after rank (with `MGRIT(cycle="pipeline")` always, in portions of the samples).

    Dropout, of the outputs of all layers but the last one, is by the rule of `xbraid_py.nn.Dropout`: a mask for each
    step, layer and update, the same on any number of ranks.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        F, H and the number of stacked layers.
    bias : bool
    batch_first : bool
        Inputs and outputs are (B, L, F) and (B, L, H), not (L, B, F) and (L, B, H).
    dropout : float
        At least 0 and below 1.
    bidirectional : bool
        Each layer reads the sequence, of each sample, from its end as well, and its outputs are those of both
        directions. Then all ranks have all outputs of each layer, and gradients of them.
    proj_size : int
        0: there is no projection.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        A serial run without.
    mgrit : MGRIT, optional
        Of the states. The default, `MGRIT(tol=0.1)`, solves until the relative change is below 0.1, which leaves errors
        of some percent in the gradient; 1e-2 leaves some thousandths. `MGRIT(cycle="pipeline")` is exact: portions of
        the samples follow each other through the steps of the ranks, in all layers at once.
    adjoint : MGRIT, optional
        Of the adjoints; what it leaves at its default is taken from `mgrit`.
    accuracy : GradientControl, optional
        What is asked of the gradient of all weights together: as of `LayerParallel`.
    kind : {"plain", "implicit"}
        See `xbraid_py.layers.gru.GruCell` and `xbraid_py.layers.lstm.LstmCell`.
    dt : float
        Step size, above 0; 1 is that of torch.
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
        Of initial weights and of dropout.
    device, dtype
        Of the weights.

    Attributes
    ----------
    record : SequenceRecord or None
        What the last forward and backward solves did: in one direction those of each layer of each window, the windows
        in order, otherwise those of each window of both directions of each layer, the layers in order.

    Raises
    ------
    ValueError
        If an argument has no such value, or the ranks do not pass the same.
    """

    cell_type: ClassVar[type[GatedCell]]
    torch_type: ClassVar[type[nn.GRU | nn.LSTM]]
    weight_ih_l0: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        comm: Any = None,
        mgrit: MGRIT | None = None,
        adjoint: MGRIT | None = None,
        accuracy: GradientControl | None = None,
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
        backwards, accuracy = for_adjoint(adjoint, options), accuracy or GradientControl()
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
                what = self.torch_type.__name__
                raise ValueError(f"dt={dt} must be positive and finite; use 1.0, the step of torch.nn.{what}")
            if not 0.0 <= dropout < 1.0:
                raise ValueError(f"dropout={dropout} must be at least 0 and below 1; use 0.1")
            if proj_size != 0:
                raise ValueError(
                    f"proj_size={proj_size} must be 0: coarse steps of projected states are not known; use proj_size=0 "
                    f"and a torch.nn.Linear behind, or torch.nn.LSTM"
                )
            if bidirectional and output == "own":
                raise ValueError(
                    "output='own' with bidirectional=True: the directions own other steps on a rank; use output='all'"
                )
            for name, given in (("mgrit", options), ("adjoint", backwards)):
                if given.coarse_step == "midpoint":
                    raise ValueError(f"coarse_step='midpoint' of {name}: a gated unit has no such step; leave it out")
            check_portions(options, backwards)
            with own_random_numbers(seed):
                sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
                made = self.torch_type(*sizes, device=device, dtype=dtype)
        arguments = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "bias": bias}
        arguments |= {"batch_first": batch_first, "dropout": dropout, "bidirectional": bidirectional, "mgrit": options}
        arguments |= {"adjoint": backwards, "accuracy": accuracy, "kind": kind, "dt": dt, "output": output}
        arguments |= {"windows": windows, "coarse": coarse, "seed": seed}
        same_arguments(self.comm, arguments, kernels=BACKEND)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.output, self.windows = bias, batch_first, output, windows
        self.dropout, self.bidirectional, self.proj_size, self.seed = dropout, bidirectional, proj_size, seed
        self.cell, self.dt, self.coarse = self.cell_type(hidden_size, kind), dt, coarse
        self.record: SequenceRecord | None = None
        for name, parameter in made.named_parameters():
            self.register_parameter(name, parameter)
        has_levels = options.cycle != "pipeline" and options.max_levels != 1
        self.controller = Controller(accuracy, has_levels, self.comm.rank == 0)
        self._draws = self._updates = 0
        self._watch = Watch(self.comm)
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

    def forward(self, x: Tensor | PackedSequence, h_0: Any = None) -> tuple[Any, Any]:
        """Output of the uppermost layer, as `output` says, and the states behind the sequences, as of torch's module.

        Collective: every rank calls it, with inputs of the same shape, in the same mode.

        Parameters
        ----------
        x : (L, B, F), (B, L, F) or (L, F) tensor, or PackedSequence
            The output comes likewise.
        h_0 : (D, B, H) or (D, H) tensor, or a pair of them of an LSTM, optional
            States before the sequences, h and of an LSTM c; 0 without.

        Raises
        ------
        ValueError
            If a tensor does not fit, or the ranks differ in shape, type or mode.
        """
        weight = self.weight_ih_l0
        if torch.is_autocast_enabled(weight.device.type):
            # Nothing is cast: states and adjoints are in the type of the weights.
            kinds = (Tensor, PackedSequence)
            x, h_0 = tree_map(
                lambda each: each.to(weight.dtype) if isinstance(each, kinds) else each,
                (x, h_0),
                is_leaf=lambda each: isinstance(each, kinds),
            )
            with torch.autocast(weight.device.type, enabled=False):
                return self.forward(x, h_0)
        states = self._named(h_0)
        self._agree(x, h_0, states)
        given = Sequences(x, self.batch_first)
        compare_bits(self.comm, given.numbers, h_0)
        if self.training and torch.is_grad_enabled() and self._watch.next_is_due():
            self._watch.compare("the input", (given.numbers, *states.values()))
            self._watch.compare("the weights", self.parameters())
        masks = None
        if self.training and self.dropout and self.num_layers > 1:
            check_not_again(type(self).__name__, "dropout", "windows=4")
            self._draws += 1
            masks = Masks(self.dropout, self.seed, self._draws, given.size[1])
        rows = given.padded()
        if states:
            start = torch.cat([given.states(state) for state in states.values()], -1)
        else:
            start = rows.new_zeros((self._num_states, rows.shape[1], self.cell.state_size))
        how = How(self.cell, self.dt, self.coarse, lengths=given.lengths, masks=masks)
        weights = tuple(self.parameters())
        if torch.is_grad_enabled() or self.training:
            output, end = _PropagateSequence.apply(self, how, rows, start, *weights)
        else:
            done = self._pass(replace(how, exact=True), rows, start, weights, keep=False)
            output, end = done.output, done.end
        ends = end.split(self.hidden_size, -1) if len(self.cell.tensors) > 1 else (end,)
        output, ends = given.handed_back(output, ends)
        return output, ends if len(ends) > 1 else ends[0]

    def plan(self, length: int) -> SequencePlan:
        """Windows and owners of the steps of a sequence of `length`."""
        if length not in self._plans:
            found = SequencePlan.make(*self._options, length, self.windows, self.dt, self.comm)
            if len(self._plans) == _PLANS:
                self._plans.clear()
            self._plans[length] = found
        return self._plans[length]

    def flatten_parameters(self) -> None:
        """Nothing: for programs that call it on torch's module."""

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: counts of updates, and how exactly solves are made."""
        return {"draws": self._draws, "updates": self._updates, "accuracy": self.controller.state()}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws, self._updates = int(state["draws"]), int(state["updates"])
        self.controller.restore(state["accuracy"])

    def extra_repr(self) -> str:
        found = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, kind={self.cell.kind}"
        found = f"{found}, bidirectional={self.bidirectional}, dropout={self.dropout}"
        return f"{found}, dt={self.dt}, output={self.output}, windows={self.windows}"

    # ---- How it goes

    @property
    def _num_states(self) -> int:
        """D."""
        return self.num_layers * (2 if self.bidirectional else 1)

    def _named(self, h_0: Any) -> dict[str, Any]:
        """What is given of the states before the sequences, by name."""
        if h_0 is None:
            return {}
        names = [f"{name}_0" for name in self.cell.tensors]
        if len(names) == 1:
            return {names[0]: h_0}
        # What is no pair is found to be none.
        is_pair = isinstance(h_0, tuple | list) and len(h_0) == len(names)
        return dict(zip(names, h_0, strict=True)) if is_pair else {f"({', '.join(names)})": h_0}

    def _agree(self, x: Any, h_0: Any, states: dict[str, Any]) -> None:
        """Raise the same error on all ranks unless they all go on with such a call."""
        weights = tuple(self.parameters())
        sizes = (self._num_states, self.hidden_size)
        message = problem_of(x, self.batch_first, states, weights[0], self.input_size, sizes)
        if message is None and h_0 is not None and len(states) != len(self.cell.tensors):
            message = f"h_0={type(h_0).__name__} must be a pair of tensors; use (h_0, c_0)"
        given, call = None, None
        if message is None:
            given = Sequences(x, self.batch_first)
            if given.is_packed and self.output == "own":
                message = "output='own' with a packed sequence, whose samples end on other ranks; use output='all'"
            # All ranks take part in the adjoint solve, and in spreading the gradients of what asks for them.
            wanted = tuple(t.requires_grad for t in (given.numbers, *states.values(), *weights))
            call = (given.key, h_0 is None, torch.is_grad_enabled(), self.training, wanted)
        agree(self.comm, (message, call), "shape and mode of the input", "forward()")
        if message is not None or given is None:
            raise ValueError(message)
        length = given.size[0]
        if length not in self._plans:
            with together(self.comm):
                self.plan(length)

    def _pass(self, how: How, x: Tensor, start: Tensor, weights: Sequence[Tensor], keep: bool) -> Pass:
        """A forward pass with inputs (L, B, F) and states (D, B, S)."""
        size = len(weights) // self._num_states
        parts = ([weight.detach() for weight in weights[n : n + size]] for n in range(0, len(weights), size))
        layers = [LayerWeights(by_x, by_h, *(biases or (None, None))) for by_x, by_h, *biases in parts]
        kind = BothDirections if self.bidirectional else OneDirection
        return kind(self.plan(len(x)), how, layers, x.detach(), start.detach(), self.output, keep)

    def _update(self, how: How, x: Tensor, start: Tensor, weights: Sequence[Tensor], keep: bool) -> Update:
        """The same as watched by the controller."""

        def make(exact: bool, level: int, samples: int | None, kept: bool) -> Pass:
            lengths = None if how.lengths is None else how.lengths[:samples]
            own = replace(how, exact=exact, level=level, lengths=lengths)
            return self._pass(own, x[:, :samples], start[:, :samples], weights, kept)

        solvers = self.plan(len(x)).solvers
        return Update(self.controller, make, x.shape[1], solvers.are_iterative and not solvers.are_pipelined, keep)

    def _size_of(self, slope: Tensor | None, of_end: Tensor | None) -> float:
        """Norm of what comes back, the same on all ranks, each of which may have another part of it or none."""
        squares = [each.detach().double().square().sum() for each in (slope, of_end) if each is not None]
        own = torch.tensor([float(sum(squares))], dtype=torch.float64)
        every = self.comm.allgather(own, (1,) * self.comm.size)
        return float(every.sum() if self.output == "own" else every.max()) ** 0.5


class _PropagateSequence(torch.autograd.Function):
    """`apply(module, how, x, start, *weights)` gives the output and the states behind the sequence."""

    @staticmethod
    @cast_kept
    def forward(ctx, module: ParallelRecurrent, how: How, x: Tensor, start: Tensor, *weights: Tensor):
        """Output (L, B, H or 2 H), or the steps owned here, or None; and states (D, B, S)."""
        keep = any(ctx.needs_input_grad)
        update = module._update(how, x.detach(), start.detach(), [weight.detach() for weight in weights], keep)
        module.record = update.record
        done = update.done
        if keep:
            # For torch to notice if they are overwritten before the backward pass.
            ctx.save_for_backward(x, start, *weights)
            ctx.module, ctx.update = module, update
        ctx.set_materialize_grads(False)
        # Held by the call they would hold the graph, and with it the call: nobody could ever free it.
        output, end = done.output, done.end
        del done.output, done.end
        if module.output == "own":
            ctx.mark_non_differentiable(end)
        return output, end

    @staticmethod
    @cast_again
    def backward(ctx, slope: Tensor | None, of_end: Tensor | None):
        """Gradients of the input, of the states before the sequence, and of the weights."""
        module = ctx.module
        if torch.is_grad_enabled():
            what = type(module).__name__
            raise RuntimeError(
                f"create_graph=True: a {what} has no second derivatives; use torch.nn.{module.torch_type.__name__}, "
                f"whose weights it shares"
            )
        _ = ctx.saved_tensors
        agree(module.comm, None, "", "backward()")
        of_end = None if module.output == "own" else of_end
        module._updates += 1
        found = ctx.update.backward(module._updates, slope, of_end, ctx.needs_input_grad[2], module._size_of)
        of_x, of_start, of_weights, module.record = found
        if not graph_is_kept():
            # A loss that is still around would otherwise hold all states during the next forward pass.
            ctx.update = None
        wanted = ctx.needs_input_grad
        # There are gradients of all biases, also of those that are not.
        of_weights = [part for number, part in enumerate(of_weights) if module.bias or number % 4 < 2]
        of_weights = (part if want else None for part, want in zip(of_weights, wanted[4:], strict=True))
        return None, None, of_x, of_start if wanted[3] else None, *of_weights
