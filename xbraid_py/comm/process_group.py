"""The ranks of torch.distributed: a process group as a communicator, and the job that `torchrun` has started."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented
from torch.nn.parallel import DistributedDataParallel

from xbraid_py.comm import watchdog
from xbraid_py.comm.base import Communicator, SerialCommunicator, as_bytes

# Who waits too long is told so by the watchdog; torch's own time-out must not come before.
_NEVER = datetime.timedelta(days=7)
# Backends that end the messages between two ranks one after the other, whichever way they go.
IN_ORDER = ["nccl", "xccl"]
_NAP, _SOON = 0.02, 3.0  # seconds between two questions, and within which all have left


class ProcessGroupCommunicator(Communicator):
    """The ranks of a `torch.distributed.ProcessGroup`.

    Tensors are sent from where they are if the backend serves that device: gloo the processor, NCCL the GPUs, with
    nothing staged through the host. All others go through a copy on a device that is served.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The ranks.
    ranks : sequence of int, optional
        Their numbers among all of the job, in the order of this communicator; by default in that of the group.
    timeout : timedelta, optional
        Of the groups that this one is split into, in which a message has to come; torch's own by default.
    """

    def __init__(
        self, group: Any, ranks: Sequence[int] | None = None, timeout: datetime.timedelta | None = None
    ) -> None:
        members = dist.get_process_group_ranks(group)
        self.group, self._timeout = group, timeout
        self.ranks = tuple(members if ranks is None else ranks)
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(members)
        self._places = [members.index(rank) for rank in self.ranks]  # in the group
        self._backend = dist.get_backend_config(group)
        backends = dict(each.split(":") for each in self._backend.split(","))
        self.library = f"torch.distributed, {dist.get_backend(group)}"
        # Of GPUs gloo knows copies to the host only, which are made here.
        self.served = {kind for kind, backend in backends.items() if kind == "cpu" or backend != "gloo"}
        self._device = torch.device("cpu" if "cpu" in self.served else next(iter(self.served)))
        # Two ranks that send to each other before they receive would wait for ever: so there is a group for each way.
        in_order = any(backend in IN_ORDER for backend in backends.values())
        self._down, self._up = [self._group_of(self.ranks) if in_order else group for _ in range(2)]
        # What torch forgets before it has arrived does not arrive.
        self._under_way: dict[int, tuple[Any, torch.Tensor]] = {}
        self._line: _StoreLine | None = None

    def isend(self, tensor, dest):
        carried = as_bytes(self._carried(tensor))
        work = dist.isend(carried, self.ranks[dest], self._up if dest > self.rank else self._down)
        self._under_way[id(work)] = work, carried

        def finish():
            self._wait(work, dest)
            self._under_way.pop(id(work), None)

        return finish

    def recv(self, out, source):
        return self.irecv(out, source)()

    def irecv(self, out, source):
        landing, filled = self._landing(out)
        work = dist.irecv(landing, self.ranks[source], self._down if source > self.rank else self._up)

        def finish():
            self._wait(work, source)
            return filled()

        return finish

    def bcast(self, value, root=0):
        box = [value]
        with _waiting(self.ranks):
            dist.broadcast_object_list(box, self.ranks[root], self.group, self._device)
        return value if self.rank == root else box[0]

    def broadcast(self, tensor, root=0):
        if self.rank == root:
            landing, filled = as_bytes(self._carried(tensor)), lambda: tensor
        else:
            landing, filled = self._landing(tensor)
        self._wait(dist.broadcast(landing, self.ranks[root], self.group, async_op=True))
        return filled()

    def allgather(self, rows, counts):
        if len(rows) != counts[self.rank]:
            raise ValueError(f"counts={list(counts)} but rank {self.rank} sent {len(rows)}")
        out = rows.new_empty((sum(counts), *rows.shape[1:]), requires_grad=False)
        landing, filled = self._landing(out)
        width = len(landing) // max(len(out), 1)
        parts = [*landing.split([count * width for count in counts])]
        parts[self.rank].copy_(as_bytes(self._carried(rows)))
        if len(set(counts)) == 1:
            in_order = [parts[self._places.index(place)] for place in range(self.size)]
            works = [dist.all_gather(in_order, parts[self.rank].clone(), self.group, async_op=True)]
        else:
            works = [
                dist.broadcast(part, rank, self.group, async_op=True)
                for part, rank in zip(parts, self.ranks, strict=True)
                if len(part)
            ]
        for work in works:
            self._wait(work)
        return filled()

    def gather(self, value, root=0):
        found = [None] * self.size if self.rank == root else None
        with _waiting(self.ranks):
            dist.gather_object(value, found, self.ranks[root], self.group)
        return found and [found[place] for place in self._places]

    def barrier(self):
        self._wait(dist.barrier(self.group, async_op=True))

    def abort(self, status):
        # The others meet a closed connection. Who waits for nobody, and takes the SIGTERM of torchrun for a request,
        # is told so.
        if self._line is not None:
            self._line.tell_of_the_end()
        os._exit(status)

    def _split(self, color, key):
        asked = self.bcast(self.gather((color, key)))
        chosen = sorted((r for r in range(self.size) if asked[r][0] == color), key=lambda rank: asked[rank][1])
        ranks = [self.ranks[rank] for rank in chosen]
        group = self._group_of(ranks)
        if len(ranks) == 1:
            return SerialCommunicator()
        made = ProcessGroupCommunicator(group, ranks, self._timeout)
        made.is_alike = self.is_alike
        return made

    def refuse_replicas(self):
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None:
            return
        ranks = self.common_ranks(dist.get_process_group_ranks(wrapper.process_group))
        if len(ranks) > 1:
            raise ValueError(
                f"DistributedDataParallel takes ranks {', '.join(map(str, ranks))} for replicas, but they share the "
                f"layers out; give it process_group=mesh.get_group('replicas'), with mesh = "
                f"xbraid_py.ProcessGrid(comm, replicas).device_mesh(), or wrap only what lies around the stack"
            )

    def common_ranks(self, ranks):
        return sorted({*self.ranks} & {*ranks})

    def misses_a_rank(self, error):
        return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))

    def line(self):
        # A store that this process alone talks to in this way, since some words to the store of the job are waits:
        # at that of torchrun, which outlives the ranks, or at one of the first rank.
        host, store, said = os.environ.get("MASTER_ADDR", "localhost"), None, None
        at_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.rank == 0:
            port = int(os.environ["MASTER_PORT"]) if at_torchrun else 0
            store = TCPStore(host, port, is_master=not at_torchrun, wait_for_workers=False)
            said = store.port, store.add("lines of xbraid_py", 1)
        port, number = self.bcast(said)
        store = store or TCPStore(host, port)
        self._line = _StoreLine(PrefixStore(f"line {number} of xbraid_py", store), self.rank, self.size)
        return self._line

    def _group_of(self, ranks: Sequence[int]) -> Any:
        """A group of some ranks of the job, this one among them; all ranks of this communicator make one each."""
        # Torch names a group that only its members make by their ranks, and by how many groups a process has: as many
        # as all others have.
        for _ in range(_number_of_groups(), max(self.bcast(self.gather(_number_of_groups())))):
            self._own_group([dist.get_rank()])
        return self._own_group(ranks)

    def _own_group(self, ranks: Sequence[int]) -> Any:
        return dist.new_group([*ranks], self._timeout, self._backend, use_local_synchronization=True)

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where it can be sent from."""
        tensor = tensor.detach()
        return (tensor if tensor.device.type in self.served else tensor.to(self._device, copy=True)).contiguous()

    def _landing(self, out: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """Bytes to receive into, and a function for afterwards that fills `out` and returns it."""
        target = landing = out.detach()
        if target.device.type not in self.served:
            landing = torch.empty(target.shape, dtype=target.dtype, device=self._device)
        elif not target.is_contiguous():
            landing = torch.empty_like(target, memory_format=torch.contiguous_format)

        def finish() -> torch.Tensor:
            if landing is not target:
                target.copy_(landing)
            return out

        return as_bytes(landing), finish

    def _wait(self, work: Any, peer: int | None = None) -> None:
        """Wait for a message to or from a rank, or of all ranks; on a GPU the stream does, not the processor."""
        with _waiting(self.ranks if peer is None else self.ranks[peer : peer + 1]):
            work.wait()


class _waiting:
    """This process waits for some ranks of the job within."""

    def __init__(self, ranks: tuple[int, ...]):
        self._ranks = ranks

    def __enter__(self):
        watchdog.begin(self._ranks)

    def __exit__(self, *error):
        watchdog.end()


class _StoreLine:
    """A line for the watchdog: a box for each rank in a store that the first rank holds."""

    def __init__(self, store: Any, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store, self._read, self._lock, self._is_over = store, 0, threading.Lock(), False

    def send(self, word, dest):
        with self._lock:
            if not self._is_over:
                number = self._store.add(f"to {dest}", 1)
                self._store.set(f"to {dest}, {number}", f"{self.rank} {word}")

    def tell_of_the_end(self) -> None:
        """Let all ranks end, each at its next look."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set("over", "")

    def poll(self):
        found = []
        with self._lock:
            if not self._is_over and self._store.check(["over"]):
                # Who has ended the job has said why.
                sys.stdout.flush()
                os._exit(1)
            while not self._is_over and self._store.check([f"to {self.rank}, {self._read + 1}"]):
                self._read += 1
                source, _, word = self._store.get(f"to {self.rank}, {self._read}").decode().partition(" ")
                found.append((int(source), word))
        return found

    def meet(self, seconds):
        """Whether all ranks come here within so many seconds; then the line is closed."""
        if not self._all("come", seconds, 1):
            return False
        # With the first rank the store ends: it is the last to leave.
        with self._lock:
            self._is_over = True
            if self.rank == 0:
                self._all("left", _SOON, 1)
            else:
                self._store.add("left", 1)
        return True

    def _all(self, what: str, seconds: float, own: int) -> bool:
        """Whether all ranks say so within so many seconds."""
        self._store.add(what, own)
        until = time.monotonic() + seconds
        while self._store.add(what, 0) < self.size:
            if time.monotonic() > until:
                return False
            time.sleep(_NAP)
        return True


def _number_of_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def is_there() -> bool:
    """Whether this process has its process group."""
    return dist.is_available() and dist.is_initialized()


def is_one(comm: Any) -> bool:
    """Whether this is a process group."""
    return dist.is_available() and isinstance(comm, dist.ProcessGroup)


# A group is handed over with every batch, and its communicator may have groups of its own.
_known: dict[Any, ProcessGroupCommunicator] = {}


def communicator_of(group: Any, timeout: datetime.timedelta | None = None) -> Communicator:
    """The one `Communicator` of a process group; see `kinds.as_communicator`."""
    if group.size() == 1:
        return SerialCommunicator()
    found = _known.get(group)
    if found is None:
        if not _known:
            atexit.register(_settle)  # before what sends the last messages, so that it comes after that
        found = _known[group] = ProcessGroupCommunicator(group, timeout=timeout)
    return found


def ranks_of_the_job(comm: Communicator) -> tuple[int, ...]:
    """Numbers that torch knows the ranks of a communicator by, which has all of them.

    Raises
    ------
    ValueError
        If it has not.
    """
    ranks = comm.ranks if isinstance(comm, ProcessGroupCommunicator) else ()
    if not ranks or len(ranks) < dist.get_world_size():
        raise ValueError(
            f"{comm.size} rank(s) that are not all those of a process group of torch.distributed cannot be a device "
            f"mesh; start with torchrun on two processes or more, and make the grid of comm=xbraid_py.world()"
        )
    return ranks


def world() -> Communicator:
    """All ranks of this job of torch.distributed; see `kinds.world`."""
    if is_there():
        return communicator_of(dist.group.WORLD)
    if int(os.environ["WORLD_SIZE"]) == 1:
        return SerialCommunicator()
    backend, local = "gloo", int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if dist.is_nccl_available() and local <= torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    hook = sys.excepthook
    dist.init_process_group(backend, timeout=_NEVER)
    if hook is not sys.__excepthook__:
        # Torch has put its own before it, which holds back what is printed in it until it comes back.
        sys.excepthook = hook
    atexit.register(_leave)
    return communicator_of(dist.group.WORLD, _NEVER)


def _settle() -> None:
    # A thread of gloo lets go of the tensors of the last message, and needs the interpreter for that: where it comes
    # too late, at the end of Python, the process aborts.
    time.sleep(0.1)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
