"""Which two neurons become one of the next coarser network, pi and P of a layer, and of the state of all layers.

Heavy-edge matching is that of paper 002, section 5.5. Greedy matching visits neurons in their order and gives each the
nearest one that is still free. All neurons before the visited one are taken by then, so it reads the similarities with
later, free neurons alone. `match_rows` computes no others: a block of rows at a time, about a quarter of the matrix.

Restriction pi and prolongation P (section 5.4) need no matrices. A layer's n neurons, or channels, are joined to m
aggregates. pi is (m, n), P is (n, m), and pi P = I. Both have one number for each neuron, so each is kept as a vector.
With E (n, m) the indicators of the aggregates, D the norms of the neurons' rows and S = E^T D E, the sums of the norms
in each aggregate, `scaling` is one of

* "mean" (eq. 32): pi = (E^T E)^-1 E^T, P = E. A pair is averaged.
* "norms" (eq. 34): pi = S^-1 E^T, P = D E. The neurons of a pair may differ by a positive factor.
* "sums": pi = E^T, P = D E S^-1. A pair is added up, and the neurons' shares of the norms stand in P.

Sums are norms with the coarse neurons scaled: pi_sums = S pi_norms and P_sums = P_norms S^-1. Where
phi(S z) = S phi(z), as for ReLU, S cancels between the rows of a layer and the columns of the next one, and the coarse
functions are the same. Gradients restricted by R = P^T are not, so a step of the same rate is another one. Other
activations allow "mean" alone: under the other scalings they would change even single neurons.

All residual layers of a network act on the same state, so one matching holds for all of them. Neurons of the state are
alike if their rows are alike in the opening layer and in every residual layer: u_{n+1} = u_n + h s(W_n u_n + b_n) then
keeps them alike. With pi and P of the state the coarse weights are

    opening pi W, pi b;   layers pi W_n P, pi b_n;   classification W P, b,

and those of paper 002 (eq. 25 to 28) for a network whose layers have the same pi and P on both sides.

Shape letters: `n` neurons, or residual layers owned here, `m` aggregates, `d` numbers of a neuron's row, `C` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xbraid_py.multilevel.depth.transfer import refuse_splines
from xbraid_py.multilevel.width.options import METHODS, SCALINGS
from xbraid_py.problem.network import DenseResNet

_BLOCK = 64  # at least so many rows at a time
# Parallel rows have the same cosines up to rounding, which depends on how a product is cut into pieces. They tie
# where they should once the cosines are multiples of these.
_QUANTA = {torch.float32: 2.0**-20, torch.float64: 2.0**-40}


@dataclass(frozen=True, eq=False)
class Matching:
    """Pairs and singletons of n neurons. Aggregates are numbered in the order of their first members.

    Attributes
    ----------
    partner : Tensor
        (n,) integers: pi of algorithm 1, the neuron itself for a singleton.
    aggregate : Tensor
        (n,) integers: zeta of algorithm 1, counted from 0.
    first, second : Tensor
        (m,) integers: the members of each aggregate, the same one twice for a singleton.
    """

    partner: Tensor
    aggregate: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, partner: Tensor) -> Self:
        """The matching of these partners (n,); `ValueError` if the partner of a neuron's partner is another neuron."""
        here = torch.arange(len(partner), device=partner.device)
        inside = bool(((partner >= 0) & (partner < len(partner))).all())
        if not (inside and torch.equal(partner[partner], here)):
            raise ValueError(f"partner={partner.tolist()} must pair neurons both ways; use {here.tolist()} for no pair")
        first = (partner >= here).nonzero()[:, 0]
        second = partner[first]
        aggregate = torch.empty_like(here)
        aggregate[first] = aggregate[second] = torch.arange(len(first), device=partner.device)
        return cls(partner, aggregate, first, second)

    @property
    def num_fine(self) -> int:
        """n."""
        return len(self.partner)

    @property
    def num_coarse(self) -> int:
        """m."""
        return len(self.first)

    @property
    def num_pairs(self) -> int:
        """Aggregates of two neurons, n - m."""
        return self.num_fine - self.num_coarse


