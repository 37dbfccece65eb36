"""Coarser pixels on coarse levels: how states, and the weights of convolutions, come to them and back.

Shape letters: `n` states, `X` pixels along one axis, `Y` those of the coarser level, `p` parameters of a layer,
`k` width of a kernel. The pixels are the last two or three axes of a state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps
from xbraid_py.mgrit import MGRIT

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, kw_only=True)
class SpatialCoarsening:
    """Fewer pixels on chosen coarse levels of a solve. Solutions are those of the finest level, whatever the choices.

    Parameters
    ----------
    levels
        Coarse levels with fewer pixels than the next finer level; 1 is the first coarse one.
    states
        Carry: states of a coarse level have all pixels, and a step changes them by P F(R u), F evaluated with fewer
        pixels, R the mean over blocks of pixels, P interpolation; what coarse pixels do not show is carried along as it
        is. Restrict: the full approximation scheme with coarse states R u; what the coarse level changes, P (U - R u),
        is interpolated and added, and what coarse pixels do not show moves by relaxation alone: for V- and F-cycles
        with `nrelax` of at least 1, and good where layers damp such details, as diffusion does. The adjoints are then
        restricted by P^T and interpolated by R^T, so that a coarse adjoint step is the transpose of the coarse step.
    dims
        Pixel axes: the last 2 or 3 of a state.
    factor
        Pixels along each axis that one coarse pixel stands for; where it does not divide their number the last
        coarse pixel stands for fewer.
    interpolation
        P: linear between the middles of the coarse pixels, or constant in each of them.
    weights
        Of convolutions (kernels of odd width above 1, stride 1, as many pixels as before) on the coarse level: those of
        R K P away from the boundary (galerkin), which are the better ones where kernels resemble derivatives, or the
        same. All other weights are the same.
    """

    levels: tuple[int, ...] = (1,)
    states: Literal["carry", "restrict"] = "carry"
    dims: Literal[2, 3] = 2
    factor: int = 2
    interpolation: Literal["linear", "constant"] = "linear"
    weights: Literal["galerkin", "same"] = "galerkin"

    def __post_init__(self):
        if not self.levels or min(self.levels) < 1 or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels={self.levels} must be different coarse levels, numbers from 1 on; use (1,)")
        if self.factor < 2:
            raise ValueError(f"factor={self.factor} must be at least 2; use 2")
        for name, words in (
            ("states", ("carry", "restrict")),
            ("dims", (2, 3)),
            ("interpolation", ("linear", "constant")),
            ("weights", ("galerkin", "same")),
        ):
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be {' or '.join(map(str, words))}; use {words[0]}"
                )

    def check(self, options: MGRIT) -> None:
        """Raise `ValueError` unless solves with these options converge."""
        if self.states == "restrict" and options.cycle == "lagged":
            raise ValueError(
                "states='restrict' is for V- and F-cycles; cycle='lagged' has no C-relaxation: use states='carry'"
            )
        relaxed = [options.nrelax_of(level - 1) for level in self.levels]
        if self.states == "restrict" and min(relaxed) < 1:
            raise ValueError(
                f"nrelax={min(relaxed)} leaves what coarse pixels do not show as it is with states='restrict'; use "
                f"nrelax=1"
            )

    def transfers(self, shape: torch.Size, num_levels: int) -> tuple[PixelTransfer | None, ...]:
        """How states of that shape come to each coarse level from the next finer one; None where they stay the same.

        Raises `ValueError` if a state has not so many axes, or one of its axes too few pixels.
        """
        if len(shape) < self.dims + 1:
            raise ValueError(f"dims={self.dims} pixel axes need a state of more axes than {tuple(shape)}")
        pixels, found = tuple(shape[-self.dims :]), []
        for level in range(1, num_levels):
            if level not in self.levels:
                found.append(None)
                continue
            if min(pixels) <= self.factor:
                raise ValueError(
                    f"levels={self.levels}: {pixels} pixels are too few for level {level}, which asks for at least "
                    f"{self.factor + 1} along each axis; leave it out"
                )
            found.append(PixelTransfer(pixels, self))
            pixels = found[-1].coarse_pixels
        return tuple(found)


@dataclass(frozen=True)
class PixelTransfer:
    """From states of one level to those of the next with fewer pixels, and back.

    Parameters
    ----------
    pixels : tuple of int
        Along each axis, on the finer level.
    options : SpatialCoarsening
    is_transposed : bool
        Restrict by P^T and interpolate by R^T: for adjoints.
    """

    pixels: tuple[int, ...]
    options: SpatialCoarsening
    is_transposed: bool = False

    @property
    def keeps_states(self) -> bool:
        """Whether states of the coarser level have all pixels, and only its steps fewer."""
        return self.options.states == "carry"

    @property
    def coarse_pixels(self) -> tuple[int, ...]:
        """Along each axis, on the coarser level."""
        return tuple(-(-count // self.options.factor) for count in self.pixels)

    def restrict(self, states: Tensor) -> Tensor:
        """States (*, X...) on the coarser level (*, Y...)."""
        return self._along_axes(states, self.pixels, self.is_transposed, not self.is_transposed)

    def interpolate(self, states: Tensor) -> Tensor:
        """States (*, Y...) of the coarser level on the finer one (*, X...)."""
        return self._along_axes(states, self.coarse_pixels, self.is_transposed, self.is_transposed)

    def _along_axes(self, states: Tensor, pixels: tuple[int, ...], transposed: bool, restriction: bool) -> Tensor:
        lead, found = states.shape[: -len(pixels)], states
        for axis in range(len(pixels)):
            matrices = axis_matrices(self.pixels[axis], self.options.factor, self.options.interpolation)
            matrix = matrices[0 if restriction else 1].to(states)
            matrix = matrix.t() if transposed else matrix
            shape = found.shape
            behind = shape[len(lead) + axis + 1 :].numel()
            found = matrix @ found.reshape(-1, shape[len(lead) + axis], behind)
            found = found.reshape(*shape[: len(lead) + axis], len(matrix), *shape[len(lead) + axis + 1 :])
        return found

    def transposed(self) -> PixelTransfer:
        """That of the adjoints."""
        return replace(self, is_transposed=not self.is_transposed)

    def steps(self, steps: ModuleSteps) -> ModuleSteps:
        """Steps as they are to be made on the coarser level."""
        if self.options.weights == "galerkin":
            steps = replace(steps, theta=galerkin_rows(steps.block, steps.theta, self.options))
        if not self.keeps_states:
            return steps
        # The adjoint of these steps is that of the same steps: autograd transposes R and P.
        return replace(steps, transfers=(*steps.transfers, replace(self, is_transposed=False)))


@lru_cache(maxsize=64)
def axis_matrices(pixels: int, factor: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Restriction (Y, X) and interpolation (X, Y) along one axis, in double precision."""
    fine = torch.arange(pixels)
    block = fine // factor
    belongs = torch.nn.functional.one_hot(block).double()
    restriction = (belongs / belongs.sum(0)).t()
    if interpolation == "constant":
        return restriction, belongs
    places = fine.double()
    middles = restriction @ places
    right = torch.searchsorted(middles, places).clamp(1, len(middles) - 1)
    share = ((places - middles[right - 1]) / (middles[right] - middles[right - 1])).clamp(0.0, 1.0)
    linear = torch.zeros_like(belongs)
    linear[fine, right - 1] = 1.0 - share
    linear[fine, right] += share
    return restriction, linear


