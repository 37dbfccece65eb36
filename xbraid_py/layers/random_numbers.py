"""Torch's random numbers for a while of one's own, as if nobody had drawn any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_RANDOM_NUMBERS = threading.RLock()  # ranks that are threads share one generator


@contextmanager
def own_random_numbers(seed: int, within: AbstractContextManager | None = None) -> Iterator[None]:
    """Random numbers within start from the seed, and those without go on as if nothing had happened.

    `within` is entered along with it.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _RANDOM_NUMBERS, torch.random.fork_rng(devices=devices), within or nullcontext():
        torch.manual_seed(seed)
        yield
