"""Threads of one process that behave as ranks: they stand in for MPI in tests and in notebooks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from xbraid_py.comm.base import Communicator, SerialCommunicator

# Messages between two ranks and messages of all ranks do not mix, as with MPI.
_TENSORS, _OF_ALL = "tensors", "of all"


class ThreadCommunicator(Communicator):
    """One of several threads of this process that behave as ranks; made by `run_threads`."""

    def __init__(self, rank: int, shared: _Shared):
        self.rank = rank
        self.size = shared.size
        self._shared = shared

    def isend(self, tensor, dest):
        self._put(tensor.detach().clone(), dest, _TENSORS)
        return lambda: None

    def recv(self, out, source):
        return self._write(self._get(source, _TENSORS), out, source)

    def broadcast(self, tensor, root=0):
        if self.rank != root:
            return self._write(self._get(root), tensor, root)
        self.bcast(tensor.detach().clone(), root)
        return tensor

    def bcast(self, value, root=0):
        if self.rank != root:
            return self._get(root)
        for peer in range(self.size):
            if peer != root:
                self._put(value, peer)
        return value

    def allgather(self, rows, counts):
        parts = self.bcast(self.gather(rows.detach().clone()))
        if [len(part) for part in parts] != list(counts):
            raise ValueError(f"counts={list(counts)} but the ranks sent {[len(part) for part in parts]}")
        return torch.cat(parts)

    def gather(self, value, root=0):
        if self.rank != root:
            self._put(value, root)
            return None
        return [value if peer == root else self._get(peer) for peer in range(self.size)]

    def _split(self, color, key):
        asked = self.gather((color, key))
        groups: dict[int, tuple[_Shared, list[int]]] = {}
        if asked is not None:
            for chosen in {color for color, _ in asked}:
                ranks = [rank for rank in range(self.size) if asked[rank][0] == chosen]
                ranks.sort(key=lambda rank: asked[rank][1])
                groups[chosen] = _Shared(len(ranks), self._shared.failed), ranks
        shared, ranks = self.bcast(groups)[color]
        if len(ranks) == 1:
            return SerialCommunicator(end=self.abort)
        return ThreadCommunicator(ranks.index(self.rank), shared)

    def abort(self, status):
        self._shared.failed.set()
        raise SystemExit(status)

    def _write(self, sent, out, source):
        if sent.shape != out.shape or sent.dtype != out.dtype:
            raise ValueError(f"rank {self.rank} expects {out.shape} from rank {source}, got {sent.shape}")
        out.detach().copy_(sent)
        return out

    def _put(self, value, dest, kind=_OF_ALL):
        self._shared.queues[kind, self.rank, dest].put(value)

    def _get(self, source, kind=_OF_ALL):
        # Polling, so that the failure of one thread ends the others as an abort ends MPI ranks.
        while not self._shared.failed.is_set():
            try:
                return self._shared.queues[kind, source, self.rank].get(timeout=0.05)
            except queue.Empty:
                continue
        raise _PeerFailed


class _PeerFailed(Exception):
    """Another thread has failed; its exception is the one to report."""


class _Shared:
    def __init__(self, size: int, failed: threading.Event):
        self.size = size
        self.failed = failed  # of all groups: the failure of one thread ends every other one
        self.queues = {
            (kind, a, b): queue.SimpleQueue() for kind in (_TENSORS, _OF_ALL) for a in range(size) for b in range(size)
        }


def run_threads(size: int, body: Callable[[Communicator], Any]) -> list[Any]:
    """Run `body(comm)` on `size` ranks that are threads; their results in the order of the ranks.

    The first exception of a rank ends the others and is raised here.

    Parameters
    ----------
    size : int
        Number of ranks.
    body : callable
        Called as `body(comm)` on each of them, with its communicator.

    Returns
    -------
    list
        What the bodies return.
    """
    shared = _Shared(size, threading.Event())
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadCommunicator(rank, shared))
        except _PeerFailed:
            pass
        except BaseException as error:
            # Whatever it is, it is raised again below, in the thread that asked for the run.
            errors.append(error)
            shared.failed.set()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
