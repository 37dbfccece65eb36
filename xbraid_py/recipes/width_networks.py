"""The networks that paper 002 trains (section 8), of its sizes or of others, with seeded weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from xbraid_py.layers.module_block import own_random_numbers

KINDS = ("dense", "convolutional")


@dataclass(frozen=True, kw_only=True)
class WidthNetwork:
    """A network of dense layers with ReLU, behind convolutions with ReLU or not.

    Parameters
    ----------
    kind
        Dense, or convolutional: convolutions first.
    widths
        Neurons of the hidden dense layers; by default those of the paper for the problem.
    channels
        Of the convolutions; by default those of the paper.
    kernels
        Widths of their kernels; by default those of the paper.
    strides
        Their strides; by default those of the paper. There is no padding.
    """

    kind: Literal["dense", "convolutional"] = "dense"
    widths: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    kernels: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be dense or convolutional; use dense")
        for name, use in (("widths", "400,400"), ("channels", "20,20"), ("kernels", "7,7"), ("strides", "2,2")):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise ValueError(f"{name}={list(values)} must be numbers of at least 1; use {use}")

    def of(self, problem: str) -> WidthNetwork:
        """The same with the sizes of the paper where none are given."""
        theirs = _PAPER[problem.partition("_")[0], self.kind]
        names = ("widths", "channels", "kernels", "strides")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        found = replace(theirs, **given)
        if self.kind == "convolutional" and not len(found.channels) == len(found.kernels) == len(found.strides):
            raise ValueError(
                f"channels={list(found.channels)}, kernels={list(found.kernels)} and strides={list(found.strides)} "
                "must be as many; use one of each for every convolution"
            )
        return found

    def features(self, inputs: tuple[int, int, int]) -> int:
        """Inputs of the first dense layer, for samples (C, H, W).

        Raises
        ------
        ValueError
            If a kernel is wider than what it is for.
        """
        channels, height, width = inputs
        if self.kind == "convolutional":
            for out, kernel, stride in zip(self.channels, self.kernels, self.strides, strict=True):
                if kernel > min(height, width):
                    raise ValueError(
                        f"kernels={list(self.kernels)}: {kernel} does not fit into {height} x {width} points; use "
                        f"{[1] * len(self.kernels)} or smaller strides"
                    )
                channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return channels * height * width

    def module(
        self, inputs: tuple[int, int, int], outputs: int, seed: int, dtype: torch.dtype = torch.float32
    ) -> nn.Sequential:
        """The network with PyTorch's usual initial weights; made by `of`.

        Parameters
        ----------
        inputs : tuple of int
            (C, H, W) of a sample.
        outputs : int
        seed : int
            Of the weights; the random numbers of the process stay as they are.
        dtype : torch.dtype

        Raises
        ------
        ValueError
            If a kernel is wider than what it is for.
        """
        parts: list[nn.Module] = []
        size = self.features(inputs)
        with own_random_numbers(seed):
            if self.kind == "convolutional":
                channels = (inputs[0], *self.channels)
                for n, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
                    parts += [nn.Conv2d(channels[n], channels[n + 1], kernel, stride), nn.ReLU()]
            parts.append(nn.Flatten())
            for neurons in self.widths:
                parts += [nn.Linear(size, neurons), nn.ReLU()]
                size = neurons
            parts.append(nn.Linear(size, outputs))
        # Drawn in single precision in any case, so that both precisions begin at the same weights.
        return nn.Sequential(*parts).to(dtype)


_PAPER = {
    ("poisson", "dense"): WidthNetwork(widths=(400, 400)),
    ("poisson", "convolutional"): WidthNetwork(
        kind="convolutional", widths=(400, 400), channels=(200, 200), kernels=(7, 7), strides=(2, 2)
    ),
    ("darcy", "dense"): WidthNetwork(widths=(1024, 1024, 1024)),
    ("darcy", "convolutional"): WidthNetwork(
        kind="convolutional", widths=(2048, 2048), channels=(100, 200, 400), kernels=(11, 7, 3), strides=(2, 1, 1)
    ),
}
