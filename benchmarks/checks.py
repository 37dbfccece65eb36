"""What it costs that ranks look whether they make the same calls and have the same batches.

    python benchmarks/checks.py [--quick] [--ranks 2] [--rounds 3] [--blocks mlp,conv8,encoder]

A stack of 64 layers (`benchmarks/layer_parallel.py` has the blocks, and their states) between two linear layers is
trained by SGD, `MGRIT(cycle="pipeline")`. Updates take turns: all looks as they are (a message of one number before
each forward and each backward pass; inputs and gradients of outputs compared in the first calls and in one of 100), and
none. A round is 100 updates of each kind, so that the rare looks are among them; `checks_BLOCK` is the median over the
rounds of the quotients of their sums, less 1, and its spread is that of the rounds. `agree_us` is what one such message
takes alone, the median of 100 means of 100.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import common
import torch
from layer_parallel import BLOCKS, state
from torch import nn

from xbraid_py import MGRIT, LayerParallel
from xbraid_py.comm import world
from xbraid_py.comm.agreement import agree
from xbraid_py.layer_parallel import window
from xbraid_py.layer_parallel.alike import CHECK_INPUTS, EVERY

NUM_LAYERS = 64


def nothing(*_, **__) -> None:
    """In the place of `agree`."""


def take_turns(name: str, rounds: int) -> None:
    """What the ranks of a job do: report seconds of rounds of both kinds."""
    comm = world()
    make, shape = BLOCKS[name]
    width = shape[-1]
    batches = [state(shape, seed) for seed in range(8)]

    def training() -> Callable[[int], float]:
        torch.manual_seed(0)
        stack = LayerParallel(make, NUM_LAYERS, 1.0, comm, mgrit=MGRIT(cycle="pipeline"))
        model = nn.Sequential(nn.Linear(width, width), stack, nn.Linear(width, width))
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)

        def update(number: int) -> float:
            comm.barrier()
            start = time.perf_counter()
            optimizer.zero_grad()
            model(batches[number % len(batches)]).square().mean().backward()
            optimizer.step()
            return time.perf_counter() - start

        return update

    # Each with calls of its own, that are counted: every look is among them.
    looking, blind = training(), training()

    def without(number: int) -> float:
        window.agree, os.environ[CHECK_INPUTS] = nothing, "0"
        try:
            return blind(number)
        finally:
            window.agree = agree
            del os.environ[CHECK_INPUTS]

    for number in range(4):
        looking(number), without(number)
    sums: dict[str, list[float]] = {"with": [], "without": []}
    kinds = [("with", looking), ("without", without)]
    for _ in range(rounds):
        seconds = dict.fromkeys(sums, 0.0)
        for number in range(EVERY):
            for key, update in kinds[:: 1 if number % 2 else -1]:  # neither is always the first
                seconds[key] += update(number)
        for key, each in seconds.items():
            sums[key].append(each)
    alone = []
    for _ in range(100):
        comm.barrier()
        start = time.perf_counter()
        for _ in range(100):
            agree(comm, None, "", "nothing")
        alone.append((time.perf_counter() - start) / 100)
    if comm.rank == 0:
        common.report(sums | {"agree": median(alone)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds, of the MLP alone")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--blocks", default="mlp,conv8,encoder")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        take_turns(arguments.job, arguments.rounds)
        return
    if arguments.quick:
        arguments.rounds, arguments.blocks = 2, "mlp"
    figures: dict[str, float] = {}
    print(f"{NUM_LAYERS} layers, {arguments.ranks} ranks; milliseconds of an update, medians of rounds of {EVERY}")
    print(f"{'':10s}{'with':>10s}{'without':>10s}{'cost':>28s}{'one message, us':>18s}")
    for name in arguments.blocks.split(","):
        row = common.job(__file__, arguments.ranks, "--job", name, "--rounds", arguments.rounds)
        ratio = common.Spread.of_ratios(row["with"], row["without"])
        ms = {key: 1e3 * median(row[key]) / EVERY for key in ("with", "without")}
        cost = f"{ratio.median - 1:+.2%} ({ratio.low - 1:+.2%} to {ratio.high - 1:+.2%})"
        print(f"{name:10s}{ms['with']:10.2f}{ms['without']:10.2f}{cost:>28s}{1e6 * row['agree']:18.1f}", flush=True)
        figures |= {f"checks_{name}": ratio.median - 1, f"agree_us_{name}": 1e6 * row["agree"]}
    common.finish("checks", figures)


if __name__ == "__main__":
    main()
