"""The clocks of all ranks while they work and send: array operations for thousands of ranks, or event by event for few.

A rank that sends is busy for as long as the bytes take; the message is there one latency later. Event by event, every
rank has a programme of work, messages and collectives. At any time the ranks of a node that work share its cores
evenly; those that wait take none.

All replicas of a network do the same at the same time: a clock is told what one does. Rank p of replica r of R is rank
p R + r of the job.

Shape letters: `P` ranks of a replica.
"""

from __future__ import annotations

from collections import defaultdict, deque
from math import inf
from typing import Protocol

import numpy as np

from xbraid_py.comm.partition import Partition
from xbraid_py.planner.machine import Machine

_WORK, _SEND, _RECEIVE, _MEET = range(4)


class Clock(Protocol):
    """What a simulated solve asks of the ranks; all seconds are those of a rank alone on its node."""

    def work(self, seconds: np.ndarray) -> None:
        """Every rank computes: seconds (P,)."""

    def sweep(self, ranks: np.ndarray, seconds: np.ndarray, num_bytes: float) -> None:
        """These ranks compute one after the other, (P,) seconds; each passes a message on to the next."""

    def pipeline(self, ranks: np.ndarray, seconds: np.ndarray, num_bytes: float, portions: int) -> None:
        """So many sweeps that follow each other; a rank takes the next as soon as it is there."""

    def messages(self, source: np.ndarray, dest: np.ndarray, num_bytes: np.ndarray) -> None:
        """Messages, all sent before any is received; those of a rank in the order of the arrays."""

    def collective(self, num_bytes: float) -> None:
        """All ranks of all replicas wait for each other; then each gets so many bytes."""

    def share(self, seconds: np.ndarray) -> None:
        """Those with the same layers in all replicas wait for each other, and go on (P,) seconds later."""

    def finish(self) -> float:
        """The time at which the last rank is through."""
        ...


