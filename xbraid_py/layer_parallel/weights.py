"""The weights of a stack of blocks: the layers owned here on the first axis, the whole stack in a state dict.

Shape letters: `N` layers, `n` of them owned here, `M` coefficients of splines in depth, `C` channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import agree, together
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.owners import Owner, Place
from xbraid_py.layers.existing import Existing, difference
from xbraid_py.layers.module_block import ModuleBlock, own_random_numbers
from xbraid_py.layers.norm_dropout import Moments, changes_by_itself
from xbraid_py.layers.splines import SplineLayers, Splines
from xbraid_py.mgrit.grid import LayerGrid

_FROM_BLOCKS = "for blocks that exist use LayerParallel.from_blocks(blocks, comm)"


class StackedWeights(Owner):
    """Parameters (n, *shape) under the names that they have in a block.

    `state_dict()` holds all N layers, (N, *shape), on every rank, whatever the number of ranks; it is collective, as is
    nothing else here. `load_state_dict` takes such a dict and keeps the layers owned here.

    Parameters
    ----------
    make : callable or Existing
        Makes a block, or has them.
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
    form, returns, torch_random
        As of `ModuleBlock`.

    Attributes
    ----------
    block : ModuleBlock
        The block that all layers are evaluated with. It goes along with the weights, in type, device and mode.
    splines : SplineLayers or None
    """

    is_stacked = True

    def __init__(
        self,
        make: Callable[[], nn.Module] | Existing,
        grid: LayerGrid,
        partition: Partition,
        comm: Communicator,
        seed: int,
        first_layer: int = 0,
        splines: Splines | None = None,
        form: str | None = None,
        returns: int | str | None = None,
        torch_random: bool = False,
    ):
        super().__init__()
        self.partition, self.comm, self._first_layer = partition, comm, first_layer
        self.splines = None if splines is None else SplineLayers(splines, grid, partition, comm)
        first, count = first_layer + partition.first(comm.rank), partition.count(comm.rank)
        options = (seed, form, returns, torch_random)
        with together(comm):
            made, tensors = self._make(make, options, range(first, first + count))
            if splines is not None:
                _, rows = self._make(make, options, range(splines.num))
                choices = zip(made.columns, rows, tensors, strict=True)
                tensors = [row if column.is_parameter else tensor for column, row, tensor in choices]
        self.block = made
        for column, tensor in zip(made.columns, tensors, strict=True):
            *path, last = column.name.split(".")
            # Not `register_parameter` and the like: a block may have parts of any name, also of those that are ours.
            place: nn.Module = self
            for name in path:
                below = place._modules.get(name) or nn.Module()
                place._modules[name] = below
                place = below
            if column.is_parameter:
                wanted = dict(made.module.named_parameters())[column.name].requires_grad
                place._parameters[last] = nn.Parameter(tensor, requires_grad=wanted)
            else:
                place._buffers[last] = tensor
        self.register_state_dict_post_hook(_gather)
        self.register_load_state_dict_pre_hook(_slice)
        self.train()
        self.watch()

    def places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """The parameters with a row for each layer owned here: its first layer, their number, and that of all."""
        count = self.partition.count(self.comm.rank)
        first = self._first_layer + (self.partition.first(self.comm.rank) if count else 0)
        for name, p in self.named_parameters():
            if name in self.divided:
                yield p, (first, count, self.partition.num_rows)

    @staticmethod
    def _make(make, options: tuple, layers: range) -> tuple[ModuleBlock, list[Tensor]]:
        seed, form, returns, torch_random = options

        def block_of(layer: int) -> nn.Module:
            if isinstance(make, Existing):
                return make.blocks[layer]
            try:
                with own_random_numbers(hash((seed, layer)) & (2**63 - 1)):
                    found = make()
            except StopIteration:
                raise ValueError(f"block() had no block left for layer {layer}; {_FROM_BLOCKS}") from None
            if not isinstance(found, nn.Module):
                raise TypeError(f"block() made {type(found).__name__}; it must make an nn.Module")
            return found

        module, counters, rates = block_of(0), (), ()
        if isinstance(make, Existing):
            module, counters, rates = copy.deepcopy(module), make.counters, make.rates
        block = ModuleBlock(module, seed, form, returns, counters, rates, torch_random)
        before = block.module
        kinds = [(column.name, column.shape) for column in block.columns]
        rows: list[list[Tensor]] = []
        for layer in layers:
            module = block_of(layer)
            have = [(column.name, column.shape) for column in ModuleBlock(module, seed).columns]
            if have != kinds:
                raise ValueError(f"block() made other weights for layer {layer} than for layer 0; they must be alike")
            rows.append(block.tensors_of(module))
            if not isinstance(make, Existing):
                _check_new(module, layer, block.module, before)
                _check_like(module, layer, block.module)
            before = module
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

    @torch.no_grad()
    def apply(self, fn: Callable[[nn.Module], None]):
        """Call fn with the parts of a block that has the weights of one layer after the other, and keep what it writes.

        Random numbers within start from one that is drawn here, and the number of the layer: where all ranks have
        the same state of torch's, weights do not depend on the number of ranks.
        """
        start = int(torch.randint(1 << 62, ()))
        have = dict(self.named_parameters()) | dict(self.named_buffers())
        columns = [c for c in self.block.columns if self.splines is None or c.is_parameter]
        first = 0 if self.splines else self._first_layer + self.partition.first(self.comm.rank)
        module = self.block.module
        mine = self._tensors_of(module)
        kept = [tensor.clone() for tensor in mine.values()]
        for column in columns:
            mine[column.name].requires_grad_(have[column.name].requires_grad)
        # A rank without layers goes along with what is set beside the weights.
        for row in range(len(have[columns[0].name])) or (None,):
            if row is not None:
                for column in columns:
                    mine[column.name].copy_(have[column.name][row])
            with own_random_numbers(hash((start, first + (row or 0))) & (2**63 - 1)):
                module.apply(fn)
            mine = self._tensors_of(module)
            for column in columns if row is not None else ():
                if column.name not in mine or mine[column.name].shape != column.shape:
                    raise ValueError(
                        f"apply(): after {getattr(fn, '__name__', 'fn')} the block has no {column.name} with the shape "
                        f"{tuple(column.shape)}; change parts of a block where block() makes it"
                    )
                have[column.name][row] = mine[column.name]
        for column in columns:
            have[column.name].requires_grad_(mine[column.name].requires_grad)
        for tensor, value in zip(mine.values(), kept, strict=True):
            tensor.copy_(value)
        return self

    @staticmethod
    def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
        return dict(module.named_parameters()) | dict(module.named_buffers())

    def _apply(self, fn, recurse=True):
        super()._apply(_of_rows(fn), recurse)
        self.block.module._apply(fn)
        return self

    def gathered(self, tensor: Tensor) -> Tensor:
        """A column (n, *shape) of all layers (N, *shape), on every rank."""
        return self.comm.allgather(tensor.detach(), self.partition.counts)

    def statistics(self, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Running means and variances (n, C) of a norm of the block, and the batches (n,) they have met; not copies."""
        prefix = f"{norm}." if norm else ""
        have = dict(self.named_buffers())
        mean, variance, count = (have[prefix + key] for key in ("running_mean", "running_var", "num_batches_tracked"))
        return mean, variance, count

    def move_statistics(self, moments: Moments) -> None:
        """Move the running statistics of the layers owned here, once, by what a solve has met."""
        for name, norm in self.block.moving.items():
            norm.move(*self.statistics(name), moments.found[norm.number])


