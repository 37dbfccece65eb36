"""Transfers between networks of different depth: of weights to a deeper one, and both ways between neighbors of MG/OPT.

What is consistent. The weights are values of a function theta(t) on [0, T], a layer is a step of size h = T / N, and a
coarse layer stands for two fine ones with the step H = 2h.

* Weights. I repeats (or interpolates) values, so each row of I sums to 1. The coarse network discretizes the same
  equation y' = F(y, theta(t)) if the coarse weights are values of the same function: each row of the restriction has to
  sum to 1. Injection (theta at the beginning of the coarse step) and averaging do. The rows of R = I^T sum to 2: used
  on weights, it makes a coarse network for 2 theta(t), and for 2^(L-1) theta(t) on the coarsest of L levels. R would
  be right for h theta, the weights of a network without a step size.
* Gradients. A gradient pairs with changes of the weights: <g, I e> = <I^T g, e>, hence R = I^T whatever restricts the
  weights. It is consistent as it stands: g_k is about h G(t_k) with G the gradient in L2(0, T), and R sums two of them
  to 2h G = H G, which is what the coarse network's own gradient is about.
* First-order consistency, grad H(x^0) = R grad H_fine(x), holds for each of the restrictions, by the coupling term.

So injection and averaging satisfy both demands. Averaging is the least-squares restriction for the constant I: two
fine steps make u + h F(u, theta_0) + h F(u, theta_1) + O(h^2), for F linear in theta a coarse step with their mean.
Injection keeps the size of weights that are no smooth function of depth, such as random initial ones, of which
averaging halves the variance on every level. Injection is the default. Opening and classification have no depth: they
are carried unchanged, and so are their gradients.

Shape letters: `N` layers of the coarse network, `n` layers owned here, `p` parameters of a layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.splines import Splines
from xbraid_py.multilevel.depth.options import INTERPOLATIONS, RESTRICTIONS
from xbraid_py.problem.network import DenseResNet


def prolong_rows(rows: Tensor, interpolation: str, following: Tensor | None = None) -> Tensor:
    """Weights of 2n layers from those of n (paper 001, eq. 8): row 2k is row k, row 2k + 1 lies behind it.

    Parameters
    ----------
    rows : (n, p) tensor
    interpolation : {"constant", "linear"}
        Row 2k + 1 is row k, or the mean of rows k and k + 1.
    following : (1, p) tensor, optional
        The row behind the last one; without, behind the last row lies itself.

    Returns
    -------
    (2n, p) tensor

    Raises
    ------
    ValueError
        If the interpolation is neither.
    """
    if interpolation not in ("constant", "linear"):
        raise ValueError(f"interpolation={interpolation!r} must be constant or linear; use constant")
    odd = rows
    if interpolation == "linear" and len(rows):
        behind = torch.cat([rows[1:], rows[-1:] if following is None else following])
        odd = (rows + behind) / 2
    return torch.stack([rows, odd], 1).flatten(0, 1)


def doubled_rows(comm, rows: Tensor, partition: Partition, interpolation: str) -> Tensor:
    """Rows (2n, *p) where those (n, *p) of a partition are; a rank hears of the row behind its last one."""
    following = None
    if interpolation == "linear" and len(rows):
        following = comm.shift(rows[:1], partition, -1)
    return prolong_rows(rows, interpolation, following)


def halved_rows(comm, rows: Tensor, fine: Partition, coarse: Partition, how: str) -> Tensor:
    """Rows (n, *p) of a coarse partition from those of the fine one: collective.

    `how` is inject, average, or the interpolation, constant or linear, whose transpose is meant.
    """
    pairs = comm.redistribute(rows, fine, coarse.refine(2))
    even, odd = pairs[0::2], pairs[1::2]
    if how == "inject":
        return even
    if how == "average":
        return (even + odd) / 2
    if how == "constant":
        return even + odd
    # Column k of the linear I: 1 for layer 2k, 1/2 for 2k - 1 and 2k + 1; 1 for the very last layer.
    before = comm.shift(odd[-1:], coarse, +1) if len(odd) else None
    behind = torch.cat([torch.zeros_like(odd[:1]) if before is None else before, odd[:-1]])
    share = odd / 2
    if comm.rank == coarse.last_owner:
        share[-1] = odd[-1]
    return even + share + behind / 2


def prolong_depth(
    coarse: DenseResNet,
    fine: DenseResNet,
    x: Tensor,
    interpolation: str,
    chosen: Collection[int] | None = None,
) -> Tensor:
    """Weights of a network with twice as many layers (paper 001, eq. 8), or with some of the layers cut in two.

    Parameters
    ----------
    coarse, fine : DenseResNet
        N and 2N layers, or as many more than N as are chosen, over the same communicator.
    x : Tensor
        Flat vector of the coarse network.
    interpolation : {"constant", "linear"}
        Layer 2n takes the weights of layer n; layer 2n + 1 the same, or the mean of those of n and n + 1
        (those of n at the end). Opening and classification layers are copied. Of splines the coefficients stay as they
        are, or, if the fine network has more knots, the functions do. The weights of a layer are those where it begins,
        so this is linear in the distance on grids that are not uniform, too.
    chosen : collection of int, optional
        The layers that are cut; all if not given.

    Returns
    -------
    Tensor
        Flat vector of the fine network.
    """
    number = coarse.grid.num_layers
    if chosen is None and fine.grid.num_layers != 2 * number:
        raise ValueError(f"fine num_layers={fine.grid.num_layers} must be {2 * number}, twice the coarse")
    if chosen is not None and fine.grid != coarse.grid.halve(chosen):
        raise ValueError(f"fine grid of {fine.grid.num_layers} layers must be the coarse one with chosen={chosen} cut")
    insertion = _insertion(coarse.splines, fine.splines)
    comm, rows = coarse.comm, coarse.layout.rows(x)
    out = fine.layout.zeros()
    target = fine.layout.rows(out)
    # The last layer, and with it the classification layer, may have another owner; the opening layer never has.
    target["opening"].copy_(rows["opening"])
    hand_over(comm, rows["classification"], target["classification"], coarse.last_rank, fine.last_rank)
    theta = rows["layers"]
    if fine.splines is not None:
        # All rows are on one rank, so that a product of matrices has the same bits on any number of ranks.
        target["layers"].copy_(theta if insertion is None or not len(theta) else insertion.to(theta.dtype) @ theta)
        return out
    both = doubled_rows(comm, theta, coarse.partition, interpolation)
    source = coarse.partition.refine(2)
    if chosen is not None:
        # Before row i of the coarse network there are i rows, and one more for each that is cut.
        cut = sorted(chosen)
        source = Partition(tuple(bound + bisect_left(cut, bound) for bound in coarse.partition.bounds))
        first, count = coarse.partition.first(comm.rank), coarse.partition.count(comm.rank)
        kept = [row for n in range(count) for row in (2 * n, 2 * n + 1)[: 1 + (first + n in chosen)]]
        both = both[kept]
    target["layers"].copy_(comm.redistribute(both, source, fine.partition))
    return out


def _insertion(coarse: Splines | None, fine: Splines | None) -> Tensor | None:
    """Matrix of knot insertion; None where the splines are the same, or there are none. Wrong ones are an error."""
    if (coarse is None) != (fine is None):
        raise ValueError(
            f"coarse splines={coarse} and fine splines={fine} must both be splines, or both None; use {coarse or fine}"
        )
    return None if coarse is None or fine is None or coarse == fine else coarse.insertion(fine)


def check_transfer(interpolation: str, restriction: str) -> None:
    """Raise `ValueError` if a word is none that transfers know."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} must be {' or '.join(INTERPOLATIONS)}; use constant")
    if restriction not in RESTRICTIONS:
        raise ValueError(f"restriction={restriction!r} must be {' or '.join(RESTRICTIONS)}; use inject")


