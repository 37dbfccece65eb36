"""The clocks of all ranks while they work and send: one array operation for all ranks, for thousands of them.

A rank that sends is busy for as long as the bytes take; the message is there one latency later.
Shape letters: `P` ranks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from xbraid_py.comm.partition import Partition
from xbraid_py.planner.machine import Machine


class Clock(Protocol):
    """What a simulated solve asks of the ranks; all seconds are those of a rank alone on its node."""

    def work(self, seconds: np.ndarray) -> None:
        """Every rank computes: seconds (P,)."""

    def sweep(self, ranks: np.ndarray, seconds: np.ndarray, num_bytes: float) -> None:
        """These ranks compute one after the other, (P,) seconds; each passes a message on to the next."""

    def messages(self, source: np.ndarray, dest: np.ndarray, num_bytes: np.ndarray) -> None:
        """Messages, all sent before any is received; those of a rank in the order of the arrays."""

    def collective(self, num_bytes: float) -> None:
        """All ranks wait for each other; then each gets so many bytes."""

    def finish(self) -> float:
        """The time at which the last rank is through."""


class Clocks:
    """Clocks of ranks that have a core each; of more ranks than cores only the parallel parts are slower.

    Parameters
    ----------
    machine : Machine
    num_ranks : int

    Attributes
    ----------
    time : (P,) array
        What the clock of every rank shows, in seconds.
    """

    def __init__(self, machine: Machine, num_ranks: int):
        self.machine = machine
        self.time = np.zeros(num_ranks)
        self._node = np.arange(num_ranks) // machine.ranks_per_node

    def work(self, seconds):
        working = np.bincount(self._node, seconds > 0).astype(int)
        slowdown = {count: self.machine.slowdown(count) for count in set(working.tolist())}
        self.time += seconds * np.array([slowdown[count] for count in working.tolist()])[self._node]

    def sweep(self, ranks, seconds, num_bytes):
        if not len(ranks):
            return
        latency, transfer = self._link(ranks[:-1], ranks[1:], num_bytes)
        # e_i = max(t_i, e_{i-1} + latency_{i-1}) + g_i, g_i = work and sending: with the sums S_i of all g and
        # latencies up to i, e_i - S_i = max(t_i + g_i - S_i, e_{i-1} - S_{i-1}).
        busy = seconds[ranks]
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
        self.time[:] = self.time.max() + self.machine.collective(len(self.time), num_bytes)

    def finish(self) -> float:
        return float(self.time.max())

    def _link(self, source, dest, num_bytes) -> tuple[np.ndarray, np.ndarray]:
        """Latency and seconds of sending of messages between these ranks."""
        near, shared, network = self._node[source] == self._node[dest], self.machine.shared, self.machine.network
        transfer = num_bytes / np.where(near, shared.bandwidth, network.bandwidth)
        return np.where(near, shared.latency, network.latency), transfer


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
