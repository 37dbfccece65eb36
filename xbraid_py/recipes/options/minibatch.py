"""Options of jobs on minibatches, whatever is learned; torch is not loaded for them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from xbraid_py.mgrit import MGRIT
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    from xbraid_py.planner import Layer


@dataclass(frozen=True, kw_only=True)
class MinibatchOptions(RunOptions):
    """What all jobs on minibatches are told.

    Parameters
    ----------
    batch_size
        Samples of an update, of all replicas together.
    learning_rate
        Of the optimizer.
    clip
        2-norm above which the gradient is scaled down; not at all if not given.
    seed
        Of initial weights and of the order of the samples.
    replicas
        Copies of the network, each on as many ranks, that share out every batch; divides the number of ranks. Those of
        the plan if not given, which is made by rule from the sizes of the network and the number of ranks.
    exact
        Propagate layer after layer, or step after step of a sequence, instead of by MGRIT.
    validate_every
        Updates between two validations; the last update has one in any case.
    mgrit
        Solver of the states; that of the plan if nothing of it is given.
    adjoint
        Solver of the adjoints; what is left at its default is taken from mgrit.
    """

    batch_size: int = 50
    learning_rate: float = 5e-3
    clip: float | None = None
    seed: int = 0
    replicas: int | None = free(None)
    exact: bool = False
    validate_every: int = free(300)
    checkpoint_every: int = free(100)
    checkpoint_best: bool = free(True)
    mgrit: MGRIT | None = None
    adjoint: MGRIT = MGRIT()

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, batch_size=1, replicas=1, validate_every=1)
        for name in ("learning_rate", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                good = getattr(type(self), name) or 1.0
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")
        if self.batch_size < (self.replicas or 1):
            raise ValueError(f"batch_size={self.batch_size} is less than replicas={self.replicas}; use {self.replicas}")

    @property
    @abstractmethod
    def depth(self) -> int:
        """Layers, or steps, that are propagated through."""

    @property
    @abstractmethod
    def layer(self) -> Layer:
        """What one of them costs, for the plan by rule."""

    @property
    def lagged(self) -> MGRIT:
        """Solver where the lagged cycle is chosen: what the members of `mgrit` are by default."""
        field = next(each for each in fields(self) if each.name == "mgrit")
        return field.metadata.get("members", MGRIT())

    def planned(self, ranks: int) -> tuple[Self, str]:
        """These options with solver and replicas, by rule where they are not given, and the plan in words."""
        from xbraid_py.recipes.planned import of_modules

        return of_modules(self, self.depth, self.layer, self.lagged, ranks)

    @property
    def solvers(self) -> dict[str, Any]:
        """The arguments `mgrit` and `adjoint` of what is solved for: without coarse levels if it is to be exact."""
        both = {"mgrit": self.mgrit or MGRIT(), "adjoint": self.adjoint}
        return {name: replace(each, max_levels=1) for name, each in both.items()} if self.exact else both
