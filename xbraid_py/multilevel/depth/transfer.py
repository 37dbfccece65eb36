"""Transfers of weights between networks of different depth.

Shape letters: `n` layers owned here, `p` parameters of a layer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

import torch
from torch import Tensor

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.splines import Splines
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
    following = None
    if interpolation == "linear" and len(theta):
        following = comm.shift(theta[:1], coarse.partition, -1)
    both = prolong_rows(theta, interpolation, following)
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
    return None if coarse == fine else coarse.insertion(fine)


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
