"""Measures what layers of a given width, batch and type cost here: medians of interleaved rounds, in seconds.

All ranks of a job take part: the first alone for the costs, all cores at once for how much they slow each other down.

Shape letters: `n` steps timed at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from xbraid_py import kernels
from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.planner.machine import Costs, SolveCosts, StepCost
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization

# Depth of the largest network that is timed: states beyond the caches, but seconds in all; in whole intervals.
_PROBE_BYTES, _PROBE_SECONDS, _WHOLE = 96 << 20, 0.06, 8
_LEAST_ROUNDS, _MOST_ROUNDS, _CROWD_ROUNDS = 5, 25, 9
_INTERVAL, _COARSENING, _COARSE_LAYERS = 8, 4, 16
_CACHE = 64 << 20  # bytes: less than this may stay in the caches from one use to the next
# Samples of a portion that are timed besides all of them: by the rule of `MGRIT.portions`, and by far fewer.
_SHARES, _AT_ONCE = (8, 64), 8
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
    is_module = False

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

    def __init__(self, workload: Workload, num_layers: int, is_cold: bool = False):
        self.num_layers = num_layers
        # What is written to before states that do not fit into the caches are gone through.
        self.rubbish = torch.empty(_CACHE if is_cold else 0, dtype=torch.uint8)
        problem = workload.problem(SerialCommunicator(), MGRIT(max_levels=1))
        # One layer, for what does not grow with the depth; and many.
        self.runs = {n: _run(problem, n, workload.optim) for n in (1, num_layers)}
        self.objective: Any = self.runs[num_layers].objective  # more than an Objective
        self.network, self.x = self.objective.network, self.runs[num_layers].x
        # A portion of a pipeline, and two of them: what a portion costs, and what is done once for all.
        self.portions = {}
        for number, key in ((1, "portion"), (2, "portions")):
            pipeline = MGRIT(cycle="pipeline", portions=number)
            own = replace(workload, batch=number * workload.batch).problem(SerialCommunicator(), pipeline)
            self.portions[key] = _run(own, 1, workload.optim)
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
        for key, run in self.portions.items():
            found[f"evaluate_{key}"] = timed(lambda run=run: run.objective.evaluate(run.x))
            found[f"gradient_{key}"] = timed(lambda run=run: run.objective.gradient(run.x))
        features = self.objective.features
        found["open"] = timed(lambda: self.network.open(self.x, features))
        found["add"] = timed(lambda: self.x.add_(self.x, alpha=0.0)) / self.num_layers
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
        objective = self.objective
        row = self.network.layout.rows(self.x)["classification"]
        slope = self.states.new_empty((self.network.classification.outputs, len(objective.labels)))
        kernels.cross_entropy(self.network.classification, row, self.states[:1], objective.labels, slope=slope)

    def _call(self, kind: str, part: str, n: int) -> float:
        """Seconds of one call of the solver: n steps, in intervals of `_INTERVAL`, or in one interval for a sweep."""
        fine = min(self.num_layers, n * _COARSENING) if part in COARSE else n
        steps = self.network.steps(self.x)
        steps = replace(steps, theta=steps.theta[:fine])
        states = self.states[:fine]
        propagator: Any
        if kind == "state":
            propagator = Forward(steps, states, states[0])
        else:
            propagator = Adjoint(steps, states, torch.empty_like(steps.theta))
        c = _INTERVAL if n % _INTERVAL == 0 and not part.endswith("sweep") else n
        if part not in COARSE:
            self.rubbish.zero_()
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
    assert run.gradient is not None
    pairs, gradient = run.quasi_newton, run.gradient.clone()
    run.objective.dots([gradient, run.gradient], [*pairs.s, *pairs.y, gradient, run.gradient])
    direction, _ = pairs.direction(gradient)
    run.x.sub(direction)


@dataclass(frozen=True)
class Slowdowns:
    """How ranks of a node slow each other down, see `Machine`; as here where a job cannot show it."""

    contention: float = 1.0
    waiting: float = 0.0


def measure_costs(workload: Workload, comm: Communicator, seconds: float = 1.5) -> tuple[Costs, Slowdowns]:
    """What layers cost on one rank alone, and how ranks slow each other down.

    Every rank of the job must call it; the numbers are those of rank 0, on every rank.

    Parameters
    ----------
    workload : Workload
        The network that is timed has its layers, or fewer where that takes too long or too much memory.
    comm : Communicator
    seconds : float
        About how long to measure the costs; five rounds at least are made, for up to three numbers of samples.

    Returns
    -------
    costs : Costs
        For all samples, and for portions of them.
    slowdowns : Slowdowns
    """
    cores, on_node = cores_and_ranks(comm)
    sizes = portion_sizes(workload.batch)
    found, layers = None, 0
    if comm.rank == 0:
        depths = [_affordable(replace(workload, batch=size)) for size in sizes]
        is_cold = workload.num_layers * workload.state_bytes > _CACHE
        probes = [
            Probe(replace(workload, batch=size), depth, is_cold) for size, depth in zip(sizes, depths, strict=True)
        ]
        first = timed(lambda: [probe.round() for probe in probes])
        number = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / first)))
        comm.bcast((depths[0], number * first))
        rounds = [[probe.round() for probe in probes] for _ in range(number)]
        medians = [{name: median(each[i][name] for each in rounds) for name in rounds[0][i]} for i in range(len(sizes))]
        found = [
            _costs(replace(workload, batch=size), depth, own)
            for size, depth, own in zip(sizes, depths, medians, strict=True)
        ]
        found = replace(found[0], others=tuple(found[1:]))
        layers = depths[0]
        del probes
    else:
        layers, wait = comm.bcast(None)
        time.sleep(wait)  # a rank that waits in MPI may burn a core that the first one needs
    # Together the ranks hold as much as one alone, as in a run.
    slowdowns = measure_slowdowns(lambda busy: Probe(workload, -(-layers // busy)), comm, cores, on_node)
    return comm.bcast((found, slowdowns) if comm.rank == 0 else None)


def portion_sizes(batch: int, at_once: int = _AT_ONCE) -> list[int]:
    """Numbers of samples that are timed: all of them first, and one or two portions, where these are smaller."""
    sizes = {batch, *(min(batch, max(at_once, batch // share)) for share in _SHARES)}
    return sorted(sizes, reverse=True)


def measure_slowdowns(make: Callable[[int], Any], comm: Communicator, cores: int, on_node: int) -> Slowdowns:
    """How much slower layers are on rank 0 while all cores are busy, and what waiting ranks take.

    Parameters
    ----------
    make : callable
        For the number of ranks at work what one of them times: `layer()` gives the seconds of one of `num_layers`.
    comm : Communicator
    cores, on_node : int
        Cores and ranks of the first node.
    """
    busy = min(cores, on_node)
    if on_node == 1:
        return Slowdowns()
    probe = make(busy) if comm.rank < busy else None
    rest = comm.bcast(None if probe is None or comm.rank > 0 else probe.layer() * probe.num_layers)
    alone, together, waited = [], [], []
    for _ in range(_CROWD_ROUNDS):
        for at_work, others, found in ((1, time.sleep, alone), (busy, time.sleep, together), (busy, _nothing, waited)):
            comm.barrier()
            found.append(others(rest) if probe is None or comm.rank >= at_work else probe.layer())
    comm.barrier()
    if comm.rank > 0:
        return Slowdowns()
    alone, together, waited = (median(seconds) for seconds in (alone, together, waited))
    # Each of the ranks that wait takes a share of the cores of those at work.
    share = cores * (waited / together - 1.0) / (on_node - cores) if on_node > cores else 0.0
    return Slowdowns(max(1.0, together / alone), min(1.0, max(0.0, share)))


def _nothing(seconds: float) -> None:
    """Go on, to wait in MPI."""


def cores_and_ranks(comm: Communicator) -> tuple[int, int]:
    """Cores and ranks of the first node of the job, on every rank; every rank must call it."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found = comm.bcast(comm.gather((socket.gethostname(), affinity)))
    host = [cores for name, cores in found if name == found[0][0]]
    return len(set().union(*host)), len(host)


