"""What MGRIT knows of the equation it solves, and propagators of its layers.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from xbraid_py.comm.partition import Partition


@runtime_checkable
class Propagator(Protocol):
    """What MGRIT knows of the equation it solves."""

    @property
    def direction(self) -> int:
        """+1 if row i is followed by row i + 1, -1 if by row i - 1."""
        ...

    @property
    def cost(self) -> float:
        """Work of one step in evaluations of a layer."""
        ...

    @property
    def transfer(self) -> StateTransfer | None:
        """How states come to its level from the next finer one; None where they are the same."""
        ...

    def step(self, x: Tensor) -> Tensor:
        """States x (n, *S), one before each row, one step on; a new tensor."""
        ...

    def relax(
        self,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        record: bool = False,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """From the beginnings of the intervals of c rows (n / c, *S) to their ends, in the direction of propagation.

        tau (n, *S) is added to each step. With `record`, keep what the solve is for: the states, or the gradient.
        The input of each step is written to `inputs` (n, *S), if it is given. Returns a new tensor.
        """
        ...

    def correct(self, before: Tensor, after: Tensor, coarse: Self) -> None:
        """Correct what was recorded, to first order, for C-points (n / c, *S) that have been moved since.

        `coarse` makes one step for each interval.
        """
        ...

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int) -> Propagator:
        """The propagator that makes one step, of several parts, for `cfactor` steps of this one."""
        ...

    def redistribute(self, comm, source: Partition, target: Partition) -> Propagator:
        """This propagator with its rows handed to other ranks."""
        ...

    def empty(self, num_rows: int) -> Tensor:
        """Uninitialized states (num_rows, *S)."""
        ...


class StateTransfer(Protocol):
    """How states come to a coarser level, and what it changes comes back."""

    @property
    def keeps_states(self) -> bool:
        """Whether states of the coarser level are those of the finer one, and only its steps others."""
        ...

    def restrict(self, states: Tensor) -> Tensor:
        """States (n, *S) of the finer level on the coarser one; a new tensor."""
        ...

    def interpolate(self, states: Tensor) -> Tensor:
        """The opposite; a new tensor."""
        ...

    def transposed(self) -> StateTransfer:
        """The transfer of the adjoints."""
        ...

    def steps(self, steps: Steps) -> Steps:
        """Steps that have been coarsened in depth, as they are made with states of the coarser level."""
        ...


@runtime_checkable
class Steps(Protocol):
    """What propagators know of consecutive layers: `ResidualSteps` of dense ones, `ModuleSteps` of any others."""

    @property
    def theta(self) -> Tensor:
        """Weights, a row for each part of each step."""
        ...

    @property
    def h(self) -> float | Tensor:
        """Size of the parts; (n parts,) where they differ."""
        ...

    @property
    def parts(self) -> int:
        """A step is that many smaller ones."""
        ...

    @property
    def cost(self) -> float: ...

    def relax(self, points, cfactor, tau, inputs, record=False) -> Tensor: ...

    def relax_adjoint(self, states, points, cfactor, tau, inputs, gradient) -> Tensor: ...

    def coarsen(self, cfactor, weights, scheme, parts=1) -> Steps: ...

    def redistribute(self, comm, source, target) -> Steps: ...
