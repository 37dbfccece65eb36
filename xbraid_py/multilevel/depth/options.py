"""Options of nested iteration, adaptive depth and MG/OPT; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from xbraid_py.comm.partition import require_multiple
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit.grid import MOST_LAYERS, LayerGrid
from xbraid_py.multilevel.schedule import CYCLES, MOST_LEVELS, Schedule
from xbraid_py.multilevel.width.options import SCALINGS

if TYPE_CHECKING:
    from torch import Tensor

    from xbraid_py.optim.levels import LevelOptimizer
    from xbraid_py.optim.objective import Objective

INDICATORS = ("richardson", "goal", "jump", "both", "even")
MARKINGS = ("bulk", "share")
INTERPOLATIONS = ("constant", "linear")
RESTRICTIONS = ("inject", "average", "transpose")
METHODS = ("gd", "momentum", "adam", "lbfgs")
MOVES = ("all", "layers", "ends")


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions:
    """Refinement of those layers alone where an indicator is large.

    Parameters
    ----------
    indicator
        Richardson: the error of a layer's step, by two steps half as long, their weights interpolated in depth. Goal:
        that error times the adjoint behind the layer, its effect on the loss of each sample. Jump: the change of the
        weights to the neighbors, times the size of the step. Both: Richardson and jump, each divided by its sum over
        the layers. Even: layers spread evenly over the network, whatever they do; for comparison.
    marking
        Bulk: the fewest layers that make up this fraction of the sum of the indicator. Share: this fraction of the
        layers, those with the largest indicator.
    fraction
        In (0, 1].
    max_layers
        No refinement makes more layers than these.
    """

    indicator: Literal["richardson", "goal", "jump", "both", "even"] = "richardson"
    marking: Literal["bulk", "share"] = "bulk"
    fraction: float = 0.5
    max_layers: int | None = None

    def __post_init__(self):
        for name, words in (("indicator", INDICATORS), ("marking", MARKINGS)):
            if getattr(self, name) not in words:
                listed = f"{', '.join(words[:-1])} or {words[-1]}"
                raise ValueError(f"{name}={getattr(self, name)!r} must be {listed}; use {words[0]}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction={self.fraction} must be above 0 and at most 1; use 0.5")
        if self.max_layers is not None and self.max_layers < 1:
            raise ValueError(f"max_layers={self.max_layers} must be at least 1; use 64")


@dataclass(frozen=True, kw_only=True)
class NestedOptions:
    """Schedule of a nested iteration (paper 001, algorithm 1 and eq. 8).

    Parameters
    ----------
    refinements
        Number of refinements; 0 trains the deep network alone.
    updates
        Updates on each level, the coarsest first, one number more than refinements.
    interpolation
        Of the weights in depth: piecewise constant or linear.
    adaptive
        Cut those layers alone where an indicator is large; all of them if not given. Then num_layers is what there
        would be if all were cut each time, and the coarsest network is the same.
    spline_refine
        Where the weights are splines in depth, a refinement halves the intervals between their knots as well. The
        splines of the network are then those of the finest one; otherwise those of all.
    """

    refinements: int = 2
    updates: tuple[int, ...] = (200, 125, 75)
    interpolation: Literal["constant", "linear"] = "constant"
    adaptive: AdaptiveOptions | None = None
    spline_refine: bool = False

    def __post_init__(self):
        if not 0 <= self.refinements <= MOST_LAYERS.bit_length():
            most = MOST_LAYERS.bit_length()  # each of them cuts all layers in two
            raise ValueError(f"refinements={self.refinements} must be at least 0 and at most {most}; use 2")
        if len(self.updates) != self.refinements + 1:
            raise ValueError(
                f"updates={list(self.updates)} must have refinements + 1 = {self.refinements + 1} numbers, the "
                f"coarsest level first; use {[100] * (self.refinements + 1)}"
            )
        if min(self.updates) < 0:
            raise ValueError(f"updates={list(self.updates)} must all be at least 0; use {[100] * len(self.updates)}")
        if self.interpolation not in ("constant", "linear"):
            raise ValueError(f"interpolation={self.interpolation!r} must be constant or linear; use constant")

    def non_nested(self) -> NestedOptions:
        """The schedule that trains the finest network alone, with as much work (paper 001, section 3.1)."""
        work = sum(count / 2 ** (self.refinements - index) for index, count in enumerate(self.updates))
        return NestedOptions(refinements=0, updates=(ceil(work),), interpolation=self.interpolation)

    def depths(self, num_layers: int) -> list[int]:
        """Number of layers on each level, the coarsest first; at most, where not all of them are cut."""
        require_multiple("num_layers", num_layers, 2**self.refinements, "2^refinements")
        found = [LayerGrid(num_layers >> level, 1.0).num_layers for level in range(self.refinements, -1, -1)]
        most = self.adaptive and self.adaptive.max_layers
        if most is not None and most < found[0]:
            raise ValueError(f"max_layers={most} is less than the {found[0]} layers to begin with; use {num_layers}")
        return found

    def splines(self, finest: Splines | None) -> list[Splines | None]:
        """Splines of each level, the coarsest first, from those of the network."""
        if not self.spline_refine:
            return [finest] * (self.refinements + 1)
        if finest is None:
            raise ValueError("spline_refine=True needs a network with splines; give network.splines.num, such as 11")
        finest.coarsen(2**self.refinements)
        return [finest.coarsen(2**level) for level in range(self.refinements, -1, -1)]


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Optimizers of the levels. Of a list the first is for the finest level, the last for all further ones.

    Parameters
    ----------
    method
        Gradient descent (gd), SGD with momentum, Adam or L-BFGS.
    learning_rate
        Step size; with a line search, where it begins.
    momentum
        Of the method momentum.
    memory
        Pairs of L-BFGS.
    line_search
        Armijo backtracking instead of a fixed step, for gd and lbfgs.
    keep
        Carry momentum and pairs from one visit of a level to the next.
    """

    method: tuple[Literal["gd", "momentum", "adam", "lbfgs"], ...] = ("gd",)
    learning_rate: tuple[float, ...] = (0.1,)
    momentum: float = 0.9
    memory: int = 10
    line_search: bool = False
    keep: bool = True

    def __post_init__(self):
        for name in ("method", "learning_rate"):
            if not isinstance(getattr(self, name), tuple) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a list; use {getattr(LevelOptions, name)}")
        for method in self.method:
            if method not in METHODS:
                raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}; use gd")
            if self.line_search and method not in ("gd", "lbfgs"):
                raise ValueError(f"line_search={self.line_search} is for gd and lbfgs, not method={method}; use False")
        if not all(0.0 < rate < float("inf") for rate in self.learning_rate):
            raise ValueError(f"learning_rate={list(self.learning_rate)} must be positive and finite; use 0.1")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1; use 0.9")
        if self.memory < 1:
            raise ValueError(f"memory={self.memory} must be at least 1; use 10")

    def build(self, level: int, objective: Objective, scale: Tensor | None = None) -> LevelOptimizer:
        """The optimizer of a level (0 is the finest); `scale` as for `GradientDescent`."""
        import torch

        from xbraid_py.optim.levels import GradientDescent, QuasiNewtonOptimizer, TorchOptimizer
        from xbraid_py.optim.line_search import Armijo, FixedStep
        from xbraid_py.optim.quasi_newton import QuasiNewton

        method = self.method[min(level, len(self.method) - 1)]
        rate = self.learning_rate[min(level, len(self.learning_rate) - 1)]
        if method == "lbfgs" or self.line_search:
            quasi_newton = QuasiNewton("lbfgs" if method == "lbfgs" else "steepest", objective.dots, self.memory)
            if self.line_search:
                return QuasiNewtonOptimizer(quasi_newton, Armijo(), rate, scale, self.keep)
            return QuasiNewtonOptimizer(quasi_newton, FixedStep(rate), 1.0, scale, self.keep)
        if method == "gd":
            return GradientDescent(rate, scale)
        if method == "adam":
            return TorchOptimizer(lambda weights: torch.optim.Adam(weights, lr=rate), scale, self.keep)
        return TorchOptimizer(
            lambda weights: torch.optim.SGD(weights, lr=rate, momentum=self.momentum), scale, self.keep
        )


