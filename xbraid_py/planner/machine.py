"""What the planner knows of a machine, and what a layer costs on it: seconds and bytes, measured or stated.

Nothing here is measured; `measure.py` and `messages.py` make these objects.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from math import ceil, inf, log2
from typing import Any

import numpy as np


def _require_times(owner, names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the named times are finite and not negative."""
    for name in names:
        if not 0.0 <= getattr(owner, name) < inf:
            raise ValueError(f"{name}={getattr(owner, name)} must be at least 0 and finite; use 1e-6")


@dataclass(frozen=True)
class Link:
    """A way for messages.

    Parameters
    ----------
    latency : float
        Seconds of an empty message.
    bandwidth : float
        Bytes in a second; the sender is busy for as long as its bytes take.
    stage : float
        Seconds of one of the log2(ranks) stages of a collective of a few bytes.
    source : str
        Where the numbers come from: "measured", or the assumption in words.
    overhead : float
        Seconds that a rank is busy with each of many messages between many ranks, whatever their size.
    """

    latency: float
    bandwidth: float
    stage: float
    source: str
    overhead: float = 0.0

    def __post_init__(self):
        _require_times(self, ("latency", "stage", "overhead"))
        if not self.bandwidth > 0.0:
            raise ValueError(f"bandwidth={self.bandwidth} must be positive, in bytes/s; use 1e10")


# Of a current cluster interconnect (100 Gbit/s class), and of processes on one node where neither could be measured.
CLUSTER = Link(2e-6, 1.2e10, 3e-6, "assumed: 2 us, 12 GB/s")
SHARED_MEMORY = Link(2e-6, 5e9, 3e-6, "assumed, no mpirun was found: 2 us, 5 GB/s")