def _of_rows(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `fn` makes of a column; by layers where it asks for a layout that only tensors of one layer can have."""

    def found(column: Tensor) -> Tensor:
        try:
            return fn(column)
        except RuntimeError as error:
            if "channels_last" not in str(error):
                raise
        rows = [fn(row) for row in column] or [fn(column.new_empty(column.shape[1:]))]
        return torch.stack([row.contiguous() for row in rows])[: len(column)]

    return found


def _check_new(module: nn.Module, layer: int, first: nn.Module, before: nn.Module) -> None:
    """Raise `ValueError` if what `block()` gave is no new block, made by random numbers of its layer alone."""
    known = {id(p) for other in (first, before) for p in other.parameters()}
    if any(id(p) in known for p in module.parameters()):
        raise ValueError(
            f"block() gave a weight for layer {layer} that it has given before, and layers do not share weights; "
            f"{_FROM_BLOCKS}, for copies block=lambda: copy.deepcopy(module), for one set of weights in all layers "
            f"splines=Splines(1, 0)"
        )
    if layer == 0:
        pairs = zip(first.parameters(), module.parameters(), strict=True)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
            raise ValueError(
                f"block() gave other weights for layer 0 when it was called again: they must come from torch's random "
                f"numbers alone, which are set for each layer; {_FROM_BLOCKS}"
            )


def _check_like(module: nn.Module, layer: int, first: nn.Module) -> None:
    """Raise `ValueError` if what `block()` gave differs from that of layer 0 in more than its weights."""
    found = difference(first, module)
    # A spectral norm has vectors of its own, and is refused for what it does with them.
    other = (changes_by_itself(name, part, torch_random=True) for name, part in module.named_modules())
    if found is not None and not any(other):
        raise ValueError(f"block() made another block for layer {layer} than for layer 0: {found}; {_FROM_BLOCKS}")


def _gather(weights: StackedWeights, state: dict, prefix: str, local_metadata) -> None:
    agree(weights.comm, None, "", "state_dict()")
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
        if weights.splines is not None and column.name not in weights.divided:
            number = weights.splines.splines.num
            if len(tensor) != number:
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
