"""Transfers of weights between networks of different depth."""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.network import ResidualNetwork


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
    if interpolation not in ("constant", "linear"):
        raise ValueError(f"interpolation={interpolation!r} must be constant or linear; use constant")
    comm, rows = coarse.comm, coarse.layout.rows(x)
    theta = rows["layers"]
    odd = theta
    if interpolation == "linear" and len(theta):
        following = comm.shift(theta[:1], coarse.partition, -1)
        behind = torch.cat([theta[1:], theta[-1:] if following is None else following])
        odd = (theta + behind) / 2
    both = torch.stack([theta, odd], 1).flatten(0, 1)
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
