"""Ways to share a stack of blocks among ranks, side by side: pipelines of portions, layers, samples.

    python benchmarks/blocks.py [--quick] [--ranks 1,2] [--cases conv,transformer] [--portions 1,2,4,8]

A step is forward and backward through 32 layers (T=1), new samples every time, in float32, one thread a rank. In one
job all plans take turns, in an order that alternates; each is called twice and the second call counts. Plans:

loop: a plain loop over the modules of all layers in torch, on rank 0 alone. The measure of all others: a figure is the
median of the quotients of neighboring times, loop over plan.
pipeline_M: `LayerParallel` with `MGRIT(cycle="pipeline", portions=M)`; output and gradients agree with the loop first.
chunks_M: the loop on rank 0 alone, M portions one after the other: what small portions cost without any of our code.
layers: the default cycle of `LayerParallel`, without updates that measure the error of their gradient.
samples: data-parallel, `ProcessGrid` with a replica on each rank, gradients averaged.
limit: each rank has its share of the samples, and nobody sends a message.

The last line has {case: {plan_RANKS: speedup}}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import common
import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, GradientControl, LayerParallel, ProcessGrid, to_sequential
from xbraid_py.comm import Communicator, SerialCommunicator, world
from xbraid_py.layers.transformer import DecoderBlock

AGREEMENT = 1e-4  # of float32 gradients


def convolution() -> nn.Module:
    """Two convolutions of 8 channels with a normalization."""
    pair = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
    return nn.Sequential(pair[0], nn.GroupNorm(2, 8), nn.ReLU(), pair[1])


# What makes a block, and the shape of a state, the batch first.
CASES = {"conv": (convolution, (50, 8, 28, 28)), "transformer": (lambda: DecoderBlock(64, 4), (50, 32, 64))}


class Plan:
    """One way to make a step.

    Parameters
    ----------
    call : callable
        The forward pass.
    weights : list of Tensor
        Whose gradients are asked for.
    share : callable
        This rank's part of a batch.
    finish : callable
        What there is to do behind the backward pass.
    chunks : int
        Portions of the batch, one after the other.
    alone : bool
        Whether rank 0 alone takes part.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        weights: list[Tensor],
        *,
        share: Callable[[Tensor], Tensor] = lambda batch: batch,
        finish: Callable[[], None] = lambda: None,
        chunks: int = 1,
        alone: bool = False,
    ):
        self.call, self.weights, self.share, self.finish = call, weights, share, finish
        self.chunks, self.alone = chunks, alone

    def step(self, u: Tensor, slope: Tensor) -> tuple[float, float]:
        """Seconds of forward and of backward pass."""
        for weight in self.weights:
            weight.grad = None
        inputs = [part.detach().requires_grad_() for part in self.share(u).chunk(self.chunks)]
        start = time.perf_counter()
        outputs = [self.call(part) for part in inputs]
        middle = time.perf_counter()
        for output, part in zip(outputs, self.share(slope).chunk(self.chunks), strict=True):
            output.backward(part)
        self.finish()
        return middle - start, time.perf_counter() - middle


def plans_of(name: str, num_layers: int, portions: list[int], comm: Communicator) -> dict[str, Plan]:
    """All plans for so many ranks."""
    make, _ = CASES[name]
    alone = SerialCommunicator()
    whole = LayerParallel(make, num_layers, 1.0, alone, mgrit=common.SERIAL)
    steps, h = to_sequential(whole), whole.grid.h
    blocks = [step.block for step in steps]

    def loop(x: Tensor) -> Tensor:
        for block in blocks:
            x = x + h * block(x)
        return x

    weights = list(steps.parameters())
    found = {"loop": Plan(loop, weights, alone=True)}

    def stack(options: MGRIT, ranks: Communicator = comm) -> LayerParallel:
        return LayerParallel(make, num_layers, 1.0, ranks, mgrit=options, accuracy=GradientControl(check=0))

    for count in portions:
        model = stack(MGRIT(cycle="pipeline", portions=count))
        found[f"pipeline_{count}"] = Plan(model, list(model.parameters()))
    for count in portions:
        found[f"chunks_{count}"] = Plan(loop, weights, chunks=count, alone=True)
    model = stack(MGRIT())
    found["layers"] = Plan(model, list(model.parameters()))
    if comm.size > 1:
        grid, model = ProcessGrid(comm, comm.size), stack(common.SERIAL, alone)
        weights = list(model.parameters())
        found["samples"] = Plan(model, weights, share=grid.shard, finish=lambda: grid.average_gradients(weights))
        found["limit"] = Plan(model, weights, share=grid.shard)
    return found


