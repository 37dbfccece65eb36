"""Data-parallel times layer-parallel: a grid of ranks, batches handed on and dealt out, gradients averaged."""

from __future__ import annotations

import copy
import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from xbraid_py.comm import process_group
from xbraid_py.comm.kinds import as_communicator
from xbraid_py.comm.partition import Partition

Value = TypeVar("Value")
# A message of gradients holds at most so many bytes.
MESSAGE_BYTES = 25_000_000
# Of fewer numbers every replica gets the whole gradients of all, in one message.
SHARED_FROM = 4096

_NO_COUNT, _BAD_COUNT = -1, -2


class ProcessGrid:
    """`replicas` copies of a network, each on as many ranks, its layers shared out among them.

    All ranks of `comm` make the grid together.

    Parameters
    ----------
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        All ranks; None for a serial run.
    replicas : int
        Number of replicas; divides the number of ranks.
    neighbors : {"layers", "replicas"}
        Which ranks have numbers that follow each other: those of a replica, which share its layers (with 6 ranks and 2
        replicas, ranks 0 to 2 are the first), or those of all replicas that hold the same layers.

    Attributes
    ----------
    layers : Communicator
        The ranks of this replica, for layer-parallelism.
    data : Communicator
        The ranks that hold the same stretch of layers, one in each replica, in the order of the replicas.
    replica : int
        Which replica this rank belongs to.
    replicas : int
        Number of replicas.

    Raises
    ------
    ValueError
        On all ranks, if `replicas` does not divide their number or is not the same on all.
    """

    def __init__(self, comm: Any = None, replicas: int = 1, neighbors: Literal["layers", "replicas"] = "layers"):
        comm = as_communicator(comm)
        comm.same(replicas, "replicas")
        if not isinstance(replicas, int) or replicas < 1 or comm.size % replicas:
            raise ValueError(
                f"replicas={replicas!r} does not divide the {comm.size} rank(s); use {divisors(comm.size)}"
            )
        per_replica = comm.size // replicas
        self.replicas = replicas
        self._comm, numbers = comm, torch.arange(comm.size)
        self._numbers = numbers.view(replicas, -1) if neighbors == "layers" else numbers.view(-1, replicas).T
        if neighbors == "layers":
            self.replica, stage = divmod(comm.rank, per_replica)
        else:
            stage, self.replica = divmod(comm.rank, replicas)
        self.layers = comm.split(self.replica, comm.rank)
        self.data = comm.split(stage, comm.rank)

    def device_mesh(self, device_type: str = "cpu") -> DeviceMesh:
        """The grid as a mesh of torch's, with the dimensions "replicas" and "layers". All ranks of the job take part.

        `DistributedDataParallel(model, process_group=mesh.get_group("replicas"))` averages the gradients of a whole
        model over the replicas in `backward`, those of a stack of `grid.layers` among them; `average_gradients` is not
        called then. `fully_shard(head, mesh=mesh["replicas"])` shards what lies around a stack.

        Parameters
        ----------
        device_type : str
            Where the tensors of torch's own messages are: "cuda" for those of NCCL.

        Raises
        ------
        ValueError
            If the ranks of the grid are not all those of torch.distributed.
        """
        ranks = torch.tensor(process_group.ranks_of_the_job(self._comm))
        return DeviceMesh(device_type, ranks[self._numbers], mesh_dim_names=("replicas", "layers"))

    def shard(self, batch: Any) -> Any:
        """This replica's share of a batch, without copying: a block of samples, longer ones first.

        Parameters
        ----------
        batch : tensor, or nested tuple, list or dict of tensors
            Shape (B, ...) each, with the same number B of samples; entries that are None stay so.

        Returns
        -------
        The same structure, B / replicas samples each, rounded up for the first replicas and down for the others.

        Raises
        ------
        ValueError
            If there are fewer samples than replicas, or tensors differ in their number of samples.
        TypeError
            If `batch` holds anything else than tensors and None.
        """
        sizes: list[int] = []
        map_nested(batch, lambda leaf: sizes.append(_samples(leaf)) if leaf is not None else None)
        if len(set(sizes)) > 1:
            raise ValueError(f"batch holds tensors of {sizes} samples; the first axis of all must be the same")
        if sizes and sizes[0] < self.replicas:
            raise ValueError(
                f"batch of {sizes[0]} sample(s) is too small for replicas={self.replicas}; "
                f"use at least {self.replicas} samples, or drop the last batch of an epoch"
            )
        shares = Partition.balanced(sizes[0] if sizes else 0, self.replicas)
        mine = slice(shares.bounds[self.replica], shares.bounds[self.replica + 1])
        return map_nested(batch, lambda leaf: None if leaf is None else leaf[mine])

    def average_gradients(
        self, parameters: torch.nn.Module | Iterable[torch.Tensor], samples: int | None = None
    ) -> None:
        """Replace the gradients by their averages over the replicas; call it after `backward`.

        All ranks take part, with the same parameters in every replica. A parameter that has a gradient in some
        replicas counts as zero in the others; one that has none in any keeps none. The average is summed in the order
        of the replicas, and bitwise the same in all of them.

        Parameters
        ----------
        parameters : Module or iterable of tensors
            Whose gradients; those that do not require any are left out.
        samples : int, optional
            Samples of this replica's share. The averages are weighted by them, as in the mean over the joined
            batch; without it all replicas weigh the same.

        Raises
        ------
        ValueError
            On all replicas, if their parameters differ in number, shape or type, or their `samples` make no weights.
        """
        if isinstance(parameters, torch.nn.Module):
            parameters = parameters.parameters()
        wanted = [p for p in parameters if p.requires_grad]
        weight = self._agree(wanted, samples)
        with torch.no_grad():
            flats = self._flat_gradients(wanted)
            for pieces in _buckets([flat for _, flat in flats]):
                mine = torch.cat(pieces).mul_(weight)
                mean = self._sum(mine)
                for piece, part in zip(pieces, mean.split([piece.numel() for piece in pieces]), strict=True):
                    piece.copy_(part)
            for parameter, flat in flats:
                if parameter.grad is not None and not parameter.grad.is_contiguous():  # then `flat` is a copy of it
                    parameter.grad.copy_(flat.view_as(parameter.grad))

    def _sum(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum of vectors of all replicas, in their order; each sums a share of it where they are long."""
        if self.replicas == 2 or len(mine) < SHARED_FROM:
            return self.data.ordered_sum(mine[None], [1] * self.replicas)
        counts, own = Partition.balanced(len(mine), self.replicas).counts, self.replica
        pieces, others = mine.split(counts), [each for each in range(self.replicas) if each != own]
        arriving = {each: self.data.irecv(mine.new_empty(counts[own]), each) for each in others}
        sent = [self.data.isend(pieces[each].contiguous(), each) for each in others]
        rows = torch.stack([pieces[own] if each == own else arriving[each]() for each in range(self.replicas)])
        for wait in sent:
            wait()
        return self.data.allgather(rows.cumsum(0)[-1], counts)

    def broadcast_parameters(self, module: torch.nn.Module) -> None:
        """Overwrite the parameters and buffers of all replicas by those of the first; all ranks take part.

        Raises
        ------
        ValueError
            On all replicas, if their modules differ in names, shapes or types.
        """
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        self.data.same([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()], "parameters")
        for tensor in tensors.values():
            self.data.broadcast(tensor, 0)

    def _agree(self, parameters: list[torch.Tensor], samples: int | None) -> float:
        """Weight of this replica, once all replicas have agreed on what is to come."""
        kind = zlib.crc32(repr([(tuple(p.shape), str(p.dtype)) for p in parameters]).encode())
        valid = samples is None or (isinstance(samples, int) and samples >= 0)
        count = _BAD_COUNT if not valid else _NO_COUNT if samples is None else samples
        all_counts, kinds = self._of_all_replicas([count, kind]).T.tolist()
        if len(set(kinds)) > 1:
            raise ValueError(
                f"parameters differ between the replicas, this is replica {self.replica}; build them alike"
            )
        if all_counts == [_NO_COUNT] * self.replicas:
            return 1 / self.replicas
        if min(all_counts) < 0 or sum(all_counts) == 0:
            raise ValueError(
                f"samples={samples!r} on replica {self.replica}: every replica must pass a number from 0 on, not all "
                f"of them 0, or all of them None; use the length of the replica's share"
            )
        return count / sum(all_counts)

    def _flat_gradients(self, parameters: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameters with a gradient in some replica, with this replica's as a vector: a view where there is one."""
        missing = [p.grad is None for p in parameters]
        wanted = [True] * len(parameters)
        if self._of_all_replicas([any(missing)]).any():
            wanted = (self._of_all_replicas(missing) == 0).any(0).tolist()
        found = []
        for parameter, has_gradient in zip(parameters, wanted, strict=True):
            if has_gradient:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append((parameter, parameter.grad.reshape(-1)))
        return found

    def _of_all_replicas(self, numbers: Sequence[int]) -> torch.Tensor:
        """Integers of every replica, shape (replicas, len(numbers))."""
        return self.data.allgather(torch.tensor([numbers], dtype=torch.int64), [1] * self.replicas)


def _samples(leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"batch holds a {type(leaf).__name__}; use tensors, and torch.as_tensor for arrays")
    if not leaf.ndim:
        raise ValueError("batch holds a tensor of shape (); the first axis must be the samples")
    return len(leaf)


def _buckets(flats: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Vectors in pieces, joined to lists of one type and device and of at most `MESSAGE_BYTES`."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for flat in flats:
        groups.setdefault((flat.dtype, flat.device), []).append(flat)
    for group in groups.values():
        limit = MESSAGE_BYTES // group[0].element_size()
        bucket: list[torch.Tensor] = []
        room = limit
        for piece in (piece for flat in group for piece in flat.split(limit)):
            if piece.numel() > room:
                yield bucket
                bucket, room = [], limit
            bucket.append(piece)
            room -= piece.numel()
        yield bucket


def divisors(size: int) -> str:
    """Divisors of `size` in words: `1, 2 or 4`."""
    low = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    found = sorted({*low, *(size // d for d in low)})
    return " or ".join([", ".join(map(str, found[:-1])), str(found[-1])][len(found) == 1 :])


def broadcast_batch(value: Value | None, comm: Any, root: int = 0, device: Any = "cpu") -> Value:
    """What only rank `root` knows, such as a batch, on every rank of `comm`.

    Parameters
    ----------
    value : Any
        On `root`: a tensor, or a nested tuple, list or dict of tensors and of other things that can be pickled. What
        the other ranks pass is not looked at; None will do.
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        The ranks; all of them take part. None for a serial run.
    root : int
        The rank that knows.
    device : torch.device or str
        Where the tensors are to be, on every rank, whatever their device on `root`.

    Returns
    -------
    The same structure on every rank, its tensors contiguous and without history. On `root` they may be those of
    `value`, or share their memory.

    Raises
    ------
    TypeError
        On all ranks, if something in `value` cannot be sent.
    """
    comm = as_communicator(comm)
    tensors: list[torch.Tensor] = []
    packed = problem = None
    if comm.rank == root:
        try:
            packed = pickle.dumps(map_nested(value, lambda leaf: _describe(leaf, tensors)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            problem = f"value on rank {root} cannot be sent: {error}; use tensors, numbers, and tuples or dicts of them"
    packed, problem = comm.bcast((packed, problem), root)
    if problem is not None:
        raise TypeError(problem)
    own = iter(tensors)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, _Described):
            return leaf
        here = next(own, None)
        if here is None:
            here = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        # Contiguous on the root too: the layout in memory decides the order of later sums.
        return comm.broadcast(here.detach().contiguous(), root).to(device)

    return map_nested(pickle.loads(packed), place)


@dataclass(frozen=True)
class _Described:
    """A tensor that comes in a message of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _describe(leaf: Any, tensors: list[torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.layout != torch.strided:
        raise TypeError(f"a tensor of layout {leaf.layout}")
    tensors.append(leaf)
    return _Described(tuple(leaf.shape), leaf.dtype)


def map_nested(node: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """The same structure of tuples, lists and dicts, with `of_leaf` of everything else, in a fixed order."""
    if isinstance(node, dict):
        made = copy.copy(node)  # keeps what else the dict knows, such as a default
        made.update((key, map_nested(item, of_leaf)) for key, item in node.items())
        return made
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(map_nested(item, of_leaf) for item in node))
    if isinstance(node, tuple | list) and not isinstance(node, torch.Size):
        return type(node)(map_nested(item, of_leaf) for item in node)
    return of_leaf(node)
