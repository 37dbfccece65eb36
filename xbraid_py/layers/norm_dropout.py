"""Batch normalization and dropout that are the same however often and wherever a layer is evaluated in an update.

Shape letters: `B` samples, `C` channels, `n` layers owned here, `m` of them evaluated at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from xbraid_py.layers.random_numbers import own_random_numbers


@dataclass
class NormInputs:
    """What the norms of a layer of a stack are given when it is evaluated once, or m layers at once.

    Attributes
    ----------
    start : bool
        Whether norms that have met no batch yet take their statistics from this one.
    inputs : dict of int to Tensor
        What each norm was given, (B, C, *) or (m, B, C, *), by its number in the block.
    """

    start: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)


_norm_inputs: ContextVar[NormInputs | None] = ContextVar("norm_inputs", default=None)


@contextmanager
def within(norm_inputs: NormInputs) -> Iterator[None]:
    """Norms within belong to a layer of a stack: their statistics are given, and do not move."""
    token = _norm_inputs.set(norm_inputs)
    try:
        yield
    finally:
        _norm_inputs.reset(token)


class MovingNorm(nn.modules.batchnorm._BatchNorm):
    """What the batch normalizations of all dimensions share.

    The statistics that normalize are those of the updates before, in training too: constants of the gradient, and the
    same in all relaxations of an update, forwards and backwards. Behind the forward solve of an update the mean and
    the unbiased variance of the batch at its states are taken once, and move the running statistics once.

    The first update has no statistics of updates before. It begins with a pass layer after layer, in which each norm
    that has met no batch yet (`num_batches_tracked` 0) takes the mean and the variance of its input for its own, and
    normalizes with them.

    Outside of a stack a call in training mode does the same: at the first call the statistics are set, later ones
    normalize with the statistics before the call; behind it they move.

    Parameters
    ----------
    num_features : int
        C.
    eps : float
        Added to the variance.
    momentum : float or None
        Share of the new batch in the running statistics, from 0 to 1; None: the mean of all batches.
    affine : bool
        Whether there are a weight and a bias for each channel.

    Raises
    ------
    ValueError
        If `momentum` is out of its range; in training, if a batch has only one value for each channel.
    """

    number = 0  # among those of a block; set by the block

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True):
        if momentum is not None and not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum={momentum} must be between 0 and 1, or None; use 0.1")
        super().__init__(num_features, eps, momentum, affine)

    def forward(self, u: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: input
        """u (B, C, *) to the same shape."""
        self._check_input_dim(u)
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and count is not None
        if not self.training:
            return self._normalized(u, mean, variance)
        if u.numel() < 2 * self.num_features:
            raise ValueError(f"u.shape={tuple(u.shape)} has one value for each channel; use at least 2 samples")
        norm_inputs = _norm_inputs.get()
        if norm_inputs is None:
            found = moments(u)
            self._start(found)
            # Autograd keeps what the statistics were.
            normalized = self._normalized(u, mean.clone(), variance.clone())
            self.move(mean, variance, count, found)
            return normalized
        if self.number in norm_inputs.inputs:
            raise ValueError(
                f"block uses one {type(self).__name__} twice, whose statistics are those of one place; use two of them"
            )
        norm_inputs.inputs[self.number] = u.detach()
        if norm_inputs.start:
            self._start(moments(u))
        return self._normalized(u, mean, variance)

    def _start(self, found: tuple[Tensor, Tensor]) -> None:
        if self.num_batches_tracked == 0:
            assert self.running_mean is not None and self.running_var is not None
            self.running_mean.copy_(found[0])
            self.running_var.copy_(found[1])

    def _normalized(self, u: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(u, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor, count: Tensor, found: tuple[Tensor, Tensor]) -> None:
        """Move running statistics (*, C) that have met `count` (*) batches by the mean and variance of one more.

        In place; the leading axes are those of the layers, if any.
        """
        count += 1
        share = self.momentum
        if share is None:
            share = count.to(mean.dtype).reciprocal()[..., None]
        for running, batch in zip((mean, variance), found, strict=True):
            running.mul_(1.0 - share).add_(share * batch)


class MovingBatchNorm1d(MovingNorm, nn.BatchNorm1d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`torch.nn.BatchNorm1d` for states (B, C) or (B, C, L), its statistics moved once per update; see `MovingNorm`."""


