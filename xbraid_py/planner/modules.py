"""Layers that are torch modules: measures what a stack of them costs here, forwards and backwards, at several batches.

Shape letters: `n` layers timed at once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.layer_parallel import GradientControl, LayerParallel
from xbraid_py.layers.transformer import DecoderBlock
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner.machine import Costs, SolveCosts, StepCost
from xbraid_py.planner.measure import Slowdowns, Workload, cores_and_ranks, measure_slowdowns, portion_sizes, timed

# What a layer takes depends on how the memory of graphs comes and goes, so the deeper stack is as deep as may be.
_FEW, _MANY, _COARSENING = 2, 32, 4
_CYCLED = 16  # layers of the lagged cycle that is timed
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15
_MOST_BYTES = 128 << 20  # of weights of the deeper stack, where they are not those of four layers
_MOST_SAMPLES = 32  # of larger batches the costs are those on the same line
_PIPELINE = MGRIT(cycle="pipeline", portions=1)


@dataclass(frozen=True, kw_only=True)
class ModuleWorkload:
    """Minibatches through a stack of torch blocks, but for the ranks.

    Parameters
    ----------
    block
        Makes a block, which maps a state to one of the same shape.
    shape
        Of the state of a sample.
    num_layers, batch
    dtype
        Of weights and states.
    sweeps, adjoint_sweeps
        Fine sweeps of the lagged cycle from a cold start. Its defaults take 4 and 3 where layers are like convolutions,
        and 7 and 5 with the blocks of usual transformers.
    """

    block: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_layers: int
    batch: int
    dtype: torch.dtype = torch.float32
    sweeps: int = 4
    adjoint_sweeps: int = 3
    is_module = True
    # No word of errors, which do not matter here.
    control = GradientControl(check=0, adapt=False, gradient_error=1e9)

    def __post_init__(self):
        for name in ("num_layers", "batch", "sweeps", "adjoint_sweeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 16")

    @property
    def state_bytes(self) -> int:
        """Of the state of one layer."""
        return prod(self.shape) * self.batch * self.dtype.itemsize

    def stack(self, comm: Communicator, num_layers: int, options: MGRIT) -> LayerParallel:
        """So many layers, with steps of a twentieth."""
        stack = LayerParallel(self.block, num_layers, num_layers / 20, comm, mgrit=options, accuracy=self.control)
        return stack.to(self.dtype)

    def input(self) -> Tensor:
        """A random state."""
        return torch.randn(self.batch, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)

    def call(self, stack: LayerParallel, u: Tensor) -> Tensor:
        """What a stack makes of a state."""
        return stack(u)

    def like_dense(self) -> Workload:
        """Dense layers with states of the same size, for messages to be measured with."""
        return Workload(num_layers=self.num_layers, batch=max(1, self.state_bytes // 64))


def convolution() -> nn.Module:
    """A convolution of 8 channels, for states (8, 28, 28)."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())


def transformer() -> nn.Module:
    """A decoder layer of width 64, for states (64, 64) of 64 tokens."""
    return DecoderBlock(64, 4)


def named_workload(name: str, num_layers: int, batch: int) -> ModuleWorkload:
    """The examples: conv or transformer."""
    common: dict[str, Any] = {"num_layers": num_layers, "batch": batch}
    if name == "conv":
        return ModuleWorkload(block=convolution, shape=(8, 28, 28), **common)
    return ModuleWorkload(block=transformer, shape=(64, 64), sweeps=7, adjoint_sweeps=5, **common)


