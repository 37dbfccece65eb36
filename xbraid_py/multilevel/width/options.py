"""Options of multilevel training in width; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

from xbraid_py.multilevel.schedule import MOST_LEVELS

if TYPE_CHECKING:
    from xbraid_py.optim.levels import TorchOptimizer

METHODS = ("greedy", "mutual")
SCALINGS = ("mean", "norms", "sums")
TAU = ("same", "other")


@dataclass(frozen=True, kw_only=True)
class WidthOptions:
    """How neurons are paired and joined.

    Parameters
    ----------
    threshold : float
        theta, between -1 and 1: neurons of which the cosine is not above it are not paired.
    matching : {"greedy", "mutual"}
        Algorithm 1, or rounds of mutually nearest pairs; see `match`.
    with_bias : bool
        Whether the bias belongs to a neuron's row, in the cosines and in the norms.
    scaling : {"norms", "mean", "sums"}
        Eq. 34, eq. 32, or eq. 34 with the norms in P alone.
    coarsen : tuple of bool, optional
        For each hidden layer whether it is made narrower; all are by default.

    Raises
    ------
    ValueError
        If a value is none of these.
    """

    threshold: float = 0.0
    matching: str = "greedy"
    with_bias: bool = True
    scaling: str = "norms"
    coarsen: tuple[bool, ...] | None = None

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be between -1 and 1, as cosines are; use 0")
        if self.matching not in METHODS:
            raise ValueError(f"matching={self.matching!r} must be {' or '.join(METHODS)}; use greedy")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use norms")


@dataclass(frozen=True, kw_only=True)
class WidthTrainingOptions:
    """Multilevel training in width.

    Parameters
    ----------
    levels
        Networks, each of half the width of the one before; 1 trains the given network alone.
    steps
        s: optimizer steps before and after the coarse correction, and on the coarsest level.
    coarse_steps
        Of the coarsest of several levels, where it is to make other than `steps` of them; 0: as many.
    method
        SGD with momentum, or Adam.
    learning_rate
        Of the finest level.
    momentum
        Of the method sgd.
    weight_decay
        Of the method sgd.
    eta
        The learning rate of a level is that of the finer one divided by this, on the first `eta_levels` levels.
    eta_levels
        Further levels have the learning rate of the last of these.
    gamma
        Factor of the tau correction; 0 computes none.
    alpha_p
        Factor of the coarse correction of the weights.
    alpha_m
        Factor of the coarse correction of the momentum; with 0 each level keeps its own momentum, as it must with adam.
    rematch_every
        Cycles between two matchings of the neurons.
    tau
        Minibatches of the tau correction: the same as those of the coarse steps, or as many others.
    pairs
        How neurons are paired and joined.
    """

    levels: int = 2
    steps: int = 4
    coarse_steps: int = 0
    method: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    eta: float = sqrt(2)
    eta_levels: int = 3
    gamma: float = 0.125
    alpha_p: float = 1.0
    alpha_m: float = 0.2
    rematch_every: int = 50
    tau: Literal["same", "other"] = "same"
    pairs: WidthOptions = WidthOptions()

    def __post_init__(self):
        for name, use in (("levels", 2), ("steps", 4), ("eta_levels", 3), ("rematch_every", 50)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use {use}")
        if self.levels > MOST_LEVELS:
            raise ValueError(f"levels={self.levels} must be at most {MOST_LEVELS}; use 2")
        if self.coarse_steps < 0:
            raise ValueError(f"coarse_steps={self.coarse_steps} must be at least 0; use 16")
        if self.method not in ("sgd", "adam"):
            raise ValueError(f"method={self.method!r} must be sgd or adam; use sgd")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite; use 0.01")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1; use 0.9")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 1e-6")
        if not 1.0 <= self.eta < float("inf"):
            raise ValueError(f"eta={self.eta} must be at least 1 and finite; use 1.4")
        for name in ("gamma", "alpha_p", "alpha_m"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]; use 0.2")
        if self.method == "adam" and self.levels > 1 and self.alpha_m:
            # The second moments of weights that have had no gradient are 0, and any momentum is divided by them.
            raise ValueError(f"alpha_m={self.alpha_m} must be 0 with method=adam and several levels; use 0")
        if self.tau not in TAU:
            raise ValueError(f"tau={self.tau!r} must be {' or '.join(TAU)}; use same")

    def rate(self, level: int) -> float:
        """Learning rate of a level."""
        return self.learning_rate / self.eta ** min(level, self.eta_levels - 1)

    def optimizer(self, level: int) -> TorchOptimizer:
        """The optimizer of a level."""
        import torch

        from xbraid_py.optim.levels import TorchOptimizer

        rate = self.rate(level)
        if self.method == "adam":
            return TorchOptimizer(lambda weights: torch.optim.Adam(weights, lr=rate))
        return TorchOptimizer(
            lambda weights: torch.optim.SGD(weights, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
        )

    def steps_of(self, level: int) -> int:
        """Optimizer steps of a level in a cycle."""
        if level < self.levels - 1:
            return 2 * self.steps
        return self.coarse_steps if level and self.coarse_steps else self.steps

    def work(self) -> tuple[float, float]:
        """Work units of a cycle, with tau (eq. 40) and without: a level costs a quarter of the finer one."""
        smoothing = tau = 0.0
        for level in range(self.levels):
            steps = self.steps_of(level)
            smoothing += steps / 4**level
            if level and self.gamma:
                # A gradient there and one on the finer level for each of the minibatches.
                tau += steps * (1 / 4**level + 1 / 4 ** (level - 1))
        return smoothing + tau, smoothing
