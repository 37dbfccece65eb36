"""The weights of a stack of blocks: the layers owned here on the first axis, the whole stack in a state dict.

Shape letters: `N` layers, `n` of them owned here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.grid import Partition
from xbraid_py.layer_parallel.ranks import together
from xbraid_py.networks.module_block import ModuleBlock, own_random_numbers


class StackedWeights(nn.Module):
    """Parameters (n, *shape) under the names that they have in a block.

    `state_dict()` holds all N layers, (N, *shape), on every rank, whatever the number of ranks; it is collective, as is
    nothing else here. `load_state_dict` takes such a dict and keeps the layers owned here.

    Parameters
    ----------
    make : callable
        Makes a block.
    partition : Partition
        Of the layers.
    comm : Communicator
    seed : int
        The weights of a layer depend on it and on the number of the layer.

    Attributes
    ----------
    block : ModuleBlock
        The block that all layers are evaluated with.
    """

    def __init__(self, make: Callable[[], nn.Module], partition: Partition, comm: Communicator, seed: int):
        super().__init__()
        self.partition, self.comm = partition, comm
        first, count = partition.first(comm.rank), partition.count(comm.rank)
        with together(comm):
            made, tensors = self._make(make, seed, range(first, first + count))
        self.block = made
        self._frozen = [part for part in made.module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
        self._frozen = [part for part in self._frozen if not part.training]
        for column, tensor in zip(made.columns, tensors, strict=True):
            *path, last = column.name.split(".")
            place: nn.Module = self
            for name in path:
                if name not in place._modules:
                    place.add_module(name, nn.Module())
                place = place._modules[name]
            if column.is_parameter:
                wanted = dict(made.module.named_parameters())[column.name].requires_grad
                place.register_parameter(last, nn.Parameter(tensor, requires_grad=wanted))
            else:
                place.register_buffer(last, tensor)
        self.register_state_dict_post_hook(_gather)
        self.register_load_state_dict_pre_hook(_slice)

    @staticmethod
    def _make(make, seed: int, layers: range) -> tuple[ModuleBlock, list[Tensor]]:
        def block_of(layer: int) -> nn.Module:
            with own_random_numbers(hash((seed, layer)) & (2**63 - 1)):
                found = make()
            if not isinstance(found, nn.Module):
                raise TypeError(f"block() made {type(found).__name__}; it must make an nn.Module")
            return found

        block = ModuleBlock(block_of(0), seed)
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
        """The columns (n, *shape), in the order of the block's."""
        have = dict(self.named_parameters()) | dict(self.named_buffers())
        return tuple(have[column.name] for column in self.block.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of all weights."""
        return next(self.parameters()).device

    def set_mode(self, training: bool) -> None:
        """Training or evaluation mode of the block; frozen statistics stay frozen."""
        self.block.module.train(training)
        for part in self._frozen:
            part.eval()

    def gathered(self, tensor: Tensor) -> Tensor:
        """A column (n, *shape) of all layers (N, *shape), on every rank."""
        return self.comm.allgather(tensor.detach(), self.partition.counts)


def _gather(weights: StackedWeights, state: dict, prefix: str, local_metadata) -> None:
    for column in weights.block.columns:
        state[prefix + column.name] = weights.gathered(state[prefix + column.name])


def _slice(weights: StackedWeights, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    partition, rank = weights.partition, weights.comm.rank
    first = partition.first(rank)
    for column in weights.block.columns:
        tensor = state.get(prefix + column.name)
        if tensor is None:
            continue
        if len(tensor) != partition.num_rows:
            errors.append(f"{prefix}{column.name} has {len(tensor)} layers, the stack has {partition.num_rows}")
            continue
        state[prefix + column.name] = tensor[first : first + partition.count(rank)]
