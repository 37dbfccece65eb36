"""What all ranks have alike around a stack: inputs, gradients of outputs, weights; looked at now and then.

Shape letters: `P` ranks, `K` tensors, `E` numbers that stand for a tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import agree_on_all
from xbraid_py.layers.trees import flatten

CHECK_INPUTS = "XBRAID_CHECK_INPUTS"  # a variable of the environment, the same for all ranks
EVERY = 100  # calls in training; and the first, second, fourth, eighth ... before
_SAMPLES = 64  # numbers of a tensor that are compared one by one
_WAYS_OUT = (
    "every rank of a stack works on the same batch, and computes alike what lies around the stack: draw batches and "
    "weights by the same seed on all ranks, clip by xbraid_py.clip_grad_norm_, and for ranks with batches of their own "
    "use xbraid_py.ProcessGrid"
)


class Watch:
    """Compares what the ranks of a module give it, in some of its calls; all ranks in the same ones."""

    def __init__(self, comm: Communicator):
        self.comm, self._calls = comm, 0

    def next_is_due(self) -> bool:
        """Whether the ranks compare what they have in this call, and not only if that is asked for; counts it."""
        self._calls += 1
        said = os.environ.get(CHECK_INPUTS, "")
        if self.comm.size == 1 or said in ("0", "1"):
            return False
        n = self._calls
        return n % EVERY == 0 if n >= EVERY else n & (n - 1) == 0

    def compare(self, what: str, leaves: Iterable[Any]) -> None:
        """Raise the same `ValueError` on all ranks unless tensors are alike; collective."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        names = [what if len(tensors) == 1 else f"{what}, tensor {number}" for number in range(len(tensors))]
        compare(self.comm, dict(zip(names, tensors, strict=True)))


def compare(comm: Communicator, named: Mapping[str, Tensor]) -> None:
    """Raise the same `ValueError` on all ranks unless their tensors with these names are alike; collective.

    Up to the square root of the rounding, since processors may sum in another order; integers exactly.
    """
    if not named:
        return
    own = torch.stack([_sketch(tensor) for tensor in named.values()])
    rows = comm.allgather(own[None], (1,) * comm.size)  # (P, K, E)
    for number, (name, tensor) in enumerate(named.items()):
        bound = torch.finfo(tensor.dtype).eps ** 0.5 if tensor.is_floating_point() else 0.0
        norm = rows[0, number, -1].clamp_min(torch.finfo(torch.float64).tiny)
        scale = norm * torch.full_like(rows[0, number], max(tensor.numel(), 1) ** -0.5)
        scale[-2:] = norm
        off = ((rows[:, number] - rows[0, number]).abs() / scale).amax(1)
        if bool((off > bound).any()):
            rank = int(off.argmax())
            raise ValueError(f"{name} of rank {rank} is not that of rank 0 ({float(off[rank]):.1e} off): {_WAYS_OUT}")


@torch.no_grad()
def _sketch(tensor: Tensor) -> Tensor:
    """Numbers (E,) that stand for a tensor: some of its own, its sum and its norm."""
    flat = tensor.detach().flatten().nan_to_num()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    if not len(flat):
        return torch.zeros(_SAMPLES + 2, dtype=torch.float64)
    places = torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).long()
    whole = flat.double()
    return torch.cat([whole[places.to(flat.device)], whole.sum()[None], whole.norm()[None]]).cpu()


def compare_bits(comm: Communicator, *inputs: Any) -> None:
    """Raise the same `ValueError` on all ranks if these differ in a bit, with XBRAID_CHECK_INPUTS=1; collective then.

    To look for what makes ranks go apart. It reads all numbers, and costs a message a call.
    """
    if os.environ.get(CHECK_INPUTS, "0") != "1" or comm.size == 1:
        return
    found = {}
    numbers = count()
    for leaf in flatten(inputs)[0]:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest = hashlib.blake2b(flat.data, digest_size=6).hexdigest()
            found[f"tensor {next(numbers)}"] = f"{tuple(leaf.shape)} {leaf.dtype} with digest {digest}"
    agree_on_all(comm, found, f"inputs ({CHECK_INPUTS}=1)")