def match(similarity: Tensor, threshold: float = 0.0, method: str = "greedy") -> Matching:
    """Match neurons by a matrix (n, n) of similarities, symmetric; only what is above the diagonal is read, -inf is no
    edge.

    Parameters
    ----------
    similarity : Tensor
    threshold : float
        theta, between -1 and 1: a pair must be more similar than this.
    method : {"greedy", "mutual"}
        Algorithm 1, or rounds: all free neurons that are each other's nearest become pairs, until there are none.
        Equal similarities: the neuron of the lowest number.

    Raises
    ------
    ValueError
        If the matrix is not square, has NaN or inf, or an option is none of these.
    """
    _check(threshold, method)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not len(similarity):
        raise ValueError(f"similarity has the shape {tuple(similarity.shape)}, must be square; use (n, n) with n > 0")
    _check_type("similarity", similarity)
    similarity = similarity.detach()
    if not bool((similarity < torch.inf).all()):
        raise ValueError("similarity has NaN or inf in it, must be comparable; use -inf for no edge")
    if method == "mutual":
        partner = _mutual(_edges(similarity, threshold).cpu().numpy())
    else:
        weights = similarity.cpu().numpy()
        partner = _greedy(len(weights), lambda free, count: weights[np.ix_(free[:count], free)], threshold)
    return Matching.of(torch.from_numpy(partner).to(similarity.device))


def match_rows(rows: Tensor, threshold: float = 0.0, method: str = "greedy") -> Matching:
    """Match neurons by the cosines between their rows (n, d) of float32 or float64, computed where the rows are.

    A row is weights and bias of a neuron; one of zeros has no direction and remains single. Options are those of
    `match`. Raises `ValueError` if a row has NaN or inf, or an option is none of those allowed.
    """
    _check(threshold, method)
    if method == "mutual":
        return match(cosines(rows), threshold, method)
    unit, zero = _directions(rows)

    def block(free: np.ndarray, count: int) -> np.ndarray:
        index = torch.from_numpy(free).to(unit.device)
        return _products(unit[index], zero[index], count).cpu().numpy()

    return Matching.of(torch.from_numpy(_greedy(len(unit), block, threshold)).to(rows.device))


def cosines(rows: Tensor) -> Tensor:
    """The cosines (n, n) between rows (n, d), rounded to 2^-20 (float32) or 2^-40; -inf where a row is zero.

    Raises `ValueError` if a row has NaN or inf.
    """
    unit, zero = _directions(rows)
    return _products(unit, zero, len(unit))


def _check(threshold: float, method: str) -> None:
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be between -1 and 1, as cosines are; use 0")
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be {' or '.join(METHODS)}; use greedy")


def _check_type(name: str, values: Tensor) -> None:
    if values.dtype not in _QUANTA:
        raise ValueError(f"{name} is of {values.dtype}, must be float32 or float64; use {name}.float()")


