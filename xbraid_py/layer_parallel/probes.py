"""What a block of a model that exists does, found by calling it once: whether it keeps its state, what it hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_form(block: nn.Module, returns: int | None, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a block keeps its state, like u, where its matrices are zero."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device) for _ in range(2))
    ends = [_once(block, each, more, named, 0.0) for each in (first, second)]
    ends = [end if returns is None else end[returns] for end in ends]
    name = type(block).__name__
    if not isinstance(ends[0], Tensor):
        raise ValueError(
            f"block={name} returns a {type(ends[0]).__name__}; say which entry of it is the next state, as returns=0"
        )
    if ends[0].shape != u.shape:
        return  # which the stack says
    way, change = first - second, ends[0] - ends[1]
    if change.norm() <= 1e-6 * way.norm():
        raise ValueError(
            f"block={name} forgets its state where its matrices are zero, so it seems to be F of u + F(u); if the "
            f"model adds the state itself, u = u + block(u), use form='increment'; if the model goes on with what "
            f"the block gives, u = block(u), use form='map'"
        )
    likeness = float((way * change).sum() / (way.norm() * change.norm()))
    if not likeness > 0.3:
        raise ValueError(
            f"block={name} makes something else of its state where its matrices are zero (cosine {likeness:.2f}), "
            f"so it is in doubt what it gives: use form='map' for u = block(u), or form='increment' for u = u + "
            f"block(u)"
        )


def handed_on(block: nn.Module, returns: int | None, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> tuple:
    """Of all entries that a block returns for u and further inputs, the input that each is, or None.

    Raises `ValueError` if there is another one than the state.
    """
    values, name = dict(enumerate(more)) | dict(named), type(block).__name__
    ends = _once(block, u.detach(), more, named)
    if not isinstance(ends, tuple | list):
        raise ValueError(f"block={name} returns a {type(ends).__name__}, no tuple; leave returns out")
    found: list[Any] = []
    for number, end in enumerate(ends):
        same = [name for name, value in values.items() if value is end]
        if end is not None and number != returns and not same:
            raise ValueError(
                f"block={name} returns a {type(end).__name__} as entry {number}, which is neither None nor an "
                f"input handed on; a stack has no other output than the state: make the block leave it out "
                f"(such as output_attentions=False), or give it a state of several tensors"
            )
        found.append(same[0] if same and end is not None and number != returns else None)
    return tuple(found)


@torch.no_grad()
def _once(block: nn.Module, u: Tensor, more: Sequence[Any], named: Mapping[str, Any], scale: float = 1.0) -> Any:
    """What a block returns in evaluation mode, its matrices scaled."""
    modes = [(part, part.training) for part in block.modules()]
    weights = {name: p * scale if p.dim() > 1 else p for name, p in block.named_parameters()}
    try:
        block.eval()
        return torch.func.functional_call(block, weights, (u, *more), dict(named))
    except RuntimeError as error:
        raise ValueError(
            f"block={type(block).__name__} cannot be evaluated for a state like that of the first block ({error}); if "
            f"blocks change its shape use form='map', and make them return the next state alone"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode
