"""Pairs of sequences for models that translate: the second one is the first one reversed, or sorted.

Shape letters: `B` pairs, `S` tokens of a sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from xbraid_py.data.dataset import whole_number

START = 0  # stands before a translation; no token of a sequence
TASKS = ("reverse", "sort")


def pairs(
    task: str, num_tokens: int, length: int, number: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences drawn at random, and their translations; they depend on the arguments only.

    Parameters
    ----------
    task : {"reverse", "sort"}
    num_tokens : int
        Tokens are 1 to this, inclusive.
    length : int
        S, at least 1.
    number : int
        B, at least 1.
    seed, step : int
        Neither negative; every step draws anew.

    Returns
    -------
    sources, targets : torch.Tensor
        Shape (B, S), int64.

    Raises
    ------
    ValueError
        If `task` is none of those, or a number is too small.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be reverse or sort; use reverse")
    num_tokens, length = whole_number("num_tokens", num_tokens, 1, 16), whole_number("length", length, 1, 8)
    number, seed, step = (
        whole_number("number", number, 1, 32),
        whole_number("seed", seed, 0, 0),
        whole_number("step", step, 0, 0),
    )
    drawn = np.random.default_rng((seed, step)).integers(1, num_tokens + 1, size=(number, length))
    sources = torch.from_numpy(drawn)
    return sources, sources.flip(1) if task == "reverse" else sources.sort(1).values


def shifted(targets: torch.Tensor) -> torch.Tensor:
    """What a decoder is shown (B, S): `START`, and all tokens (B, S) but the last."""
    return torch.cat([torch.full_like(targets[:, :1], START), targets[:, :-1]], 1)
