"""The weights of a stack whose parameters are spline coefficients: columns of the layers owned here, with autograd.

Shape letters: `M` coefficients of a weight, `n` layers owned here, `p` numbers of a layer.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.window import Window
from xbraid_py.layers.spline_weights import SplineLayers
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit.grid import LayerGrid


class Expand(torch.autograd.Function):
    """`apply(layers, *coefficients)`: columns (n, *shape) from coefficients (M, *shape), the same on all ranks.

    The backward pass is collective: it sums the gradients of all layers, and every rank gets the sum.
    """

    @staticmethod
    def forward(ctx, layers: SplineLayers, *coefficients: Tensor) -> tuple[Tensor, ...]:
        """The weights of the layers owned here."""
        ctx.layers, ctx.shapes = layers, [each.shape[1:] for each in coefficients]
        found = tuple(
            layers.layers(_flat(each)).reshape(-1, *shape) for each, shape in zip(coefficients, ctx.shapes, strict=True)
        )
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(each for each, want in zip(found, wanted, strict=True) if not want))
        return found

    @staticmethod
    def backward(ctx, *slopes: Tensor):
        """Gradients of the coefficients."""
        layers, wanted = ctx.layers, ctx.needs_input_grad[1:]
        sizes = [prod(shape) for shape in ctx.shapes]
        rows = torch.cat([_flat(slope) for slope, want in zip(slopes, wanted, strict=True) if want], 1)
        sums = layers.sums(rows)
        if sums is None:
            sums = rows.new_empty((layers.splines.num, rows.shape[1]))
        parts = iter(
            layers.comm.broadcast(sums, layers.root).split(
                [size for size, want in zip(sizes, wanted, strict=True) if want], 1
            )
        )
        found = (
            next(parts).reshape(-1, *shape) if want else None for shape, want in zip(ctx.shapes, wanted, strict=True)
        )
        return None, *found


def spline_layers(
    splines: Splines | None, grid: LayerGrid, partition: Partition, comm: Communicator, window: Window
) -> SplineLayers | None:
    """The weights of a stack's layers from coefficients; None without splines.

    Raises
    ------
    TypeError
        If these are no splines.
    ValueError
        If the stack is a window of a deeper one, whose layers share the coefficients.
    """
    if splines is None:
        return None
    if not isinstance(splines, Splines):
        raise TypeError(f"splines={splines!r} must be Splines or None; use Splines(8)")
    if window != Window():
        raise ValueError(f"splines={splines} must be None in a window of a deeper stack; use LayerParallel without one")
    return SplineLayers(splines, grid, partition, comm)


def _flat(column: Tensor) -> Tensor:
    """Rows (n, size) of a column (n, *shape), whose layers may have one number."""
    return column[:, None].flatten(1)
