"""Messages: the same bodies on threads and on the ranks of an MPI job."""

from __future__ import annotations

import random
import time
from unittest import mock

import pytest
import torch

from xbraid_py.comm import as_communicator, process_group
from xbraid_py.comm.partition import Partition

DTYPES = [torch.float64, torch.float32, torch.int64, torch.bool]


def global_rows(num_rows: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    """The same rows on every rank, all different."""
    size = num_rows
    for extent in shape:
        size *= extent
    return torch.arange(1, size + 1).reshape(num_rows, *shape).to(dtype)


def random_partition(seed: int, num_rows: int, num_ranks: int) -> Partition:
    """Drawn the same on every rank, with ranks that own nothing among them."""
    rng = random.Random(seed)
    return Partition((0, *sorted(rng.randint(0, num_rows) for _ in range(num_ranks - 1)), num_rows))


def local(rows: torch.Tensor, partition: Partition, rank: int) -> torch.Tensor:
    """The rows that `rank` owns."""
    return rows[partition.first(rank) : partition.first(rank) + partition.count(rank)]


def test_ranks_know_themselves(spmd):
    found = spmd(lambda comm: (comm.rank, comm.size))
    assert found == [(rank, len(found)) for rank in range(len(found))]


def test_bcast_and_gather_of_objects(spmd):
    def body(comm):
        root = comm.size - 1
        value = comm.bcast({"rank": comm.rank, "text": "ü"}, root)
        gathered = comm.gather((comm.rank, "x" * comm.rank), root)
        comm.barrier()
        return value, gathered

    results = spmd(body)
    size = len(results)
    assert all(value == {"rank": size - 1, "text": "ü"} for value, _ in results)
    assert results[-1][1] == [(rank, "x" * rank) for rank in range(size)]
    assert all(gathered is None for _, gathered in results[:-1])


def test_nobody_passes_a_barrier_early(spmd):
    # The last rank comes late; what the clock of all ranks on one machine shows is an order, not a duration.
    def body(comm):
        if comm.rank == comm.size - 1:
            time.sleep(0.1)
        came = time.monotonic()
        comm.barrier()
        return came, time.monotonic()

    results = spmd(body)
    assert min(left for _, left in results) >= max(came for came, _ in results)


@pytest.mark.ranks(2, 3, 5)
def test_messages_arrive_in_the_order_of_sending(spmd):
    # Every rank sends to every other one before it receives: sends do not wait for the receiver.
    def body(comm):
        peers = [peer for peer in range(comm.size) if peer != comm.rank]
        sent = [torch.full((20_000,), 100.0 * comm.rank + i) for i in range(4)]
        waits = [comm.isend(tensor, peer) for tensor in sent for peer in peers]
        got = {peer: [comm.recv(torch.empty(20_000), peer) for _ in sent] for peer in peers}
        for wait in waits:
            wait()
        return all(
            torch.equal(got[peer][i], torch.full((20_000,), 100.0 * peer + i)) for peer in peers for i in range(4)
        )

    assert all(spmd(body))


@pytest.mark.ranks(2, 3)
def test_a_group_of_torch_for_each_way(spmd):
    """What NCCL has, by the backend that there is; threads and MPI have one way and take their own."""

    def body(comm):
        if hasattr(comm, "group"):
            with mock.patch.object(process_group, "IN_ORDER", ["gloo"]):
                comm = process_group.ProcessGroupCommunicator(comm.group)
                comm = comm.split(0, -comm.rank)
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        waits = [comm.isend(torch.tensor([comm.rank, i]), peer) for peer in others for i in range(2)]
        got = [comm.recv(torch.empty(2, dtype=torch.int64), peer).tolist() for peer in others for _ in range(2)]
        for wait in waits:
            wait()
        return got == [[peer, i] for peer in others for i in range(2)]

    assert all(spmd(body))


@pytest.mark.ranks(2, 3)
def test_a_buffer_is_free_after_the_wait(spmd):
    def body(comm):
        ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        buffer = torch.full((1000,), float(comm.rank), dtype=torch.float64)
        wait = comm.isend(buffer, ahead)
        out = torch.empty_like(buffer)
        returned = comm.recv(out, behind)
        wait()
        buffer.zero_()
        return returned is out and bool((out == behind).all())

    assert all(spmd(body))


@pytest.mark.ranks(2, 3)
def test_tensors_that_require_grad_are_sent_as_they_are(spmd):
    def body(comm):
        weights = torch.full((3,), float(comm.rank), requires_grad=True)
        wait = comm.isend(weights, (comm.rank + 1) % comm.size)
        out = comm.recv(torch.empty(3), (comm.rank - 1) % comm.size)
        wait()
        return not out.requires_grad and out.tolist() == [float((comm.rank - 1) % comm.size)] * 3

    assert all(spmd(body))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)], ids=str)
def test_allgather_joins_uneven_rows(spmd, dtype, shape):
    def body(comm):
        rows = global_rows(11, *shape, dtype=dtype)
        for seed in range(5):
            partition = random_partition(seed, 11, comm.size)
            joined = comm.allgather(local(rows, partition, comm.rank), partition.counts)
            assert joined.dtype == dtype and torch.equal(joined, rows), partition

    spmd(body)


