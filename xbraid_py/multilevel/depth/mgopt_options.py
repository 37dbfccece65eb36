"""The options of MG/OPT in depth: cycle, transfers, and the optimizers of the levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xbraid_py.multilevel.cycle.schedule import CYCLES, Schedule
from xbraid_py.multilevel.depth.depth_transfer import INTERPOLATIONS, RESTRICTIONS
from xbraid_py.multilevel.width.layer_matrices import SCALINGS
from xbraid_py.optim import Armijo, FixedStep, QuasiNewton
from xbraid_py.optim.levels import GradientDescent, LevelOptimizer, QuasiNewtonOptimizer, TorchOptimizer
from xbraid_py.optim.objective import Objective

METHODS = ("gd", "momentum", "adam", "lbfgs")
MOVES = ("all", "layers", "ends")


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
        method, rate = (each[min(level, len(each) - 1)] for each in (self.method, self.learning_rate))
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
