"""Inputs and targets of a regression on the points of a square mesh: a split, and statistics of the training samples.

Shape letters: `B` samples, `C` channels, `H W` points of the mesh, y and x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from xbraid_py.data.dataset import kind_of, whole_number


@dataclass(frozen=True, eq=False)
class PdeDataset:
    """Samples of a map from fields to fields or numbers, in the units of the problem.

    Parameters
    ----------
    inputs : torch.Tensor
        (B, C, H, W), floating point.
    targets : torch.Tensor
        (B, H, W), or (B, Q) for Q numbers a sample; of the dtype of the inputs.
    channels : tuple of str
        Names of the C channels.
    parameters : torch.Tensor, optional
        (B, P) of the dtype of the inputs: what else a sample was made from. By default P = 0.

    Raises
    ------
    TypeError
        If they are no floating-point tensors of one dtype.
    ValueError
        If the shapes do not fit each other, or a value is not finite.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    channels: tuple[str, ...]
    parameters: torch.Tensor | None = None

    def __post_init__(self):
        parts = {"inputs": self.inputs, "targets": self.targets, "parameters": self.parameters}
        for name, part in parts.items():
            if name == "parameters" and part is None:
                part = self.inputs.new_zeros(len(self.inputs), 0)
                object.__setattr__(self, name, part)
            if not (isinstance(part, torch.Tensor) and part.is_floating_point() and part.dtype == self.inputs.dtype):
                raise TypeError(
                    f"{name} is {kind_of(part)}, must be a tensor of one floating-point type with inputs; use float32"
                )
            if len(part) != len(self.inputs):
                raise ValueError(f"{name}.shape={tuple(part.shape)} must begin with {len(self.inputs)}, as inputs does")
            if not torch.isfinite(part).all():
                raise ValueError(f"{name} holds a value that is not finite")
        if self.inputs.ndim != 4 or 0 in self.inputs.shape or self.inputs.shape[1] != len(self.channels):
            raise ValueError(
                f"inputs.shape={tuple(self.inputs.shape)} must be (B, C, H, W) with C={len(self.channels)} channels, "
                f"none empty; use (100, {len(self.channels)}, 32, 32)"
            )
        assert self.parameters is not None
        if self.targets.ndim not in (2, 3) or 0 in self.targets.shape or self.parameters.ndim != 2:
            raise ValueError(
                f"targets.shape={tuple(self.targets.shape)} must be (B, H, W) or (B, Q), none empty, and "
                f"parameters.shape={tuple(self.parameters.shape)} (B, P); use (100, 32, 32) and (100, 0)"
            )

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.inputs)

    def rows(self, places: torch.Tensor | slice) -> PdeDataset:
        """The samples at `places`, in that order."""
        assert self.parameters is not None
        return PdeDataset(self.inputs[places], self.targets[places], self.channels, self.parameters[places])


def split(dataset: PdeDataset, num_val: int, seed: int = 0) -> tuple[PdeDataset, PdeDataset]:
    """Samples for training and for validation, drawn uniformly without replacement; each in ascending order.

    The same numbers of samples and the same seed give the same split on every rank, without a message. Raises
    `TypeError` or `ValueError` unless `num_val` is an integer from 1 to one less than there are, and the seed not
    negative.
    """
    num_val, seed = whole_number("num_val", num_val, 1, 1000), whole_number("seed", seed, 0, 0)
    if num_val >= dataset.num_samples:
        raise ValueError(
            f"num_val={num_val} must leave some of the {dataset.num_samples} samples for training; use "
            f"{max(1, dataset.num_samples // 10)}"
        )
    order = torch.from_numpy(np.random.default_rng([seed, dataset.num_samples]).permutation(dataset.num_samples))
    return dataset.rows(order[num_val:].sort().values), dataset.rows(order[:num_val].sort().values)


@dataclass(frozen=True, eq=False)
class Standardization:
    """Means and deviations of training samples, and the data sets they make of others; made by `of`.

    One mean and one deviation for each channel, over samples and points, and one of each for all targets: so a mean
    square error of standardized targets, times `target_scale` squared, is the one of the raw targets. The paper says
    nothing of a standardization: raw values are the default everywhere.

    Attributes
    ----------
    input_mean, input_scale : (C, 1, 1) tensor
    target_mean, target_scale : tensor
        Scalars.
    """

    input_mean: torch.Tensor
    input_scale: torch.Tensor
    target_mean: torch.Tensor
    target_scale: torch.Tensor

    @classmethod
    def of(cls, train: PdeDataset) -> Standardization:
        """The statistics of `train`; what never differs is only centered."""
        inputs = train.inputs.double()
        input_mean = inputs.mean((0, 2, 3), keepdim=True)[0]
        target_mean = train.targets.double().mean()
        found = (
            input_mean,
            _scale(inputs, (inputs - input_mean).square().mean((0, 2, 3), keepdim=True)[0].sqrt(), (0, 2, 3)),
            target_mean,
            _scale(train.targets, (train.targets.double() - target_mean).square().mean().sqrt(), None),
        )
        return cls(*(part.to(train.inputs.dtype) for part in found))

    def apply(self, dataset: PdeDataset) -> PdeDataset:
        """`dataset` with standardized inputs and targets."""
        return PdeDataset(
            (dataset.inputs - self.input_mean) / self.input_scale,
            (dataset.targets - self.target_mean) / self.target_scale,
            dataset.channels,
            dataset.parameters,
        )

    def raw_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Standardized targets, or predictions of them, in the units of the problem."""
        return targets * self.target_scale + self.target_mean


def _scale(values: torch.Tensor, deviation: torch.Tensor, axes: tuple[int, ...] | None) -> torch.Tensor:
    """The deviation, 1 where all values are the same; not by the deviation, which rounding may keep from 0."""
    if axes is None:
        same = values.max() == values.min()
    else:
        same = values.amax(axes, keepdim=True)[0] == values.amin(axes, keepdim=True)[0]
    return torch.where(same, torch.ones_like(deviation), deviation)
