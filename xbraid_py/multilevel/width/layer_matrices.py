"""Restriction pi and prolongation P of what one layer puts out, without matrices (paper 002, section 5.4).

A layer's n neurons, or channels, are joined to m aggregates. pi is (m, n), P is (n, m), and pi P = I. Both have one
number for each neuron, so each is kept as a vector. With E (n, m) the indicators of the aggregates, D the norms of the
neurons' rows and S = E^T D E, the sums of the norms in each aggregate, `scaling` is one of

* "mean" (eq. 32): pi = (E^T E)^-1 E^T, P = E. A pair is averaged.
* "norms" (eq. 34): pi = S^-1 E^T, P = D E. The neurons of a pair may differ by a positive factor.
* "sums": pi = E^T, P = D E S^-1. A pair is added up, and the neurons' shares of the norms stand in P.

Sums are norms with the coarse neurons scaled: pi_sums = S pi_norms and P_sums = P_norms S^-1. Where
phi(S z) = S phi(z), as for ReLU, S cancels between the rows of a layer and the columns of the next one, and the coarse
functions are the same. Gradients restricted by R = P^T are not, so a step of the same rate is another one. Other
activations allow "mean" alone: under the other scalings they would change even single neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from xbraid_py.multilevel.width.matching import Matching

SCALINGS = ("mean", "norms", "sums")


@dataclass(frozen=True, eq=False)
class LayerMatrices:
    """pi (m, n) and P (n, m) of a layer.

    Attributes
    ----------
    matching : Matching
        Which entries are not zero.
    pi, P : Tensor
        (n,): the entry that a neuron has in its aggregate's row of pi, and in its own row of P.
    """

    matching: Matching
    pi: Tensor
    P: Tensor

    @classmethod
    def of(cls, matching: Matching, scaling: str, norms: Tensor, dtype: torch.dtype) -> Self:
        """Those for neurons with these norms (n,) of float64, as numbers of `dtype`; a norm of zero counts as 1."""
        # eq. 32 is eq. 34 with D = I. What is no normal number of the type would have no reciprocal.
        unscaled = (norms < torch.finfo(dtype).tiny) | (scaling == "mean")
        norms = norms.masked_fill(unscaled, 1)
        pairs = matching.second != matching.first
        total = (norms[matching.first] + norms[matching.second] * pairs)[matching.aggregate]  # P^T D P
        pi, P = (torch.ones_like(norms), norms / total) if scaling == "sums" else (1 / total, norms)  # eq. 34
        return cls(matching, pi.to(dtype), P.to(dtype))

    def joined(self, values: Tensor, dim: int, entries: Tensor) -> Tensor:
        """n slices along `dim` to m, each the sum over an aggregate's members times their `entries`, pi or P."""
        first, second = self.matching.first, self.matching.second
        other = entries[second].masked_fill(second == first, 0)
        out = values.index_select(dim, first).mul_(_along(entries[first], values, dim))
        return out.addcmul_(values.index_select(dim, second), _along(other, values, dim))

    def spread(self, values: Tensor, dim: int, entries: Tensor) -> Tensor:
        """m slices along `dim` to n, each that of a neuron's aggregate times its entry of `entries`, pi or P."""
        return values.index_select(dim, self.matching.aggregate).mul_(_along(entries, values, dim))


def _along(entries: Tensor, values: Tensor, dim: int) -> Tensor:
    return entries.view(-1, *[1] * (values.ndim - dim - 1))