def test_allgather_of_more_ranks_than_rows(spmd):
    def body(comm):
        partition = Partition.balanced(1, comm.size)
        rows = global_rows(1, 4)
        return torch.equal(comm.allgather(local(rows, partition, comm.rank), partition.counts), rows)

    assert all(spmd(body))


def test_allgather_of_strided_rows(spmd):
    def body(comm):
        partition = Partition.balanced(7, comm.size)
        rows = global_rows(5, 7).T
        return torch.equal(comm.allgather(local(rows, partition, comm.rank), partition.counts), rows)

    assert all(spmd(body))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_ordered_sum_is_bitwise_the_same_on_any_number_of_ranks(spmd, shape, strided):
    # Summands of very different sizes: any other order or grouping changes the last bits.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, *shape, generator=generator, dtype=torch.float64)
    rows *= 10.0 ** torch.randint(-12, 12, rows.shape, generator=generator)
    expected = torch.zeros(shape, dtype=torch.float64)
    for row in rows:
        expected += row
    if strided:
        rows = torch.stack([rows, -rows], -1)[..., 0]

    def body(comm):
        partition = Partition.balanced(1000, comm.size)
        return comm.ordered_sum(local(rows, partition, comm.rank), partition.counts)

    assert all(torch.equal(total, expected) for total in spmd(body))


@pytest.mark.parametrize("columns", [1, 3, 10, 21])
def test_a_column_has_the_same_sum_whatever_stands_beside_it(columns):
    """A resumed run sums the products of its pairs in other company than the run that made them."""
    rows = torch.randn(16, 44, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    comm = as_communicator(None)
    some = comm.ordered_sum(rows[:, :columns].contiguous(), [16])
    assert torch.equal(some, comm.ordered_sum(rows, [16])[:columns])


@pytest.mark.ranks(1, 2, 3, 5, 8)
def test_redistribute_hands_every_row_to_its_owner(spmd):
    cases = [(num_rows, seed) for num_rows in (0, 1, 2, 7, 16, 33) for seed in range(5)]

    def body(comm):
        for num_rows, seed in cases:
            source, target = (random_partition(s, num_rows, comm.size) for s in (seed, 100 + seed))
            rows = global_rows(num_rows, 2, 3)
            out = comm.redistribute(local(rows, source, comm.rank), source, target)
            # The literal reference: join all rows, take one's own.
            joined = comm.allgather(local(rows, source, comm.rank), source.counts)
            assert torch.equal(out, local(joined, target, comm.rank)), (source, target)

    spmd(body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_redistribute_keeps_the_type(spmd, dtype):
    def body(comm):
        source = Partition((0,) * comm.size + (9,))
        target = Partition.balanced(9, comm.size)
        rows = global_rows(9, dtype=dtype)
        out = comm.redistribute(local(rows, source, comm.rank), source, target)
        return out.dtype == dtype and torch.equal(out, local(rows, target, comm.rank))

    assert all(spmd(body))


def test_equal_partitions_send_nothing(spmd):
    def body(comm):
        partition = Partition.balanced(6, comm.size)
        rows = local(global_rows(6, 2), partition, comm.rank)
        with mock.patch.multiple(comm, isend=None, recv=None):  # a message would raise TypeError
            return comm.redistribute(rows, partition, Partition(partition.bounds)) is rows

    assert all(spmd(body))


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 11])
def test_shift_passes_edges_on(spmd, direction, num_rows):
    def body(comm):
        partition = Partition.balanced(num_rows, comm.size)
        return comm.shift(torch.full((2, 3), float(comm.rank)).T, partition, direction), partition.count(comm.rank)

    results = spmd(body)
    in_use = [rank for rank, (_, count) in enumerate(results) if count][::direction]
    source = dict(zip(in_use[1:], in_use, strict=False))
    for rank, (edge, _) in enumerate(results):
        if rank in source:
            assert torch.equal(edge, torch.full((3, 2), float(source[rank])))
        else:
            assert edge is None


def test_shift_skips_ranks_without_rows(spmd):
    def body(comm):
        # Only the first and the last rank own rows.
        partition = Partition((0, *[2] * (comm.size - 1), 4)) if comm.size > 1 else Partition((0, 4))
        edge = comm.shift(torch.tensor([float(comm.rank)]), partition, 1)
        return None if edge is None else edge.item()

    results = spmd(body)
    assert results[-1] == (0.0 if len(results) > 1 else None)
    assert results[:-1] == [None] * (len(results) - 1)


def test_first_error_names_the_lowest_rank(spmd):
    def body(comm):
        none = comm.first_error(None)
        last = comm.first_error("late" if comm.rank == comm.size - 1 else None)
        every = comm.first_error(f"from {comm.rank}")
        return none, last, every

    results = spmd(body)
    assert results == [(None, (len(results) - 1, "late"), (0, "from 0"))] * len(results)


def test_an_empty_message_is_a_message(spmd):
    assert all(found == (0, "") for found in spmd(lambda comm: comm.first_error("")))
