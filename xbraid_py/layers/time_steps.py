"""An equation in time that is given by one function step(u, t0, t1): its steps, and their adjoints by autograd.

Shape letters: `n` rows (steps) owned here, `m` intervals of them, `S` shape of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.steps import sums, sweep

Step = Callable[[Any, float, float], Any]


@dataclass(frozen=True)
class TimeStepper:
    """An equation in time, by the function that makes a step of it; `xbraid_py.solve` solves it.

    Parameters
    ----------
    step : callable
        step(u, t0, t1) gives the state at t1 from the state u at t0, a new tensor with the shape and the type of u. It
        must leave u as it is, and give the same for the same arguments. Tensors where the first state is one, arrays
        of numpy where it is none. Coarse levels make their longer steps by the very same function.
    coarse : callable or sequence of callable, optional
        Other functions for coarse levels, the finest of these first; the last one serves all further levels. What they
        give changes how fast a solve converges, and not to what.
    parameters : iterable of Tensor, optional
        What `step` depends on and gradients are wanted of, beside that of the first state; the parameters of a `step`
        that is a torch module if not given.

    Raises
    ------
    TypeError
        If something is no function, or no tensor.

    Examples
    --------
    >>> decay = TimeStepper(lambda u, t0, t1: u / (1 + t1 - t0))  # u' = -u by implicit Euler
    """

    step: Step
    coarse: Step | Sequence[Step] = ()
    parameters: Iterable[Tensor] | None = None
    _tried: set = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self):
        coarse = (self.coarse,) if callable(self.coarse) else tuple(self.coarse)
        for name, each in (("step", self.step), *(("coarse", each) for each in coarse)):
            if not callable(each):
                raise TypeError(f"{name}={each!r} is no function; use lambda u, t0, t1: ...")
        parameters = self.parameters
        if parameters is None and isinstance(self.step, torch.nn.Module):
            parameters = self.step.parameters()
        parameters = tuple(parameters or ())
        for each in parameters:
            if not isinstance(each, Tensor):
                raise TypeError(f"parameters has {type(each).__name__}; use tensors, as of module.parameters()")
        object.__setattr__(self, "coarse", coarse)
        object.__setattr__(self, "parameters", parameters)

    def functions(self, like: Tensor, is_numpy: bool) -> tuple[_Function, ...]:
        """The functions of all levels, the finest first, of tensors (*S) like the first state, or one number (1,)."""
        return tuple(
            _Function(function, "step" if number == 0 else f"coarse[{number - 1}]", like.shape, like, is_numpy)
            for number, function in enumerate((self.step, *cast(Sequence[Step], self.coarse)))
        )

    def try_first(self, u0: Tensor, t0: float, t1: float, is_numpy: bool, differentiate: bool) -> None:
        """Make a first step by each function: what they give must be a state like u0 (*S), and u0 left as it is.

        Once for each kind of state. With `differentiate` gradients must come through the step, and all tensors that it
        takes them to be among the parameters.

        Raises
        ------
        ValueError, TypeError
            With what is wrong.
        """
        kind = (u0.shape, u0.dtype, u0.device, is_numpy, differentiate)
        if kind in self._tried:
            return
        for number, function in enumerate(self.functions(u0, is_numpy)):
            given = u0.detach().clone()
            with torch.no_grad():
                function(given.view(inner(u0.shape)), t0, t1)
            if not torch.equal(torch.nan_to_num(given), torch.nan_to_num(u0.detach())):
                raise ValueError(f"{function.name}(u, {t0:g}, {t1:g}) writes into u; use u.clone() there")
            if number == 0 and differentiate:
                with torch.enable_grad():
                    start = given.view(inner(u0.shape)).requires_grad_()
                    self._check_graph(function(start, t0, t1), start)
        self._tried.add(kind)

    def _check_graph(self, end: Tensor, start: Tensor) -> None:
        if end.grad_fn is None:
            raise ValueError(
                "step gives a state without a gradient: something in it is computed outside of torch, or detached; use "
                "torch operations alone, or solve under torch.no_grad()"
            )
        edge: Any = torch.autograd.graph.get_gradient_edge
        known = {edge(each).node for each in (start, *(self.parameters or ())) if each.requires_grad}
        waiting: list[Any] = [end.grad_fn]
        seen = set(known)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                raise ValueError(
                    f"step uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is not among the "
                    f"parameters: its gradient would be lost; use TimeStepper(step, parameters=[...]), or detach it"
                )
            waiting += [after for after, _ in node.next_functions if after is not None]


def inner(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that solvers are given for states of that shape: a single number is one number of a vector."""
    return tuple(shape) or (1,)


@dataclass(frozen=True)
class _Function:
    """A function of the user's as one of tensors, whose results are looked at."""

    function: Step
    name: str
    shape: torch.Size
    like: Tensor
    is_numpy: bool

    def __call__(self, u: Tensor, t0: float, t1: float) -> Tensor:
        u = u.view(self.shape)
        found = self.function(u.numpy() if self.is_numpy else u, t0, t1)
        if self.is_numpy and isinstance(found, np.ndarray | np.generic | float):
            found = torch.from_numpy(np.ascontiguousarray(found).reshape(np.shape(found)))
        if not isinstance(found, Tensor):
            wanted = "an array of numpy" if self.is_numpy else "a tensor"
            raise TypeError(f"{self.name}(u, {t0:g}, {t1:g}) gives {type(found).__name__}; use {wanted} like u")
        if found.shape != self.shape or found.dtype != self.like.dtype or found.device != self.like.device:
            raise ValueError(
                f"{self.name}(u, {t0:g}, {t1:g}) gives {_words(found)}; use a state like u, {_words(self.like)}"
            )
        return found.reshape(inner(self.shape))


