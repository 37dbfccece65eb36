"""Memory and time of an update, window by window over the depth, against other ways to save memory.

    python benchmarks/windows.py [--quick] [--windows 1,2,4,8,16] [--ranks 1,2]

Residual convolutions (two of 16 channels with a GroupNorm, 28 x 28 pixels, float32), one thread a rank, SGD. Each
contestant is a job of its own: a plain loop over the modules; the same with `torch.utils.checkpoint` in W segments;
`LayerParallel` as it is, with `recompute=True` and with W windows. On one rank propagation is exact, on
several it is one MGRIT cycle with intervals of 4 layers and no check of the gradient. Memory is the peak (VmHWM) of the
rank that needs most, less what it had behind a first update with one sample. Last line: `memory_NAME_P` and
`time_NAME_P` for P ranks, those of the plain loop being 1; NAME is kept, recompute, windows_W or checkpoint_W. With
--quick fewer layers, samples and kinds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import common
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from xbraid_py import MGRIT, GradientControl, LayerParallel, ResidualStep
from xbraid_py.comm import Communicator, world
from xbraid_py.comm.partition import Partition
from xbraid_py.run.memory import give_back

CHANNELS, PIXELS = 16, 28
T = 4.0
MIB = 2**20
PROCESS = Path("/proc/self")
SEVERAL = MGRIT(cycle="V", cfactor=4, max_levels=2, min_coarse=1, max_iter=1, tol=0.0)
AGREEMENT = 1e-3  # of the losses, where propagation is exact


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def forget_peak() -> int:
    """Hand freed memory to the system, and forget the peak so far; what is left in bytes."""
    if not PROCESS.exists():
        raise SystemExit(f"error: there is no {PROCESS}: this benchmark needs Linux")
    give_back()
    (PROCESS / "clear_refs").write_text("5")
    return memory("VmRSS")


def block() -> nn.Module:
    """F of a layer."""
    convolutions = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2)]
    return nn.Sequential(convolutions[0], nn.GroupNorm(4, CHANNELS), nn.ReLU(), convolutions[1])


def network(kind: str, number: int, num_layers: int, comm: Communicator) -> tuple[nn.Module, Callable]:
    """What is trained, and what evaluates it; `number` of windows or segments."""
    mgrit = common.SERIAL if comm.size == 1 else SEVERAL
    options = {"mgrit": mgrit, "accuracy": GradientControl(check=0, adapt=False), "vmap": False}
    if kind == "windows":
        model = LayerParallel(block, num_layers, T, comm, windows=number, **options)
    elif kind in ("kept", "recompute"):
        model = LayerParallel(block, num_layers, T, comm, recompute=kind == "recompute", **options)
    else:
        # The weights of a stack, without the stack.
        state = LayerParallel(block, num_layers, T, mgrit=common.SERIAL).state_dict()
        model = nn.Sequential(*(ResidualStep(block(), T / num_layers) for _ in range(num_layers)))
        for n, step in enumerate(model):
            step.block.load_state_dict({name.removeprefix("layers."): rows[n] for name, rows in state.items()})
    if kind == "checkpoint":
        return model, lambda u: checkpoint_sequential(model, number, u, use_reentrant=False)
    return model, model


def measure(kind: str, number: int, num_layers: int, samples: int, updates: int, comm: Communicator) -> dict:
    """Peaks of all ranks in bytes, seconds of an update, the last loss."""
    model, call = network(kind, number, num_layers, comm)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def update(u: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = call(u).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    u = torch.randn((samples, CHANNELS, PIXELS, PIXELS), generator=torch.Generator().manual_seed(0))
    update(u[:1])
    for root in range(comm.size):  # what messages of this length take is not the training's
        comm.shift(comm.broadcast(u.clone(), root), Partition.balanced(comm.size, comm.size), 1)
    before, seconds = forget_peak(), []
    for _ in range(updates):
        comm.barrier()
        start = time.perf_counter()
        loss = update(u)
        comm.barrier()
        seconds.append(time.perf_counter() - start)
    # The first one has its memory cleared by the system.
    peaks = comm.gather(memory("VmHWM") - before)
    return {"peaks": peaks, "seconds": median(seconds[1:]), "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers, samples and kinds")
    parser.add_argument("--windows")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--kinds", default="checkpoint,kept,recompute,windows")
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_layers = arguments.num_layers or (64 if arguments.quick else 256)
    samples = arguments.samples or (8 if arguments.quick else 32)
    updates = arguments.updates or (3 if arguments.quick else 6)
    if arguments.job:
        comm = world()
        kind, _, number = arguments.job.partition("_")
        row = measure(kind, int(number or 0), num_layers, samples, updates, comm)
        if comm.rank == 0:
            common.report(row)
        return

    windows = common.integers(arguments.windows or ("1,4,16" if arguments.quick else "1,2,4,8,16"))
    handed_on = [f"--num_layers={num_layers}", f"--samples={samples}", f"--updates={updates}"]
    states = num_layers * samples * CHANNELS * PIXELS**2 * 4
    print(f"{num_layers} layers, {samples} samples, {states / MIB:.0f} MiB of states, {updates} updates")
    print("ranks  kind             MiB, largest rank  all ranks  s an update  memory   time")
    plain: dict = {}
    figures = {}
    for ranks in common.integers(arguments.ranks):
        kinds = ["kept", "recompute", *(f"windows_{number}" for number in windows)]
        if not plain:
            kinds = [*(f"checkpoint_{number}" for number in windows), *kinds]
        chosen = [kind for kind in kinds if kind.partition("_")[0] in arguments.kinds.split(",")]
        for kind in chosen if plain else ["plain", *chosen]:
            size = 1 if kind.startswith(("plain", "checkpoint")) else ranks
            row = common.job(__file__, size, f"--job={kind}", *handed_on)
            plain = plain or row
            if size == 1 and abs(row["loss"] - plain["loss"]) > AGREEMENT * plain["loss"]:
                raise SystemExit(f"error: {kind}: loss {row['loss']}, that of the plain loop is {plain['loss']}")
            used = max(row["peaks"]) / max(plain["peaks"]), row["seconds"] / plain["seconds"]
            largest, every = max(row["peaks"]) / MIB, sum(row["peaks"]) / MIB
            print(
                f"{size:5d}  {kind:15s}  {largest:17.1f}  {every:9.1f}  {row['seconds']:11.3f}  {used[0]:6.3f}"
                f"  {used[1]:5.2f}",
                flush=True,
            )
            if kind != "plain":
                figures |= {f"memory_{kind}_{size}": used[0], f"time_{kind}_{size}": used[1]}
    common.finish("windows", figures)


if __name__ == "__main__":
    main()
