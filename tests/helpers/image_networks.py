"""Small residual networks for images in double precision."""

from __future__ import annotations

import torch

from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.layers.module_block import own_random_numbers

SMALL = {"blocks": (2, 3, 3), "filters": (4, 8, 12), "num_classes": 5, "groups": 2}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 3, **options) -> ImageResNet:
    """A small one in double precision, its statistics and factors no round numbers."""
    with own_random_numbers(seed):
        found = ImageResNet(**{**SMALL, **options}).double()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(found.state_dict().items()):
            if "norm" in name and tensor.is_floating_point():
                tensor.add_(0.2 * random(*tensor.shape, seed=number).tanh())
    return found