@dataclass(frozen=True, kw_only=True)
class MGOptOptions:
    """MG/OPT in depth.

    Parameters
    ----------
    levels
        Networks of num_layers, num_layers / 2, ... layers; for the schedule of paper 000.
    schedule
        Optimizer steps on each level in the paper's notation, as in "[(1), 1, 2, {2}]", instead of levels.
    cycle
        V or W.
    interpolation
        Of the weights in depth: piecewise constant or linear.
    restriction
        Of the weights: injection, averaging, or the literal transpose of the interpolation.
    line_search
        Armijo backtracking along the coarse correction.
    full_multigrid
        Start from the coarsest network, with so many cycles on each level; 0 starts on the finest.
    metric
        Inner product that gradients are taken in: euclidean, or L2(0, T), which divides those of the layers by h.
    fine_moves, coarse_moves
        Weights that the optimizer of the finest level, and those of the others, may change: all, the residual layers
        alone, or the ends (opening and classification) alone.
    narrow
        So many coarse levels, the first ones, also have half the width of the level above them: neurons of the state
        that are alike are paired anew in every cycle. For optimizers that keep nothing from one cycle to the next.
    scaling
        With narrow, how a pair becomes one neuron: mean (paper 002, eq. 32), or with the activation relu by the norms
        of their rows (eq. 34; norms or sums).
    min_layers
        Least number of layers of a rank on the coarse levels: a level with fewer than so many for each rank is on
        fewer ranks, and messages between the others are saved. 0 has all levels on all ranks.
    carry_momentum
        Share of the change of the coarse momentum that the finer level takes over (paper 002, eq. 36): with the methods
        momentum and adam a level then begins with the finer one's momentum. With 0 each level has its own.
    optim
        Optimizers of the levels.
    """

    levels: int = 8
    schedule: str | None = None
    cycle: Literal["V", "W"] = "V"
    interpolation: Literal["constant", "linear"] = "constant"
    restriction: Literal["inject", "average", "transpose"] = "inject"
    line_search: bool = False
    full_multigrid: int = 0
    metric: Literal["euclidean", "L2"] = "euclidean"
    fine_moves: Literal["all", "layers", "ends"] = "all"
    coarse_moves: Literal["all", "layers", "ends"] = "all"
    narrow: int = 0
    scaling: Literal["mean", "norms", "sums"] = "mean"
    min_layers: int = 16
    carry_momentum: float = 0.0
    optim: LevelOptions = LevelOptions()

    def __post_init__(self):
        words = {
            "cycle": tuple(CYCLES),
            "interpolation": INTERPOLATIONS,
            "restriction": RESTRICTIONS,
            "metric": ("euclidean", "L2"),
            "fine_moves": MOVES,
            "coarse_moves": MOVES,
            "scaling": SCALINGS,
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {' or '.join(allowed)}; use {allowed[0]}")
        if not 1 <= self.levels <= MOST_LEVELS:
            raise ValueError(f"levels={self.levels} must be at least 1 and at most {MOST_LEVELS}; use 8")
        if self.min_layers < 0:
            raise ValueError(f"min_layers={self.min_layers} must be at least 0; use 16")
        if self.full_multigrid < 0:
            raise ValueError(f"full_multigrid={self.full_multigrid} must be at least 0; use 1")
        if not 0.0 <= self.carry_momentum <= 1.0:
            raise ValueError(f"carry_momentum={self.carry_momentum} must lie in [0, 1]; use 0.2")
        if self.carry_momentum and not (self.optim.keep and set(self.optim.method) <= {"momentum", "adam"}):
            raise ValueError(
                f"carry_momentum={self.carry_momentum} is for optimizers that keep momentum, not "
                f"optim.method={','.join(self.optim.method)}, optim.keep={self.optim.keep}; use 0"
            )
        levels = self.steps().levels
        if not 0 <= self.narrow < levels:
            raise ValueError(f"narrow={self.narrow} must lie in 0 .. {levels - 1}, the coarse levels; use 0")
        if self.narrow and self.optim.keep and set(self.optim.method) != {"gd"}:
            raise ValueError(
                f"narrow={self.narrow} is for optimizers that keep nothing of neurons paired otherwise, not "
                f"optim.method={','.join(self.optim.method)} with optim.keep=True; use optim.keep=False"
            )

    def ranks(self, num_layers: int, size: int) -> int:
        """Ranks of a coarse level with so many layers, of so many ranks in all."""
        return max(1, min(size, num_layers // self.min_layers)) if self.min_layers else size

    def steps(self) -> Schedule:
        """The schedule, given or the paper's for so many levels."""
        return Schedule.of_paper(self.levels) if self.schedule is None else Schedule.parse(self.schedule)
