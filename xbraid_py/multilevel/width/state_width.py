"""Transfers between a residual network and one of about half its width, and transfers one after the other.

All residual layers of a network act on the same state, so one matching holds for all of them. Neurons of the state are
alike if their rows are alike in the opening layer and in every residual layer: u_{n+1} = u_n + h s(W_n u_n + b_n) then
keeps them alike. With pi and P of the state (see `matching`) the coarse weights are

    opening pi W, pi b;   layers pi W_n P, pi b_n;   classification W P, b,

and those of paper 002 (eq. 25 to 28) for a network whose layers have the same pi and P on both sides. Together with a
transfer in depth they make coarse networks that are narrower and shallower.

Shape letters: `n` residual layers owned here, `C` width, `m` width of the coarse network, `p` parameters of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xbraid_py.multilevel.cycle.vcycle import Transfer
from xbraid_py.multilevel.depth.transfer import refuse_splines
from xbraid_py.multilevel.width.matching import SCALINGS, LayerMatrices, Matching, match
from xbraid_py.problem.network import DenseResNet

_HOMOGENEOUS = ("relu", "identity")  # s(a z) = a s(z) for a > 0


def gram(network: DenseResNet, x: Tensor) -> Tensor:
    """Products (C, C) of the neurons' rows over all layers, on all ranks alike; collective."""
    named = network.layout.named(x)
    width = network.block.outputs
    found = torch.zeros(1, width * width, dtype=torch.float64)
    for stack in ("opening", "layers"):
        for kind in ("weight", "bias"):
            values = named.get(f"{stack}.{kind}")  # (n, C, columns), (n, C)
            if values is not None and len(values):
                rows = values.double().reshape(len(values), width, -1)
                found += torch.einsum("nik,njk->ij", rows, rows).reshape(1, -1)
    return network.comm.ordered_sum(found, [1] * network.comm.size).view(width, width)


def match_state(network: DenseResNet, x: Tensor) -> tuple[Matching, Tensor]:
    """Pair the neurons of the state; returns the lengths (C,) of their rows too. Collective.

    Greedy heavy-edge matching on cosines (paper 002, algorithm 1) without a threshold, so that the number of coarse
    neurons is that of half the width, rounded up, whatever the weights are.

    Raises
    ------
    ValueError
        If the weights are not finite.
    """
    products = gram(network, x)
    if not bool(products.isfinite().all()):
        raise ValueError("the weights have NaN or inf in them, must be finite to be matched; use finite weights")
    norms = products.diagonal().sqrt()
    unit = norms.masked_fill(norms == 0, 1)
    # Multiples of 2^-40: rounding is not to decide where neurons are equally near.
    cosines = (products / unit / unit[:, None] * 2.0**40).round() / 2.0**40
    return match(cosines.clamp(-1, 1) + 2, threshold=-1.0), norms  # above any threshold: all are paired


@dataclass(frozen=True, eq=False)
class StateWidthTransfer:
    """Pi, P and R = P^T between networks of width C and (C + 1) // 2 at the same depth.

    Every rank carries the layers that it owns over; only the matching is collective.

    Parameters
    ----------
    coarse, fine : DenseResNet
        Of the same depth and partition, over the same communicator.
    scaling : {"mean", "norms", "sums"}
        See `LayerMatrices`; other than mean for the activations relu and identity.
    matrices : LayerMatrices, optional
        Of the state; `renewed` gives a transfer that has them.

    Raises
    ------
    ValueError
        If the networks do not fit each other, the scaling does not go with the activation, or the weights are splines.
    """

    coarse: DenseResNet
    fine: DenseResNet
    scaling: str = "mean"
    matrices: LayerMatrices | None = None

    def __post_init__(self):
        wanted = (self.fine.block.outputs + 1) // 2
        if self.coarse.block.outputs != wanted:
            raise ValueError(
                f"coarse width={self.coarse.block.outputs} must be {wanted}, half of the fine one, rounded up"
            )
        refuse_splines(self.coarse.splines or self.fine.splines)
        if self.coarse.partition != self.fine.partition:
            raise ValueError("coarse and fine network must have the same layers on the same ranks; use one partition")
        for network in (self.coarse, self.fine):
            if getattr(network.block, "bias", "vector") != "vector":
                raise ValueError("bias=scalar belongs to no neuron, must be vector for a narrower network; use vector")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use mean")
        if self.scaling != "mean" and self.fine.block.activation not in _HOMOGENEOUS:
            raise ValueError(
                f"scaling={self.scaling!r} needs an activation with s(a z) = a s(z) for a > 0, not "
                f"{self.fine.block.activation}; use mean"
            )

    def renewed(self, x: Tensor) -> StateWidthTransfer:
        """The transfer with the neurons matched by the weights x; collective."""
        matching, norms = match_state(self.fine, x)
        # Over all layers the norms are large. Only their ratios matter, and gradients are to keep their size.
        norms = norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
        return replace(self, matrices=LayerMatrices.of(matching, self.scaling, norms, self.fine.dtype))

    def restrict(self, x: Tensor) -> Tensor:
        """Pi x: weights of the coarse network."""
        return self._joined(x, self._state.pi, self._state.P)

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g with R = P^T."""
        return self._joined(gradient, self._state.P, self._state.pi)

    def prolong(self, x: Tensor) -> Tensor:
        """P x: weights, or a correction, of the fine network."""
        out = self.fine.layout.zeros()
        state, source, target = self._state, self.coarse.layout.named(x), self.fine.layout.named(out)
        for name, values in source.items():
            stack, _, kind = name.partition(".")
            if len(values):
                if stack != "classification":
                    values = state.spread(values, 1, state.P)
                if kind == "weight" and stack != "opening":
                    values = state.spread(values, 2, state.pi)
                target[name].copy_(values)
        return out

    def _joined(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = self.coarse.layout.zeros()
        state, source, target = self._state, self.fine.layout.named(x), self.coarse.layout.named(out)
        for name, values in source.items():
            stack, _, kind = name.partition(".")
            if len(values):
                if stack != "classification":
                    values = state.joined(values, 1, rows)
                if kind == "weight" and stack != "opening":
                    values = state.joined(values, 2, columns)
                target[name].copy_(values)
        return out

    @property
    def _state(self) -> LayerMatrices:
        if self.matrices is None:
            raise ValueError("matrices=None: the neurons are not matched yet; use the transfer that renewed(x) returns")
        return self.matrices


class ComposedTransfer:
    """Transfers one after the other, the finest first: a coarse network that is narrower and shallower, for one.

    Parameters
    ----------
    parts : sequence of Transfer
    """

    def __init__(self, parts: Sequence[Transfer]):
        self.parts = tuple(parts)

    def renewed(self, x: Tensor) -> ComposedTransfer:
        """The parts at the weights x."""
        found = []
        for part in self.parts:
            found.append(part.renewed(x))
            x = found[-1].restrict(x)
        return ComposedTransfer(found)

    def restrict(self, x: Tensor) -> Tensor:
        """Weights of the coarse network."""
        for part in self.parts:
            x = part.restrict(x)
        return x

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g, the transpose of `prolong`."""
        for part in self.parts:
            gradient = part.restrict_gradient(gradient)
        return gradient

    def prolong(self, x: Tensor) -> Tensor:
        """Weights, or a correction, of the fine network."""
        for part in reversed(self.parts):
            x = part.prolong(x)
        return x
