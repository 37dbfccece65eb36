"""One propagation through consecutive layers and its adjoint: solvers, what is kept between, how good the gradient is.

Shape letters: `n` layers owned here, `B` batch, `S` shape of a state, `p` numbers of a row of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.short import ShortMessages
from xbraid_py.layer_parallel.accuracy import TIGHTER, Controller, SolveRecord
from xbraid_py.layers.module_steps import Tape
from xbraid_py.layers.pixels import PixelTransfer, SpatialCoarsening
from xbraid_py.mgrit import MGRIT, Hierarchy, Solution, Solver
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.hierarchy import Level
from xbraid_py.mgrit.protocols import Steps

# Makes the steps of the layers owned here, and what keeps the graphs of their layers, if True asks for it and they can.
MakeSteps = Callable[[bool], tuple[Steps, Tape | None]]


class Solvers:
    """The solvers of consecutive layers: MGRIT with its options tightened as asked, and layer after layer.

    Parameters
    ----------
    options, adjoint : MGRIT
        Forwards and backwards; with the same levels.
    grid : LayerGrid
    comm : Communicator
    spatial : SpatialCoarsening, optional
    owner : int, optional
        The rank that has all these layers; they are propagated one after the other then, whatever the options.
    messages : torch.dtype, optional
        Of states and adjoints that go from rank to rank.

    Attributes
    ----------
    neighbors : Communicator
        The ranks, for states and adjoints.

    Raises
    ------
    ValueError
        If the two directions have other intervals on the finest level, other portions, or only one of them portions at
        all; or if the cycle cannot do with such pixels.
    """

    def __init__(
        self,
        options: MGRIT,
        adjoint: MGRIT,
        grid: LayerGrid,
        comm: Communicator,
        spatial: SpatialCoarsening | None = None,
        owner: int | None = None,
        messages: torch.dtype | None = None,
    ):
        self.options, self.adjoint, self.grid, self.comm = options, adjoint, grid, comm
        self.spatial, self.owner, self.messages = spatial, owner, messages
        self.neighbors = comm if messages is None or comm.size == 1 else ShortMessages(comm, messages)
        check_portions(options, adjoint)
        if spatial is not None:
            spatial.check(options)
            spatial.check(adjoint)
        if owner is None:
            self.hierarchy, backwards = (Hierarchy.plan(each, grid, comm.size) for each in (options, adjoint))
        else:
            rows = Partition(tuple(grid.num_layers * (rank > owner) for rank in range(comm.size + 1)))
            self.hierarchy = backwards = Hierarchy((Level(0, grid, None, 0, rows, rows),))
        if backwards.intervals != self.hierarchy.intervals and len(backwards.levels) > 1 < len(self.hierarchy.levels):
            raise ValueError(
                f"cfactor={adjoint.cfactor} of adjoint makes other intervals than cfactor={options.cfactor} of mgrit; "
                f"the finest ones must agree: leave it out"
            )
        self.partition = self.hierarchy.partition
        only = Level(0, grid, None, 0, self.partition, self.partition)
        self.sequential = Solver(MGRIT(max_levels=1), Hierarchy((only,)), self.neighbors)
        self._backwards = backwards if backwards.partition == self.partition else self.sequential.hierarchy
        self.forward_at = lru_cache(lambda level: self._made(options, self.hierarchy, level))
        self.adjoint_at = lru_cache(lambda level: self._made(adjoint, self._backwards, level))

    def __deepcopy__(self, memo):
        return self  # nothing in it changes

    def __reduce__(self):
        return Solvers, (self.options, self.adjoint, self.grid, self.comm, self.spatial, self.owner, self.messages)

    @property
    def are_pipelined(self) -> bool:
        """Whether portions of the samples follow each other through the ranks."""
        return self.options.cycle == "pipeline"

    @property
    def are_iterative(self) -> bool:
        """Whether there is a coarse level at all."""
        return len(self.hierarchy.levels) > 1

    def transfers(self, shape: torch.Size) -> tuple[PixelTransfer | None, ...]:
        """How states (*S) come to the coarse levels, where they have fewer pixels there."""
        return () if self.spatial is None else self.spatial.transfers(shape, len(self.hierarchy.levels))

    def _made(self, options: MGRIT, hierarchy: Hierarchy, level: int) -> Solver:
        tighter = TIGHTER**level
        bounds = {"tol": options.tolerance * tighter, "atol": options.atol * tighter}
        # Below 0 where the noise of minibatches allows for less.
        own = replace(options, max_iter=max(options.iterations + level, min(options.iterations, 1)), **bounds)
        return Solver(own, hierarchy, self.neighbors)


def for_adjoint(adjoint: MGRIT | None, options: MGRIT) -> MGRIT:
    """Options of the adjoints: those given, and where they are left at their default those of the states."""
    if adjoint is None:
        return options.for_adjoint()
    given = {f.name: getattr(adjoint, f.name) for f in fields(MGRIT) if getattr(adjoint, f.name) != f.default}
    own = replace(options, **given)
    return own if "tol" in given else own.for_adjoint()


def check_portions(options: MGRIT, adjoint: MGRIT) -> None:
    """Raise `ValueError` unless both directions have the same portions, and these are those of a pipeline."""
    if (options.cycle == "pipeline") != (adjoint.cycle == "pipeline"):
        raise ValueError(
            f"cycle={adjoint.cycle!r} of adjoint with cycle={options.cycle!r} of mgrit: portions that follow each "
            f"other forwards do so backwards; leave adjoint out"
        )
    if options.portions != adjoint.portions:
        raise ValueError(
            f"portions={adjoint.portions} of adjoint must be those of mgrit, portions={options.portions}; leave it out"
        )
    if options.cycle != "pipeline" and (options.portions or 1) > 1:
        raise ValueError(
            f"portions={options.portions} with cycle={options.cycle!r}: a module solves for all samples at once; leave "
            f"it out, or use cycle='pipeline'"
        )


@dataclass
class States:
    """What a forward solve leaves for the adjoint: its steps with their graphs, the states, the outcome."""

    steps: Steps
    tape: Tape | None
    states: Tensor
    solution: Solution


class Propagation:
    """One forward solve, and the adjoint solve that belongs to it.

    Parameters
    ----------
    solvers : Solvers
    controller : Controller
        Says how exactly to solve.
    make_steps : callable
    num_rows : int
        Layers owned here.
    start : (*S) tensor
        Input of the first layer; read on its owner, elsewhere only the shape counts.
    keep : bool
        Whether there will be an adjoint solve.
    keeper : int, optional
        The rank that keeps the input, and nothing else is kept: the adjoint solve begins by another forward one.
    half : tuple of int, optional
        The axis of the samples in a state, and how much of it the first half of the samples are; the noise of the
        gradient is estimated from them.
    num_weights : int, optional
        How much of a row of the steps are weights, where it has more; a gradient beside theirs is left in `further`.

    Attributes
    ----------
    further : dict of int to (n, q) tensor
        The rest of the rows of the gradient, as of one portion, number 0.
    start : (*S) tensor
        The input, or where it is not kept a tensor without its memory.
    forward : States or None
        The forward solve, if it is kept.
    """

    def __init__(
        self,
        solvers: Solvers,
        controller: Controller,
        make_steps: MakeSteps,
        num_rows: int,
        start: Tensor,
        keep: bool,
        keeper: int | None = None,
        half: tuple[int, int] | None = None,
        num_weights: int | None = None,
    ):
        self.half, self.num_weights = half, num_weights
        self.further: dict[int, Tensor] = {}
        self.solvers, self.controller, self.make_steps = solvers, controller, make_steps
        self.num_rows, self.keeper = num_rows, keeper
        self.exact, self.level = controller.exact, controller.level
        self.checks = keep and controller.checks_now
        forward = self._propagate(self.exact, keep and keeper is None, start)
        self._end = forward.solution.end
        self.forward = forward if keeper is None else None
        is_kept = self.checks if keeper is None else keeper == solvers.comm.rank
        self.start = start if is_kept else hollow(start)

    def take_end(self) -> Tensor | None:
        """Output (*S) of the last layer, on its owner; once, and then it is not held here any more."""
        end, self._end = self._end, None
        return end

    def _propagate(self, exact: bool, keep: bool, start: Tensor) -> States:
        steps, tape = self.make_steps(keep)
        # Kept graphs hold the states; only coarse adjoints read them from elsewhere.
        held = exact and tape is not None
        shape = (self.num_rows, *start.shape)
        states = start.new_empty(()).expand(shape) if held or not keep else start.new_empty(shape)
        recorded = states if keep and not held else None
        propagator = Forward(steps, recorded, start, self.solvers.transfers(start.shape))
        solution = self._solver(exact, "forward").solve(propagator, start)
        return States(steps, tape, states, solution)

    def _solver(self, exact: bool, direction: str) -> Solver:
        if exact:
            return self.solvers.sequential
        which = self.solvers.forward_at if direction == "forward" else self.solvers.adjoint_at
        return which(self.level)

    def _adjoint(self, forward: States, exact: bool, slope: Tensor | None, keep: bool) -> tuple[Tensor, Solution]:
        if forward.tape is not None:
            forward.tape.keep = keep or not exact
        gradient = torch.empty_like(forward.steps.theta)
        transfers = self.solvers.transfers(forward.states.shape[1:])
        transposed = tuple(each and each.transposed() for each in transfers)
        propagator = Adjoint(forward.steps, forward.states, gradient, transposed)
        return gradient, self._solver(exact, "adjoint").solve(propagator, slope)

    def backward(self, slope: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None, SolveRecord]:
        """The gradient of the weights (n, p), of the input (*S) on the owner of the first layer, and what was done.

        Parameters
        ----------
        slope : (*S) tensor
            Gradient of the output, on the owner of the last layer.
        keep : bool
            Whether this may be called again.
        """
        start = kept_start(self.start, self.solvers, self.keeper)
        states = self.forward or self._propagate(self.exact, True, start)
        keep = keep and self.forward is not None
        gradient, solution = self._adjoint(states, self.exact, slope, keep)
        forward = states.solution
        if self.forward is None:
            del states
        measured = noise = None
        if self.checks:
            # The same once more, the other way; the exact gradient is the one that is used.
            other = self._propagate(not self.exact, True, start)
            other_gradient, other_solution = self._adjoint(other, not self.exact, slope, False)
            mgrit, exact = (other_gradient, gradient) if self.exact else (gradient, other_gradient)
            measured = self._distance(mgrit, exact)
            gradient = exact
            noise = self._noise(start, slope, exact)
            if self.exact:
                forward, solution_of_mgrit = other.solution, other_solution
            else:
                solution_of_mgrit, solution = solution, other_solution
        else:
            solution_of_mgrit = solution
        residuals = forward.residual + solution_of_mgrit.residual
        mode = "exact" if self.exact else "mgrit"
        sweeps = (forward.sweeps, solution_of_mgrit.sweeps)
        error, event = self.controller.observe(residuals, measured, sweeps, noise)
        record = SolveRecord(
            self.controller.update,
            mode,
            self.level,
            *sweeps,
            forward.residual,
            solution_of_mgrit.residual,
            error,
            measured is not None,
            event,
            tuple(forward.residuals),
            tuple(solution_of_mgrit.residuals),
            self.controller.noise,
            self.solvers.partition.ranks_in_use,
        )
        self.controller.weigh(record)
        if self.num_weights is not None:
            self.further = {0: gradient[:, self.num_weights :]}
            gradient = gradient[:, : self.num_weights]
        return gradient, solution.end, record

    def _noise(self, start: Tensor, slope: Tensor | None, gradient: Tensor) -> float | None:
        """Relative noise of an exact gradient; None where nobody asks for it, or there is a single sample.

        With a share w of the samples in the first half, and g_1 and g_2 the mean gradients of both, the variance of
        g = w g_1 + (1 - w) g_2 is estimated by w (1 - w) |g_1 - g_2|^2; and w g_1 is the gradient of the first half by
        its part of the slope.
        """
        if self.half is None or not self.controller.accuracy.noise:
            return None
        axis, count = self.half
        share = count / start.shape[axis]
        part = None if slope is None else slope.narrow(axis, 0, count).contiguous()
        states = self._propagate(True, True, start.narrow(axis, 0, count).contiguous())
        half, _ = self._adjoint(states, True, part, False)
        return self._distance(half / share, gradient) * (share / (1.0 - share)) ** 0.5

    def _distance(self, a: Tensor, b: Tensor) -> float:
        """|a - b| / |b| over all ranks."""
        partition = self.solvers.partition
        a, b = a[:, : self.num_weights], b[:, : self.num_weights]
        squares = torch.stack([(a - b).square().sum(1), b.square().sum(1)], 1)
        difference, size = self.solvers.comm.ordered_sum(squares, partition.counts).tolist()
        return (difference / size) ** 0.5 if size != 0.0 else 0.0  # NaN where there is one


def kept_start(start: Tensor, solvers: Solvers, keeper: int | None) -> Tensor:
    """The input of the first layer on its owner, from the rank that has kept it."""
    comm, owner = solvers.comm, solvers.partition.first_owner
    if keeper in (None, owner):
        return start
    if comm.rank == keeper:
        comm.isend(start, owner)()
    return comm.recv(start.new_empty(start.shape), keeper) if comm.rank == owner else start


def hollow(state: Tensor) -> Tensor:
    """A tensor of the shape and type of a state, without its memory."""
    return state.new_empty(()).expand(state.shape)


def graph_is_kept() -> bool:
    """Whether the backward pass under way was asked to keep the graph; if torch does not tell, it may have been."""
    own = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]: not among torch's types
    tell = getattr(own, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()
