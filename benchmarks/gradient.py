"""Value and gradient of a network on one rank: native kernels and their torch fallback against PyTorch autograd.

    python benchmarks/gradient.py [--quick] [--widths 2,4,8,16,32,64]

The network has 64 residual layers of width 8 with opening and classification layer, smoothed ReLU and mean cross
entropy, 5000 samples of peaks, float64. Ours is propagated serially. The opponent is the same network as one writes
it in torch, with states (batch, width) and (width, batch) and the activation written by `where` or by `clamp`: all
of them are timed, the fastest counts. All must agree with ours to 1e-12 first. All times are of one interleaved run
with one thread, each of a call that follows one of the same, as in a training; the copy of the bytes of all states to
another buffer is among them. Last line: `native_vs_autograd` and `fallback_vs_autograd` (how many times faster we
are), `native_vs_stream` (our time in times of that copy).
With --widths also a table of the times of a layer; --quick makes fewer rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import common
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from xbraid_py import kernels
from xbraid_py.comm import SerialCommunicator
from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.options import InitialScales
from xbraid_py.problem.regularization import Regularization

ETA = 0.1
AGREEMENT = 1e-12


@contextmanager
def backend(module) -> Iterator[None]:
    """The kernels of that module for a while."""
    before, kernels.implementation = kernels.implementation, module
    try:
        yield
    finally:
        kernels.implementation = before


def native_kernels():
    """The module with the native kernels, whatever the environment asks for."""
    try:
        from xbraid_py.kernels import native
    except ImportError as error:
        raise SystemExit(
            "error: this installation has no native kernels; install it where a C++ compiler is"
        ) from error
    return native


def by_where(z: Tensor) -> Tensor:
    """The smoothed ReLU as it is defined."""
    return torch.where(z.abs() < ETA, z.square() / (4 * ETA) + z / 2 + ETA / 4, torch.relu(z))


def by_clamp(z: Tensor) -> Tensor:
    """The same function without a branch, in fewer passes."""
    p = (z * (0.5 / ETA) + 0.5).clamp(0.0, 1.0)
    return torch.relu(z - ETA) + ETA * p * p


def batch_first(act, weights: list[Tensor], features: Tensor, labels: Tensor, h: float) -> Tensor:
    """Loss of the network in torch, states (batch, width)."""
    (first_w, first_b), *layers, (last_w, last_b) = zip(weights[::2], weights[1::2], strict=True)
    u = act(linear(features, first_w, first_b))
    for w, b in layers:
        u = u + h * act(linear(u, w, b))
    return cross_entropy(linear(u, last_w, last_b), labels)


def width_first(act, weights: list[Tensor], features: Tensor, labels: Tensor, h: float) -> Tensor:
    """The same, states (width, batch)."""
    (first_w, first_b), *layers, (last_w, last_b) = zip(weights[::2], weights[1::2], strict=True)
    u = act(torch.addmm(first_b[:, None], first_w, features))
    for w, b in layers:
        u = u + h * act(torch.addmm(b[:, None], w, u))
    return cross_entropy(torch.addmm(last_b[:, None], last_w, u).T, labels)


def opponents(objective: NetworkObjective, x: Tensor) -> dict[str, Callable[[], tuple[float, Tensor]]]:
    """Value and flat gradient by autograd, for each way of writing the network."""
    named = objective.network.layout.named(x)
    weights = []
    for stack in ("opening", "layers", "classification"):
        for w, b in zip(named[f"{stack}.weight"], named[f"{stack}.bias"], strict=True):
            weights += (w.clone().requires_grad_(), b.clone().requires_grad_())
    h, labels = objective.network.grid.h, objective.labels
    layouts = {"(batch, width)": (batch_first, objective.features.T.contiguous())}
    layouts["(width, batch)"] = (width_first, objective.features)

    def value_and_gradient(loss, act, features):
        value = loss(act, weights, features, labels, h)
        return float(value.detach()), torch.autograd.grad(value, weights)

    def body(loss, act, features):
        return lambda: value_and_gradient(loss, act, features)

    return {
        f"autograd {layout} {act.__name__}": body(loss, act, features)
        for layout, (loss, features) in layouts.items()
        for act in (by_where, by_clamp)
    }


def ours(objective: NetworkObjective, x: Tensor, module) -> Callable[[], tuple[float, Tensor]]:
    """Value and flat gradient by our serial propagation with these kernels."""

    def body():
        with backend(module):
            return objective.evaluate(x).value, objective.gradient(x)

    return body


def check(bodies: dict[str, Callable], exact: tuple[float, Tensor]) -> None:
    """All bodies find the same value and gradient."""
    for name, body in bodies.items():
        value, gradient = body()
        flat = gradient if isinstance(gradient, Tensor) else torch.cat([part.flatten() for part in gradient])
        errors = (abs(value / exact[0] - 1), float((flat - exact[1]).norm() / exact[1].norm()))
        if not max(errors) <= AGREEMENT:
            raise SystemExit(f"error: {name}: value and gradient are wrong by {errors[0]:.1e} and {errors[1]:.1e}")


def table(widths: list[int], num_layers: int, samples: int, rounds: int, native) -> None:
    """Microseconds of a layer, forwards with its states kept, and backwards with the gradient."""
    print(f"\nmicroseconds a layer, {samples} samples\n{'':8s}{'forward':>19s}{'adjoint':>21s}")
    print(f"{'width':>6s}" + f"{'native':>11s}{'torch':>10s}" * 2)
    for width in widths:
        layer, h = DenseLayer(width, width), 5.0 / num_layers
        theta = torch.randn(num_layers, layer.num_parameters, dtype=torch.float64) / width**0.5
        points = torch.rand(1, width, samples, dtype=torch.float64)
        states, gradient = points.new_empty((num_layers, width, samples)), torch.empty_like(theta)

        def forward(module, layer=layer, theta=theta, points=points, states=states, h=h):
            with backend(module):
                kernels.relax(layer, theta, points, num_layers, h=h, inputs=states)

        def adjoint(module, layer=layer, theta=theta, points=points, states=states, h=h, gradient=gradient):
            with backend(module):
                kernels.relax_adjoint(layer, theta, states, points, num_layers, h=h, gradient=gradient)

        bodies = {
            (body, module): lambda body=body, module=module: body(module)
            for body in (forward, adjoint)
            for module in (native, fallback)
        }
        times = [1e6 * median(each) / num_layers for each in common.interleaved(bodies, rounds).values()]
        print(f"{width:6d}" + "".join(f"{a:11.1f}{b:10.1f}" for a, b in (times[:2], times[2:])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--num_layers", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--widths", nargs="?", const="2,4,8,16,32,64", help="also time single layers of these widths")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (15 if arguments.quick else 60)
    native = native_kernels()

    problem = common.problem(
        SerialCommunicator(), common.SERIAL, arguments.samples, regularization=Regularization(0.0, 0.0, 0.0)
    )
    objective = problem.objective(arguments.num_layers)
    x = objective.network.initial(InitialScales(layers=0.3, classification=0.3), 0)
    bodies = {"native": ours(objective, x, native), "fallback": ours(objective, x, fallback)}
    bodies |= opponents(objective, x)
    value, gradient = bodies["native"]()
    check(bodies, (value, gradient.clone()))

    width = objective.network.block.inputs
    states = torch.rand(arguments.num_layers, width, arguments.samples, dtype=torch.float64)
    buffer = torch.zeros_like(states)
    times = common.interleaved(bodies | {"stream": lambda: buffer.copy_(states)}, rounds)
    opponent = min((name for name in bodies if name.startswith("autograd")), key=lambda name: median(times[name]))
    print(
        f"{arguments.num_layers} layers, width {width}, {arguments.samples} samples, float64, one thread, "
        f"native is {native.active()}, {rounds} rounds\n{'':32s} {'ms':>24s}  faster than {opponent}"
    )
    for name, seconds in times.items():
        milliseconds = common.Spread.of([1e3 * each for each in seconds])
        print(f"{name:32s} {milliseconds!s:>24s}  {common.Spread.of_ratios(times[opponent], seconds)}")
    figures = {
        "native_vs_autograd": common.Spread.of_ratios(times[opponent], times["native"]),
        "fallback_vs_autograd": common.Spread.of_ratios(times[opponent], times["fallback"]),
        "native_vs_stream": common.Spread.of_ratios(times["native"], times["stream"]),
    }
    if arguments.widths:
        table(common.integers(arguments.widths), arguments.num_layers, arguments.samples, max(3, rounds // 6), native)
    print()
    for name, spread in figures.items():
        print(f"{name}: {spread}")
    common.finish("gradient", {name: spread.median for name, spread in figures.items()})


if __name__ == "__main__":
    main()
