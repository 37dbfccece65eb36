"""A stack of residual blocks as one torch module, parallel over its layers.

Shape letters: `N` layers, `n` of them owned here, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, wrap
from xbraid_py.grid import LayerGrid
from xbraid_py.layer_parallel.accuracy import Accuracy, Controller, SolveRecord
from xbraid_py.layer_parallel.function import Propagate
from xbraid_py.layer_parallel.ranks import agree, pipeline, together
from xbraid_py.layer_parallel.solves import Propagation, Solvers, for_adjoint
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.mgrit import MGRIT
from xbraid_py.module_steps import ModuleSteps, Tape, batched_is_faster
from xbraid_py.networks.dense_block import DenseBlock
from xbraid_py.networks.module_block import ModuleBlock
from xbraid_py.propagator import ResidualSteps, Steps

_MOST_MEASURED = 8  # intervals that are enough to see which way is faster


class LayerParallel(nn.Module):
    """u_{n+1} = u_n + h F(u_n, theta_n) for N layers of one kind, h = T / N: states and adjoints by MGRIT.

    Every rank of the communicator makes the module, calls it with the same batch, and calls `backward`. What lies
    around it (opening, head, loss) is computed on every rank alike, with the same result, so that the training loop
    is that of a single process. Weights of a layer live on one rank; `parameters()` are those of the layers owned here,
    all layers stacked on the first axis, and an optimiser of `torch.optim` updates them there.

    In training mode propagation is by MGRIT; in evaluation mode without gradients it is exact, layer after layer, the
    samples following each other through the ranks in portions (the first axis of the state is the samples').

    Parameters
    ----------
    block : callable
        Makes one block, an `nn.Module` that maps a state u to F(u) of the same shape; called for every layer
        owned here, with random numbers that depend on `seed` and the number of the layer.
    num_layers : int
    T : float
        Final time.
    comm : Communicator or mpi4py.MPI.Comm, optional
        A serial run without.
    mgrit : MGRIT, optional
        Of the states. The default solves until the relative change is below 1e-2.
    adjoint : MGRIT, optional
        Of the adjoints; what it leaves at its default is taken from `mgrit`.
    accuracy : Accuracy, optional
        What is asked of the gradients.
    output : {"all", "last"}
        Whether every rank gets the output, or only the last one, `last_rank` (elsewhere it is 0; see `share_loss`).
        The gradient of the input is there on every rank, or only on the first one.
    seed : int
        Of initial weights and of `Dropout`.
    batched : bool, optional
        Evaluate the layers of all intervals in one call (`torch.func.vmap`), or one after the other. By default what is
        faster by far for the first input, as measured on one rank; results agree to rounding.
    recompute : bool
        Do not keep the graphs of the layers for the backward pass, but evaluate them again: less memory, a third more
        time.

    Attributes
    ----------
    record : SolveRecord or None
        What the last forward and backward solve did.

    Raises
    ------
    ValueError
        If the ranks do not pass the same arguments, if a coarsening factor does not divide the number of layers, or
        if the block cannot be a layer.
    TypeError
        If `block` is no callable, or a module.
    """

    def __init__(
        self,
        block: Callable[[], nn.Module],
        num_layers: int,
        T: float = 1.0,
        comm: Any = None,
        *,
        mgrit: MGRIT | None = None,
        adjoint: MGRIT | None = None,
        accuracy: Accuracy | None = None,
        output: Literal["all", "last"] = "all",
        seed: int = 0,
        batched: bool | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        self.comm: Communicator = wrap(comm)
        self.output, self.seed, self.recompute, self._batched = output, seed, recompute, batched
        options = mgrit or MGRIT()
        backwards = for_adjoint(adjoint, options)
        with together(self.comm):
            if isinstance(block, nn.Module) or not callable(block):
                raise TypeError(
                    f"block={type(block).__name__} must be a function that makes a block, one for each layer; "
                    f"use block=lambda: MyBlock(64)"
                )
            if output not in ("all", "last"):
                raise ValueError(f"output={output!r} must be all or last; use all")
            self.grid = LayerGrid(num_layers, T)
            self._solvers = Solvers(options, backwards, self.grid, self.comm)
        self.comm.same((num_layers, T, options, backwards, accuracy, output, seed, batched, recompute), "arguments")
        self._controller = Controller(accuracy or Accuracy(), self._solvers.are_iterative)
        self.record: SolveRecord | None = None
        self._draws = 0
        self._checked: set[tuple] = set()
        self.layers = StackedWeights(block, self._solvers.partition, self.comm, seed)
        self._block: ModuleBlock = self.layers.block
        self.train()

    # ---- What a user meets

    @property
    def first_rank(self) -> int:
        """Owner of the first layer."""
        return self._solvers.partition.owner(0)

    @property
    def last_rank(self) -> int:
        """Owner of the last layer."""
        return self._solvers.partition.owner(self.grid.num_layers - 1)

    @property
    def own_layers(self) -> range:
        """Numbers of the layers owned here."""
        partition, rank = self._solvers.partition, self.comm.rank
        return range(partition.first(rank), partition.first(rank) + partition.count(rank))

    def forward(self, u: Tensor) -> Tensor:
        """Output of the last layer for the input u (*S) of the first one.

        Collective: every rank calls it, with an input of the same shape, in the same mode.

        Raises
        ------
        ValueError
            If the ranks differ in shape, type or mode, or the block cannot be evaluated for such states.
        """
        self._agree(u)
        if not torch.is_grad_enabled() and not self.training:
            return self._exact(u)
        if self.training:
            self._draws += 1
        return Propagate.apply(self, u, *self.layers.tensors())

    def extra_repr(self) -> str:
        own = self.own_layers
        return f"num_layers={self.grid.num_layers}, T={self.grid.T}, own_layers={own.start}..{own.stop - 1}"

    def table(self) -> str:
        """The levels of the solver as text."""
        return self._solvers.hierarchy.table(self._solvers.options)

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: counts of updates, and how exactly solves are made."""
        return {"draws": self._draws, "accuracy": self._controller.state(), "batched": self._batched}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws = int(state["draws"])
        self._controller.restore(state["accuracy"])
        # Looped and batched differ in their last bits: a resumed run does as it did, and does not measure again.
        self._batched = state["batched"]

    # ---- How it goes

    def _agree(self, u: Tensor) -> None:
        """Raise the same error on all ranks unless they all go on with such a state, and the block can."""
        dtype, device = self.layers.dtype, self.layers.device
        message = call = None
        if not isinstance(u, Tensor) or u.dim() == 0:
            message = f"u={type(u).__name__} must be a tensor whose first axis is the samples"
        elif u.dtype != dtype or u.device != device:
            message = f"u is {u.dtype} on {u.device}, the weights are {dtype} on {device}; use u.to(...)"
        else:
            # All ranks take part in the adjoint solve, and where the output is spread in that of the input's gradient.
            differentiable = u.requires_grad or (
                self.output == "last" and any(tensor.requires_grad for tensor in self.layers.tensors())
            )
            call = (tuple(u.shape), torch.is_grad_enabled(), self.training, differentiable)
        key = (message, call)
        agree(self.comm, key, "shape and mode of the input")
        if message:
            raise ValueError(message)
        if key in self._checked:
            return
        self._block.check_mode()
        self._block.check_state(u.shape, u)
        if self._batched is None and not self._is_dense:
            self._batched = self.comm.bcast(self._measure(u) if self.comm.rank == 0 else None)
        self._checked.add(key)

    def _measure(self, u: Tensor) -> bool:
        """Whether the intervals of a rank are evaluated faster in one call."""
        intervals = self._solvers.hierarchy.intervals
        count = max(intervals.counts)
        if count < 2 or not self._solvers.are_iterative or self._block.is_random:
            return False
        return batched_is_faster(self._block, u, min(count, _MOST_MEASURED))

    def _steps(self, theta: Tensor, u: Tensor, keep: bool, draw: int) -> Steps:
        """The layers owned here, for states like u."""
        if self._is_dense:
            return ResidualSteps(self._block.module.layer, theta, self.grid.h)
        tape = Tape() if keep and not self.recompute else None
        batched = bool(self._batched) and not self._block.is_random
        layers = tuple(self.own_layers)
        return ModuleSteps(self._block, theta, self.grid.h, layers, draw, batched, tape)

    @property
    def _is_dense(self) -> bool:
        return type(self._block.module) is DenseBlock

    def _state(self, u: Tensor) -> Tensor:
        """u as the steps take it: dense ones features first."""
        u = u.detach()
        return u.flatten(0, -2).t().contiguous() if self._is_dense else u.contiguous()

    def _user_state(self, state: Tensor, like: Tensor) -> Tensor:
        """The opposite of `_state`, in the shape of `like`."""
        return state.t().reshape(like.shape).contiguous() if self._is_dense else state

    def _propagation(self, u: Tensor, tensors: tuple[Tensor, ...], keep: bool) -> Propagation:
        theta = self._block.join([tensor.detach() for tensor in tensors])

        draw = self._draws  # an exact gradient may be asked for after further calls

        def make_steps(kept: bool) -> Steps:
            return self._steps(theta, u, kept, draw)

        return Propagation(self._solvers, self._controller, make_steps, len(theta), self._state(u), keep)

    def _spread(self, state: Tensor | None, like: Tensor, root: int) -> Tensor:
        """A state of rank `root`, in the user's shape: on all ranks, or there and 0 elsewhere."""
        own = self.comm.rank == root
        if self.output == "all":
            found = self._user_state(state, like) if own else like.new_empty(like.shape)
            return self.comm.broadcast(found, root)
        return self._user_state(state, like) if own else torch.zeros_like(like)

    def _exact(self, u: Tensor) -> Tensor:
        """The output, layer after layer."""
        theta = self._block.join([tensor.detach() for tensor in self.layers.tensors()])
        steps = self._steps(theta, u, False, self._draws)

        def through(portion: Tensor, receive: Callable[[Tensor], Tensor]) -> Tensor:
            return steps.relax(receive(self._state(portion))[None], len(theta), None, None)[0]

        found = pipeline(self.comm, self._solvers.partition, u.detach(), through)
        own = self.comm.rank == self.last_rank
        end = torch.cat([self._user_state(state, portion) for portion, state in found]) if own else None
        if self.output == "all":
            return self.comm.broadcast(end if own else u.new_empty(u.shape), self.last_rank)
        return end if own else torch.zeros_like(u)

    def __deepcopy__(self, memo):
        raise TypeError(
            "a LayerParallel is tied to its communicator and cannot be copied; make another one and load_state_dict, "
            "or use to_sequential for a copy without ranks"
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._block.module._apply(fn)
        self._checked.clear()
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        self.layers.set_mode(mode)
        return self
