"""The `torch.autocast` that a stack is called in: for all evaluations of its blocks, in both directions, and no more.

States, adjoints and what the solver does with them stay in the type of the stack's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from xbraid_py.layers.trees import flatten

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cast:
    """An autocast that is on: of a type of device, to a type of numbers."""

    device: str
    dtype: torch.dtype

    @classmethod
    def current(cls, device: str) -> Cast | None:
        """The one that is on here; None without."""
        return cls(device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None

    def context(self) -> AbstractContextManager:
        """Operations within are cast; copies of weights are not kept, whose places are those of the next layer too."""
        return torch.autocast(self.device, self.dtype, cache_enabled=False)


_cast: ContextVar[Cast | None] = ContextVar("cast", default=None)


def current_cast() -> Cast | None:
    """What blocks are evaluated in; None where they are not cast."""
    return _cast.get()


def block_context() -> AbstractContextManager:
    """What a block is evaluated in."""
    cast = _cast.get()
    return nullcontext() if cast is None else cast.context()


def as_state(end: Any, u: Any) -> Any:
    """What a block gives, in the type of its state: an autocast leaves a shorter one."""
    if isinstance(u, Tensor) and isinstance(end, Tensor):
        return end.to(u.dtype) if end.dtype in _HALVES and u.dtype not in _HALVES else end
    like = next((leaf for leaf in flatten(u)[0] if isinstance(leaf, Tensor)), None)
    if like is None:
        return end
    leaves, structure = flatten(end)
    return structure.build([as_state(leaf, like) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


@contextmanager
def _blocks_in(cast: Cast | None, device: str) -> Iterator[None]:
    token = _cast.set(cast)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _cast.reset(token)


def blocks_cast(forward: Callable) -> Callable:
    """A `forward(self, u, ...)` that keeps the autocast around it for its blocks; u in the type of the weights."""

    @wraps(forward)
    def wrapped(self, u, *inputs, **named):
        cast = Cast.current(u.device.type) if isinstance(u, Tensor) else None
        if cast is None:
            return forward(self, u, *inputs, **named)
        with _blocks_in(cast, cast.device):
            return forward(self, u.to(self.layers.dtype) if u.is_floating_point() else u, *inputs, **named)

    return wrapped


def cast_kept(forward: Callable) -> Callable:
    """A `forward(ctx, ...)` of autograd that notes for `cast_again` what its blocks are evaluated in."""

    @wraps(forward)
    def wrapped(ctx, *arguments):
        ctx.cast = _cast.get()
        return forward(ctx, *arguments)

    return wrapped


def cast_again(backward: Callable) -> Callable:
    """A `backward(ctx, *slopes)` whose blocks are evaluated as forwards, whatever is on around it."""

    @wraps(backward)
    def wrapped(ctx, *slopes):
        device = next((slope.device.type for slope in slopes if isinstance(slope, Tensor)), "cpu")
        if ctx.cast is None and not torch.is_autocast_enabled(device):
            return backward(ctx, *slopes)
        with _blocks_in(ctx.cast, device):
            return backward(ctx, *slopes)

    return wrapped
