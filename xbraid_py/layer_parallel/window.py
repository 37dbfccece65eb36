"""Consecutive layers that are propagated at once, all of a stack or a window of it: one node of autograd's graph.

Shape letters: `n` layers owned here, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import agree
from xbraid_py.comm.base import present
from xbraid_py.layer_parallel.accuracy import Controller, SolveRecord
from xbraid_py.layer_parallel.alike import Watch
from xbraid_py.layer_parallel.habits import Unwritten, as_any_module, check_not_again
from xbraid_py.layer_parallel.inputs import Inputs, part_error
from xbraid_py.layer_parallel.layout import Place, Settings
from xbraid_py.layer_parallel.pipeline import Pipelined, PortionMoments, Portions, moments_of
from xbraid_py.layer_parallel.solves import Propagation, Solvers, graph_is_kept, hollow
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.layers.autocast import blocks_cast, cast_again, cast_kept, current_cast
from xbraid_py.layers.bound import Bound
from xbraid_py.layers.dense import DenseBlock, ResidualSteps
from xbraid_py.layers.existing import Existing
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape, has_batched_form
from xbraid_py.layers.norm_dropout import Moments
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.equations import Forward
from xbraid_py.mgrit.pipeline import follow
from xbraid_py.mgrit.protocols import Steps

# Where one call for all intervals is faster (benchmarks/results/layer_parallel.md). Fewer intervals, on all ranks
# together, are not worth the call; of more numbers the work on them is what takes the time, and the cache is too small.
LEAST_INTERVALS = 8
MOST_NUMBERS = 1 << 16
MOST_WEIGHTS = 1 << 14
_INPUT = "shape and mode of the input"
Run = Propagation | Pipelined
_PORTION = 1 << 40  # from the number of an update to that of its next portion, as masks of dropout have them


class Window(nn.Module):
    """Consecutive layers with their weights, solvers and records; made by `LayerParallel`.

    Parameters
    ----------
    block : callable or Existing
        Makes one block, or has them all.
    solvers : Solvers
        Of these layers.
    settings : Settings
    place : Place
    splines : Splines, optional

    Attributes
    ----------
    layers : StackedWeights
    record : SolveRecord or None
        What the last forward and backward solve did.
    """

    def __init__(
        self,
        block: Callable[[], nn.Module] | Existing,
        solvers: Solvers,
        settings: Settings,
        place: Place,
        splines: Splines | None = None,
    ):
        super().__init__()
        self.solvers, self.settings, self.place = solvers, settings, place
        self.comm: Communicator = solvers.comm
        self.controller = Controller(settings.accuracy, solvers.are_iterative, self.comm.rank == 0)
        self.record: SolveRecord | None = None
        self.layers = StackedWeights(
            block,
            solvers.grid,
            solvers.partition,
            self.comm,
            settings.seed,
            place.first_layer,
            splines,
            settings.form,
            settings.returns,
            settings.torch_random,
        )
        self.block = self.layers.block
        if settings.compile:
            if self._is_dense:
                raise ValueError(f"compile={settings.compile!r}: a DenseBlock has kernels of its own; leave it out")
            self.block.compile("inductor" if settings.compile is True else settings.compile)
        self._draws = 0
        self._checked: set[tuple] = set()
        self._watch, self._is_due = Watch(self.comm), False
        self._batched: dict[tuple, bool] = {}

    @property
    def first_rank(self) -> int:
        """Owner of the first layer."""
        return self.solvers.partition.first_owner

    @property
    def last_rank(self) -> int:
        """Owner of the last layer."""
        return self.solvers.partition.last_owner

    @property
    def sizes(self) -> list[float]:
        """Step sizes of all layers; of maps 1."""
        grid = self.solvers.grid
        if self.settings.form == "map":
            return [1.0] * grid.num_layers
        return grid.sizes() if self.place.h is None else [self.place.h] * grid.num_layers

    @property
    def own_layers(self) -> range:
        """Numbers of the layers owned here, in the window."""
        partition, rank = self.solvers.partition, self.comm.rank
        return range(partition.first(rank), partition.first(rank) + partition.count(rank))

    @as_any_module
    @blocks_cast
    def forward(self, u: Tensor, given: Inputs | None = None) -> Tensor:
        """Output of the last layer for the input u (*S) of the first one; see `LayerParallel.forward`."""
        self._agree_on_input(u, given)
        vmap, training = self.vmaps(u, given), self.layers.training
        if not torch.is_grad_enabled() and not training:
            return self._exact_output(u, vmap, given)
        if training:
            if self.block.is_random or self.block.moving:
                check_not_again("LayerParallel", "dropout or moving statistics")
            self._draws += 1
            if self.block.moving:
                self._start_statistics(u, given)
        further = () if given is None else given.tensors
        return _PropagateWindow.apply(self, vmap, given, u, *self.layers.tensors(), *further)

    def vmaps(self, u: Tensor, given: Inputs | None = None) -> bool:
        """Whether the intervals are evaluated in one call for inputs like u (*S), as `LayerParallel` has the rule.

        The same on any number of ranks, and in every run. Collective at the first call with such a shape.
        """
        if self._is_dense or self.block.is_random or self.block.times is not None or self.solvers.are_pipelined:
            return False
        if current_cast() or self.block.is_cast or self.block.compiled:  # which a batched form goes past
            return False
        if self.settings.vmap is not None:
            return self.settings.vmap
        if given is not None:
            return False
        hierarchy = self.solvers.hierarchy
        if len(hierarchy.levels) == 1 or hierarchy.intervals.num_rows < LEAST_INTERVALS:
            return False
        if u.numel() > MOST_NUMBERS or self.block.row_size > MOST_WEIGHTS:
            return False
        key = (tuple(u.shape), u.dtype, u.device)
        if key not in self._batched:
            # On one rank: what is looked at are warnings, and they are those of all threads.
            first = self.comm.rank == 0
            with torch.inference_mode(False):
                self._batched[key] = self.comm.bcast(has_batched_form(self.block, u) if first else None)
        return self._batched[key]

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside the weights."""
        return {"draws": self._draws, "accuracy": self.controller.state()}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws = int(state["draws"])
        self.controller.restore(state["accuracy"])

    # ---- The input

    def _agree_on_input(self, u: Tensor, given: Inputs | None) -> None:
        """Raise the same error on all ranks unless they all go on with such a state, and the block can; collective.

        Raises
        ------
        ValueError
            If `u` is no state for these weights, or the ranks pass different ones or are in different modes; if the
            block cannot be evaluated for it, with all its pixels or with those of a coarse level.
        """
        dtype, device, training = self.layers.dtype, self.layers.device, self.layers.training
        message = call = None
        if not isinstance(u, Tensor) or u.dim() == 0:
            message = f"u={type(u).__name__} must be a tensor whose first axis is the samples"
        elif u.dtype != dtype or u.device != device:
            message = f"u is {u.dtype} on {u.device}, the weights are {dtype} on {device}; use u.to(...)"
        else:
            # All ranks take part in the adjoint solve, and where the output is spread in that of the input's gradient.
            differentiable = u.requires_grad or (
                self.settings.output == "last" and any(tensor.requires_grad for tensor in self.layers.parameters())
            )
            call = (tuple(u.shape), torch.is_grad_enabled(), training, differentiable, current_cast())
        agree(self.comm, (message, call, None if given is None else given.key), _INPUT, "forward()")
        if message:
            raise ValueError(message)
        # With output="last" what lies before the stack learns on the first rank alone.
        shares = self.settings.output == "all" and training and torch.is_grad_enabled()
        self._is_due = shares and self._watch.next_is_due()
        if self._is_due and self.place.first_layer == 0:
            self._watch.compare("the input", (u,) if given is None else (u, *given.leaves))
        key = (call, dtype, device, None if given is None else given.form)
        if key in self._checked:
            return
        with self.block.not_compiled():
            self._check_block(u, given)
        self._checked.add(key)

    def _check_block(self, u: Tensor, given: Inputs | None) -> None:
        """Raise `ValueError` unless the block can be evaluated for states as u (*S), and means the same everywhere."""
        training = self.layers.training
        self.block.check_mode()
        block = self._block(given)
        if given is not None:
            given.check(self.block, self.solvers.spatial, self.controller.accuracy.noise)
        with torch.inference_mode(False):
            block.check_state(u.shape, u)
        for transfer in self.solvers.transfers(u.shape):
            if transfer is not None:
                if self._is_dense:
                    spatial = self.solvers.spatial
                    raise ValueError(f"spatial={spatial} is for blocks of convolutions; a DenseBlock has no pixels")
                coarse = torch.Size((*u.shape[: -len(transfer.pixels)], *transfer.coarse_pixels))
                try:
                    with torch.inference_mode(False):
                        block.check_state(coarse, u)
                except RuntimeError as error:
                    raise ValueError(
                        f"spatial: the block cannot be evaluated for states {tuple(coarse)} of a coarse level "
                        f"({error}); use blocks that take any number of pixels, and dims for their axes"
                    ) from error
        if self.solvers.are_pipelined or not (training or torch.is_grad_enabled()):
            self._check_portions(u, given)

    @torch.no_grad()
    def _check_portions(self, u: Tensor, given: Inputs | None) -> None:
        """Raise `ValueError`, on all ranks, if the block makes something else of a portion than of the batch."""
        portions = self._portions_of_call(u)
        if len(portions) == 1 or self._is_dense or self.block.is_random:
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device)
        what, block = f"block={type(self.block.module).__name__}", self._block(given)
        tensors = block.tensors_of(block.module)
        whole = block(tensors, x)
        try:
            block = self._block(given, portions, 1)
            part = block(block.tensors_of(block.module), portions.part(x, 1))
        except RuntimeError as error:
            raise part_error(what, "MGRIT(portions=1)", error) from error
        # Up to rounding, which sums of other lengths have.
        if (portions.part(whole, 1) - part).norm() > 1e-2 * part.norm():
            pipeline = "cycle='pipeline', " if self.solvers.are_pipelined else ""
            raise part_error(what, f"MGRIT({pipeline}portions=1)")

    def _portions_of_call(self, u: Tensor) -> Portions:
        """The portions that a call with u (*S) goes through the layers in."""
        if self.solvers.are_pipelined and (self.layers.training or torch.is_grad_enabled()):
            return self._portions(u, self._count(len(u)))
        options = MGRIT(cycle="pipeline", portions=self.solvers.options.portions)
        return self._portions(u, options.portions_of(len(u)))

    def _block(self, given: Inputs | None, portions: Portions | None = None, number: int = 0) -> ModuleBlock:
        """The block, with further inputs if there are any."""
        return self.block if given is None else given.bound(self.block, portions, number)

    @torch.no_grad()
    def _start_statistics(self, u: Tensor, given: Inputs | None) -> None:
        """Give statistics to all norms that have met no batch yet, by a pass with u layer after layer; collective."""
        weights, comm = self.layers, self.comm
        every = {name: weights.statistics(name) for name in self.block.moving}
        fresh = torch.tensor([int(any((count == 0).any() for _, _, count in every.values()))])
        if not comm.allgather(fresh, (1,) * comm.size).any():
            return
        block, theta = self._block(given), self._theta(weights.tensors())
        theta = block.rows(theta) if isinstance(block, Bound) else theta
        moments = self.block.moments(len(theta), start=True)
        # One row after the other: the norms write into the rows of theta.
        steps = self._steps(theta, self._draws, False, moments=moments, block=block)
        state = self._state(u)
        self.solvers.sequential.solve(Forward(steps, None, state), state)
        found = dict(zip((column.name for column in block.columns), block.split(theta), strict=True))
        for name, (mean, variance, _) in every.items():
            prefix = f"{name}." if name else ""
            mean.copy_(found[f"{prefix}running_mean"])
            variance.copy_(found[f"{prefix}running_var"])

    # ---- The steps, and states as they take them

    def _theta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Rows of the weights owned here, from their columns."""
        return self.block.join([tensor.detach() for tensor in tensors])

    def _steps(
        self,
        theta: Tensor,
        draw: int,
        vmap: bool,
        tape: Tape | None = None,
        moments: Moments | None = None,
        block: ModuleBlock | None = None,
    ) -> ResidualSteps | ModuleSteps:
        """The layers owned here."""
        own = self.own_layers
        h = self.sizes[0]
        if not (self.solvers.grid.is_uniform or self.block.is_map):
            h = torch.tensor(self.sizes[own.start : own.stop], dtype=theta.dtype, device=theta.device)
        if self._is_dense and isinstance(self.block.module, DenseBlock):
            return ResidualSteps(self.block.module.layer, theta, h)
        layers = tuple(self.place.first_layer + layer for layer in own)
        return ModuleSteps(block or self.block, theta, h, layers, draw, vmap, tape, moments)

    @property
    def _is_dense(self) -> bool:
        return type(self.block.module) is DenseBlock and not self.block.is_map

    def _state(self, u: Tensor) -> Tensor:
        """u as the steps take it: dense ones features first."""
        u = u.detach()
        return u.flatten(0, -2).t().contiguous() if self._is_dense else u.contiguous()

    def _user_state(self, state: Tensor, like: Tensor) -> Tensor:
        """The opposite of `_state`, in the shape of `like`."""
        return state.t().reshape(like.shape).contiguous() if self._is_dense else state

    # ---- The output

    def _exact_output(self, u: Tensor, vmap: bool, given: Inputs | None) -> Tensor:
        """The output for the input u (*S), layer after layer, the samples in portions; collective."""
        theta = self._theta(self.layers.tensors())
        steps = self._steps(theta, self._draws, vmap)
        state = self._state(u)
        portions = self._portions_of_call(u)

        def through(number: int, x: Tensor) -> Tensor:
            own = steps if given is None else replace(steps, block=given.bound(self.block, portions, number))
            return own.relax(x[None], len(theta), None, None)[0]

        own = self.comm.rank == self.last_rank
        end = torch.empty_like(state) if own else None
        follow(
            self.solvers.neighbors,
            self.solvers.partition,
            +1,
            range(len(portions)),
            begin=lambda number: portions.part(state, number),
            template=lambda number: portions.empty(state, number),
            through=through,
            end=lambda number, x: portions.put(present(end), number, x),
        )
        return self._spread(end, u, self.last_rank, self.place.has_all_output)

    def _portions(self, u: Tensor, count: int) -> Portions:
        """So many portions of the samples of an input u (*S), in states as the steps take them."""
        if self._is_dense:
            return Portions.of(len(u), count, 1, u[:1].numel() // u.shape[-1] if len(u) else 1)
        return Portions.of(len(u), count)

    def propagation(self, vmap: bool, u: Tensor, tensors: tuple[Tensor, ...], keep: bool, given: Inputs | None) -> Run:
        """The forward solve with the input u (*S) and the columns of the weights, kept for an adjoint one or not."""
        theta = self._theta(tensors)
        draw = self._draws  # an exact gradient may be asked for after further calls
        portions = self._portions(u, self._count(len(u)))
        # Of the first solve; all others of this update see the same network, and move nothing.
        norms = {part.number: part for part in self.block.moving.values()}
        moments = {m: PortionMoments(norms, len(theta)) for m in range(len(portions) if norms else 0)}
        found = list(moments.values())

        def make_steps(kept: bool, portion: int = 0) -> tuple[Steps, Tape | None]:
            wanted = kept and not self._is_dense and self.settings.recompute in (False, "states")
            tape = Tape() if wanted else None
            # Each portion has masks of its own.
            own, block = theta, None
            if given is not None:
                block = given.bound(self.block, portions if self.solvers.are_pipelined else None, portion)
                own = block.rows(theta)
            return self._steps(own, draw + portion * _PORTION, vmap, tape, moments.pop(portion, None), block), tape

        keeper = None
        if keep and self.settings.recompute in ("states", "all"):
            keeper = self.first_rank if self.place.keeper is None else self.place.keeper
        num_weights = self.block.row_size if given is not None and given.tensors else None
        solve = (self.solvers, self.controller, make_steps, len(theta), self._state(u))
        if self.solvers.are_pipelined:
            run = Pipelined(*solve, portions, keep, keeper, num_weights)
        else:
            run = Propagation(*solve, keep, keeper, self._half(u), num_weights)
        if found and len(theta):
            self.layers.move_statistics(moments_of(found))
        return run

    def _half(self, u: Tensor) -> tuple[int, int] | None:
        """The axis of the samples in a state, and how much of it the first half of them are; None of a single one."""
        if len(u) < 2:
            return None
        halves = self._portions(u, 2)
        return halves.axis, halves.rows.count(0)

    def _count(self, samples: int) -> int:
        """Portions of so many samples."""
        count = self.solvers.options.portions_of(samples)
        # The variance of a single value is none.
        return max(1, min(count, samples // 2)) if self.block.moving else count

    @property
    def compares_slopes(self) -> bool:
        """Whether the gradient of the output is looked at in the backward pass of the present call."""
        return self._is_due and self.place.is_last

    def compare_slope(self, slope: Tensor) -> None:
        """Raise the same `ValueError` on all ranks unless the gradient of the output is alike; collective."""
        self._watch.compare("the gradient of the output", (slope,))

    def read_again(self, run: Run, u: Tensor, given: Inputs | None) -> Iterator[Any]:
        """What a backward pass reads of the inputs of a call, on any rank."""
        recompute = self.settings.recompute
        if recompute in ("states", "all") or run.checks:
            yield u
        if given is not None and (recompute or run.checks):
            yield from given.leaves

    def output_of(self, run: Run, like: Tensor) -> Tensor:
        """The output of a forward solve, in the shape of the input, wherever it is wanted; once."""
        return self._spread(run.take_end(), like, self.last_rank, self.place.has_all_output)

    def gradients_of(
        self, run: Run, slope: Tensor, like: Tensor, keep: bool, with_input: bool, given: Inputs | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the columns of the weights and of further inputs, and of the input if asked for, from that of
        the output (*S).
        """
        own = self.comm.rank == self.last_rank
        gradient, back, self.record = run.backward(self._state(slope) if own else None, keep)
        of_u = self._spread(back, like, self.first_rank, self.place.has_all_input) if with_input else None
        columns = self.block.split(gradient)
        if given is not None and given.tensors:
            portions = self._portions(like, self._count(len(like)) if self.solvers.are_pipelined else 1)
            columns += given.gradients(run.further, portions, self.solvers.partition, self.comm, gradient.dtype)
        return columns, of_u

    def _spread(self, state: Tensor | None, like: Tensor, root: int, on_all: bool) -> Tensor:
        """A state of rank `root`, in the user's shape: on all ranks, or there and 0 elsewhere."""
        own = self.comm.rank == root
        if on_all:
            found = self._user_state(present(state), like) if own else like.new_empty(like.shape)
            return self.comm.broadcast(found, root)
        return self._user_state(present(state), like) if own else torch.zeros_like(like)