def refuse_splines(splines: Splines | None) -> None:
    """Raise `ValueError` if there are splines: their coefficients have no coarser level."""
    if splines is not None:
        raise ValueError(
            f"splines={splines} must be None for MG/OPT, which needs layers with weights of their own; use "
            f"splines=None, or nested iteration"
        )


def hand_over(comm, row: Tensor, target: Tensor, source: int, dest: int) -> None:
    if comm.rank == source == dest:
        target.copy_(row)
    elif comm.rank == source:
        comm.isend(row.contiguous(), dest)()
    elif comm.rank == dest:
        comm.recv(target, source)


class DepthTransfer:
    """Prolongation and restriction between networks of N and 2N layers.

    Rows move between ranks where the partitions of the two networks ask for it, and otherwise only the rows of
    neighbors that linear interpolation needs.

    Parameters
    ----------
    coarse, fine : DenseResNet
        N and 2N layers, over the same communicator.
    interpolation : {"constant", "linear"}
        I: layer 2k + 1 takes the weights of coarse layer k, or the mean of those of k and k + 1 (those of k at the
        end); layer 2k takes those of k.
    restriction : {"inject", "average", "transpose"}
        Of the weights: those of layer 2k, the mean of 2k and 2k + 1, or the literal I^T of paper 000.

    Raises
    ------
    ValueError
        If the depths do not fit, a word is none of these, or the weights are splines.
    """

    def __init__(
        self,
        coarse: DenseResNet,
        fine: DenseResNet,
        interpolation: str = "constant",
        restriction: str = "inject",
    ):
        if fine.grid.num_layers != 2 * coarse.grid.num_layers:
            raise ValueError(
                f"fine num_layers={fine.grid.num_layers} must be {2 * coarse.grid.num_layers}, twice the coarse"
            )
        refuse_splines(coarse.splines or fine.splines)
        check_transfer(interpolation, restriction)
        self.coarse, self.fine = coarse, fine
        self.interpolation, self.restriction = interpolation, restriction

    def prolong(self, x: Tensor) -> Tensor:
        """I x, for weights and for corrections."""
        return prolong_depth(self.coarse, self.fine, x, self.interpolation)

    def restrict(self, x: Tensor) -> Tensor:
        """Weights of the coarse network, as `restriction` says."""
        return self._restricted(x, self.interpolation if self.restriction == "transpose" else self.restriction)

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g with R = I^T."""
        return self._restricted(gradient, self.interpolation)

    def renewed(self, x: Tensor) -> DepthTransfer:
        """This one: it does not depend on the weights."""
        return self

    def _restricted(self, x: Tensor, how: str) -> Tensor:
        """Coarse layers from pairs of fine ones; opening and classification unchanged."""
        coarse, fine, comm = self.coarse, self.fine, self.coarse.comm
        rows = fine.layout.rows(x)
        out = coarse.layout.zeros()
        target = coarse.layout.rows(out)
        target["layers"].copy_(halved_rows(comm, rows["layers"], fine.partition, coarse.partition, how))
        target["opening"].copy_(rows["opening"])
        hand_over(comm, rows["classification"], target["classification"], fine.last_rank, coarse.last_rank)
        return out
