"""Modules that stand in for those of torch, and do the same in each evaluation of a layer: dropout and norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from xbraid_py.layers.norm_dropout import (
    Dropout,
    DropPath,
    MovingBatchNorm1d,
    MovingBatchNorm2d,
    MovingBatchNorm3d,
    MultiheadAttention,
)

_NORM = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_NORMS = {nn.BatchNorm1d: MovingBatchNorm1d, nn.BatchNorm2d: MovingBatchNorm2d, nn.BatchNorm3d: MovingBatchNorm3d}


def replace_modules(model: nn.Module) -> nn.Module:
    """Put those of `xbraid_py.nn` in the places of torch's dropout and batch normalization, and alike; in place.

    `nn.Dropout` becomes `Dropout`; the stochastic depth of timm, torchvision and `transformers` `DropPath`;
    `nn.MultiheadAttention` with dropout of its own `MultiheadAttention`; `nn.BatchNorm1d`, `2d`, `3d` with running
    statistics `MovingBatchNorm1d` and so on, with weights and statistics. Names stay, so that state dicts fit. Dropout
    by a function (`functional.dropout`, `dropout_p`) is no module: for it there is `LayerParallel(torch_random=True)`.

    Parameters
    ----------
    model : nn.Module
        A block, or a model before `parallelize` or `LayerParallel.from_blocks` takes its blocks.

    Returns
    -------
    nn.Module
        The same, or what takes its place.

    Examples
    --------
    >>> replace_modules(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)))
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): MovingBatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
      (2): Dropout(p=0.1)
    )
    """
    around = nn.ModuleDict({"model": model})  # which may be such a module itself
    replace_dropout([around])
    for above in list(around.modules()):
        for name, part in list(above.named_children()):
            if isinstance(part, _NORM) and type(part) in _NORMS and part.track_running_stats:
                setattr(above, name, _moving(part))
            elif type(part) is nn.MultiheadAttention and part.dropout > 0.0:
                part.__class__ = MultiheadAttention
    return around["model"]


def _moving(norm: _NORM) -> nn.Module:
    found = _NORMS[type(norm)](norm.num_features, norm.eps, norm.momentum, norm.affine)
    # The very same tensors: an optimizer may have them.
    found._parameters, found._buffers = norm._parameters, norm._buffers
    return found.train(norm.training)


def replace_dropout(blocks: Sequence[nn.Module]) -> list[dict[str, nn.Module]]:
    """Put dropout and stochastic depth of this package in the places of others', and give those of each block by names.

    Where a rate is 0 many libraries have an `nn.Identity` in the place, which is a `DropPath` then too.
    """
    paths = {
        name
        for block in blocks
        for name, part in block.named_modules()
        if isinstance(part, DropPath) or _drops_samples(part)
    }
    found: list[dict[str, nn.Module]] = []
    for block in blocks:
        replaced = {}
        for name, part in block.named_modules():
            if type(part) is nn.Dropout and name:
                replaced[name] = (part, Dropout(part.p))
            elif name in paths and (_drops_samples(part) or isinstance(part, nn.Identity)):
                replaced[name] = (part, DropPath(getattr(part, "drop_prob", getattr(part, "p", 0.0)) or 0.0))
        for name, (part, ours) in replaced.items():
            above, _, last = name.rpartition(".")
            setattr(block.get_submodule(above), last, ours.train(part.training))
        found.append({name: part for name, (part, _) in replaced.items()})
    return found


def _drops_samples(part: nn.Module) -> bool:
    """Whether a part is stochastic depth of another library: timm's, torchvision's with a mask by sample, and alike."""
    if isinstance(part, DropPath) or not type(part).__name__.endswith(("DropPath", "StochasticDepth")):
        return False
    return getattr(part, "mode", "row") == "row" and getattr(part, "scale_by_keep", True)


def put_back(block: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """The opposite: put these parts in their places."""
    for name, part in parts.items():
        above, _, last = name.rpartition(".")
        setattr(block.get_submodule(above), last, part)
