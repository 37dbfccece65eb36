"""Deep narrow dense networks on a GPU: LayerParallel against serial PyTorch, eager and captured in a CUDA graph.

    python benchmarks/graph.py [--quick] [--depths 1024,4096] [--widths 8,16,32,64] [--batches 256,5000]
    python benchmarks/graph.py --cpu

Forward and backward of u + h relu(W u + b), T=5, float32, one device, one process. Ours is `LayerParallel` of
`DenseBlock` with the lagged cycle, its intervals evaluated in one call, for several numbers of intervals. The
opponents are the plain loop over `nn.Linear` with autograd, and the same captured once and replayed. Beside each time
stands the relative error (2-norm, gradients of all weights) against the eager loop, and the relaxations of states
and adjoints. Every solve starts cold.

Last line: for each network `vs_eager_N_W_B` and `vs_graph_N_W_B`, how many times faster ours is with the number of
intervals that is fastest, and `error_N_W_B` there. Without CUDA there are no figures; --cpu makes a tiny comparison
with the eager loop on the CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import common
import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, DenseBlock, GradientControl, LayerParallel, to_sequential

T = 5.0


class Network:
    """The plain loop over linear layers, with the weights of a stack.

    Parameters
    ----------
    stack : LayerParallel
    u, slope : (batch, width) tensor
        Input, and the gradient of the output.
    """

    def __init__(self, stack: LayerParallel, u: Tensor, slope: Tensor):
        self.layers, self.h = nn.ModuleList(), stack.grid.h
        for step in to_sequential(stack, u.device):
            linear = nn.utils.skip_init(nn.Linear, *step.block.weight.shape, device=u.device)
            linear.weight, linear.bias = step.block.weight, step.block.bias
            self.layers.append(linear)
        self.u, self.slope = u.detach().clone().requires_grad_(), slope

    def eager(self) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of the input and of all weights."""
        x = self.u
        for layer in self.layers:
            x = x + self.h * torch.relu(layer(x))
        return torch.autograd.grad(x, (self.u, *self.layers.parameters()), self.slope)

    def captured(self) -> Callable[[], None]:
        """The same as one launch; what it computes is thrown away."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.eager()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = self.eager()
        return lambda kept=kept: graph.replay()

    def gradient(self) -> Tensor:
        """The gradient of the weights as the stack has it, a row for each layer."""
        _, *found = self.eager()
        return torch.cat([torch.stack(found[::2]).flatten(1), torch.stack(found[1::2])], 1)


def stack_of(num_layers: int, width: int, intervals: int, device: str) -> LayerParallel:
    """A stack whose solves stay as they are, whatever their errors."""
    return LayerParallel(
        lambda: DenseBlock(width, "relu"),
        num_layers,
        T,
        mgrit=MGRIT(intervals=intervals, max_levels=2),
        accuracy=GradientControl(check=0, adapt=False),
    ).to(device)


def ours(stack: LayerParallel, u: Tensor, slope: Tensor) -> list[Tensor]:
    """Forward and backward: the gradients of the weights."""
    for weight in stack.parameters():
        weight.grad = None
    stack(u.detach().requires_grad_()).backward(slope)
    return [weight.grad for weight in stack.parameters()]


def timed(body: Callable[[], object], device: str) -> Callable[[], None]:
    """The body to the end of all its kernels."""

    def run() -> None:
        body()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def compare(
    num_layers: int, width: int, batch: int, intervals: list[int], rounds: int, device: str
) -> dict[str, float]:
    """Time one network in all ways, print its rows; its figures."""
    generator = torch.Generator().manual_seed(0)
    u, slope = (torch.randn(batch, width, generator=generator).to(device) for _ in range(2))
    stacks = {each: stack_of(num_layers, width, each, device) for each in intervals}
    network = Network(stacks[intervals[0]], u, slope)
    exact = network.gradient()
    errors, bodies = {}, {"eager": timed(network.eager, device)}
    if device == "cuda":
        bodies["graph"] = timed(network.captured(), device)
    for each, stack in stacks.items():
        found = torch.cat([gradient.flatten(1) for gradient in ours(stack, u, slope)], 1)
        errors[each] = float((found - exact).norm() / exact.norm())
        bodies[each] = timed(lambda stack=stack: ours(stack, u, slope), device)
    times = common.interleaved(bodies, rounds)
    for name, seconds in times.items():
        milliseconds = common.Spread.of([1e3 * each for each in seconds])
        label = f"{name} intervals" if name in stacks else name
        row = f"{num_layers:6d}{width:6d}{batch:6d}  {label:14s}{milliseconds!s:>24s}"
        if name in stacks:
            record = stacks[name].record
            row += f"{errors[name]:10.1e}  {record.iterations} + {record.adjoint_iterations}"
        print(row, flush=True)
    best = min(stacks, key=lambda each: median(times[each]))
    key = f"{num_layers}_{width}_{batch}"
    opponents = [name for name in ("eager", "graph") if name in times]
    figures = {f"vs_{name}_{key}": common.Spread.of_ratios(times[name], times[best]).median for name in opponents}
    return figures | {f"error_{key}": errors[best]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 1024 layers, widths 8 and 64")
    parser.add_argument("--cpu", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--depths")
    parser.add_argument("--widths")
    parser.add_argument("--batches")
    parser.add_argument("--intervals")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here, nothing to compare; --cpu makes a tiny comparison")
        common.finish("graph", {})
        return
    if arguments.cpu:
        chosen = ("64,128", "8", "32", "4,8")
    elif arguments.quick:
        chosen = ("1024", "8,64", "256,5000", "16,32")
    else:
        chosen = ("1024,4096", "8,16,32,64", "256,5000", "8,16,32,64")
    given = (arguments.depths, arguments.widths, arguments.batches, arguments.intervals)
    depths, widths, batches, intervals = (
        common.integers(own or default) for own, default in zip(given, chosen, strict=True)
    )
    rounds = arguments.rounds or (3 if arguments.quick or arguments.cpu else 7)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, float32, {rounds} rounds")
    print(f"{'layers':>6s}{'width':>6s}{'batch':>6s}  {'':14s}{'ms':>24s}{'error':>10s}  relaxations")
    figures: dict[str, float] = {}
    for num_layers in depths:
        for width in widths:
            for batch in batches:
                figures |= compare(num_layers, width, batch, intervals, rounds, device)
                if device == "cuda":
                    torch.cuda.empty_cache()
    print()
    common.finish("graph", figures)


if __name__ == "__main__":
    main()
