"""Nested iteration: train a shallow network, prolong its weights to a deeper one, go on there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from xbraid_py.comm.base import present
from xbraid_py.comm.partition import require_multiple
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.adaptive import layers_to_cut
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.multilevel.depth.state import Snapshot, arrays_of, check_numbers, read_snapshot
from xbraid_py.multilevel.depth.transfer import prolong_depth
from xbraid_py.optim import OneShot, OneShotOptions, Update
from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.options import InitialScales
from xbraid_py.problem.problem import Problem
from xbraid_py.run.store.read import Checkpoint
from xbraid_py.run.store.write import Shard


@dataclass(frozen=True)
class Record:
    """The state of the run before an update, or at its end.

    Attributes
    ----------
    level, num_layers : int
        Level of the nesting (0 is the finest) and its depth.
    update : int
        Number of this record. As there is one before each update, that is the number of updates so far, unless
        a level has ended early.
    work : float
        Work so far in work units (one update on the finest level: paper 001, section 3), by counting
        evaluations of a layer.
    seconds : float
        Time spent so far in training.
    evaluations : int
        State solves so far.
    evaluation : Evaluation
        The objective.
    adjoint_residual : float or None
        Relative residual of the last adjoint solve.
    grad_norm, step, backtracks, note
        As in `optim.Update`; grad_norm is None at the end of the run.
    final : bool
        Whether this is the end of the run.
    cut : tuple of int or None
        At the first record after a refinement of chosen layers: those of the level before that were cut.
    lengths : tuple of int or None
        At such a record: lengths of the layers, as `LayerGrid` has them (all 1 where they are equal).
    """

    level: int
    num_layers: int
    update: int
    work: float
    seconds: float
    evaluations: int
    evaluation: Evaluation
    adjoint_residual: float | None
    grad_norm: float | None
    step: float
    backtracks: int
    note: str | None = None
    final: bool = False
    cut: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None


class NestedIteration:
    """Algorithm 1 of paper 001; with no refinement, plain one-shot training.

    Parameters
    ----------
    problem : Problem
    num_layers : int
        Depth of the finest network.
    options : NestedOptions, optional
    one_shot : OneShotOptions, optional
    scales : InitialScales, optional
        Of the initial weights of the coarsest network.
    seed : int

    Attributes
    ----------
    objective : NetworkObjective
        Of the present level.
    one_shot : OneShot
        The optimizer there.
    """

    def __init__(
        self,
        problem: Problem,
        num_layers: int,
        *,
        options: NestedOptions | None = None,
        one_shot: OneShotOptions | None = None,
        scales: InitialScales | None = None,
        seed: int = 0,
    ):
        options, one_shot = options or NestedOptions(), one_shot or OneShotOptions()
        cfactor = problem.forward.cfactor_of(0, num_layers)
        if cfactor is not None and (problem.forward.cfactor is not None or problem.forward.cycle != "lagged"):
            # Said in terms of the finest network, which is what a user chooses.
            name = "cfactor" + " * 2^refinements" * (options.refinements > 0)
            require_multiple("num_layers", num_layers, cfactor * 2**options.refinements, name)
        self.depths = options.depths(num_layers)
        shape = problem.architecture
        self._problems = [
            problem if each == shape.splines else replace(problem, architecture=replace(shape, splines=each))
            for each in options.splines(shape.splines)
        ]
        for depth in self.depths:
            problem.hierarchies(depth)
        check_ranks(problem, num_layers, options)
        self.problem, self.options, self.one_shot_options = problem, options, one_shot
        self.scales, self.seed = scales or InitialScales(), seed
        self._unit = problem.work_unit(num_layers)
        self._cut: tuple[int, ...] | None = None
        self._note: str | None = None
        self._before = {"records": 0, "work": 0.0, "evaluations": 0, "seconds": 0.0}
        self._is_over = self._is_recorded = False
        self._begin(0, problem.grid(self.depths[0]), None)

    @property
    def level(self) -> int:
        """Present level of the nesting; 0 is the finest."""
        return self.options.refinements - self._index

    @property
    def depth(self) -> int:
        """Number of layers of the present level."""
        return self._grid.num_layers

    @property
    def weights(self) -> Tensor:
        """Weights of the present level's network, those that this rank owns: a flat vector, see `network.layout`."""
        return self.one_shot.x

    @property
    def grid(self) -> LayerGrid:
        """The layers of the present level."""
        return self._grid

    @property
    def network(self):
        """The network of the present level."""
        return self.objective.network

    def run(self) -> Iterator[Record]:
        """Train; yields a record before each update and one at the end.

        Goes on from what `load` has read, whose own record is not yielded again, unless it is that of the end.
        """
        if self._is_over:
            yield self._record(None)
            return
        while True:
            updates = self.one_shot.run(self.options.updates[self._index])
            while True:
                clock = time.perf_counter()
                update = next(updates, None)
                self._before["seconds"] += time.perf_counter() - clock
                if update is None:
                    break
                if not self._is_recorded:
                    yield self._record(update)
                self._is_recorded = False
            if self._index == self.options.refinements:
                yield self._record(None)
                return
            clock = time.perf_counter()
            self._refine()
            self._before["seconds"] += time.perf_counter() - clock

    def _begin(self, index: int, grid: LayerGrid, x: Tensor | None) -> None:
        self._index, self._grid = index, grid
        self.objective = self._problems[index].objective(grid)
        start = self.network.initial(self.scales, self.seed) if x is None else x
        self.one_shot = OneShot(self.objective, self.one_shot_options, start)

    def _refine(self) -> None:
        self._note = self.one_shot.note
        coarse, x, how = self.network, self.one_shot.x, self.options.interpolation
        grid = coarse.grid.refine(2)
        if self.options.adaptive is not None:
            self._cut = layers_to_cut(self.options.adaptive, self.problem, self.objective, x, how)
            grid = coarse.grid.halve(self._cut)
        self._before["work"] += self.objective.work
        self._before["evaluations"] += self.objective.evaluations
        self._begin(self._index + 1, grid, None)
        self.one_shot.x = prolong_depth(coarse, self.network, x, how, self._cut)

    def _record(self, update: Update | None) -> Record:
        one_shot = self.one_shot
        record = Record(
            level=self.level,
            num_layers=self.depth,
            update=self._before["records"],
            work=(self._before["work"] + self.objective.work) / self._unit,
            seconds=self._before["seconds"],
            evaluations=self._before["evaluations"] + self.objective.evaluations,
            evaluation=present(one_shot.evaluation),
            adjoint_residual=self.objective.adjoint_residual,
            grad_norm=None if update is None else update.grad_norm,
            step=one_shot.step,
            backtracks=one_shot.backtracks,
            note=self._note or one_shot.note,
            final=update is None,
            cut=self._cut,
            lengths=None if self._cut is None else self._grid.lengths or (1,) * self.depth,
        )
        self._note = self._cut = None
        self._before["records"] += 1
        self._is_over = record.final
        return record

    def snapshot(self) -> Snapshot:
        """All that the rest of the run depends on, now."""
        one_shot, objective, lengths = self.one_shot, self.objective, self._grid.lengths
        warm = {"state": objective.warm or (), "adjoint": objective.adjoint_warm or ()}
        # The run goes on to overwrite what the lagged cycle keeps.
        warm = {name: tuple(rows.clone() for rows in levels) for name, levels in warm.items()}
        return Snapshot(
            numbers={
                "index": self._index,
                "num_layers": self.depth,
                **({} if lengths is None else {"lengths": list(lengths)}),
                **({} if self.network.splines is None else {"splines": asdict(self.network.splines)}),
                "number": one_shot.number,
                "step": one_shot.step,
                "scale": one_shot.quasi_newton.scale,
                "backtracks": one_shot.backtracks,
                "evaluation": asdict(present(one_shot.evaluation)),
                "adjoint_residual": objective.adjoint_residual,
                "work": objective.work,
                "evaluations": objective.evaluations,
                "is_final": self._is_over,
                "before": dict(self._before),
            },
            vectors={
                "weights": [one_shot.x],
                "gradient": [] if one_shot.gradient is None else [one_shot.gradient],
                "s": one_shot.quasi_newton.s,
                "y": one_shot.quasi_newton.y,
            },
            warm=warm,
        )

    def state(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """The snapshot as global arrays and numbers, for checkpoints."""
        snapshot, problem = self.snapshot(), self.problem
        ranks = problem.comm.rank, problem.replicas
        arrays = arrays_of(snapshot, self.network.layout, problem.hierarchies(self.grid), *ranks)
        return arrays, snapshot.numbers

    def load(self, checkpoint: Checkpoint, convert_dtype: bool = False) -> None:
        """Let `run` go on from a state; sends no message.

        Parameters
        ----------
        checkpoint : Checkpoint
            Of `state`, its numbers under the meta data "state"; written on any number of ranks.
        convert_dtype : bool
            Take over numbers of the other floating-point type, converted.

        Raises
        ------
        CheckpointError, LookupError, TypeError, ValueError
            If it is the state of something else.
        """
        numbers = checkpoint.meta["state"]
        check_numbers(checkpoint.path, numbers, self.depths, self.options.adaptive is not None)
        layout, hierarchies = self.network_of(numbers).layout, self.problem.hierarchies(self.grid_of(numbers))
        stage = self.problem.stage_rank
        self._restore(read_snapshot(checkpoint, numbers, layout, hierarchies, stage, convert_dtype))

    def grid_of(self, numbers: Mapping) -> LayerGrid:
        """The layers of a snapshot with these numbers."""
        lengths = numbers.get("lengths")
        if lengths is not None:
            return LayerGrid.of_lengths(lengths, self._grid.T)
        return self.problem.grid(numbers["num_layers"])

    def network_of(self, numbers: Mapping) -> DenseResNet:
        """The network of a snapshot with these numbers."""
        return self._problems[numbers["index"]].network(self.grid_of(numbers))

    def _restore(self, snapshot: Snapshot) -> None:
        numbers, vectors = snapshot.numbers, snapshot.vectors
        self._begin(numbers["index"], self.grid_of(numbers), vectors["weights"][0])
        one_shot, objective = self.one_shot, self.objective
        one_shot.number = numbers["number"]
        one_shot.step, one_shot.backtracks = numbers["step"], numbers["backtracks"]
        one_shot.evaluation = Evaluation(**numbers["evaluation"])
        one_shot.gradient = vectors["gradient"][0] if vectors["gradient"] else None
        one_shot.quasi_newton.restore(vectors["s"], vectors["y"])
        one_shot.quasi_newton.scale = numbers["scale"]
        objective.warm, objective.adjoint_warm = (snapshot.warm.get(name) or None for name in ("state", "adjoint"))
        objective.adjoint_residual = numbers["adjoint_residual"]
        objective.work, objective.evaluations = numbers["work"], numbers["evaluations"]
        self._before, self._is_over, self._is_recorded = dict(numbers["before"]), numbers["is_final"], True
        if self._is_over:
            self._before["records"] -= 1  # the end is recorded again


def check_ranks(problem: Problem, num_layers: int, options: NestedOptions) -> None:
    """Raise `ValueError` unless a nested iteration can be made on these ranks, with these replicas; no message."""
    stages = problem.comm.size // problem.replicas
    if stages > num_layers:
        more = f" in each of {problem.replicas} replicas" if problem.replicas > 1 else ""
        raise ValueError(f"{stages} ranks{more} are more than num_layers={num_layers}; use at most {num_layers} ranks")
    if options.adaptive is not None and problem.replicas > 1:
        raise ValueError(f"replicas={problem.replicas}: a replica sees a part of the samples; use 1 with adaptive")
