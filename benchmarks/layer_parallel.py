"""LayerParallel: overhead on one rank, looped against batched intervals, and a training step on several ranks.

    python benchmarks/layer_parallel.py [--quick] [--ranks 1,2,4] [--parts overhead,batched,ranks]

All in float32, one thread a rank; times are of forward and backward. Four parts:

overhead: a stack of 32 layers with `MGRIT(max_levels=1)` on one rank, against a plain loop over the same modules in
torch; outputs and gradients agree first. `overhead_BLOCK` is the median of the quotients of neighboring times.
compiled: the same stack with `compile=True`, against without; `compiled_BLOCK` is how many times faster it is, and
`compile_s_BLOCK` the seconds of the first forward and backward pass. Not of the dense block, which has its own kernels.
batched: so many intervals of one layer evaluated one after the other, against all in one call (`torch.func.vmap`).
`batched_BLOCK` is how many times faster the one call is with 8 intervals, forward and backward together.
ranks: a step of a stack of 64 layers (T=5, new samples every time) with default options, against exact propagation
on one rank. In one job they take turns: all ranks one of the first kind, then rank 0 alone one of the second.
`speedup_BLOCK_P` is the median of the quotients, `error_BLOCK_P` the relative error (2-norm, all weights) of the last
gradient. Not among the times: the first steps and those that measure the error of their gradient, one in a hundred.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import common
import torch
from torch import Tensor, nn

from xbraid_py import DenseBlock, LayerParallel, to_sequential
from xbraid_py.comm import SerialCommunicator, world
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape
from xbraid_py.layers.transformer import DecoderBlock

AGREEMENT = 1e-4  # of float32 gradients
SKIPPED = 2  # steps that do not count


def perceptron() -> nn.Module:
    """Two linear maps, width 64."""
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def convolution(channels: int) -> Callable[[], nn.Module]:
    """Two convolutions with a normalization."""

    def make() -> nn.Module:
        pair = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        return nn.Sequential(pair[0], nn.GroupNorm(2, channels), nn.ReLU(), pair[1])

    return make


# What makes a block, and the shape of a state, the batch first.
BLOCKS = {
    "mlp": (perceptron, (128, 64)),
    "dense": (lambda: DenseBlock(64), (128, 64)),
    "conv8": (convolution(8), (32, 8, 14, 14)),
    "conv16": (convolution(16), (32, 16, 28, 28)),
    "encoder": (lambda: DecoderBlock(64, 4), (4, 64, 64)),
}


def state(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def propagate(model: Callable[[Tensor], Tensor], weights: list[Tensor], u: Tensor, slope: Tensor) -> list[Tensor]:
    """Forward and backward: the output, and the gradients of input and weights."""
    for weight in weights:
        weight.grad = None
    u = u.detach().requires_grad_()
    end = model(u)
    end.backward(slope)
    return [end, u.grad, *(weight.grad for weight in weights)]


def overhead(blocks: list[str], num_layers: int, rounds: int) -> dict[str, float]:
    """A table of the overhead; its medians."""
    print(f"overhead, {num_layers} layers, {rounds} rounds\n{'':10s}{'plain ms':>24s}{'ours ms':>24s}{'overhead':>24s}")
    figures = {}
    for name in blocks:
        make, shape = BLOCKS[name]
        stack = LayerParallel(make, num_layers, 1.0, mgrit=common.SERIAL)
        steps, h = to_sequential(stack), stack.grid.h
        u, slope = state(shape), state(shape, 1)

        def loop(x: Tensor, blocks=tuple(step.block for step in steps), h=h) -> Tensor:
            for block in blocks:
                x = x + h * block(x)
            return x

        theirs, ours = list(steps.parameters()), list(stack.parameters())
        bodies = {
            "plain": lambda loop=loop, weights=theirs, u=u, slope=slope: propagate(loop, weights, u, slope),
            "ours": lambda stack=stack, weights=ours, u=u, slope=slope: propagate(stack, weights, u, slope),
        }
        end, back, *gradients = bodies["ours"]()
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1).flatten()
        expected_end, expected_back, *gradients = bodies["plain"]()
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        for a, b in ((end, expected_end), (back, expected_back), (flat, expected)):
            if not float((a - b).detach().norm()) <= AGREEMENT * float(b.detach().norm()):
                raise SystemExit(f"error: {name}: the stack and the plain loop disagree")
        times = common.interleaved(bodies, rounds)
        spreads = [common.Spread.of([1e3 * each for each in times[key]]) for key in ("plain", "ours")]
        ratio = common.Spread.of_ratios(times["ours"], times["plain"])
        print(f"{name:10s}{spreads[0]!s:>24s}{spreads[1]!s:>24s}{ratio!s:>24s}", flush=True)
        figures[f"overhead_{name}"] = ratio.median
    return figures


def compiled(blocks: list[str], num_layers: int, rounds: int) -> dict[str, float]:
    """A table of stacks with and without compiled blocks; how many times faster the former are."""
    print(f"\ncompiled, {num_layers} layers, {rounds} rounds")
    print(f"{'':10s}{'first s':>10s}{'without ms':>24s}{'with ms':>24s}  faster")
    figures = {}
    for name in blocks:
        make, shape = BLOCKS[name]
        stacks = {key: LayerParallel(make, num_layers, 1.0, mgrit=common.SERIAL, compile=key) for key in (False, True)}
        u, slope = state(shape), state(shape, 1)
        bodies = {
            key: lambda stack=stack, u=u, slope=slope: propagate(stack, list(stack.parameters()), u, slope)
            for key, stack in stacks.items()
        }
        start = time.perf_counter()
        bodies[True]()
        first = time.perf_counter() - start
        times = common.interleaved(bodies, rounds)
        spreads = [common.Spread.of([1e3 * each for each in times[key]]) for key in (False, True)]
        ratio = common.Spread.of_ratios(times[False], times[True])
        print(f"{name:10s}{first:10.1f}{spreads[0]!s:>24s}{spreads[1]!s:>24s}  {ratio}", flush=True)
        figures |= {f"compiled_{name}": ratio.median, f"compile_s_{name}": first}
    return figures


def batched(blocks: list[str], intervals: list[int], rounds: int) -> dict[str, float]:
    """A table of looped and batched evaluation; how many times faster the latter is."""
    print(f"\nmilliseconds for so many intervals, looped and batched, {rounds} rounds")
    print(f"{'':10s}{'intervals':>10s}{'forward':>20s}{'backward':>20s}  batched faster")
    figures = {}
    for name in blocks:
        make, shape = BLOCKS[name]
        block = ModuleBlock(make())
        row = block.join([tensor[None] for tensor in block.tensors_of(block.module)])
        for count in intervals:
            theta = row.repeat(count, 1)
            points, gradient = state((count, *shape)), torch.empty_like(theta)
            seconds = {}
            bodies = {}
            for is_batched in (False, True):
                steps = ModuleSteps(block, theta, 0.01, tuple(range(count)), vmap=is_batched, tape=Tape())
                bodies[is_batched, "forward"] = lambda steps=steps, points=points: steps.relax(
                    points, 1, None, None, True
                )
                # At the graphs of the last relaxation, which is that of the same steps.
                bodies[is_batched, "backward"] = lambda steps=steps, points=points, gradient=gradient: (
                    steps.relax_adjoint(points, points, 1, None, None, gradient)
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of operations that have no batched form
                bodies[False, "forward"]()
                bodies[True, "forward"]()
                times = common.interleaved(bodies, rounds)
            seconds = {key: 1e3 * median(each) for key, each in times.items()}
            looped, in_one = (
                [sum(pair) for pair in zip(times[k, "forward"], times[k, "backward"], strict=True)]
                for k in (False, True)
            )
            ratio = common.Spread.of_ratios(looped, in_one)
            pairs = (f"{seconds[False, way]:9.2f}{seconds[True, way]:10.2f}" for way in ("forward", "backward"))
            print(f"{name:10s}{count:10d}" + "".join(f"{pair:>20s}" for pair in pairs) + f"  {ratio}", flush=True)
            if count == 8:
                figures[f"batched_{name}"] = ratio.median
    return figures


def take_turns(name: str, num_layers: int, steps: int) -> None:
    """What the ranks of a job do: report seconds of steps of both kinds, in turns, and the errors of gradients."""
    comm = world()
    make, shape = BLOCKS[name]
    ours = LayerParallel(make, num_layers, 5.0, comm)
    exact = LayerParallel(make, num_layers, 5.0, SerialCommunicator(), mgrit=common.SERIAL) if comm.rank == 0 else None
    times: dict[str, list[float]] = {"ours": [], "exact": []}
    for number in range(steps + SKIPPED):
        u, slope = state(shape, 2 * number), state(shape, 2 * number + 1)
        for kind, stack in (("ours", ours), ("exact", exact)):
            comm.barrier()
            start = time.perf_counter()
            if stack is not None:
                propagate(stack, list(stack.parameters()), u, slope)
            if number >= SKIPPED:
                times[kind].append(time.perf_counter() - start)
    found = [ours.layers.gathered(weight.grad) for weight in ours.parameters()]
    if comm.rank == 0:
        expected = [weight.grad for weight in exact.parameters()]
        squares = [
            sum(float(a.square().sum()) for a in each)
            for each in ([a - b for a, b in zip(found, expected, strict=True)], expected)
        ]
        record = ours.record
        row = {"error": (squares[0] / squares[1]) ** 0.5, "estimate": record.gradient_error, "mode": record.mode}
        row |= {"iterations": [record.iterations, record.adjoint_iterations], "vmap": ours.windows[0].vmaps(u)}
        common.report(times | row)


def ranks(blocks: list[str], counts: list[int], num_layers: int, steps: int) -> dict[str, float]:
    """A table of steps on several ranks; speedups and errors."""
    print(f"\na step on several ranks, {num_layers} layers, {steps} steps")
    print(
        f"{'':10s}{'ranks':>6s}{'ours ms':>24s}{'exact, 1 rank, ms':>24s}{'speedup':>24s}"
        f"{'error':>9s}{'estimate':>9s}  solves"
    )
    figures = {}
    for name in blocks:
        for count in counts:
            row = common.job(__file__, count, "--job", name, "--num_layers", num_layers, "--steps", steps)
            spreads = [common.Spread.of([1e3 * each for each in row[kind]]) for kind in ("ours", "exact")]
            ratio = common.Spread.of_ratios(row["exact"], row["ours"])
            how = "{} + {} iterations".format(*row["iterations"]) if row["mode"] == "mgrit" else "exact"
            print(
                f"{name:10s}{count:6d}{spreads[0]!s:>24s}{spreads[1]!s:>24s}{ratio!s:>24s}{row['error']:9.1e}"
                f"{row['estimate']:9.1e}  {how}{', batched' * row['vmap']}",
                flush=True,
            )
            figures |= {f"speedup_{name}_{count}": ratio.median, f"error_{name}_{count}": row["error"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--parts", default="overhead,batched,ranks", help="and compiled")
    parser.add_argument("--blocks", default=",".join(BLOCKS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--layers", type=int, default=32, help="of the overhead")
    parser.add_argument("--num_layers", type=int, default=64, help="of the steps on several ranks")
    parser.add_argument("--intervals", default="2,4,8,16")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps or (10 if arguments.quick else 40)
    if arguments.job:
        take_turns(arguments.job, arguments.num_layers, steps)
        return
    rounds = arguments.rounds or (10 if arguments.quick else 40)
    figures: dict[str, float] = {}
    parts, blocks = arguments.parts.split(","), arguments.blocks.split(",")
    costly = [name for name in ("conv8", "encoder") if name in blocks]
    if "overhead" in parts:
        figures |= overhead(blocks, arguments.layers, rounds)
    if "compiled" in parts:
        figures |= compiled([name for name in blocks if name != "dense"], arguments.layers, rounds)
    if "batched" in parts:
        figures |= batched(blocks, common.integers(arguments.intervals), max(2, rounds // 4))
    if "ranks" in parts:
        figures |= ranks(costly, common.integers(arguments.ranks), arguments.num_layers, steps)
    print()
    common.finish("layer_parallel", figures)


if __name__ == "__main__":
    main()