class MovingBatchNorm2d(MovingNorm, nn.BatchNorm2d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`torch.nn.BatchNorm2d` for states (B, C, H, W), its statistics moved once per update; see `MovingNorm`."""


class MovingBatchNorm3d(MovingNorm, nn.BatchNorm3d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`torch.nn.BatchNorm3d` for states (B, C, D, H, W), its statistics moved once per update; see `MovingNorm`."""


@torch.no_grad()
def moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (C,) of u (B, C, *)."""
    # The layout in memory decides the order of summation; of layers evaluated at once it depends on their number.
    variance, mean = torch.var_mean(u.detach().contiguous(), [0, *range(2, u.dim())])
    return mean, variance


class Moments:
    """Mean and unbiased variance of what the norms of n layers were given by the last recorded relaxation.

    `norms` are by their numbers, and so is `found`, pairs of (n, C) tensors; `start` is as of `NormInputs`.
    """

    def __init__(self, norms: Mapping[int, MovingNorm], num_rows: int, start: bool = False):
        self.start = start
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        for number, norm in norms.items():
            empty = cast(Tensor, norm.running_mean).new_empty((num_rows, norm.num_features))
            self.found[number] = empty, torch.empty_like(empty)

    def take(self, rows: int | slice, norm_inputs: NormInputs) -> None:
        """Those of an evaluation of one row, or of several at once."""
        for number, (means, variances) in self.found.items():
            inputs = norm_inputs.inputs[number]
            some = [rows] if isinstance(rows, int) else range(*rows.indices(len(means)))
            for row, u in zip(some, [inputs] if isinstance(rows, int) else inputs, strict=True):
                means[row], variances[row] = moments(u)


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
        return u * self._kept(u, u.shape, position) / (1.0 - self.p)

    def _kept(self, u: Tensor, shape: tuple[int, ...], position: tuple[int, int, int]) -> Tensor:
        """A mask of that shape."""
        # The hash of a tuple of integers is the same in every process.
        generator = torch.Generator(u.device).manual_seed(hash((*position, self.number)) & (2**63 - 1))
        return torch.rand(shape, generator=generator, device=u.device) >= self.p

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropPath(Dropout):
    """Stochastic depth: zero all of a sample with probability p and scale the others by 1 / (1 - p), in training.

    A block uses it on what it adds to its state; such a sample goes past the layer. Within a layer-parallel stack there
    is one mask for each layer and update, as of `Dropout`, on coarse layers that of the layer they begin with.

    Parameters
    ----------
    p : float
        Between 0 and 1. Blocks that exist may have one each, as rates that grow with depth are made
        (`LayerParallel.from_blocks`).
    """

    def forward(self, u: Tensor) -> Tensor:
        """u (B, *)."""
        if not self.training or self.p == 0.0:
            return u
        position, shape = _position.get(), (len(u), *(1,) * (u.dim() - 1))
        if position is None:
            return u * nn.functional.dropout(u.new_ones(shape), self.p)
        return u * self._kept(u, shape, position) / (1.0 - self.p)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose dropout has the masks of its layer and update, as that of `Dropout` has."""

    number = 0  # among those of a block; set by the block

    @property
    def p(self) -> float:
        """Probability of the dropout."""
        return self.dropout

    def forward(self, *inputs, **named):
        """As of torch."""
        position = _position.get()
        if position is None or not self.training or self.dropout == 0.0:
            return super().forward(*inputs, **named)
        with own_random_numbers(hash((*position, self.number)) & (2**63 - 1)):
            return super().forward(*inputs, **named)


def changes_by_itself(name: str, part: nn.Module, torch_random: bool = False) -> str | None:
    """What is wrong with a part of a block that is another one each time it is evaluated, and what to take; or None.

    Parameters
    ----------
    name : str
        Of the part in the block.
    part : nn.Module
    torch_random : bool
        Whether random numbers of torch's own are the same in all evaluations of a layer.
    """
    if not part.training or isinstance(part, Dropout | MultiheadAttention):
        return None
    what = f"block has {type(part).__name__} ({name})"
    again = "another mask in every sweep of the solver is another network"
    is_path = type(part).__name__.endswith(("DropPath", "StochasticDepth"))
    if is_path and not torch_random:
        rate = getattr(part, "drop_prob", getattr(part, "p", None)) or 0.0
        if rate > 0.0:
            return (
                f"{what}: {again}; use xbraid_py.nn.DropPath({rate}), one mask for each layer and update, or "
                f"LayerParallel(..., torch_random=True)"
            )
    if isinstance(part, nn.MultiheadAttention) and part.dropout > 0.0 and not torch_random:
        return (
            f"{what} with dropout={part.dropout} of its own: {again}; use xbraid_py.nn.MultiheadAttention, "
            f"as xbraid_py.replace_modules(block) does, or LayerParallel(..., torch_random=True)"
        )
    hooks = part._forward_pre_hooks.values()
    if any(type(each).__name__ in ("SpectralNorm", "_SpectralNorm") for each in (part, *hooks)):
        return (
            f"{what} with a spectral norm: its power iteration would go on in every sweep of the solver; use a "
            f"parametrization that is a function of the weight alone, as W / torch.linalg.matrix_norm(W, 2), by "
            f"torch.nn.utils.parametrize.register_parametrization"
        )
    return None