def _directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, d) of length 1, and which of them (n,) are zero."""
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"rows has the shape {tuple(rows.shape)}, must be (n, d); use one row for each neuron")
    _check_type("rows", rows)
    rows = rows.detach()
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    finite = largest.isfinite()
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"rows[{row}] has NaN or inf in it, must be finite to have a direction; use finite weights")
    zero = largest == 0
    # Divided by the largest entry first: the squares of very large or small numbers are inf or 0.
    unit = rows / largest.masked_fill(zero, 1)[:, None]
    return unit.div_(torch.linalg.vector_norm(unit, dim=1).masked_fill_(zero, 1)[:, None]), zero


def _products(unit: Tensor, zero: Tensor, count: int) -> Tensor:
    """Cosines (count, n) of the first rows of (n, d) with all of them."""
    quantum = _QUANTA[unit.dtype]
    found = unit[:count] @ unit.T
    found.mul_(1 / quantum).round_().mul_(quantum).clamp_(-1, 1)
    return found.masked_fill_(zero | zero[:count, None], -torch.inf) if bool(zero.any()) else found


def _greedy(n: int, block: Callable[[np.ndarray, int], np.ndarray], threshold: float) -> np.ndarray:
    """Algorithm 1: partners (n,). `block(free, count)` are the similarities of the first free neurons with all free."""
    partner = np.arange(n)
    free = partner.copy()
    while len(free):
        # An eighth of them: larger blocks compute more rows that are taken before their turn, smaller ones copy more.
        count = min(max(_BLOCK, len(free) // 8), len(free) - 1)  # the very last one has nobody to be paired with
        if not count:
            break
        weights = block(free, count)
        theta = weights.dtype.type(threshold)
        taken = np.zeros(len(free), weights.dtype)  # -inf for those that are: added, it hides them
        for i in range(count):
            if taken[i]:
                continue
            candidates = weights[i, i + 1 :] + taken[i + 1 :]
            nearest = candidates.argmax()  # the first one where they tie
            taken[i] = -np.inf
            if candidates[nearest] > theta:
                j = i + 1 + nearest
                taken[j] = -np.inf
                partner[free[i]], partner[free[j]] = free[j], free[i]
        free = free[taken == 0]
    return partner


def _edges(similarity: Tensor, threshold: float) -> Tensor:
    """The symmetric matrix of what is above the diagonal, -inf for what is no edge."""
    upper = similarity.triu(1)
    weights = (upper + upper.T).fill_diagonal_(-torch.inf)
    return weights.masked_fill_(weights <= threshold, -torch.inf)


def _mutual(weights: np.ndarray) -> np.ndarray:
    """Partners (n,) by rounds of mutually nearest neurons.

    Every round has a pair: among the free neurons with the greatest similarity, the one of the lowest number is the
    nearest of its own nearest one.
    """
    partner = np.arange(len(weights))
    free = np.ones(len(weights), bool)
    nearest = partner.copy()
    changed = partner.copy()  # free neurons whose nearest one is not known
    while len(changed):
        among = np.flatnonzero(free)
        everybody = len(changed) == len(weights)
        choice = weights if everybody else weights[np.ix_(changed, among)]
        nearest[changed] = among[choice.argmax(1)]
        alone = np.isneginf(weights[changed, nearest[changed]])
        free[changed[alone]] = False  # nobody is left for these, and they are nobody's nearest
        left = np.flatnonzero(free)
        paired = left[nearest[nearest[left]] == left]
        partner[paired] = nearest[paired]
        free[paired] = False
        left = np.flatnonzero(free)
        changed = left[~free[nearest[left]]]
    return partner


@dataclass(frozen=True, eq=False)
class LayerMatrices:
    """pi (m, n) and P (n, m) of a layer: `matching` says which entries are not zero.

    `pi` and `P` (n,) are the entry that a neuron has in its aggregate's row of pi, and in its own row of P.
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
    neurons is that of half the width, rounded up, whatever the weights are. Raises `ValueError` if these are not
    finite.
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
        return self._carried(x, self.coarse, self.fine, self._state.spread, self._state.P, self._state.pi)

    def _joined(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self._carried(x, self.fine, self.coarse, self._state.joined, rows, columns)

    @staticmethod
    def _carried(x: Tensor, source: DenseResNet, target: DenseResNet, move, rows: Tensor, columns: Tensor) -> Tensor:
        """Weights of one network as those of the other: `move`, joined or spread, along rows and along columns."""
        out = target.layout.zeros()
        views = target.layout.named(out)
        for name, values in source.layout.named(x).items():
            stack, _, kind = name.partition(".")
            if len(values):
                if stack != "classification":
                    values = move(values, 1, rows)
                if kind == "weight" and stack != "opening":
                    values = move(values, 2, columns)
                views[name].copy_(values)
        return out

    @property
    def _state(self) -> LayerMatrices:
        if self.matrices is None:
            raise ValueError("matrices=None: the neurons are not matched yet; use the transfer that renewed(x) returns")
        return self.matrices
