"""Messages: the same bodies on threads and on the ranks of an MPI job."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from xbraid_py.comm import (
    Communicator,
    LaunchError,
    SerialCommunicator,
    check_launcher,
    launcher_rank,
    wrap,
)
from xbraid_py.grid import Partition
from xbraid_py.threads import ThreadCommunicator, run_threads

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
    expected = rows.sum(0)
    if strided:
        rows = torch.stack([rows, -rows], -1)[..., 0]

    def body(comm):
        partition = Partition.balanced(1000, comm.size)
        return comm.ordered_sum(local(rows, partition, comm.rank), partition.counts)

    assert all(torch.equal(total, expected) for total in spmd(body))


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


def test_serial_runs_have_nobody_to_talk_to():
    comm = SerialCommunicator()
    with pytest.raises(ValueError, match="^dest=1: a serial run"):
        comm.isend(torch.zeros(1), 1)
    with pytest.raises(ValueError, match="^source=1: a serial run"):
        comm.recv(torch.zeros(1), 1)


def test_a_failing_thread_ends_the_others():
    def body(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("rank 1")
        comm.recv(torch.empty(1), 1)  # never sent

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 1"):
        run_threads(3, body)
    assert threading.active_count() == before


def test_abort_of_a_thread_ends_the_others():
    def body(comm):
        if comm.rank == 2:
            comm.abort(3)
        comm.bcast(None, root=2)

    with pytest.raises(SystemExit) as raised:
        run_threads(3, body)
    assert raised.value.code == 3


@pytest.mark.parametrize("out", [torch.empty(2, dtype=torch.float64), torch.empty(3)], ids=["shape", "dtype"])
def test_threads_notice_what_mpi_would_mangle(out):
    def body(comm):
        if comm.rank == 0:
            comm.isend(torch.zeros(3, dtype=torch.float64), 1)
        else:
            comm.recv(out, 0)

    with pytest.raises(ValueError, match="^rank 1 expects .* from rank 0"):
        run_threads(2, body)


def test_threads_notice_wrong_counts():
    with pytest.raises(ValueError, match=r"^counts=\[1, 1\] but the ranks sent \[2, 2\]"):
        run_threads(2, lambda comm: comm.allgather(torch.zeros(2), [1, 1]))


LAUNCHERS = [
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
]


@pytest.mark.parametrize(("size_name", "rank_name"), LAUNCHERS)
def test_launchers_are_believed(size_name, rank_name):
    environ = {size_name: "4", rank_name: "3"}
    check_launcher(4, environ)
    assert launcher_rank(environ) == 3
    with pytest.raises(LaunchError, match=rf"^{size_name}=4 but MPI sees 1 process\(es\).*beside this python.*pmi2"):
        check_launcher(1, environ)


def test_no_launcher_no_complaint():
    check_launcher(1, {})
    assert launcher_rank({}) == 0


def test_the_innermost_launcher_counts():
    # mpirun inside a SLURM allocation: the allocation holds more tasks than the job has ranks.
    environ = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "PMI_SIZE": "2", "PMI_RANK": "1"}
    check_launcher(2, environ)
    assert launcher_rank(environ) == 1


def test_independent_processes_notice_their_launcher(run_job):
    job = run_job(["-c", "from xbraid_py.comm import world; world()"], env={"SLURM_NTASKS": "3", "SLURM_PROCID": "0"})
    assert job.returncode != 0
    assert "LaunchError: SLURM_NTASKS=3 but MPI sees 1 process(es)" in job.stderr


def test_a_single_process_is_a_serial_run(run_job):
    code = "from mpi4py import MPI; from xbraid_py.comm import *; print(type(world()), type(wrap(MPI.COMM_SELF)))"
    job = run_job(["-c", code])
    assert job.stdout.count("SerialCommunicator") == 2, job.stderr


def test_wrap_takes_what_a_caller_has(spmd):
    def body(comm):
        assert wrap(comm) is comm
        assert isinstance(wrap(None), SerialCommunicator)
        return isinstance(comm, Communicator) and (comm.size == 1) == isinstance(comm, SerialCommunicator)

    assert all(spmd(body))


def test_mpi4py_is_not_needed_without_a_launcher():
    code = "import sys, torch, xbraid_py.comm; sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_threads_are_the_default_stand_in():
    assert all(type(comm) is ThreadCommunicator for comm in run_threads(2, lambda comm: comm))


JOB = """
import torch
from xbraid_py.comm import world
comm = world()
if comm.rank == 1:
    comm.abort(7)
comm.recv(torch.empty(1), 1)
"""


def test_abort_ends_a_job_that_waits(run_job):
    assert run_job(["-c", JOB], ranks=3).returncode == 7