@lru_cache(maxsize=64)
def kernel_matrix(width: int, factor: int, interpolation: str) -> Tensor:
    """What R K P is away from the boundary: kernels (k,) along one axis to those of the coarser level, (k, k)."""
    reach = width // 2
    count = 2 * width + 5
    restriction, prolongation = axis_matrices(count * factor, factor, interpolation)
    row, middle = restriction[count // 2], count // 2
    found = torch.empty((width, width), dtype=torch.float64)
    for tap in range(width):
        # K with this tap alone moves everything by `tap - reach` pixels; far from the ends nothing wraps around.
        moved = prolongation.roll(reach - tap, 0)
        found[:, tap] = (row @ moved)[middle - reach : middle + reach + 1]
    return found


def galerkin_rows(block: ModuleBlock, theta: Tensor, options: SpatialCoarsening) -> Tensor:
    """Rows of weights (n, p) with the kernels of R K P for convolutions K."""
    kernels: dict[str, Any] = {
        f"{name}.weight" if name else "weight": part.kernel_size
        for name, part in block.module.named_modules()
        if isinstance(part, _CONVOLUTIONS[options.dims]) and _keeps_pixels(part)
    }
    columns = block.split(theta)
    for place, column in enumerate(block.columns):
        for axis, width in enumerate(kernels.get(column.name, ())):
            if width > 1:
                matrix = kernel_matrix(width, options.factor, options.interpolation).to(theta)
                moved = columns[place].movedim(3 + axis, -1) @ matrix.t()
                columns[place] = moved.movedim(-1, 3 + axis)
    return block.join([column.contiguous() for column in columns])


def _keeps_pixels(part: Any) -> bool:
    """Whether a convolution has kernels of odd width, and as many pixels behind it as before it."""
    widths = part.kernel_size
    same = tuple(width // 2 for width in widths)
    padded = part.padding == "same" or tuple(part.padding) == same
    return padded and all(w % 2 for w in widths) and set(part.stride) == set(part.dilation) == {1}
