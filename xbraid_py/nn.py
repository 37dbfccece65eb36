"""Modules with the names that torch has for them, for use in layers that are propagated together.

They differ from torch's in what they depend on, masks on the layer and the update alone, statistics on the update
alone: the same numbers come out wherever a layer lies and however often it is evaluated.
"""

from xbraid_py.layers.norm_dropout import (
    Dropout,
    DropPath,
    MovingBatchNorm1d,
    MovingBatchNorm2d,
    MovingBatchNorm3d,
    MultiheadAttention,
)

__all__ = ["DropPath", "Dropout", "MovingBatchNorm1d", "MovingBatchNorm2d", "MovingBatchNorm3d", "MultiheadAttention"]