class ModuleProbe:
    """Stacks on one rank, and the calls that are timed on them."""

    def __init__(self, workload: ModuleWorkload):
        alone = SerialCommunicator()
        self.workload, self.input = workload, workload.input()
        self.few = workload.stack(alone, _FEW, _PIPELINE)
        self.row_bytes = sum(each.numel() for each in self.few.parameters()) // _FEW * workload.dtype.itemsize
        most = min(_MANY, _MOST_BYTES // max(1, self.row_bytes))
        self.num_layers = max(2 * _FEW, min(most, workload.num_layers))
        self.many = workload.stack(alone, self.num_layers, _PIPELINE)
        self.twice = workload.stack(alone, _FEW, MGRIT(cycle="pipeline", portions=2))
        self.cycles = {
            sweeps: workload.stack(
                alone, _CYCLED, MGRIT(cfactor=_COARSENING, max_levels=2, min_coarse=2, max_iter=sweeps, tol=0.0)
            )
            for sweeps in (1, 2)
        }
        self.optimizers = {
            key: torch.optim.Adam(stack.parameters(), 1e-6) for key, stack in (("few", self.few), ("many", self.many))
        }

    def of(self, batch: int) -> ModuleProbe:
        """The same stacks with another batch."""
        other = copy.copy(self)
        other.workload = replace(self.workload, batch=batch)
        other.input = other.workload.input()
        return other

    def layer(self) -> float:
        """Seconds of state and adjoint step of a layer."""
        return sum(self._both(self.many, self.input)) / self.num_layers

    def round(self) -> dict[str, float]:
        """Every call once; the seconds of each."""
        found = {}
        double = torch.cat([self.input, self.input])
        for key, stack, u in (
            ("few", self.few, self.input),
            ("many", self.many, self.input),
            ("twice", self.twice, double),
            ("cycle1", self.cycles[1], self.input),
            ("cycle2", self.cycles[2], self.input),
        ):
            self._both(stack, u)  # the second call counts: in a training each follows one of the same
            found[f"state_{key}"], found[f"adjoint_{key}"] = self._both(stack, u)
        for key, optimizer in self.optimizers.items():
            found[f"optimizer_{key}"] = timed(optimizer.step)
        gradients = [each.grad for each in self.many.parameters() if each.grad is not None]
        found["add"] = timed(lambda: [each.add_(each, alpha=0.0) for each in gradients]) / self.num_layers
        vector = self.input.clone()
        found["vector"] = timed(lambda: vector.add_(self.input))
        return found

    def _both(self, stack: LayerParallel, u: Tensor) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass."""
        for weight in stack.parameters():
            weight.grad = None
        u = u.detach().requires_grad_()
        start = time.perf_counter()
        end = self.workload.call(stack, u)
        middle = time.perf_counter()
        end.backward(u.detach())
        return middle - start, time.perf_counter() - middle


def measure_module(workload: ModuleWorkload, comm: Communicator, seconds: float = 3.0) -> tuple[Costs, Slowdowns]:
    """What layers cost on one rank alone, and how ranks slow each other down; see `measure_costs`."""
    cores, on_node = cores_and_ranks(comm)
    batch, found = workload.batch, None
    workload = replace(workload, batch=min(batch, _MOST_SAMPLES))
    if comm.rank == 0:
        sizes = portion_sizes(workload.batch, 1)
        whole = ModuleProbe(workload)
        probes = [whole.of(size) for size in sizes]
        for probe in probes:
            probe.round()
        first = timed(lambda: [probe.round() for probe in probes])
        number = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / first)))
        comm.bcast(number * first)
        rounds = [[probe.round() for probe in probes] for _ in range(number)]
        costs = []
        for size, probe, own in zip(sizes, probes, zip(*rounds, strict=True), strict=True):
            medians = {name: median(each[name] for each in own) for name in own[0]}
            costs.append(_costs(replace(workload, batch=size), probe, medians))
        most = replace(costs[0], others=tuple(costs[1:]))
        # Of a larger batch these are on a line; what was measured stays known.
        found = most if most.samples == batch else replace(most.at(batch), others=tuple(costs))
        del whole, probes, probe  # pyright: ignore[reportPossiblyUnboundVariable]
    else:
        time.sleep(comm.bcast(None))
    slowdowns = measure_slowdowns(lambda busy: ModuleProbe(workload), comm, cores, on_node)
    return comm.bcast((found, slowdowns) if comm.rank == 0 else None)


def _costs(workload: ModuleWorkload, probe: ModuleProbe, seconds: dict[str, float]) -> Costs:
    """The costs from the medians of the rounds."""

    def solve(kind: str) -> SolveCosts:
        few, many, twice, one, two = (seconds[f"{kind}_{key}"] for key in ("few", "many", "twice", "cycle1", "cycle2"))
        each = max(1e-9, many - few) / (probe.num_layers - _FEW)
        portion = max(0.0, twice - few)
        sweep = StepCost(max(0.0, portion - _FEW * each), each)
        once = max(0.0, few - portion)
        # An iteration is a sweep of the fine level and one of the coarse level, of two evaluations in each step; to
        # that of the adjoints the correction of the gradient belongs, which costs about as much.
        coarse = max((two - one - _CYCLED * each) / (_CYCLED // _COARSENING), each)
        step = StepCost(sweep.call, coarse / 2 if kind == "adjoint" else coarse)
        return SolveCosts(
            sweep=sweep,
            record=sweep,
            relax=sweep,
            coarse_sweep=step,
            coarse=step,
            correct=step if kind == "adjoint" else StepCost(0.0, 0.0),
            layer=0.0,
            ends=once,
            check=0.0,
            once=once,
        )

    few, many = seconds["optimizer_few"], seconds["optimizer_many"]
    optimizer = max(0.0, many - few) / (probe.num_layers - _FEW)
    return Costs(
        state_bytes=workload.state_bytes,
        row_bytes=probe.row_bytes,
        states=solve("state"),
        adjoints=solve("adjoint"),
        vector=seconds["vector"],
        coarsen=0.0,
        optimizer=max(0.0, few - _FEW * optimizer),
        optimizer_layer=optimizer,
        add=seconds["add"],
        samples=workload.batch,
        is_module=True,
    )