def _affordable(workload: Workload) -> int:
    """Layers of the network that is timed."""
    few = min(4, workload.num_layers)
    probe = Probe(workload, few)
    probe.layer()
    seconds = max(probe.layer(), 1e-9)
    most = min(workload.num_layers, _PROBE_BYTES // workload.state_bytes, int(_PROBE_SECONDS / seconds))
    return max(few, most - most % _WHOLE if most > _WHOLE else most)


def _costs(workload: Workload, layers: int, seconds: dict[str, float]) -> Costs:
    """The costs from the medians of the rounds."""

    def line(name: str, n: int = layers) -> StepCost:
        """The line through the seconds for one and for n layers."""
        one, many = seconds[f"{name}_one"], seconds[f"{name}_many"]
        each = max(0.0, many - one) / (n - 1) if n > 1 else one
        return StepCost(max(0.0, one - each), each)

    def solve(kind: str, whole: str) -> SolveCosts:
        # Two portions of one layer less one portion of it: what each adds, and what is done once.
        portion = max(0.0, seconds[f"{whole}_portions"] - seconds[f"{whole}_portion"])
        once = max(0.0, seconds[f"{whole}_portion"] - portion)
        coarse = coarse_layers(layers)
        steps = {part: line(f"{kind}_{part}", coarse if part in COARSE else layers) for part in PARTS}
        total, sweep = line(whole), steps["sweep"]
        return SolveCosts(
            **steps,
            layer=max(0.0, total.each - sweep.each),
            ends=max(0.0, total.call - sweep.call),
            check=seconds["check"] if kind == "state" else 0.0,
            opening=min(seconds["open"], portion),
            closing=max(0.0, portion - min(seconds["open"], portion) - sweep.call - sweep.each),
            once=once,
        )

    parameters = workload.architecture.width * (workload.architecture.width + 1)
    optimizer = line("optimize")
    return Costs(
        state_bytes=workload.state_bytes,
        row_bytes=parameters * workload.dtype.itemsize,
        states=solve("state", "evaluate"),
        adjoints=solve("adjoint", "gradient"),
        vector=seconds["vector"],
        coarsen=seconds["coarsen"],
        optimizer=optimizer.call,
        optimizer_layer=optimizer.each,
        add=seconds["add"],
        samples=workload.batch,
        at_once=_AT_ONCE,
    )
