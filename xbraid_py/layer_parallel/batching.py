"""Whether the layers of all intervals are evaluated faster in one call, or one after the other."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape
from xbraid_py.mgrit import Hierarchy

_TRIALS = 3
_FAR = 0.7
_MOST = 8  # intervals that are enough to see which way is faster


def batched_pays(block: ModuleBlock, u: Tensor, hierarchy: Hierarchy) -> bool:
    """Whether the intervals of a rank are evaluated faster in one call, for states like u (*S)."""
    count = max(hierarchy.intervals.counts)
    if count < 2 or len(hierarchy.levels) == 1 or block.is_random:
        return False
    return batched_is_faster(block, u, min(count, _MOST))


def batched_is_faster(block: ModuleBlock, u: Tensor, count: int) -> bool:
    """Whether so many intervals with states like u (*S) are evaluated faster in one call, forwards and backwards."""
    theta = block.join([tensor[None] for tensor in block.tensors_of(block.module)]).repeat(count, 1)
    points = torch.randn((count, *u.shape), dtype=u.dtype, generator=torch.Generator().manual_seed(0)).to(u.device)
    gradient = torch.empty_like(theta)
    seconds = []
    for vmap in (False, True):
        steps = ModuleSteps(block, theta, 1e-3, tuple(range(count)), vmap=vmap, tape=Tape())
        best = float("inf")
        with warnings.catch_warnings():
            # Of operations that have no batched form, and are slow therefore.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(_TRIALS):
                start = time.perf_counter()
                steps.relax(points, 1, None, None, True)
                steps.relax_adjoint(points, points, 1, None, None, gradient)
                if u.is_cuda:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
        seconds.append(best)
    # By far: what is nearly as fast would be chosen in one run and not in the next.
    return seconds[1] < _FAR * seconds[0]
