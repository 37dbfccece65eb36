"""A network on one rank and the calls on it that the planner times.

Shape letters: `n` steps timed at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.problem.network import InitialScales
from xbraid_py.problem.problem import DenseResNetOptions, Problem
from xbraid_py.problem.regularization import Regularization

_INTERVAL, _COARSENING, _COARSE_LAYERS = 8, 4, 16
# The calls of `SolveCosts`.
COARSE = ("coarse_sweep", "coarse", "correct")
PARTS = ("sweep", "record", "relax", *COARSE)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained, but for the ranks.

    Parameters
    ----------
    num_layers
        Residual layers.
    batch
        Training samples.
    architecture
        Width, activation and bias of the layers.
    dtype
        Of weights and states.
    num_features, num_classes
        Of a sample.
    optim
        The optimizer.
    """

    num_layers: int
    batch: int
    architecture: DenseResNetOptions = DenseResNetOptions()
    dtype: torch.dtype = torch.float64
    num_features: int = 2
    num_classes: int = 5
    optim: OneShotOptions = OneShotOptions()

    def __post_init__(self):
        for name in ("num_layers", "batch", "num_features", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 64")

    @property
    def state_bytes(self) -> int:
        """Of the state of one layer."""
        return self.architecture.width * self.batch * self.dtype.itemsize

    def problem(self, comm: Communicator, options: MGRIT) -> Problem:
        """Random points with random labels, to be solved with these options."""
        generator = torch.Generator().manual_seed(0)
        return Problem(
            features=torch.randn(self.num_features, self.batch, generator=generator, dtype=torch.float64),
            labels=torch.randint(self.num_classes, (self.batch,), generator=generator),
            num_classes=self.num_classes,
            architecture=self.architecture,
            regularization=Regularization(),
            forward=options,
            adjoint=options,
            comm=comm,
            dtype=self.dtype,
        )


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Probe:
    """A network on one rank, and the calls that are timed on it."""

    def __init__(self, workload: Workload, num_layers: int):
        self.num_layers = num_layers
        problem = workload.problem(SerialCommunicator(), MGRIT(max_levels=1))
        # One layer, for what does not grow with the depth; and many.
        self.runs = {n: _run(problem, n, workload.optim) for n in (1, num_layers)}
        objective, x = self.runs[num_layers].objective, self.runs[num_layers].x
        self.network, self.x = objective.network, x
        shape = (workload.architecture.width, workload.batch)
        self.states = torch.randn(num_layers, *shape, dtype=workload.dtype)
        self.tau = torch.zeros(_COARSE_LAYERS, *shape, dtype=workload.dtype)

    def layer(self) -> float:
        """Seconds of state and adjoint step of a layer."""
        run = self.runs[self.num_layers]
        seconds = timed(lambda: run.objective.evaluate(run.x)) + timed(lambda: run.objective.gradient(run.x))
        return seconds / self.num_layers

    def round(self) -> dict[str, float]:
        """Every call once; the seconds of each."""
        found = {}
        for key, n in (("one", 1), ("many", self.num_layers)):
            run = self.runs[n]
            found[f"evaluate_{key}"] = timed(lambda run=run: run.objective.evaluate(run.x))
            found[f"gradient_{key}"] = timed(lambda run=run: run.objective.gradient(run.x))
            found[f"optimize_{key}"] = timed(lambda run=run: _optimize(run))
        for kind in ("state", "adjoint"):
            for part in PARTS:
                many = coarse_layers(self.num_layers) if part in COARSE else self.num_layers
                for key, n in (("one", 1), ("many", many)):
                    found[f"{kind}_{part}_{key}"] = self._call(kind, part, n)
        found["vector"] = timed(self._vectors) / (2 * coarse_layers(self.num_layers))
        found["check"] = timed(self._loss)
        steps, how = self.network.steps(self.x), _how(self.num_layers)
        found["coarsen"] = timed(lambda: steps.coarsen(self.num_layers, *how)) / self.num_layers
        return found

    def _vectors(self) -> None:
        """Two passes over each tau, which leave it as it was."""
        for sign in (1, -1):
            for tau, state in zip(self.tau, self.states[-coarse_layers(self.num_layers) :], strict=False):
                tau.add_(state, alpha=sign)

    def _loss(self) -> None:
        self.runs[self.num_layers].objective.loss(self.network.classify(self.x, self.states[0]))

    def _call(self, kind: str, part: str, n: int) -> float:
        """Seconds of one call of the solver: n steps, in intervals of `_INTERVAL`, or in one interval for a sweep."""
        fine = min(self.num_layers, n * _COARSENING) if part in COARSE else n
        steps = self.network.steps(self.x)
        steps = replace(steps, theta=steps.theta[:fine])
        states = self.states[:fine]
        if kind == "state":
            propagator = Forward(steps, states, states[0])
        else:
            propagator = Adjoint(steps, states, torch.empty_like(steps.theta))
        c = _INTERVAL if n % _INTERVAL == 0 and not part.endswith("sweep") else n
        if part not in COARSE:
            return timed(lambda: propagator.relax(states[: n // c], c, None, part != "relax"))
        coarse = propagator.coarsen(fine // n, *_how(fine // n))
        if part == "correct":
            return timed(lambda: propagator.correct(states[:n], states[-n:], coarse))
        return timed(lambda: coarse.relax(states[: n // c], c, self.tau[:n], False, torch.empty_like(states[:n])))


def coarse_layers(num_layers: int) -> int:
    """Steps of the coarser level that is timed for a network."""
    return max(1, min(_COARSE_LAYERS, num_layers // _COARSENING))


def _how(cfactor: int) -> tuple[str, str, int]:
    """How the lagged cycle makes a coarse step for so many steps."""
    options = MGRIT(cycle="lagged")
    return options.coarse_weights, options.scheme, options.parts(cfactor)


def _run(problem: Problem, num_layers: int, options: OneShotOptions) -> OneShot:
    """A run whose optimizer has all its pairs, and that has been evaluated once."""
    objective = problem.objective(num_layers)
    run = OneShot(objective, options, objective.network.initial(InitialScales(), 0))
    objective.evaluate(run.x)
    run.gradient = objective.gradient(run.x)
    pairs = [torch.ones_like(run.x) for _ in range(options.memory)]
    run.quasi_newton.restore(pairs, pairs)
    return run


def _optimize(run: OneShot) -> None:
    """A new pair, a direction from a new gradient, and a trial along it."""
    pairs, gradient = run.quasi_newton, run.gradient.clone()
    run.objective.dots([gradient, run.gradient], [*pairs.s, *pairs.y, gradient, run.gradient])
    direction, _ = pairs.direction(gradient)
    run.x.sub(direction)