def check(plans: dict[str, Plan], u: Tensor, slope: Tensor, comm: Communicator) -> None:
    """End the job unless pipelines make the gradients of the loop."""
    plans["loop"].step(u, slope)
    expected = sum(float(weight.grad.double().square().sum()) for weight in plans["loop"].weights)
    for name, plan in plans.items():
        if name.startswith("pipeline"):
            plan.step(u, slope)
            own = sum(float(weight.grad.double().square().sum()) for weight in plan.weights)
            squares = float(comm.allgather(torch.tensor([own], dtype=torch.float64), (1,) * comm.size).sum())
            if not abs(squares - expected) <= AGREEMENT * expected:
                raise SystemExit(f"error: {name}: gradients of size {squares**0.5:.6g}, the loop's {expected**0.5:.6g}")


def take_turns(name: str, num_layers: int, portions: list[int], rounds: int) -> None:
    """What the ranks of a job do: report seconds of forward and backward passes of all plans."""
    comm = world()
    plans, shape = plans_of(name, num_layers, portions, comm), CASES[name][1]

    def state(seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    check(plans, state(0), state(1), comm)
    times: dict[str, list[tuple[float, float]]] = {plan: [] for plan in plans}
    for number in range(rounds):
        u, slope = state(2 * number + 2), state(2 * number + 3)
        for plan in list(plans)[:: -1 if number % 2 else 1]:
            for is_counted in (False, True):
                comm.barrier()
                seconds = plans[plan].step(u, slope) if comm.rank == 0 or not plans[plan].alone else (0.0, 0.0)
                if is_counted:
                    times[plan].append(seconds)
    if comm.rank == 0:
        common.report({"times": times})


def measured(name: str, num_layers: int, counts: list[int], portions: list[int], rounds: int) -> dict[str, float]:
    """A table of a case; its speedups."""
    print(f"\n{name}, {num_layers} layers, state {CASES[name][1]}, {rounds} rounds, milliseconds")
    print(f"{'ranks':>5s}  {'plan':12s}{'forward':>24s}{'backward':>24s}{'speedup':>24s}")
    figures = {}
    for count in counts:
        arguments = ("--layers", num_layers, "--rounds", rounds, "--portions", ",".join(map(str, portions)))
        times = common.job(__file__, count, "--job", name, *arguments)["times"]
        whole = {plan: [sum(pair) for pair in pairs] for plan, pairs in times.items()}
        for plan, pairs in times.items():
            ways = [common.Spread.of([1e3 * pair[way] for pair in pairs]) for way in (0, 1)]
            ratio = common.Spread.of_ratios(whole["loop"], whole[plan])
            print(f"{count:5d}  {plan:12s}{ways[0]!s:>24s}{ways[1]!s:>24s}{ratio!s:>24s}", flush=True)
            if plan != "loop":
                figures[f"{plan}_{count}"] = ratio.median
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--portions", default="1,2,4,8")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 20)
    portions = common.integers(arguments.portions)
    if arguments.job:
        take_turns(arguments.job, arguments.layers, portions, rounds)
        return
    ranks = common.integers(arguments.ranks)
    names = arguments.cases.split(",")
    common.finish("blocks", {name: measured(name, arguments.layers, ranks, portions, rounds) for name in names})


if __name__ == "__main__":
    main()
