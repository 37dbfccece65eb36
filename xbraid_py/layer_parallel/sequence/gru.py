"""A gated recurrent network as a torch module, parallel over the steps of its sequences.

Shape letters: `L` steps, `B` batch, `F` inputs of a step, `H` hidden size, `D` stacked layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, together
from xbraid_py.layer_parallel.sequence.function import Run, Sequence, SequenceRecord
from xbraid_py.layer_parallel.sequence.plan import SequencePlan
from xbraid_py.layer_parallel.solves import for_adjoint
from xbraid_py.layers.gru import KINDS, GruCell
from xbraid_py.layers.gru_steps import COARSE
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.mgrit import MGRIT

OUTPUTS = ("all", "last", "own")
_PLANS = 64  # lengths whose plans are kept


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
    step after the other, rank after rank.

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
        of some percent in the gradient; 1e-2 leaves some thousandths.
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
        Coarse steps; see `xbraid_py.layers.gru_steps.GruSteps`.
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
            with own_random_numbers(seed):
                made = nn.GRU(input_size, hidden_size, num_layers, bias, device=device, dtype=dtype)
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, options, backwards)
        self.comm.same((*arguments, kind, dt, output, windows, coarse, seed), "arguments")
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
        self._agree(x, h_0)
        if self.batch_first:
            x = x.transpose(0, 1)
        start = x.new_zeros((self.num_layers, x.shape[1], self.hidden_size)) if h_0 is None else h_0
        weights = tuple(self.parameters())
        if torch.is_grad_enabled() or self.training:
            output, end = Sequence.apply(self, x, start, *weights)
        else:
            run = Run(self, x, start, weights, True, False)
            output, end = run.output, run.end
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

    def __deepcopy__(self, memo):
        raise TypeError(
            "a ParallelGRU is tied to its communicator and cannot be copied; make another one and load_state_dict"
        )
