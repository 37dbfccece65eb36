"""Layer steps that are too wide for the native kernels, against the bare matrix products in them.

    python benchmarks/wide_layers.py [--quick] [--width 220] [--samples 1000]

Residual layers of width 220 on 1000 samples, as in the Indian Pines job: forwards with their states kept (a product
each), and backwards with the gradients of the weights (three: the layer again, the transposed weights, the gradient).
The bare products have the same shapes and number, and write to the same few buffers over and over; nothing else is done
in them. Both are of one interleaved run with one thread, in float64 and float32. Last line: `forward_share` and
`adjoint_share`, the time of the bare products in times of ours (1 would be a layer that costs nothing but its
products), the smaller one of the two types.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import common
import torch
from torch import Tensor

from xbraid_py import keep_freed_memory, kernels
from xbraid_py.layers.dense import DenseLayer

T = 5.0
PRODUCTS = {"forward": 1, "adjoint": 3}  # a layer


def layer_steps(theta: Tensor, u: Tensor, width: int) -> dict[str, Callable[[], object]]:
    """All layers one after the other, as a solve on one rank makes them."""
    layer, (num_layers, _), h = DenseLayer(width, width), theta.shape, T / len(theta)
    states = u.new_empty((num_layers, *u.shape))
    gradient = torch.empty_like(theta)

    def forward():
        return kernels.relax(layer, theta, u[None], num_layers, h=h, inputs=states)

    def adjoint():
        return kernels.relax_adjoint(layer, theta, states, u[None], num_layers, h=h, gradient=gradient)

    forward()
    return {"forward": forward, "adjoint": adjoint}


def bare_products(theta: Tensor, u: Tensor, width: int) -> dict[str, Callable[[], object]]:
    """The products of these steps and nothing else."""
    weights = list(theta[:, : width * width].unflatten(1, (width, width)).clone())
    states = list(u.expand(len(weights), *u.shape).clone())
    out, v, gradient = torch.empty_like(u), u.clone(), torch.empty_like(weights[0])

    def forward():
        for w, state in zip(weights, states, strict=True):
            torch.mm(w, state, out=out)

    def adjoint():
        for w, state in zip(weights, states, strict=True):
            torch.mm(w, state, out=out)
            torch.mm(w.T, v, out=out)
            torch.mm(v, state.T, out=gradient)

    return {"forward": forward, "adjoint": adjoint}


def measured(dtype: torch.dtype, width: int, samples: int, num_layers: int, rounds: int) -> dict[str, common.Spread]:
    """Shares of one type; prints the times."""
    theta = torch.randn(num_layers, DenseLayer(width, width).num_parameters, dtype=dtype) / width**0.5
    u = torch.rand(width, samples, dtype=dtype)
    ours, bare = layer_steps(theta, u, width), bare_products(theta, u, width)
    bodies = {(name, kind): body for kind, all_ in (("ours", ours), ("bare", bare)) for name, body in all_.items()}
    times = common.interleaved(bodies, rounds)
    shares = {}
    for name, count in PRODUCTS.items():
        own, least = times[name, "ours"], times[name, "bare"]
        shares[name] = common.Spread.of_ratios(least, own)
        speed = count * 2e-9 * num_layers * width**2 * samples / median(least)
        own, least = (common.Spread.of([1e3 * each / num_layers for each in some]) for some in (own, least))
        print(f"{dtype!s:14s} {name:8s} {own!s:>24s} {least!s:>24s}  {shares[name]!s:>22s} {speed:8.0f}", flush=True)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--width", type=int, default=220)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--num_layers", type=int, default=8)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (25 if arguments.quick else 100)
    keep_freed_memory()  # as a job does
    print(
        f"width {arguments.width}, {arguments.samples} samples, one thread, kernels: {kernels.BACKEND}, "
        f"{rounds} rounds\n"
        f"{'':23s} {'ms a layer':>24s} {'bare products':>24s}  {'share':>22s} {'GFlop/s':>8s}"
    )
    sizes = arguments.width, arguments.samples, arguments.num_layers, rounds
    found = [measured(dtype, *sizes) for dtype in (torch.float64, torch.float32)]
    common.finish("wide_layers", {f"{name}_share": min(each[name].median for each in found) for name in PRODUCTS})


if __name__ == "__main__":
    main()