class _PropagateWindow(torch.autograd.Function):
    """`apply(window, vmap, given, u, *tensors, *further)`: a solve for states forwards, one for adjoints backwards."""

    @staticmethod
    @cast_kept
    def forward(ctx, window: Window, vmap: bool, given: Inputs | None, u: Tensor, *tensors: Tensor) -> Tensor:
        """The output of the last layer."""
        keep = any(ctx.needs_input_grad)
        run = window.propagation(vmap, u, tensors[: len(window.block.columns)], keep, given)
        if keep:
            ctx.window, ctx.run, ctx.u, ctx.given = window, run, hollow(u), given
            ctx.slope_is_due = window.compares_slopes
            ctx.unwritten = Unwritten(window.read_again(run, u, given))
        output = window.output_of(run, u)
        # torch lets nobody write to a view that comes out of a function.
        return output.clone() if output._is_view() else output

    @staticmethod
    @cast_again
    def backward(ctx, slope: Tensor):
        """Gradients of the input, of the weights owned here, and of further inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a LayerParallel has no second derivatives; use to_sequential(model), a plain module"
            )
        if ctx.run is None:
            raise RuntimeError(
                "backward through a LayerParallel a second time: what its forward pass kept has been freed; use "
                "backward(retain_graph=True) the first time"
            )
        agree(ctx.window.comm, None, _INPUT, "backward()")
        if ctx.slope_is_due:
            ctx.window.compare_slope(slope)
        ctx.unwritten.check()
        keep = graph_is_kept()
        columns, of_u = ctx.window.gradients_of(ctx.run, slope, ctx.u, keep, ctx.needs_input_grad[3], ctx.given)
        if not keep:
            # A loss that is still around would otherwise hold all states during the next forward pass.
            ctx.run = None
        wanted = ctx.needs_input_grad[4:]
        return None, None, None, of_u, *(column if want else None for column, want in zip(columns, wanted, strict=True))
