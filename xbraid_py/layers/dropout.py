"""Dropout whose mask depends on the layer and the update alone, not on how often or where the layer is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

# Seed, number of the update and number of the layer that is being evaluated.
_position: ContextVar[tuple[int, int, int] | None] = ContextVar("position", default=None)


@contextmanager
def at_position(seed: int, draw: int, layer: int) -> Iterator[None]:
    """Masks within are those of this update and this layer."""
    token = _position.set((seed, draw, layer))
    try:
        yield
    finally:
        _position.reset(token)


class Dropout(nn.Module):
    """Zero entries with probability p and scale the others by 1 / (1 - p), in training.

    Within a layer-parallel stack a solve evaluates a layer several times, on coarse grids and fine ones, forwards and
    backwards. All of them meet the same network: the mask is drawn from the seed of the stack, the number of the
    update and the number of the layer. Elsewhere it is `torch.nn.Dropout`.

    Parameters
    ----------
    p : float
        Between 0 and 1.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p={p} must be at least 0 and below 1; use 0.1")
        self.p = p
        self.number = 0  # among those of a block; set by the block

    def forward(self, u: Tensor) -> Tensor:
        """u of any shape."""
        if not self.training or self.p == 0.0:
            return u
        position = _position.get()
        if position is None:
            return nn.functional.dropout(u, self.p)
        # The hash of a tuple of integers is the same in every process.
        generator = torch.Generator(u.device).manual_seed(hash((*position, self.number)) & (2**63 - 1))
        kept = torch.rand(u.shape, generator=generator, device=u.device) >= self.p
        return u * kept / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
