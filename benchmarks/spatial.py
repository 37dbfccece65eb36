"""Coarser pixels on coarse levels: iterations and time of MGRIT for convolutions, with and without.

    python benchmarks/spatial.py [--quick] [--cases 2d,3d] [--weights diffusion,stiff,random,trained]

States of 64 x 64 or 16 x 16 x 16 pixels, 4 channels, 128 layers u + h tanh(K u + b), V-cycles with FCF-relaxation on 3
levels until the relative residual is 1e-6, states and adjoints. Weights: "diffusion", discrete Laplacians with
rates up to the limit of stability of the coarsest level without coarser pixels; "stiff", the same up to that of the
finest level, so that coarse steps are stable only where coarser pixels go with them, of pictures so faint that tanh is
linear; "random", normal with deviation 1/sqrt(inputs), smooth in depth; "trained", by 60 updates of Adam with exact
gradients, which take noise out of smooth pictures. Interleaved, one thread; medians. Last line: `iterations_...` and
`time_...` of each choice over none.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import common
import torch
from torch import nn

from xbraid_py import MGRIT, Adjoint, Forward, Hierarchy, LayerGrid, Solver, SpatialCoarsening
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps

CHANNELS, BATCH = 4, 4
PIXELS = {"2d": (64, 64), "3d": (16, 16, 16)}
# Which coarse levels have fewer pixels, and how the weights of convolutions come there.
CHOICES = {
    "none": None,
    "carry, galerkin": {"levels": (1, 2)},
    "carry, same": {"levels": (1, 2), "weights": "same"},
    "carry, last": {"levels": (2,)},
    "restrict, galerkin": {"levels": (1, 2), "states": "restrict"},
    "restrict, same": {"levels": (1, 2), "states": "restrict", "weights": "same"},
    "restrict, last": {"levels": (2,), "states": "restrict"},
}


class Convolution(nn.Module):
    """tanh(K u + b); u (B, C, X...)."""

    def __init__(self, dims: int):
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.convolution = kind(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.float64)

    def forward(self, u):
        return torch.tanh(self.convolution(u))


def laplacian(dims: int) -> torch.Tensor:
    """Second differences along all axes (3, ...), pixels of size 1."""
    stencil = torch.zeros((3,) * dims, dtype=torch.float64)
    stencil[(1,) * dims] = -2.0 * dims
    for axis in range(dims):
        for side in (0, 2):
            stencil[tuple(side if each == axis else 1 for each in range(dims))] = 1.0
    return stencil


def pictures(pixels: tuple[int, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth random pictures (count, CHANNELS, X...)."""
    rough = torch.randn((count, CHANNELS, *(max(2, each // 8) for each in pixels)), generator=generator).double()
    return nn.functional.interpolate(rough, pixels, mode="bilinear" if len(pixels) == 2 else "trilinear")


def weights_of(kind: str, block: ModuleBlock, pixels: tuple[int, ...], num_layers: int, T: float) -> torch.Tensor:
    """Rows of weights (N, p)."""
    dims, generator = len(pixels), torch.Generator().manual_seed(0)
    kernel = (CHANNELS, CHANNELS, *(3,) * dims)
    depth = torch.linspace(0.0, 1.0, num_layers, dtype=torch.float64)
    if kind in ("diffusion", "stiff"):
        # An Euler step of 16 layers, on the coarsest level, is stable up to a rate of 1 / (2 dims 16 h).
        most = num_layers / T / (16 if kind == "diffusion" else 1) / (2 * dims)
        rates = most * (0.5 + 0.5 * torch.cos(3.0 * depth) ** 2)
        rows = torch.zeros((num_layers, *kernel), dtype=torch.float64)
        for channel in range(CHANNELS):
            rows[:, channel, channel] = rates.view(-1, *(1,) * dims) * laplacian(dims)
        biases = torch.zeros((num_layers, CHANNELS), dtype=torch.float64)
        return block.join([rows, biases])
    scale = (CHANNELS * 3.0**dims) ** -0.5
    ends = scale * torch.randn((2, block.row_size), generator=generator).double()
    theta = torch.cos(2.0 * depth)[:, None] * ends[0] + torch.sin(2.0 * depth)[:, None] * ends[1]
    return theta if kind == "random" else trained(0.1 * theta, block, pixels, T, generator)


def trained(theta, block: ModuleBlock, pixels, T: float, generator: torch.Generator) -> torch.Tensor:
    """Weights that take noise out of pictures; half as many pixels along each axis in training."""
    pixels = tuple(each // 2 for each in pixels)
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=1e-2)
    for _ in range(60):
        clean = pictures(pixels, 4, generator)
        u = clean + 0.5 * torch.randn(clean.shape, generator=generator).double()
        for row in theta:
            u = u + T / len(theta) * block([part[0] for part in block.split(row[None])], u)
        loss = nn.functional.mse_loss(u, clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained to a mean squared error of {loss.item():.3g} (noise 0.25)")
    return theta.detach()


def solves(block, theta, u0, options: MGRIT, choice: dict | None, T: float) -> dict[str, float]:
    """Iterations and seconds of a state and an adjoint solve."""
    dims = u0.dim() - 2
    hierarchy = Hierarchy.plan(options, LayerGrid(len(theta), T), 1)
    spatial = SpatialCoarsening(dims=dims, **choice) if choice is not None else None
    transfers = spatial.transfers(u0.shape, len(hierarchy.levels)) if spatial else ()
    solver = Solver(options, hierarchy, SerialCommunicator())
    steps = ModuleSteps(block, theta, T / len(theta), tuple(range(len(theta))))
    states, found = u0.new_empty((len(theta), *u0.shape)), {}
    slope = torch.randn(u0.shape, generator=torch.Generator().manual_seed(1)).double()
    back = tuple(each and each.transposed() for each in transfers)
    for name, propagator, start in (
        ("forward", Forward(steps, states, u0, transfers), u0),
        ("adjoint", Adjoint(steps, states, None, back), slope),
    ):
        clock = time.perf_counter()
        solution = solver.solve(propagator, start)
        found[f"{name} s"] = time.perf_counter() - clock
        converged = solution.residual <= options.tolerance
        found[name] = len(solution.residuals) - 1 if converged else float("inf")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 layers, a quarter of the pixels, one round")
    parser.add_argument("--cases", default="2d,3d")
    parser.add_argument("--weights", default="diffusion,stiff,random,trained")
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--T", type=float, default=4.0)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    quick = arguments.quick
    num_layers, rounds = arguments.num_layers or (64 if quick else 128), arguments.rounds or (1 if quick else 3)
    options = MGRIT(cycle="V", cfactor=4, max_levels=3, min_coarse=2, tol=1e-6, max_iter=20, coarse_step="euler")
    figures = {}
    for case in arguments.cases.split(","):
        pixels = tuple(each // 2 for each in PIXELS[case]) if quick else PIXELS[case]
        block = ModuleBlock(Convolution(len(pixels)))
        u0 = pictures(pixels, BATCH, torch.Generator().manual_seed(2))
        u0 = u0 + 0.5 * torch.randn(u0.shape, generator=torch.Generator().manual_seed(3)).double()
        for kind in arguments.weights.split(","):
            theta = weights_of(kind, block, pixels, num_layers, arguments.T)
            start = 1e-3 * u0 if kind == "stiff" else u0
            runs: dict[str, list[dict]] = {name: [] for name in CHOICES}
            for _ in range(rounds):
                for name, choice in CHOICES.items():
                    runs[name].append(solves(block, theta, start, options, choice, arguments.T))
            print(f"\n{case}, {kind} weights, {num_layers} layers, {' x '.join(map(str, pixels))} pixels")
            print(f"{'coarse pixels':18}  iterations (states, adjoints)  seconds (both)  time over none")
            both = {name: [each["forward s"] + each["adjoint s"] for each in found] for name, found in runs.items()}
            for name, found in runs.items():
                ratio = common.Spread.of_ratios(both[name], both["none"])
                counts = found[0]["forward"], found[0]["adjoint"]
                print(f"{name:18}  {counts[0]:12g}  {counts[1]:15g}  {median(both[name]):14.3g}  {ratio}", flush=True)
                if name != "none":
                    key = f"{case}_{kind}_{name.replace(', ', '_')}"
                    least = found[0]["forward"] / runs["none"][0]["forward"]
                    if max(counts) < float("inf"):  # a solve that does not converge has no time to compare
                        figures[f"iterations_{key}"] = least
                        figures[f"time_{key}"] = ratio.median
    common.finish("spatial", figures)


if __name__ == "__main__":
    main()
