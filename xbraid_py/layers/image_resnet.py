"""Pre-activation (wide) residual networks for images with an explicit step size, and lesions of them (paper 003).

A stage is a stretch of the time grid: Y + h F(Y), block after block (eq. 2). The first block of every stage but the
first is a transition: its residual module has stride 2 and more filters, its shortcut no parameters.

Shape letters: `B` images, `C` channels, `H W` pixels.
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from xbraid_py.layers.norm_dropout import MovingBatchNorm2d

Norm = Literal["batch", "moving", "group", "frozen", "none"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with its running statistics, in training mode too; they do not move.

    Weights and statistics have the names that they have in `nn.BatchNorm2d`, so either loads the other's state dict.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.eval()

    def train(self, mode: bool = True):
        """In evaluation mode, whatever is asked for."""
        return super().train(False)


def normalization(norm: Norm, channels: int, groups: int) -> nn.Module:
    """One of `Norm` for so many channels; `groups` are those of a group normalization."""
    if norm == "group":
        return nn.GroupNorm(groups, channels)
    kinds = {"batch": nn.BatchNorm2d, "moving": MovingBatchNorm2d, "frozen": FrozenBatchNorm2d, "none": nn.Identity}
    return kinds[norm](channels)


class ResidualModule(nn.Module):
    """F(Y): normalization, ReLU and a 3x3 convolution without bias, twice.

    Parameters
    ----------
    inputs, filters : int
        Channels of Y and of F(Y).
    stride : int
        Of the first convolution.
    norm, groups
        As of `ImageResNet`.
    """

    def __init__(self, inputs: int, filters: int, stride: int = 1, norm: Norm = "batch", groups: int = 4):
        super().__init__()
        self.norm1 = normalization(norm, inputs, groups)
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
        self.norm2 = normalization(norm, filters, groups)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to F(Y) (B, filters, H / stride, W / stride), halves rounded up."""
        y = self.conv1(functional.relu(self.norm1(y)))
        return self.conv2(functional.relu(self.norm2(y)))


class ResidualBlock(nn.Module):
    """Y + h F(Y) (paper 003, eq. 2); in a transition Y is pooled 2x2 and gets zero channels behind each of its own.

    Zero channels in one place would be groups of a group normalization that hold nothing but h F(Y): they would be
    scaled to 1 whatever h is, and refining the time grid changed the network by more than O(h).

    Parameters
    ----------
    residual : ResidualModule
        F. With stride 2 the block is a transition.
    step_size : float
        h. With 0 the residual module is left out, and not evaluated: what remains is the shortcut.
    """

    def __init__(self, residual: ResidualModule, step_size: float):
        super().__init__()
        self.residual, self.step_size = residual, step_size

    @property
    def is_transition(self) -> bool:
        """Whether the block halves the image."""
        return self.residual.conv1.stride != (1, 1)

    def shortcut(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) in the shape of F(Y)."""
        if not self.is_transition:
            return y
        y = functional.avg_pool2d(y, 2, ceil_mode=True)  # odd images are halved as the convolution does
        behind_each, behind_all = divmod(self.residual.conv1.out_channels, y.shape[1])
        y = functional.pad(y[:, :, None], (0, 0, 0, 0, 0, behind_each - 1)).flatten(1, 2)
        return functional.pad(y, (0, 0, 0, 0, 0, behind_all))

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to the next state."""
        if self.step_size == 0.0:
            return self.shortcut(y)
        # In this order the sum has the memory format of the convolution's output; that of a shortcut may be another.
        return self.step_size * self.residual(y) + self.shortcut(y)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size:g}"


