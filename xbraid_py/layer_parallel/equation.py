"""`solve`: an equation in time by MGRIT, all its steps at once, and the gradient of what comes out.

Shape letters: `N` steps, `n` of them owned here, `S` shape of a state, `p` numbers of all parameters.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import Any, Generic, Literal, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree_on_all, together
from xbraid_py.comm.base import present
from xbraid_py.layers.time_steps import TimeStepper, TimeSteps, inner
from xbraid_py.mgrit import MGRIT, Hierarchy, Solution, Solver
from xbraid_py.mgrit.equations import AdjointTrajectory, Forward
from xbraid_py.mgrit.grid import MOST_LAYERS, LayerGrid
from xbraid_py.mgrit.norms import Size, Stop

States = TypeVar("States", bound=Tensor | np.ndarray)
_MOST_ITERATIONS = 100
_OUTPUTS = ("all", "end", "own")


@dataclass(frozen=True)
class Trajectory(Generic[States]):
    """What `solve` gives.

    Attributes
    ----------
    t : (M,) tensor or array
        Times of the states.
    states : (M, *S) tensor or array
        The state at each of them.
    residuals, norms : list of float
        Residual at the C-points before the first and after each iteration, relative to the states there, and its norm;
        of the lagged cycle, how much each iteration has changed. Empty where there was no coarse level to use.
    iterations : int
        Cycles that were made.
    converged : bool or None
        Whether the residual met the tolerance; None where none was asked for.
    work : float
        Calls of the step on all ranks together, coarse ones included.
    adjoint_residuals : list of float
        The same as `residuals` for the adjoints, from the last backward pass.
    """

    t: Any
    states: States
    residuals: list[float]
    norms: list[float]
    iterations: int
    converged: bool | None
    work: float
    adjoint_residuals: list[float] = field(default_factory=list)

    @property
    def end(self) -> States:
        """The state at the last of the times."""
        return cast(States, self.states[-1])

    @property
    def factors(self) -> list[float]:
        """What each iteration has made of the norm of the residual before it."""
        return [after / before for before, after in zip(self.norms, self.norms[1:], strict=False) if before > 0.0]


@overload
def solve(
    stepper: TimeStepper,
    u0: Tensor,
    t: Tensor | np.ndarray | Sequence[float],
    comm: Any = None,
    *,
    mgrit: MGRIT | None = None,
    output: Literal["all", "end", "own"] = "all",
) -> Trajectory[Tensor]: ...
@overload
def solve(
    stepper: TimeStepper,
    u0: np.ndarray | Sequence[float] | float,
    t: Tensor | np.ndarray | Sequence[float],
    comm: Any = None,
    *,
    mgrit: MGRIT | None = None,
    output: Literal["all", "end", "own"] = "all",
) -> Trajectory[np.ndarray]: ...
def solve(
    stepper: TimeStepper,
    u0: Any,
    t: Any,
    comm: Any = None,
    *,
    mgrit: MGRIT | None = None,
    output: Literal["all", "end", "own"] = "all",
) -> Trajectory[Any]:
    """Solve u_{i+1} = step(u_i, t_i, t_{i+1}) for all i at once, by MGRIT with FAS over the ranks.

    All ranks call it, and the backward pass, with the same arguments; results are the same on any number of them.

    Parameters
    ----------
    stepper : TimeStepper
    u0 : (*S) tensor, or array or number
        State at t[0]. Of a tensor results are tensors, which have gradients by `u0` and `stepper.parameters`; of an
        array they are arrays.
    t : (N + 1,) tensor, array or sequence of float
        Times of the states: rising or falling, at whatever distances.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        None for a serial run.
    mgrit : MGRIT, optional
        V-cycles with FCF-relaxation on 3 levels, a coarsening factor of 4, if not given. Where it leaves them open, the
        tolerance is 1e-9 (1e-5 in single precision) and there are at most 100 iterations. Backwards the same.
    output : {"all", "end", "own"}
        Which states every rank gets: all N + 1, the last one, or those of the steps it owns (the first rank u0 too,
        and the last one the last), which need no message and no more memory. Gradients are those of one loss that all
        ranks compute alike, or with "own" of the sum of what each rank makes of its states.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError, TypeError
        On all ranks, if something does not fit, the step does not give a state or ranks pass different arguments.

    Notes
    -----
    Coarsening factors need not divide N: missing steps are made up by ones that do nothing, on the last ranks. A
    backward pass keeps the graphs of the steps owned here, the P-th part of what autograd keeps of a loop.

    Examples
    --------
    >>> import torch, xbraid_py
    >>> decay = xbraid_py.TimeStepper(lambda u, t0, t1: u / (1 + t1 - t0))
    >>> found = xbraid_py.solve(decay, torch.ones(1, dtype=torch.float64), torch.linspace(0, 5, 101))
    >>> found.converged, f"{found.end.item():.4f}"
    (True, '0.0076')
    """
    comm = as_communicator(comm)
    with together(comm):
        equation = _Equation(stepper, u0, t, comm, mgrit, output)
    equation.check_alike()
    return equation.solve()


class _Equation:
    """A call of `solve`: its arguments, the levels, and the rows owned here."""

    def __init__(self, stepper: TimeStepper, u0: Any, t: Any, comm: Communicator, mgrit: MGRIT | None, output: str):
        if not isinstance(stepper, TimeStepper):
            raise TypeError(f"stepper={type(stepper).__name__} must be a TimeStepper; use TimeStepper(step)")
        if output not in _OUTPUTS:
            raise ValueError(f"output={output!r} must be {' or '.join(map(repr, _OUTPUTS))}; use 'all'")
        self.is_numpy = not isinstance(u0, Tensor)
        self.u0 = torch.tensor(np.asarray(u0)) if self.is_numpy else u0
        if not self.u0.is_floating_point():
            raise TypeError(f"u0 has the type {self.u0.dtype} and must have float64 or float32; use u0 * 1.0")
        self.t, self.times = t, _times(t)
        self.stepper, self.comm, self.output = stepper, comm, output
        self.options = _options(mgrit, self.u0.dtype)
        self.number = len(self.times) - 1
        padded, levels = _padded(self.options, self.number)
        self.takes_turns = levels == 1 < comm.size and self.options.max_levels != 1
        self.options = replace(self.options, max_levels=levels)
        grid = LayerGrid(padded, abs(self.times[-1] - self.times[0]))
        self.hierarchy = Hierarchy.plan(self.options, grid, comm.size)
        rows = self.hierarchy.partition
        first, self.count, self.last_rank = rows.first(comm.rank), rows.count(comm.rank), rows.last_owner
        # Rows that pad come behind all others.
        self.first, stop = (min(row, self.number) for row in (first, first + self.count))
        self.valid = stop - self.first
        parameters = () if self.is_numpy else stepper.parameters or ()
        self.wanted = tuple(each for each in parameters if each.requires_grad)
        self.differentiate = torch.is_grad_enabled() and any(each.requires_grad for each in (*self.wanted, self.u0))
        if self.is_numpy:
            self.differentiate = False
        stepper.try_first(self.u0, self.times[0], self.times[1], self.is_numpy, self.differentiate)
        times = torch.tensor(self.times + self.times[-1:] * (padded - self.number), dtype=torch.float64)
        theta = torch.stack([times[:-1], times[1:]], 1)[first : first + self.count]
        self.steps = TimeSteps(stepper.functions(self.u0, self.is_numpy), theta)
        self.solver = Solver(self.options, self.hierarchy, comm)

    def check_alike(self) -> None:
        """Raise `ValueError` on all ranks unless they have the same arguments. Collective."""
        named = {"u0": _digest(self.u0), "t": _digest(torch.tensor(self.times)), "output": self.output}
        named |= {"mgrit": self.options, "differentiate": self.differentiate, "arrays of numpy": self.is_numpy}
        named |= {f"parameters[{i}]": _digest(each) for i, each in enumerate(self.stepper.parameters or ())}
        agree_on_all(self.comm, named, "arguments of solve")
        if self.takes_turns:
            self._warn(f"t has {self.number + 1} points, too few for a coarse level: the ranks take turns; use more", 4)

    def solve(self) -> Trajectory[Any]:
        """The states, with what is to be known of how they were found."""
        self.adjoint_residuals: list[float] = []
        if self.differentiate:
            states = _Solve.apply(self, self.u0, *self.wanted)
        else:
            states = self.forward()
        solution, chosen = self.solution, self._chosen()
        times = torch.tensor(self.times, dtype=torch.float64)[chosen]
        if isinstance(self.t, Tensor):
            times = times.to(self.t.device, self.t.dtype if self.t.is_floating_point() else None)
        elif self.is_numpy:
            times = times.numpy()
        if self.is_numpy:
            states = states.numpy()
        made = len(solution.residuals) - (self.options.cycle != "lagged")
        return Trajectory(
            times,
            states,
            solution.residuals,
            solution.norms,
            max(0, made),
            self._converged(solution, "the states"),
            solution.work,
            self.adjoint_residuals,
        )

    def _chosen(self) -> slice:
        """The points whose states this rank gives."""
        if self.output == "own":
            return slice(self.first, self.first + self.valid + self._has_end) if self.count else slice(0, 0)
        return slice(self.number if self.output == "end" else 0, None)

    @property
    def _has_end(self) -> bool:
        return self.comm.rank == self.last_rank

    def _converged(self, solution: Solution, what: str) -> bool | None:
        if len(self.hierarchy.levels) == 1:
            return True
        stop = Stop(self.options.tolerance, self.options.atol)
        if not stop.watches:
            return None
        last = Size(solution.norms[-1], solution.residuals[-1])
        if not stop.met(last):
            way = "a greater max_iter, a smaller cfactor or a greater nrelax"
            if not isfinite(last.relative):
                way = "fewer levels, a smaller cfactor or TimeStepper(step, coarse=...), since coarse steps blow up"
            self._warn(
                f"solve has stopped at max_iter={self.options.iterations} with a relative residual of "
                f"{last.relative:.1e} of {what}, above tol={self.options.tolerance:g}; use {way}",
                5,
            )
        return stop.met(last)

    def _warn(self, text: str, stacklevel: int) -> None:
        if self.comm.rank == 0:
            warnings.warn(text, stacklevel=stacklevel)

    def forward(self) -> Tensor:
        """The states that are asked for, and those before all steps owned here for the adjoints."""
        start = self.u0.detach().reshape(inner(self.u0.shape))
        keep = self.differentiate or self.output != "end"
        self.states = states = start.new_empty((self.count, *start.shape)) if keep else None
        self.solution = self.solver.solve(Forward(self.steps, states, start), start)
        own = [present(self.solution.end)] if self._has_end else []
        if self.output == "end" or states is None:
            end = own[0] if own else torch.empty_like(start)
            found = self.comm.broadcast(end.contiguous(), self.last_rank)[None].clone()
        else:
            found = torch.cat([states[: self.valid], *(end[None] for end in own)])
            if self.output == "all":
                found = self.comm.allgather(found, self._points_of_ranks())
        return found.view(-1, *self.u0.shape)

    def _points_of_ranks(self) -> list[int]:
        bounds = [min(each, self.number) for each in self.hierarchy.partition.bounds]
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        counts[self.last_rank] += 1
        return counts

    def backward(self, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients by u0 (*S) and by each wanted parameter, on every rank, from that by the states given."""
        states = self.states
        assert states is not None  # kept, since there are gradients
        slope = slope.reshape(len(slope), *inner(self.u0.shape))
        if self.output == "all":
            slope = slope[self.first : self.first + self.valid + self._has_end]
        start, sources = slope[-1].contiguous() if self._has_end else None, None
        if self.output != "end":
            sources = torch.zeros_like(states)
            sources[: self.valid] = slope[: self.valid]
        steps = TimeSteps(self.steps.functions, self.steps.theta, sources)
        kept = torch.empty_like(states) if self.wanted else None
        found = self.solver.solve(AdjointTrajectory(steps, states, None, kept=kept), start)
        self.adjoint_residuals[:] = found.residuals
        self._converged(found, "the adjoints")
        owner = self.hierarchy.partition.first_owner
        of_start = present(found.end) if self.comm.rank == owner else slope.new_empty(inner(self.u0.shape))
        of_start = self.comm.broadcast(of_start.contiguous(), owner).view(self.u0.shape)
        if kept is None:
            return of_start, []
        blocks = self.hierarchy.blocks.counts
        flat = self.comm.ordered_sum(steps.slopes(states, kept, self.wanted, self.hierarchy.block), blocks)
        parts = flat.split([each.numel() for each in self.wanted])
        return of_start, [part.view(each.shape).to(each) for part, each in zip(parts, self.wanted, strict=True)]


