"""MG/OPT in depth, and in width too: its options, the hierarchy of networks, and a run of cycles with its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from torch import Tensor

from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.partition import require_multiple
from xbraid_py.multilevel.depth.options import MGOptOptions
from xbraid_py.multilevel.depth.state import shards, vectors_of, warm_of, warm_shards
from xbraid_py.multilevel.depth.transfer import DepthTransfer, refuse_splines
from xbraid_py.multilevel.vcycle import ComposedTransfer, Damping, Transfer, VCycle
from xbraid_py.multilevel.width.matching import StateWidthTransfer
from xbraid_py.optim import Armijo
from xbraid_py.optim.levels import Point
from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.portions import PortionedObjective, Samples
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization
from xbraid_py.run.store.read import Checkpoint, check_total, no_state
from xbraid_py.run.store.write import Shard


def coarsened(regularization: Regularization, factor: int) -> Regularization:
    """The regularization of a level that has fewer layers by a factor (paper 000, section 4: beta 2^(L-l)).

    Plain sums are multiplied by the factor, so that those over the layers stay multiples of the same time integral;
    time integrals are that already.
    """
    if regularization.measure == "integral":
        return regularization
    weights = {name: factor * getattr(regularization, name) for name in ("tikhonov", "ddt", "classification")}
    return replace(regularization, **weights)


def level_scale(network: DenseResNet, metric: str, moves: str) -> Tensor | None:
    """The diagonal D of the optimizers (`GradientDescent`) for a network; None where it is 1."""
    if metric == "euclidean" and moves == "all":
        return None
    scale = network.layout.zeros()
    for name, rows in network.layout.rows(scale).items():
        if moves in ("all", "layers" if name == "layers" else "ends"):
            rows.fill_(1.0 / network.grid.h if metric == "L2" and name == "layers" else 1.0)
    return scale


@dataclass(frozen=True)
class CycleRecord:
    """The state of a run after a cycle; what it cost does not include this record.

    Attributes
    ----------
    cycle : int
        Cycles so far, a full-multigrid start included as one.
    evaluation : Evaluation
        The objective of the finest level.
    work : float
        Work units so far by eq. 10, one being a gradient on the finest level.
    counted : float
        The same by counting evaluations of a layer on all levels and ranks, those of line searches included; of the
        solvers the work is counted as it is, where eq. 10 takes a gradient for a gradient. A narrower layer counts as
        the numbers of its matrix.
    gradients : tuple of int
        Gradients so far on each level, the finest first.
    seconds : float
        Time so far.
    """

    cycle: int
    evaluation: Evaluation
    work: float
    counted: float
    gradients: tuple[int, ...]
    seconds: float


class MGOpt:
    """A run of MG/OPT in depth.

    Parameters
    ----------
    problem : Problem
    num_layers : int
        Of the finest network, a multiple of 2^(levels - 1).
    options : MGOptOptions
    portions : sequence of Samples, optional
        All samples, where there are too many to be propagated together; those of the problem are the first portion.

    Attributes
    ----------
    x : Tensor
        Weights of the finest network, to be set before `run`; zeros at first.
    objectives : list of NetworkObjective or PortionedObjective
        The finest first.
    costs : list of float
        Of a gradient on each level, in work units.
    cycle : VCycle

    Raises
    ------
    ValueError
        If the depth does not fit the number of levels, or the weights are splines.
    """

    def __init__(
        self, problem: Problem, num_layers: int, options: MGOptOptions, portions: Sequence[Samples] | None = None
    ):
        schedule = options.steps()
        refuse_splines(problem.architecture.splines)
        require_multiple("num_layers", num_layers, 2 ** (schedule.levels - 1), "2^(levels - 1)")
        self.options, self.schedule = options, schedule
        problems = [self._problem_of(problem, level, num_layers) for level in range(schedule.levels)]
        plain = [each.objective(num_layers >> level) for level, each in enumerate(problems)]
        self._hierarchies = [each.hierarchies(num_layers >> level) for level, each in enumerate(problems)]
        self._replicas = problem.replicas
        self.objectives = plain if portions is None else [PortionedObjective(each, portions) for each in plain]
        networks = [objective.network for objective in self.objectives]
        width = networks[0].block.outputs
        # A dense layer costs what its matrix has of numbers.
        self._areas = [(network.block.outputs / width) ** 2 for network in networks]
        self.costs = [area / 2**level for level, area in enumerate(self._areas)]
        moves = [options.fine_moves] + [options.coarse_moves] * (schedule.levels - 1)
        self._smoothers = [
            options.optim.build(level, objective, level_scale(objective.network, options.metric, moves[level]))
            for level, objective in enumerate(self.objectives)
        ]
        self.cycle = VCycle(
            self.objectives,
            self._transfers(problem, networks),
            self._smoothers,
            schedule.pre,
            schedule.post,
            schedule.coarse,
            cycle=options.cycle,
            line_search=Armijo() if options.line_search else None,
            damping=Damping(momentum=options.carry_momentum),
        )
        self._unit = problem.work_unit(num_layers)
        self.x = networks[0].layout.zeros()
        self._start = CycleRecord(-1, Evaluation(0.0, 0.0, 0.0, 0.0), 0.0, 0.0, (0,) * len(self.objectives), 0.0)
        self._last = self._start
        self._point = Point(self.x)
        self._aside = 0.0  # seconds of the next cycle that `state` has spent
        self._levels: list[dict[str, Any]] = []

    def _problem_of(self, problem: Problem, level: int, num_layers: int, width_level: int | None = None) -> Problem:
        """The problem of a level: regularization by its depth, width, and perhaps fewer ranks."""
        ranks = problem.ranks
        if level and problem.replicas == 1:
            ranks = self.options.ranks(num_layers >> level, problem.comm.size)
        width, halvings = problem.architecture.width, level if width_level is None else width_level
        for _ in range(min(halvings, self.options.narrow)):
            width = (width + 1) // 2
        return replace(
            problem,
            regularization=coarsened(problem.regularization, 2**level),
            ranks=ranks,
            architecture=replace(problem.architecture, width=width),
        )

    def _transfers(self, problem: Problem, networks: Sequence[DenseResNet]) -> list[Transfer]:
        how, found = (self.options.interpolation, self.options.restriction), []
        for level, (fine, coarse) in enumerate(zip(networks, networks[1:], strict=False)):
            if level < self.options.narrow:
                depth = fine.grid.num_layers
                between = self._problem_of(problem, level, depth << level, level + 1).network(depth)
                width = StateWidthTransfer(between, fine, self.options.scaling)
                found.append(ComposedTransfer([width, DepthTransfer(coarse, between, *how)]))
            else:
                found.append(DepthTransfer(coarse, fine, *how))
        return found

    @property
    def network(self) -> DenseResNet:
        """The finest network."""
        return self.objectives[0].network

    def state(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """All that the rest of `run` depends on, at one of its records, as global arrays and numbers; collective.

        The gradient is a part of it: what solves start from is not what it was before the objective was evaluated.
        """
        if self._last.cycle or not self.options.full_multigrid:  # which begins elsewhere
            clock = time.perf_counter()
            self._point = self._point.complete(self.objectives[0])
            self._aside += time.perf_counter() - clock
        layout, comm, gradient = self.network.layout, self.network.comm, self._point.gradient
        arrays = shards(layout, "weights", [self._point.x])
        arrays |= shards(layout, "gradient", [] if gradient is None else [gradient])
        levels = []
        for level, objective in enumerate(self.objectives):
            vectors, numbers = self._smoothers[level].kept()
            vectors = {name: each for name, each in vectors.items() if each}
            for name, each in vectors.items():
                arrays |= shards(objective.network.layout, f"level{level}/{name}", each, several=True)
            warm = {"state": objective.warm or (), "adjoint": objective.adjoint_warm or ()}
            # The run goes on to overwrite what the lagged cycle keeps.
            warm = {name: tuple(rows.clone() for rows in each) for name, each in warm.items()}
            arrays |= warm_shards(f"level{level}/warm", warm, self._hierarchies[level], comm.rank, self._replicas)
            counts = {"work": objective.work, "gradients": objective.gradients}
            levels.append(counts | {"vectors": list(vectors), "numbers": numbers})
        return arrays, asdict(self._last) | {"levels": levels}

    def load(self, checkpoint: Checkpoint) -> None:
        """Let `run` go on from a state; sends no message.

        Parameters
        ----------
        checkpoint : Checkpoint
            Of `state`, its numbers under the meta data "state"; written on any number of ranks. With one of an earlier
            version, which has nothing but the weights, optimizers and solves begin anew.

        Raises
        ------
        CheckpointError, LookupError, TypeError, ValueError
            If it is the state of something else.
        """
        numbers, path = dict(checkpoint.meta["state"]), checkpoint.path
        evaluation, gradients = Evaluation(**numbers.pop("evaluation")), tuple(numbers.pop("gradients"))
        levels = numbers.pop("levels", None)
        done = CycleRecord(**numbers, evaluation=evaluation, gradients=gradients)
        if type(done.cycle) is not int or done.cycle < 0 or len(gradients) != len(self.objectives):
            raise no_state(path, f"cycle={done.cycle!r} of {len(gradients)} levels")
        (self.x,), found = (vectors_of(checkpoint, self.network.layout, name) for name in ("weights", "gradient"))
        self._point = Point(self.x, evaluation, *found)
        if levels is not None and not found and (done.cycle or not self.options.full_multigrid):
            raise no_state(path, "the gradient is missing")
        if levels is None:
            self._point = Point(self.x)
            levels = [{"work": 0.0, "gradients": each, "vectors": [], "numbers": {}} for each in gradients]
            levels[0]["work"] = done.counted * self._unit
        self._levels = [self._read(checkpoint, level, entry) for level, entry in enumerate(levels)]
        check_total(path, len(self._levels), len(self.objectives))
        self._start = self._last = done

    def _read(self, checkpoint: Checkpoint, level: int, entry: dict[str, Any]) -> dict[str, Any]:
        """A rank's part of what a state has of a level."""
        layout = self.objectives[level].network.layout
        vectors = {name: vectors_of(checkpoint, layout, f"level{level}/{name}", True) for name in entry["vectors"]}
        for name, each in vectors.items():
            if not each:
                raise no_state(checkpoint.path, f"level{level}/{name} is missing")
        stage = self.network.comm.rank // self._replicas
        warm = warm_of(checkpoint, f"level{level}/warm", self._hierarchies[level], stage)
        counts = {"work": float(entry["work"]), "gradients": int(entry["gradients"])}
        numbers = {name: float(each) for name, each in entry["numbers"].items()}
        return counts | {"optimizer": (vectors, numbers), "warm": warm}

    def _restore(self) -> None:
        """Put what `load` has read of the levels in its places; collective."""
        for objective, smoother, kept in zip(self.objectives, self._smoothers, self._levels, strict=True):
            objective.work, objective.gradients = kept["work"], kept["gradients"]
            objective.warm, objective.adjoint_warm = (kept["warm"].get(name) for name in ("state", "adjoint"))
            smoother.restore(*kept["optimizer"])

    def run(self, max_cycles: int, batches: Callable[[int], Samples] | None = None) -> Iterator[CycleRecord]:
        """Make cycles; yields a record before the first and after each, when `x` are the weights it is of.

        Goes on from what `load` has read: the next record is that of the cycle after it.

        Parameters
        ----------
        max_cycles : int
            Cycles in all.
        batches : callable, optional
            `batches(k)` are the samples of cycle k, counted from 0, on all levels (paper 000, algorithm 3). Then a
            record has the objective on those of the next cycle. Not for an objective in portions.

        Raises
        ------
        RunError
            If the objective is not finite.
        """
        objective, schedule, options = self.objectives[0], self.schedule, self.options
        done = self._start
        work, seconds, point = done.work, done.seconds, Point(self.x)
        for cycle in range(max(0, done.cycle), max_cycles + 1):
            if batches is not None:
                samples = batches(cycle)
                for each in self.objectives:
                    if isinstance(each, PortionedObjective):
                        raise ValueError("batches of an objective in portions, which has all samples; leave one out")
                    each.use(*samples)
                point = Point(point.x)  # what is known of it is of other samples
            if cycle == done.cycle:
                self._restore()
                point = self._point
            spent = sum(each.work * area for each, area in zip(self.objectives, self._areas, strict=True))
            counted = spent / self._unit
            gradients = tuple(each.gradients for each in self.objectives)
            clock = time.perf_counter()
            # The next cycle begins with this very evaluation.
            evaluation = point.evaluation
            if evaluation is None:
                evaluation = objective.evaluate(point.x)
                point = Point(point.x, evaluation)
            evaluated = time.perf_counter() - clock
            if not isfinite(evaluation.value):
                raise RunError(
                    f"the objective is {evaluation.value} after {cycle} cycles: it must be finite; use a smaller "
                    f"step size (optim.learning_rate={options.optim.learning_rate[0] / 10:g})"
                )
            self.x, self._point = point.x, point
            if cycle > done.cycle:
                self._last = CycleRecord(cycle, evaluation, work, counted, gradients, seconds)
                yield self._last
                point = self._point  # `state` has completed it, if it was asked for
            if cycle == max_cycles:
                return
            clock = time.perf_counter()
            if cycle == 0 and options.full_multigrid:
                point = self.cycle.full_multigrid(point.x, options.full_multigrid)
                work += schedule.full_multigrid_work(options.full_multigrid, options.cycle, self.costs)
            else:
                point = self.cycle.run(point)
                work += schedule.work(options.cycle, self.costs)
            seconds += evaluated + self._aside + time.perf_counter() - clock
            self._aside = 0.0