class Head(nn.Module):
    """Normalization, ReLU, mean over the pixels, linear map: states (B, C, H, W) to logits (B, classes)."""

    def __init__(self, filters: int, num_classes: int, norm: Norm, groups: int):
        super().__init__()
        self.norm = normalization(norm, filters, groups)
        self.linear = nn.Linear(filters, num_classes)

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to (B, classes)."""
        return self.linear(functional.relu(self.norm(y)).mean((2, 3)))


class ImageResNet(nn.Module):
    """A convolution, stages of residual blocks, a head (paper 003, section 5.1).

    With the default filters or twice those, and 2, 5, 8 or 20 blocks a stage, it has the parameters of table 5.

    Parameters
    ----------
    blocks : sequence of int
        Residual blocks of each stage, at least one.
    filters : sequence of int
        Channels of each stage; they do not decrease.
    num_classes : int
    in_channels : int
        Of the images.
    step_size : float
        h, the factor of every residual module, those of transitions included.
    norm : {"batch", "moving", "group", "frozen", "none"}
        Normalization: batch; batch with statistics that move once per update (`MovingBatchNorm2d`); group; batch with
        statistics that do not move (0 and 1 until others are loaded); none.
    groups : int
        Of a group normalization; divides all filters.
    stem_stride : int
        Of the first convolution; 2 halves large images at once.

    Attributes
    ----------
    stem : nn.Conv2d
    stages : nn.ModuleList of nn.ModuleList of ResidualBlock
    head : Head

    Raises
    ------
    ValueError
        If a number is out of its range, or the sequences do not fit together.
    """

    stages: MutableSequence[Any]  # of lists of ResidualBlock

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2),
        filters: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        step_size: float = 1.0,
        norm: Norm = "batch",
        groups: int = 4,
        stem_stride: int = 1,
    ):
        super().__init__()
        blocks, filters = tuple(blocks), tuple(filters)
        _check(blocks, filters, norm, groups)
        numbers = {"num_classes": num_classes, "in_channels": in_channels, "stem_stride": stem_stride}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; use {10 if name == 'num_classes' else 1}")
        if not 0.0 < step_size < float("inf"):
            raise ValueError(f"step_size={step_size} must be positive and finite; use 1.0")
        self.filters, self.num_classes, self.in_channels = filters, num_classes, in_channels
        self.norm, self.groups, self.stem_stride = norm, groups, stem_stride
        self._step_size = float(step_size)
        self.stem = nn.Conv2d(in_channels, filters[0], 3, stem_stride, padding=1, bias=False)
        self.stages = nn.ModuleList()  # pyright: ignore[reportAttributeAccessIssue]  # a sequence of them
        for s, count in enumerate(blocks):
            stage = nn.ModuleList()
            for j in range(count):
                is_transition = s > 0 and j == 0
                inputs = filters[s - 1] if is_transition else filters[s]
                residual = ResidualModule(inputs, filters[s], 2 if is_transition else 1, norm, groups)
                stage.append(ResidualBlock(residual, self.step_size))
            self.stages.append(stage)
        self.head = Head(filters[-1], num_classes, norm, groups)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Residual blocks of each stage."""
        return tuple(len(stage) for stage in self.stages)

    @property
    def step_size(self) -> float:
        """h, which every block has been given: that of a network does not change."""
        return self._step_size

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, num_classes); `ValueError` for images of another shape."""
        check_images(images, self.in_channels)
        y = self.stem(images)
        for stage in self.stages:
            for block in stage:
                y = block(y)
        return self.head(y)

    def options(self) -> dict[str, Any]:
        """The arguments that make a network of this shape."""
        names = ("blocks", "filters", "num_classes", "in_channels", "step_size", "norm", "groups", "stem_stride")
        return {name: getattr(self, name) for name in names}


def check_images(images: Tensor, in_channels: int) -> None:
    """Raise `ValueError` unless the images are (B, in_channels, H, W)."""
    if images.dim() != 4 or images.shape[1] != in_channels:
        raise ValueError(
            f"images.shape={tuple(images.shape)} must be (images, {in_channels}, height, width); "
            f"use images.view(-1, {in_channels}, height, width)"
        )


def _check(blocks: tuple[int, ...], filters: tuple[int, ...], norm: str, groups: int) -> None:
    if not blocks or min(blocks) < 1:
        raise ValueError(f"blocks={blocks} must name at least one stage, and one block in each; use (2, 2, 2)")
    if len(filters) != len(blocks):
        fits = tuple(16 * 2**s for s in range(len(blocks)))
        raise ValueError(f"filters={filters} must name {len(blocks)} stages, as blocks={blocks} does; use {fits}")
    if min(filters) < 1 or list(filters) != sorted(filters):
        fits = tuple(max(1, filters[0]) * 2**s for s in range(len(filters)))
        raise ValueError(f"filters={filters} must be positive and not decrease; use {fits}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} must be {', '.join(get_args(Norm)[:-1])} or none; use batch")
    if norm == "group" and (groups < 1 or any(count % groups for count in filters)):
        largest = math.gcd(*filters)
        fits = max(count for count in range(1, max(1, min(groups, largest)) + 1) if largest % count == 0)
        raise ValueError(f"groups={groups} must be at least 1 and divide all of filters={filters}; use {fits}")


@dataclass(frozen=True)
class BlockNorms:
    """Mean L2 norms over a batch, of the state Y_j and of h F(Y_j), at a block of a stage, both numbered from 0."""

    stage: int
    block: int
    input: float
    residual: float


@torch.no_grad()
def residual_norms(network: ImageResNet, images: Tensor) -> list[BlockNorms]:
    """Norms of the states and of the residual modules of all blocks, in evaluation mode (paper 003, figures 3, 4, 7).

    Images are (B, in_channels, H, W); the modes of the network are left as they were.
    """
    check_images(images, network.in_channels)
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    found = []
    y = network.stem(images)
    for s, stage in enumerate(network.stages):
        for j, block in enumerate(stage):
            following = block(y)
            sizes = (part.flatten(1).norm(dim=1).mean().item() for part in (y, following - block.shortcut(y)))
            found.append(BlockNorms(s, j, *sizes))
            y = following
    for part, training in modes:
        part.training = training
    return found


def with_blocks(network: ImageResNet, order: Sequence[Sequence[int]]) -> ImageResNet:
    """The same network with only these blocks, in this order: lesions and shuffling at test time (paper 003, 3.3).

    A transition cannot change places: where a stage has one, it is first. Left out, its residual module is, and its
    shortcut remains, so that the states have the shape that the following blocks expect.

    Parameters
    ----------
    network : ImageResNet
    order : sequence of sequence of int
        For each stage the numbers of its blocks, from 0, each at most once.

    Returns
    -------
    ImageResNet
        It shares all modules, weights included, with `network`; modes of the two are the same.

    Raises
    ------
    ValueError
        If the order names other stages or blocks, a block twice, or moves a transition.
    """
    if len(order) != len(network.stages):
        raise ValueError(
            f"order={order} must name {len(network.stages)} stages; use {[[*range(n)] for n in network.blocks]}"
        )
    with torch.device("meta"):
        found = ImageResNet(**{**network.options(), "blocks": (1,) * len(order)})  # for its other attributes
    found.stem, found.head, found.training = network.stem, network.head, network.training
    for s, (stage, wanted) in enumerate(zip(network.stages, order, strict=True)):
        every = list(range(len(stage)))
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(every):
            raise ValueError(f"order[{s}]={list(wanted)} must name blocks of {every}, each at most once; use {every}")
        chosen = [stage[j] for j in wanted]
        if every and stage[0].is_transition:
            if 0 in wanted[1:]:
                fits = [0, *(j for j in wanted if j)]
                raise ValueError(f"order[{s}]={list(wanted)} must begin with 0, the transition, or omit it; use {fits}")
            if 0 not in wanted:
                chosen.insert(0, ResidualBlock(stage[0].residual, 0.0))
        found.stages[s] = nn.ModuleList(chosen)
    return found