class _Solve(torch.autograd.Function):
    """`apply(equation, u0, *parameters)` gives the states."""

    @staticmethod
    def forward(ctx, equation: _Equation, u0: Tensor, *parameters: Tensor) -> Tensor:
        """The states that are asked for."""
        # For torch to notice if they are overwritten before the backward pass.
        ctx.save_for_backward(u0, *parameters)
        ctx.equation = equation
        return equation.forward()

    @staticmethod
    def backward(ctx, *slopes: Tensor):
        """Gradients of the first state and of the parameters."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: solve has no second derivatives; use a loop over the steps")
        _ = ctx.saved_tensors
        of_start, of_parameters = ctx.equation.backward(*slopes)
        return None, of_start if ctx.needs_input_grad[1] else None, *of_parameters


def _times(t: Any) -> list[float]:
    """The times as numbers that rise or fall."""
    if isinstance(t, Tensor) and t.requires_grad:
        raise ValueError("t requires a gradient, and times have none; use t.detach()")
    times = np.asarray(t.tolist() if isinstance(t, Tensor) else t, dtype=np.float64)
    if times.ndim != 1 or not 2 <= len(times) <= MOST_LAYERS + 1:
        raise ValueError(
            f"t has the shape {times.shape} and must be 2 to {MOST_LAYERS + 1} times; use torch.linspace(0, 1, 65)"
        )
    lengths = np.diff(times)
    wrong = ~np.isfinite(lengths) | (lengths * np.sign(lengths[0]) <= 0)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"t[{i}]={times[i]:g} and t[{i + 1}]={times[i + 1]:g}: times must be finite and rise, or fall, from each "
            f"to the next; use torch.linspace(0, 1, 65)"
        )
    return times.tolist()


def _options(mgrit: MGRIT | None, dtype: torch.dtype) -> MGRIT:
    """The options with what they leave open for an equation."""
    options = MGRIT(cycle="V") if mgrit is None else mgrit
    if not isinstance(options, MGRIT):
        raise TypeError(f"mgrit={options!r} must be of MGRIT; use MGRIT(cycle='V', cfactor=4, tol=1e-9)")
    if options.cycle == "pipeline" or (options.portions or 1) > 1:
        raise ValueError(
            f"cycle={options.cycle!r} with portions={options.portions}: an equation has no samples to hand on from "
            f"rank to rank; use cycle='V', or max_levels=1 for one step after the other"
        )
    if options.coarse_step is not None or options.coarse_weights != "average":
        raise ValueError(
            f"coarse_step={options.coarse_step!r}, coarse_weights={options.coarse_weights!r} are for layers; leave "
            f"them out, and use TimeStepper(step, coarse=...) for other coarse steps"
        )
    if options.tol is None:
        options = replace(options, tol=1e-9 if dtype == torch.float64 else 1e-5)
    if options.max_iter is None and Stop(options.tolerance, options.atol).watches:
        options = replace(options, max_iter=_MOST_ITERATIONS)
    return options


def _padded(options: MGRIT, number: int) -> tuple[int, int]:
    """The least number of steps, from that one on, that all coarsening factors divide; how many levels they make."""
    steps, factors = number, []
    while (factor := options.cfactor_of(len(factors), steps)) is not None:
        if -(-steps // factor) < options.min_coarse:
            break
        steps = -(-steps // factor)
        factors.append(factor)
    return steps * prod(factors), len(factors) + 1


def _digest(tensor: Tensor) -> str:
    """What a tensor is, in some letters."""
    held = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} by digest {hashlib.blake2b(held.data, digest_size=6).hexdigest()}"
