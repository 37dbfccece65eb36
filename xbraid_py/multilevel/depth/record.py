"""What a nested iteration tells of itself on its way, and what it can go on from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from xbraid_py.optim.objective import Evaluation


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


@dataclass(frozen=True)
class Snapshot:
    """All that the rest of a run depends on, at one of its records.

    Attributes
    ----------
    numbers : dict
        Level, updates, counters and the last evaluation, JSON-able.
    vectors : dict of str to list of Tensor
        Flat vectors of the level's network: "weights", "gradient", "s" and "y".
    warm : dict of str to tuple of Tensor
        `Solution.warm` of the last "state" and "adjoint" solves, the l-th with rows over the intervals of level l.
    """

    numbers: dict
    vectors: dict[str, list[Tensor]]
    warm: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether it is that of the end of the run."""
        return self.numbers["is_final"]

    @property
    def next_record(self) -> int:
        """Number of records up to this one, and so that of the first new one of a run that goes on from here."""
        return self.numbers["before"]["records"]
