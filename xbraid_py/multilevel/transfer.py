"""Transfers of weights between networks of different depth.

Shape letters: `n` layers owned here, `p` parameters of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.network import ResidualNetwork


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


def prolong_depth(coarse: ResidualNetwork, fine: ResidualNetwork, x: Tensor, interpolation: str) -> Tensor:
    """Weights of a network with twice as many layers (paper 001, eq. 8).

    Parameters
    ----------
    coarse, fine : ResidualNetwork
        N and 2N layers, over the same communicator.
    x : Tensor
        Flat vector of the coarse network.
    interpolation : {"constant", "linear"}
        Layer 2n takes the weights of layer n; layer 2n + 1 the same, or the mean of those of n and n + 1
        (those of n at the end). Opening and classification layers are copied.

    Returns
    -------
    Tensor
        Flat vector of the fine network.
    """
    if fine.grid.num_layers != 2 * coarse.grid.num_layers:
        raise ValueError(
            f"fine num_layers={fine.grid.num_layers} must be {2 * coarse.grid.num_layers}, twice the coarse"
        )
    comm, rows = coarse.comm, coarse.layout.rows(x)
    theta = rows["layers"]
    following = None
    if interpolation == "linear" and len(theta):
        following = comm.shift(theta[:1], coarse.partition, -1)
    both = prolong_rows(theta, interpolation, following)
    out = fine.layout.zeros()
    target = fine.layout.rows(out)
    target["layers"].copy_(comm.redistribute(both, coarse.partition.refine(2), fine.partition))
    # The last layer, and with it the classification layer, may have another owner; the opening layer never has.
    target["opening"].copy_(rows["opening"])
    hand_over(comm, rows["classification"], target["classification"], coarse.last_rank, fine.last_rank)
    return out


def hand_over(comm, row: Tensor, target: Tensor, source: int, dest: int) -> None:
    if comm.rank == source == dest:
        target.copy_(row)
    elif comm.rank == source:
        comm.isend(row.contiguous(), dest)()
    elif comm.rank == dest:
        comm.recv(target, source)