@dataclass(frozen=True)
class Machine:
    """Nodes with some cores each, and messages within and between them.

    Parameters
    ----------
    cores : int
        Cores of a node.
    ranks_per_node : int
        Ranks on a node, consecutive ones; more of them than cores take turns.
    shared, network : Link
        Messages within a node, and between nodes.
    contention : float
        How much longer a layer takes when all cores of a node are at it, since they share its memory; at least 1.
    waiting : float
        Share of a core that a rank takes while it waits for a message, 0 to 1: some MPI libraries look for messages all
        the time. It counts where there are more ranks than cores.
    """

    cores: int
    ranks_per_node: int
    shared: Link
    network: Link = CLUSTER
    contention: float = 1.0
    waiting: float = 0.0

    def __post_init__(self):
        for name in ("cores", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 1")
        if not 1.0 <= self.contention < inf:
            raise ValueError(f"contention={self.contention} must be at least 1 and finite; use 1.0")
        if not 0.0 <= self.waiting <= 1.0:
            raise ValueError(f"waiting={self.waiting} must be between 0 and 1; use 0.0")

    def slowdown(self, working: int) -> float:
        """How much longer work takes on a node with so many ranks at work, than for one rank alone."""
        at_once = min(working, self.cores)
        share = (at_once - 1) / (self.cores - 1) if self.cores > 1 else 0.0
        load = working + self.waiting * max(0, self.ranks_per_node - working)
        return (1.0 + (self.contention - 1.0) * share) * max(1.0, load / self.cores)

    def collective(self, num_ranks: int, num_bytes: float) -> float:
        """Seconds from the arrival of the last rank to the end of a collective that gives all ranks `num_bytes`."""
        if num_ranks == 1:
            return 0.0
        on_node, nodes = min(num_ranks, self.ranks_per_node), ceil(num_ranks / self.ranks_per_node)
        seconds = self.shared.stage * log2(on_node) + self.network.stage * log2(nodes)
        return seconds + num_bytes / (self.network if nodes > 1 else self.shared).bandwidth

    def exchange(self, num_ranks: int, num_bytes: float) -> float:
        """Seconds for each of so many ranks that follow each other to hand all others a share of `num_bytes`."""
        if num_ranks == 1:
            return 0.0
        near = min(num_ranks, self.ranks_per_node) - 1
        far = num_ranks - 1 - near
        link = self.network if far else self.shared
        busy = near * self.shared.overhead + far * self.network.overhead
        return busy + link.latency + num_bytes * (num_ranks - 1) / num_ranks / link.bandwidth


@dataclass(frozen=True)
class StepCost:
    """Seconds of a relaxation or a sweep: so much for the call, and so much for each layer in it."""

    call: float
    each: float

    def __post_init__(self):
        _require_times(self, ("call", "each"))

    def seconds(self, layers: np.ndarray) -> np.ndarray:
        """Of one call with so many layers on each rank (P,); nothing where there are none."""
        return self.call * (layers > 0) + self.each * layers


@dataclass(frozen=True)
class SolveCosts:
    """Seconds of the parts of a solve, for states or for adjoints; the ends of the network included.

    Attributes
    ----------
    sweep : StepCost
        Layers of the finest level one after the other, keeping the states, or the gradient of the weights.
    record : StepCost
        The same as a relaxation of several intervals.
    relax : StepCost
        Relaxation of the finest level that keeps nothing.
    coarse_sweep, coarse : StepCost
        Sweep through, and relaxation of, a coarser level, with tau, keeping all inputs; two evaluations of a layer
        in each step.
    correct : StepCost
        What the correction of the lagged cycle adds to what was recorded, for each step of the coarser level.
    layer : float
        For each layer, whatever the cycle: weights, regularization.
    ends : float
        Opening, classification and loss, and whatever else does not grow with the depth; or their adjoints.
    check : float
        Second loss by which the lagged cycle estimates its error.
    opening, closing : float
        What each portion of a pipeline adds on the first rank and on the last one.
    once : float
        What a pipeline adds for all portions together.
    """

    sweep: StepCost
    record: StepCost
    relax: StepCost
    coarse_sweep: StepCost
    coarse: StepCost
    correct: StepCost
    layer: float
    ends: float
    check: float
    opening: float = 0.0
    closing: float = 0.0
    once: float = 0.0

    def __post_init__(self):
        _require_times(self, ("layer", "ends", "check", "opening", "closing", "once"))

    @property
    def euler(self) -> SolveCosts:
        """The same with one evaluation of a layer in each coarse step."""
        coarse = {
            name: replace(step, each=max(step.each - self.relax.each, 0.5 * step.each))
            for name, step in (("coarse_sweep", self.coarse_sweep), ("coarse", self.coarse))
        }
        return replace(self, **coarse)


@dataclass(frozen=True)
class Costs:
    """What layers of one width, batch and type cost on one rank alone, in seconds.

    Attributes
    ----------
    state_bytes, row_bytes : int
        Of one state, and of the weights of one layer.
    states, adjoints : SolveCosts
    vector : float
        One pass of a vector operation over a state that is not in cache.
    coarsen : float
        Making the weights of the next coarser level, for each layer.
    optimizer, optimizer_layer : float
        Direction of the optimizer and its dot products: for an update, and in addition for each layer.
    add : float
        Adding the gradients of a layer of one portion to those of another.
    samples : int
        Of a state; all of them, if nothing is said of `others`.
    others : tuple of Costs
        The same for other numbers of samples.
    at_once : int
        Samples that the kernels take together: portions are made of so many, where there are enough.
    is_module : bool
        Whether the layers are those of a torch module: replicas have all weights of their layers each, and average
        gradients; there are no sums over all ranks, and every rank of a replica gets the last state.
    """

    state_bytes: int
    row_bytes: int
    states: SolveCosts
    adjoints: SolveCosts
    vector: float
    coarsen: float
    optimizer: float
    optimizer_layer: float
    add: float = 0.0
    samples: int = 1
    others: tuple[Costs, ...] = ()
    at_once: int = 1
    is_module: bool = False

    def __post_init__(self):
        _require_times(self, ("vector", "coarsen", "optimizer", "optimizer_layer", "add"))

    def at(self, samples: int) -> Costs:
        """The costs for so many samples: on the line between the next smaller and the next larger number known.

        Below the smallest number they are those of that number.
        """
        if samples == self.samples:
            return self
        found = self.__dict__.get("_at")
        if found is None:
            object.__setattr__(self, "_at", found := {})
        if samples not in found:
            found[samples] = self._interpolated(samples)
        return found[samples]

    def _interpolated(self, samples: int) -> Costs:
        known = sorted((self, *self.others), key=lambda each: each.samples)
        above = next((i for i, each in enumerate(known) if each.samples >= samples), len(known) - 1)
        low, high = known[max(0, above - 1)], known[above]
        if low is high:
            return replace(low, samples=samples, others=self.others)
        weight = (samples - low.samples) / (high.samples - low.samples)
        return replace(_between(low, high, weight), samples=samples, others=self.others)

    def portion(self, portions: int) -> int:
        """Samples in the largest of so many portions."""
        vectors = -(-self.samples // self.at_once)
        if portions == 1 or vectors < portions:
            return -(-self.samples // portions)
        return min(self.samples, self.at_once * -(-vectors // portions))


def _between(low: Any, high: Any, weight: float) -> Any:
    """A number, or a dataclass of numbers, on the line between two others; never below 0."""
    if is_dataclass(low) and not isinstance(low, type):
        names = [each.name for each in fields(low) if each.name not in ("others", "is_module")]
        return replace(low, **{name: _between(getattr(low, name), getattr(high, name), weight) for name in names})
    found = max(0.0, low + (high - low) * weight)
    return round(found) if isinstance(low, int) else found
