"""The two equations that are solved: for the states forwards, for the adjoints backwards.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.mgrit.protocols import StateTransfer, Steps


@dataclass(frozen=True)
class Forward:
    """The states: u_{i+1} = step_i(u_i).

    Parameters
    ----------
    steps : Steps
        The layers owned here.
    states : (n, *S) tensor or None
        Recorded states are written here: row i holds the input of layer i. None where nobody asks for them.
    template : (*S) tensor
        Any tensor with the shape and type of a state.
    transfers : tuple of StateTransfer or None
        To the coarse levels, the finest first: where states have another shape than on the next finer level.
    transfer : StateTransfer, optional
        To this level.
    """

    steps: Steps
    states: Tensor | None
    template: Tensor
    transfers: tuple[StateTransfer | None, ...] = ()
    transfer: StateTransfer | None = None
    direction = +1

    @property
    def cost(self) -> float:
        return self.steps.cost

    def step(self, x: Tensor) -> Tensor:
        return self.steps.relax(x, 1, None, None)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        return self.steps.relax(points, cfactor, tau, self.states if record else inputs, record)

    def correct(self, before: Tensor, after: Tensor, coarse: Forward) -> None:
        # The states stay as they are: to correct them would cost as much as another relaxation.
        pass

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> Forward:
        steps, template = self.steps.coarsen(cfactor, weights, scheme, parts), self.template
        transfer, *further = self.transfers or (None,)
        if transfer is not None:
            steps = transfer.steps(steps)
            if transfer.keeps_states:
                transfer = None
            else:
                template = transfer.restrict(template[None])[0]
        return Forward(steps, None, template, tuple(further), transfer)

    def redistribute(self, comm, source: Partition, target: Partition) -> Forward:
        return replace(self, steps=self.steps.redistribute(comm, source, target), states=None)

    def empty(self, num_rows: int) -> Tensor:
        return self.template.new_empty((num_rows, *self.template.shape))


@dataclass(frozen=True)
class Adjoint:
    """The adjoints, backwards: v_i = (d step_i / du)^T v_{i+1}, linearized at the recorded states.

    Parameters
    ----------
    steps : Steps
        The layers owned here.
    states : (n, *S) tensor
        Row i holds the input of layer i.
    gradient : (n, p) tensor or None
        A recorded relaxation writes the gradient of the weights here, a row for each layer.
    transfers, transfer
        As of the states, transposed.
    """

    steps: Steps
    states: Tensor
    gradient: Tensor | None
    transfers: tuple[StateTransfer | None, ...] = ()
    transfer: StateTransfer | None = None
    direction = -1

    @property
    def cost(self) -> float:
        # A vector-Jacobian product evaluates the layer again and multiplies by its transpose.
        return 2.0 * self.steps.cost

    def step(self, x: Tensor) -> Tensor:
        return self.steps.relax_adjoint(self.states, x, 1, None, None, None)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        return self.steps.relax_adjoint(self.states, points, cfactor, tau, inputs, self.gradient if record else None)

    def correct(self, before: Tensor, after: Tensor, coarse: Adjoint) -> None:
        linear = self.linear(coarse)
        assert linear is not None
        linear.relax(after - before, 1, record=True)
        self.correct_by(linear)

    def linear(self, coarse: Adjoint) -> Adjoint | None:
        """What takes changes of the C-points from one to the next; None if `coarse` does more with them.

        Its recorded relaxation, of the changes behind all of its steps, keeps what `correct_by` asks for.
        """
        # Steps with sources are affine.
        if getattr(coarse.steps, "sources", None) is not None:
            return None
        return replace(coarse, gradient=torch.empty_like(coarse.steps.theta))

    def correct_by(self, linear: Adjoint) -> None:
        """`correct`, from what a relaxation of changes has kept."""
        # The gradient is linear in the adjoints: what the change adds to it, by coarse steps, goes to the layers that a
        # part of a coarse step stands for, in proportion to their sizes.
        added = linear.gradient
        assert added is not None and self.gradient is not None
        if len(added):
            length = len(self.gradient) // len(added)
            target, h = self.gradient.unflatten(0, (-1, length)), self.steps.h
            if isinstance(h, Tensor):
                # Steps that pad a sequence have size 0.
                whole = torch.as_tensor(linear.steps.h)[:, None].clamp_min(torch.finfo(h.dtype).tiny)
                share = h.unflatten(0, (-1, length)) / whole
                share = share.reshape(*share.shape, *[1] * (target.dim() - share.dim()))
                target.add_(share * added[:, None])
            else:
                target.add_(added.div_(length)[:, None])

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> Adjoint:
        # The coarse states are the fine ones where the parts of the steps begin: injection in depth.
        length = cfactor * self.steps.parts // parts
        steps, states = self.steps.coarsen(cfactor, weights, scheme, parts), self.states[::length]
        transfer, *further = self.transfers or (None,)
        if transfer is not None:
            steps = transfer.steps(steps)
            if transfer.keeps_states:
                transfer = None
            else:
                states = transfer.transposed().restrict(states)
        return Adjoint(steps, states, None, tuple(further), transfer)

    def redistribute(self, comm, source: Partition, target: Partition) -> Adjoint:
        steps, parts = self.steps.redistribute(comm, source, target), self.steps.parts
        states = comm.redistribute(self.states.contiguous(), source.refine(parts), target.refine(parts))
        return replace(self, steps=steps, states=states, gradient=None)

    def empty(self, num_rows: int) -> Tensor:
        return self.states.new_empty((num_rows, *self.states.shape[1:]))


@dataclass(frozen=True)
class AdjointTrajectory(Adjoint):
    """The adjoints, where they are wanted themselves instead of the gradient.

    Parameters
    ----------
    kept : (n, *S) tensor
        A recorded relaxation writes the adjoint behind each layer here.
    """

    kept: Tensor | None = None

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        return self.steps.relax_adjoint(self.states, points, cfactor, tau, self.kept if record else inputs, None)

    def correct(self, before: Tensor, after: Tensor, coarse: Adjoint) -> None:
        # As with the states: better ones would cost another relaxation.
        pass

    def linear(self, coarse: Adjoint) -> Adjoint | None:
        found = super().linear(coarse)
        return found and replace(found, gradient=None)

    def correct_by(self, linear: Adjoint) -> None:
        pass
