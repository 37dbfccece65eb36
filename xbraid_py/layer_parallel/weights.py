"""The weights of a stack of blocks: the layers owned here on the first axis, the whole stack in a state dict.

Shape letters: `N` layers, `n` of them owned here, `M` coefficients of splines in depth, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import together
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.module_block import ModuleBlock, own_random_numbers
from xbraid_py.layers.norm_dropout import Moments
from xbraid_py.layers.splines import SplineLayers, Splines
from xbraid_py.mgrit.grid import LayerGrid


class StackedWeights(nn.Module):
    """Parameters (n, *shape) under the names that they have in a block.

    `state_dict()` holds all N layers, (N, *shape), on every rank, whatever the number of ranks; it is collective, as is
    nothing else here. `load_state_dict` takes such a dict and keeps the layers owned here.

    Parameters
    ----------
    make : callable
        Makes a block.
    grid : LayerGrid
    partition : Partition
        Of the layers.
    comm : Communicator
    seed : int
        The weights of a layer depend on it and on the number of the layer.
    first_layer : int
        Number of the first layer, where these are not all layers of a stack.
    splines : Splines, optional
        The parameters (M, *shape) are the coefficients of splines in depth then, on every rank alike, each row drawn as
        the weights of a layer are. Buffers have a row for each layer.
    form : {"increment", "map"}, optional
        As of `ModuleBlock`.

    Attributes
    ----------
    block : ModuleBlock
        The block that all layers are evaluated with. It goes along with the weights, in type, device and mode.
    splines : SplineLayers or None
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        grid: LayerGrid,
        partition: Partition,
        comm: Communicator,
        seed: int,
        first_layer: int = 0,
        splines: Splines | None = None,
        form: str | None = None,
    ):
        super().__init__()
        self.partition, self.comm = partition, comm
        self.splines = None if splines is None else SplineLayers(splines, grid, partition, comm)
        first, count = first_layer + partition.first(comm.rank), partition.count(comm.rank)
        with together(comm):
            made, tensors = self._make(make, seed, form, range(first, first + count))
            if splines is not None:
                _, rows = self._make(make, seed, form, range(splines.num))
                choices = zip(made.columns, rows, tensors, strict=True)
                tensors = [row if column.is_parameter else tensor for column, row, tensor in choices]
        self.block = made
        for column, tensor in zip(made.columns, tensors, strict=True):
            *path, last = column.name.split(".")
            place: nn.Module = self
            for name in path:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            if column.is_parameter:
                wanted = dict(made.module.named_parameters())[column.name].requires_grad
                place.register_parameter(last, nn.Parameter(tensor, requires_grad=wanted))
            else:
                place.register_buffer(last, tensor)
        self.register_state_dict_post_hook(_gather)
        self.register_load_state_dict_pre_hook(_slice)
        self.train()

    @staticmethod
    def _make(make, seed: int, form: str | None, layers: range) -> tuple[ModuleBlock, list[Tensor]]:
        def block_of(layer: int) -> nn.Module:
            with own_random_numbers(hash((seed, layer)) & (2**63 - 1)):
                found = make()
            if not isinstance(found, nn.Module):
                raise TypeError(f"block() made {type(found).__name__}; it must make an nn.Module")
            return found

        block = ModuleBlock(block_of(0), seed, form)
        kinds = [(column.name, column.shape) for column in block.columns]
        rows: list[list[Tensor]] = []
        for layer in layers:
            module = block_of(layer)
            have = [(column.name, column.shape) for column in ModuleBlock(module, seed).columns]
            if have != kinds:
                raise ValueError(f"block() made other weights for layer {layer} than for layer 0; they must be alike")
            rows.append(block.tensors_of(module))
        empty = [tensor.new_empty((0, *tensor.shape)) for tensor in block.tensors_of(block.module)]
        stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)] if rows else empty
        return block, stacked

    def tensors(self) -> tuple[Tensor, ...]:
        """The columns (n, *shape), in the order of the block's; of splines their values, a part of autograd's graph."""
        have = dict(self.named_parameters()) | dict(self.named_buffers())
        if self.splines is not None:
            names = [column.name for column in self.block.columns if column.is_parameter]
            have |= dict(zip(names, _Expand.apply(self.splines, *(have[name] for name in names)), strict=True))
        return tuple(have[column.name] for column in self.block.columns)

    @property
    def divided(self) -> frozenset[str]:
        """Names of the parameters and buffers with a row for each layer owned here; others are alike on all ranks."""
        of_layers = (column for column in self.block.columns if self.splines is None or not column.is_parameter)
        return frozenset(column.name for column in of_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of all weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True):
        super().train(mode)
        self.block.train(mode)
        return self

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.block.module._apply(fn)
        return self

    def gathered(self, tensor: Tensor) -> Tensor:
        """A column (n, *shape) of all layers (N, *shape), on every rank."""
        return self.comm.allgather(tensor.detach(), self.partition.counts)

    def statistics(self, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Running means and variances (n, C) of a norm of the block, and the batches (n,) they have met; not copies."""
        prefix = f"{norm}." if norm else ""
        mean, variance, count = (
            self.get_buffer(prefix + key) for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        return mean, variance, count

    def move_statistics(self, moments: Moments) -> None:
        """Move the running statistics of the layers owned here, once, by what a solve has met."""
        for name, norm in self.block.moving.items():
            norm.move(*self.statistics(name), moments.found[norm.number])


def _gather(weights: StackedWeights, state: dict, prefix: str, local_metadata) -> None:
    for column in weights.block.columns:
        if column.name in weights.divided:
            state[prefix + column.name] = weights.gathered(state[prefix + column.name])


def _slice(weights: StackedWeights, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    partition, rank = weights.partition, weights.comm.rank
    first = partition.first(rank)
    for column in weights.block.columns:
        tensor = state.get(prefix + column.name)
        if tensor is None:
            continue
        if column.name not in weights.divided:
            if len(tensor) != weights.splines.splines.num:
                number = weights.splines.splines.num
                errors.append(f"{prefix}{column.name} has {len(tensor)} coefficients, the splines have {number}")
            continue
        if len(tensor) != partition.num_rows:
            errors.append(f"{prefix}{column.name} has {len(tensor)} layers, the stack has {partition.num_rows}")
            continue
        state[prefix + column.name] = tensor[first : first + partition.count(rank)]


class _Expand(torch.autograd.Function):
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


def _flat(column: Tensor) -> Tensor:
    """Rows (n, size) of a column (n, *shape), whose layers may have one number."""
    return column[:, None].flatten(1)