class Clocks:
    """Clocks of ranks that have a core each: of more ranks than cores only the parallel parts are slower.

    Parameters
    ----------
    machine : Machine
    num_ranks : int
        Of all replicas.
    replicas : int

    Attributes
    ----------
    time : (P,) array
        What the clocks of the ranks of a replica show, in seconds.
    """

    def __init__(self, machine: Machine, num_ranks: int, replicas: int = 1):
        self.machine, self.num_ranks, self.replicas = machine, num_ranks, replicas
        self.time = np.zeros(num_ranks // replicas)
        self._node = np.arange(num_ranks // replicas) * replicas // machine.ranks_per_node
        self._slowdowns: dict[int, float] = {}
        self._is_even = machine.contention == 1.0 and machine.ranks_per_node <= machine.cores

    def work(self, seconds):
        self.time += seconds * self._pace(seconds > 0)

    def _pace(self, working: np.ndarray) -> np.ndarray | float:
        """How much longer work takes on each rank (P,), where these are at work."""
        if self._is_even:
            return 1.0
        found, node = np.unique(np.bincount(self._node, working).astype(int), return_inverse=True)
        return np.array([self._slowdown(stages) for stages in found.tolist()])[node[self._node]]

    def _slowdown(self, stages: int) -> float:
        """Where so many ranks of each replica work on a node."""
        if stages not in self._slowdowns:
            working = min(stages * self.replicas, max(stages, self.machine.ranks_per_node))
            self._slowdowns[stages] = self.machine.slowdown(working)
        return self._slowdowns[stages]

    def pipeline(self, ranks, seconds, num_bytes, portions):
        if portions > 1:
            seconds = seconds * self._pace(seconds > 0) / self._slowdown(1)
        for _ in range(portions):
            self.sweep(ranks, seconds, num_bytes)

    def sweep(self, ranks, seconds, num_bytes):
        if not len(ranks):
            return
        latency, transfer = self._link(ranks[:-1], ranks[1:], num_bytes)
        # e_i = max(t_i, e_{i-1} + latency_{i-1}) + g_i, g_i = work and sending: with the sums S_i of all g and
        # latencies up to i, e_i - S_i = max(t_i + g_i - S_i, e_{i-1} - S_{i-1}).
        busy = seconds[ranks] * self._slowdown(1)
        busy[:-1] += transfer
        sums = np.cumsum(busy)
        sums[1:] += np.cumsum(latency)
        self.time[ranks] = sums + np.maximum.accumulate(self.time[ranks] + busy - sums)

    def messages(self, source, dest, num_bytes):
        if not len(source):
            return
        order = np.argsort(source, kind="stable")
        source, dest = source[order], dest[order]
        latency, transfer = self._link(source, dest, num_bytes[order])
        sent = np.cumsum(transfer)
        first = np.searchsorted(source, source)  # of the messages of the same sender
        sent -= (sent - transfer)[first]
        arrival = self.time[source] + sent + latency
        np.add.at(self.time, source, transfer)
        np.maximum.at(self.time, dest, arrival)

    def collective(self, num_bytes):
        self.time[:] = self.time.max() + self.machine.collective(self.num_ranks, num_bytes)

    def share(self, seconds):
        self.time += seconds

    def finish(self) -> float:
        return float(self.time.max())

    def _link(self, source, dest, num_bytes) -> tuple[np.ndarray, np.ndarray]:
        """Latency and seconds of sending of messages between these ranks."""
        near, shared, network = self._node[source] == self._node[dest], self.machine.shared, self.machine.network
        transfer = num_bytes / np.where(near, shared.bandwidth, network.bandwidth)
        return np.where(near, shared.latency, network.latency), transfer


class SharedCores:
    """Clocks of ranks that share cores and memory: notes what the ranks do, and plays it in `finish`, event by event.

    Parameters
    ----------
    machine : Machine
    num_ranks : int
        Of all replicas.
    replicas : int
    """

    def __init__(self, machine: Machine, num_ranks: int, replicas: int = 1):
        self.machine, self.replicas = machine, replicas
        self._programmes: list[list[tuple]] = [[] for _ in range(num_ranks)]
        self._meetings: list[tuple[float, int]] = []  # seconds, and how many meet

    def work(self, seconds):
        for stage, amount in enumerate(seconds.tolist()):
            if amount:
                for rank in self._ranks(stage):
                    self._programmes[rank].append((_WORK, amount))

    def pipeline(self, ranks, seconds, num_bytes, portions):
        for _ in range(portions):
            self.sweep(ranks, seconds, num_bytes)

    def sweep(self, ranks, seconds, num_bytes):
        stages = ranks.tolist()
        for i, stage in enumerate(stages):
            for replica, rank in enumerate(self._ranks(stage)):
                if i:
                    self._programmes[rank].append((_RECEIVE, self._ranks(stages[i - 1])[replica]))
                self._programmes[rank].append((_WORK, float(seconds[stage])))
                if i + 1 < len(stages):
                    self._send(rank, self._ranks(stages[i + 1])[replica], num_bytes)

    def messages(self, source, dest, num_bytes):
        messages = list(zip(source.tolist(), dest.tolist(), num_bytes.tolist(), strict=True))
        for replica in range(self.replicas):
            for sender, receiver, size in messages:
                self._send(self._ranks(sender)[replica], self._ranks(receiver)[replica], size)
            for sender, receiver, _ in messages:
                self._programmes[self._ranks(receiver)[replica]].append((_RECEIVE, self._ranks(sender)[replica]))

    def collective(self, num_bytes):
        size = len(self._programmes)
        self._meet(range(size), self.machine.collective(size, num_bytes))

    def share(self, seconds):
        if self.replicas > 1:
            for stage, amount in enumerate(seconds.tolist()):
                self._meet(self._ranks(stage), amount)

    def finish(self) -> float:
        return _Play(self.machine, self._programmes, self._meetings).run()

    def _ranks(self, stage: int) -> range:
        """Those of all replicas."""
        return range(stage * self.replicas, (stage + 1) * self.replicas)

    def _meet(self, ranks: range, seconds: float) -> None:
        for rank in ranks:
            self._programmes[rank].append((_MEET, len(self._meetings)))
        self._meetings.append((seconds, len(ranks)))

    def _send(self, source: int, dest: int, num_bytes: float) -> None:
        near = source // self.machine.ranks_per_node == dest // self.machine.ranks_per_node
        link = self.machine.shared if near else self.machine.network
        self._programmes[source] += [(_WORK, num_bytes / link.bandwidth), (_SEND, dest, link.latency)]


class _Play:
    """One play of the programmes of all ranks."""

    def __init__(self, machine: Machine, programmes: list[list[tuple]], meetings: list[tuple[float, int]]):
        self.machine, self.programmes, self.meetings = machine, programmes, meetings
        size = len(programmes)
        self.node = np.arange(size) // machine.ranks_per_node
        self.slowdown = np.array([1.0] + [machine.slowdown(k) for k in range(1, size + 1)])
        self.now = 0.0
        self.at = [0] * size
        self.left = np.full(size, inf)  # seconds of work; infinite where a rank does not work
        self.wake = np.full(size, inf)  # when to look again at a rank that waits for a known time
        self.mail: dict[tuple[int, int], deque[float]] = defaultdict(deque)
        self.present: dict[int, list[int]] = defaultdict(list)
        self.over: dict[int, float] = {}

    def run(self) -> float:
        """The time at which the last rank is through."""
        for rank in range(len(self.programmes)):
            self._go_on(rank)
        while True:
            working = np.isfinite(self.left)
            pace = self.slowdown[np.bincount(self.node, working).astype(int)][self.node]
            until = np.minimum(self.now + self.left * pace, self.wake)
            then = until.min()
            if then == inf:
                return self.now
            self.left[working] -= (then - self.now) / pace[working]
            self.now = float(then)
            for rank in np.flatnonzero(until <= then * (1 + 1e-12)).tolist():
                if self.left[rank] < inf:
                    self.at[rank] += 1
                self.left[rank] = self.wake[rank] = inf
                self._go_on(rank)

    def _go_on(self, rank: int) -> None:
        """Through the programme of a rank until it works or waits."""
        programme = self.programmes[rank]
        while self.at[rank] < len(programme):
            kind, *what = programme[self.at[rank]]
            if kind == _WORK:
                self.left[rank], self.wake[rank] = what[0], inf
                return
            if kind == _SEND:
                dest, latency = what
                self.mail[rank, dest].append(self.now + latency)
                self.wake[dest] = self._due(dest)
            elif self._due(rank) > self.now:
                self.wake[rank] = self._due(rank)
                return
            elif kind == _RECEIVE:
                self.mail[what[0], rank].popleft()
            self.at[rank] += 1

    def _due(self, rank: int) -> float:
        """When what a rank waits for will be there, as far as that is known; infinite if it waits for nothing."""
        programme = self.programmes[rank]
        kind, *what = programme[self.at[rank]] if self.at[rank] < len(programme) else (_WORK,)
        if kind == _RECEIVE:
            box = self.mail[what[0], rank]
            return box[0] if box else inf
        if kind == _MEET:
            return self._meet(rank, what[0])
        return inf

    def _meet(self, rank: int, meeting: int) -> float:
        """End of a meeting, where this rank has arrived; infinite until all have."""
        present = self.present[meeting]
        if meeting not in self.over and rank not in present:
            present.append(rank)
            seconds, size = self.meetings[meeting]
            if len(present) == size:
                self.over[meeting] = self.now + seconds
                for other in present:
                    self.wake[other] = self.over[meeting]
        return self.over.get(meeting, inf)


def in_order(partition: Partition, direction: int) -> np.ndarray:
    """Ranks that own rows, in the direction of propagation."""
    return np.flatnonzero(counts(partition))[::direction]


def counts(partition: Partition) -> np.ndarray:
    """Number of rows of every rank."""
    return np.diff(np.array(partition.bounds))


def moves(source: Partition, target: Partition) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What changes hands from one ownership of rows to another: arrays of sender, receiver, number of rows."""
    old, new = np.array(source.bounds), np.array(target.bounds)
    cuts = np.unique(np.concatenate([old, new]))
    rows, start = np.diff(cuts), cuts[:-1]
    sender = np.searchsorted(old, start, side="right") - 1
    receiver = np.searchsorted(new, start, side="right") - 1
    moved = sender != receiver
    return sender[moved], receiver[moved], rows[moved]
