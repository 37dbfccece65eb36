"""A stack of residual blocks as one torch module, parallel over its layers.

Shape letters: `N` layers, `n` of them owned here, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import together
from xbraid_py.layer_parallel.accuracy import Controller, GradientControl, SolveRecord
from xbraid_py.layer_parallel.function import Propagate
from xbraid_py.layer_parallel.inference import exact_output
from xbraid_py.layer_parallel.input import agree_on_input
from xbraid_py.layer_parallel.solves import Propagation, Solvers, for_adjoint
from xbraid_py.layer_parallel.spline_columns import spline_layers
from xbraid_py.layer_parallel.statistics import move_statistics, start_statistics
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.layer_parallel.window import Window
from xbraid_py.layers.batch_norm import Moments
from xbraid_py.layers.dense_block import DenseBlock
from xbraid_py.layers.dense_steps import ResidualSteps
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape
from xbraid_py.layers.pixels import SpatialCoarsening
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.protocols import Steps

Recompute = Literal[False, True, "states", "all"]


class LayerParallel(nn.Module):
    """u_{n+1} = u_n + h F(u_n, theta_n) for N layers of one kind, h = T / N: states and adjoints by MGRIT.

    Every rank of the communicator makes the module, calls it with the same batch, and calls `backward`. What lies
    around it (opening, head, loss) is computed on every rank alike, with the same result, so that the training loop
    is that of a single process. Weights of a layer live on one rank; `parameters()` are those of the layers owned here,
    all layers stacked on the first axis, and an optimizer of `torch.optim` updates them there.

    In training mode propagation is by MGRIT; in evaluation mode without gradients it is exact, layer after layer, the
    samples following each other through the ranks in portions (the first axis of the state is the samples').
    Dropout and batch normalization are those of this package: all evaluations of an update meet the same network.

    Parameters
    ----------
    block : callable
        Makes one block, an `nn.Module` that maps a state u to F(u) of the same shape; called for every layer
        owned here, with random numbers that depend on `seed` and the number of the layer.
    num_layers : int or LayerGrid
        The number of layers, or a grid whose steps may differ in length.
    T : float
        Final time; that of the grid, if one is given.
    comm : Communicator or mpi4py.MPI.Comm, optional
        A serial run without.
    mgrit : MGRIT, optional
        Of the states. The default solves until the relative change is below 1e-2.
    adjoint : MGRIT, optional
        Of the adjoints; what it leaves at its default is taken from `mgrit`.
    accuracy : GradientControl, optional
        What is asked of the gradients.
    output : {"all", "last"}
        Whether every rank gets the output, or only the last one, `last_rank` (elsewhere it is 0; see `broadcast_loss`).
        The gradient of the input is there on every rank, or only on the first one.
    seed : int
        Of initial weights and of `Dropout`.
    vmap : bool, optional
        Evaluate the layers of all intervals in one call (`torch.func.vmap`), or one after the other. By default what is
        faster by far for the first input, as measured on one rank; results agree to rounding.
    recompute : {False, True, "states", "all"}
        True: do not keep the graphs of the layers for the backward pass, but evaluate them again: less memory, a third
        more time. "states": keep nothing but the input of the stack, and solve for the states again. "all": both.
    window : Window, optional
        The place of this stack in a deeper one; see `in_windows`.
    splines : Splines, optional
        The parameters are coefficients of splines in depth then, (M, *shape) on every rank alike; t_n is the middle of
        layer n. Buffers that differ from layer to layer keep a row for each layer.
    spatial : SpatialCoarsening, optional
        Fewer pixels on coarse levels, for blocks of convolutions.

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
        num_layers: int | LayerGrid,
        T: float = 1.0,
        comm: Any = None,
        *,
        mgrit: MGRIT | None = None,
        adjoint: MGRIT | None = None,
        accuracy: GradientControl | None = None,
        output: Literal["all", "last"] = "all",
        seed: int = 0,
        vmap: bool | None = None,
        recompute: Recompute = False,
        window: Window | None = None,
        splines: Splines | None = None,
        spatial: SpatialCoarsening | None = None,
    ):
        super().__init__()
        self.comm: Communicator = as_communicator(comm)
        self.output, self.seed, self.recompute, self._vmap = output, seed, recompute, vmap
        self._window = window or Window()
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
            if recompute not in get_args(Recompute):
                raise ValueError(f"recompute={recompute!r} must be False, True, states or all; use False")
            self.grid = num_layers if isinstance(num_layers, LayerGrid) else LayerGrid(num_layers, T)
            self._solvers = Solvers(options, backwards, self.grid, self.comm, spatial)
        how = (output, seed, vmap, recompute, self._window, splines, spatial)
        self.comm.same((self.grid, options, backwards, accuracy, *how), "arguments")
        self._controller = Controller(accuracy or GradientControl(), self._solvers.are_iterative)
        self.record: SolveRecord | None = None
        self._draws = 0
        self._checked: set[tuple] = set()
        partition = self._solvers.partition
        curves = spline_layers(splines, self.grid, partition, self.comm, self._window)
        self.layers = StackedWeights(block, partition, self.comm, seed, self._window.first_layer, curves)
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
    def sizes(self) -> list[float]:
        """Step sizes of all layers."""
        return self.grid.sizes() if self._window.h is None else [self._window.h] * self.grid.num_layers

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
        agree_on_input(self, u)
        if not torch.is_grad_enabled() and not self.training:
            return exact_output(self, u)
        if self.training:
            self._draws += 1
            if self._block.moving:
                start_statistics(self, u)
        return Propagate.apply(self, u, *self.layers.tensors())

    def extra_repr(self) -> str:
        own = self.own_layers
        return f"num_layers={self.grid.num_layers}, T={self.grid.T}, own_layers={own.start}..{own.stop - 1}"

    def table(self) -> str:
        """The levels of the solver as text."""
        return self._solvers.hierarchy.table(self._solvers.options)

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: counts of updates, and how exactly solves are made."""
        return {"draws": self._draws, "accuracy": self._controller.state(), "vmap": self._vmap}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws = int(state["draws"])
        self._controller.restore(state["accuracy"])
        # Looped and batched differ in their last bits: a resumed run does as it did, and does not measure again.
        self._vmap = state["vmap"]

    # ---- How it goes

    def _steps(self, theta: Tensor, keep: bool, draw: int, moments: Moments | None = None) -> Steps:
        """The layers owned here."""
        own = self.own_layers
        h = self.sizes[0]
        if not self.grid.is_uniform:
            h = torch.tensor(self.sizes[own.start : own.stop], dtype=theta.dtype, device=theta.device)
        if self._is_dense:
            return ResidualSteps(self._block.module.layer, theta, h)
        tape = Tape() if keep and self.recompute in (False, "states") else None
        batched = bool(self._vmap) and not self._block.is_random
        layers = tuple(self._window.first_layer + layer for layer in own)
        return ModuleSteps(self._block, theta, h, layers, draw, batched, tape, moments)

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
        moments = self._block.moments(len(theta))
        solves = iter([moments])  # the first one; all others of this update see the same network, and move nothing

        def make_steps(kept: bool) -> Steps:
            return self._steps(theta, kept, draw, next(solves, None))

        keeper = None
        if keep and self.recompute in ("states", "all"):
            keeper = self.first_rank if self._window.keeper is None else self._window.keeper
        start = self._state(u)
        run = Propagation(self._solvers, self._controller, make_steps, len(theta), start, keep, keeper)
        if moments is not None:
            move_statistics(self.layers, moments)
        return run

    def _spread(self, state: Tensor | None, like: Tensor, root: int, is_end: bool) -> Tensor:
        """A state of rank `root`, in the user's shape: on all ranks, or, at an end, there and 0 elsewhere."""
        own = self.comm.rank == root
        if self.output == "all" or not is_end:
            found = self._user_state(state, like) if own else like.new_empty(like.shape)
            return self.comm.broadcast(found, root)
        return self._user_state(state, like) if own else torch.zeros_like(like)

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