def _words(u: Tensor) -> str:
    return f"{tuple(u.shape)} {str(u.dtype).split('.')[-1]} on {u.device}"


@dataclass
class _Memory:
    """Graphs of rows at some states, each from its input to its output; None where the two are the same."""

    states: Tensor | None = None
    version: int = 0
    graphs: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeSteps:
    """The steps of a `TimeStepper`, as the solver takes them.

    Parameters
    ----------
    functions : tuple of callable
        `TimeStepper.functions` of this level and all further ones.
    theta : (n parts, 2) tensor
        Times before and behind each part. Where they are the same, as in rows that pad, a part does nothing.
    sources : (n parts, *S) tensor or None
        What the adjoints get beside what comes from behind: slopes of the states before the parts.
    parts : int
        A step is that many smaller ones.
    """

    functions: tuple[Step, ...]
    theta: Tensor
    sources: Tensor | None = None
    parts: int = 1
    _memory: _Memory = field(default_factory=_Memory, repr=False, compare=False)

    @property
    def h(self) -> Tensor:
        """Sizes of the parts."""
        return self.theta[:, 1] - self.theta[:, 0]

    @property
    def cost(self) -> float:
        """Calls of the function in one step."""
        return float(self.parts)

    def relax(
        self,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        inputs: Tensor | None = None,
        record: bool = False,
    ) -> Tensor:
        """`cfactor` steps from the beginning of each interval (m, *S) to its end, tau (m c, *S) added to each.

        The input of each step is written to `inputs` (m c, *S). `record` needs nothing done.
        """
        ends, times, length = torch.empty_like(points), self.theta.tolist(), cfactor * self.parts
        with torch.no_grad():
            for k in range(len(points)):

                def advance(u: Tensor, part: int, first: int = k * length) -> Tensor:
                    t0, t1 = times[first + part]
                    return u if t0 == t1 else self.functions[0](u, t0, t1)

                def place(step: int, first: int = k * cfactor) -> int:
                    return first + step

                ends[k] = sweep(points[k], range(cfactor), self.parts, advance, place, tau, inputs)
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
        """The same backwards, at the given states (m c parts, *S); the sources are added behind each part.

        Times have no gradient: `gradient` is set to 0.
        """
        ends, length = torch.empty_like(points), cfactor * self.parts
        if gradient is not None:
            gradient.zero_()
        for k in range(len(points)):

            def advance(v: Tensor, part: int, first: int = k * length) -> Tensor:
                row, graph = first + part, self._graph(states, first + part)
                if graph is not None:
                    v = _through(graph[1], (graph[0],), v)[0]
                return v if self.sources is None else v + self.sources[row]

            def place(step: int, first: int = k * cfactor) -> int:
                return first + step

            ends[k] = sweep(points[k], range(cfactor)[::-1], self.parts, advance, place, tau, inputs)
        return ends

    def slopes(self, states: Tensor, adjoints: Tensor, parameters: Sequence[Tensor], block: int) -> Tensor:
        """Gradients (n / block, p) of all parameters together, summed over blocks of steps one row after the other.

        At the states before the steps and with the adjoints behind them, both (n, *S); of steps of one part.
        """
        size = sum(each.numel() for each in parameters)
        found = states.new_zeros((len(states) // block, size))
        for row in range(len(states)):
            if (graph := self._graph(states, row)) is not None:
                parts = _through(graph[1], parameters, adjoints[row])
                found[row // block] += torch.cat([part.reshape(-1) for part in parts])
        return found

    def _graph(self, states: Tensor, row: int) -> tuple[Tensor, Tensor] | None:
        """The input and the output of a part at its state, evaluated once for the same states."""
        memory = self._memory
        if memory.states is not states or memory.version != states._version:
            memory.states, memory.version = states, states._version
            memory.graphs.clear()
        if row not in memory.graphs:
            t0, t1 = self.theta[row].tolist()
            memory.graphs[row] = None
            if t0 != t1:
                with torch.enable_grad():
                    start = states[row].detach().requires_grad_()
                    memory.graphs[row] = start, self.functions[0](start, t0, t1)
        return memory.graphs[row]

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> TimeSteps:
        """One step for every `cfactor` steps, from where the first begins to where the last ends, in `parts` parts.

        `weights` and `scheme` say nothing: a coarse step is made by the function of its level.
        """
        length = cfactor * self.parts // parts
        return TimeSteps(
            self.functions[1:] or self.functions,
            torch.stack([self.theta[::length, 0], self.theta[length - 1 :: length, 1]], 1),
            None if self.sources is None else sums(self.sources, length),
            parts,
        )

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        source, target = source.refine(self.parts), target.refine(self.parts)
        theta = comm.redistribute(self.theta.contiguous(), source, target)
        sources = None if self.sources is None else comm.redistribute(self.sources.contiguous(), source, target)
        return replace(self, theta=theta, sources=sources, _memory=_Memory())


def _through(end: Tensor, starts: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
    """v (*S) through the transposed Jacobians of a graph that is kept."""
    if not end.requires_grad:
        return tuple(torch.zeros_like(start) for start in starts)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(end, starts, v, **options)
