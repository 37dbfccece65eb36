"""A block with the inputs that it has beside its state, and with states of several tensors packed into one.

Shape letters: `m` layers evaluated at once, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xbraid_py.layers.module_block import Column, ModuleBlock
from xbraid_py.layers.norm_dropout import NormInputs
from xbraid_py.layers.trees import Packing


class Bound(ModuleBlock):
    """A block with further inputs; those that need gradients are columns of its weights, the same in each layer.

    Parameters
    ----------
    block : ModuleBlock
    tensors : sequence of Tensor
        The further inputs that need gradients.
    arguments : callable
        Positional and keyword arguments of the module behind its state, from such tensors.
    packing : Packing, optional
        Of states.
    """

    def __init__(
        self,
        block: ModuleBlock,
        tensors: Sequence[Tensor],
        arguments: Callable[[Sequence[Tensor]], tuple[tuple, dict]],
        packing: Packing | None = None,
    ):
        vars(self).update(vars(block))
        self.further = [tensor.detach() for tensor in tensors]
        self.arguments, self.packing = arguments, packing
        self.own = len(block.columns)
        self.columns = (*block.columns, *(Column(f"inputs.{n}", t.shape, True) for n, t in enumerate(self.further)))
        self.row_size = sum(column.size for column in self.columns)

    @property
    def is_plain(self) -> bool:
        return False

    def rows(self, theta: Tensor) -> Tensor:
        """Rows (n, p) of weights with the further inputs behind them."""
        if not self.further:
            return theta
        return torch.cat([theta, *(tensor.reshape(1, -1).expand(len(theta), -1) for tensor in self.further)], 1)

    def tensors_of(self, module) -> list[Tensor]:
        have = dict(module.named_parameters()) | dict(module.named_buffers())
        return [have[column.name].detach() for column in self.columns[: self.own]] + self.further

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # it holds the further inputs
        self,
        tensors: Sequence[Tensor],
        u: Tensor,
        draw: int = 0,
        layer: int = 0,
        norm_inputs: NormInputs | None = None,
    ) -> Tensor:
        """What the module gives for a state (*S), with these columns: those of its weights, and further inputs."""
        inputs, named = self.arguments(tensors[self.own :])
        state = u if self.packing is None else self.packing.unpack(u)
        end = super().__call__(tensors[: self.own], state, draw, layer, norm_inputs, inputs, named)
        return end if self.packing is None else self.packing.pack(end, type(self.module).__name__)

    def functional(self, tensors, u) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, named = self.arguments(tensors[self.own :])
        state = u if self.packing is None else self.packing.unpack(u)
        end = super().functional(tensors[: self.own], state, inputs, named)
        return end if self.packing is None else self.packing.pack(end, type(self.module).__name__)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        super()._put(tensors[: self.own])
