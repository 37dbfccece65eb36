"""Tensors in memory the processor cannot read: those of a GPU, and everywhere others that are taken for such."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch

from xbraid_py.comm.mpi import Staging, cuda_aware

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = [1, 3, 1000, 1001, 4097, 70_001]


def staged(comm):
    """All tensors of `comm` go through other memory; threads have no such way and take their own."""
    if hasattr(comm, "served"):
        return mock.patch.object(comm, "served", set())
    if not hasattr(comm, "staging"):
        return contextlib.nullcontext()
    return mock.patch.object(comm.staging, "is_remote", lambda tensor: True)


@pytest.fixture
def staging() -> Staging:
    made = Staging()
    made.is_remote = lambda tensor: True
    return made


def test_what_goes_out_is_a_copy(staging):
    tensor = torch.arange(6.0)
    buffer = staging.outgoing(tensor)
    tensor.zero_()
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_tensors_of_the_processor_are_sent_from_where_they_are():
    tensor = torch.zeros(4)
    out, finish = Staging().incoming(tensor)
    assert np.shares_memory(Staging().outgoing(tensor), tensor.numpy()) and np.shares_memory(out, tensor.numpy())
    assert finish() is tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool], ids=str)
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.T, lambda t: t[:, ::2], lambda t: t[1:1]])
def test_what_comes_in_fills_the_tensor_at_the_end(staging, view, dtype):
    source = view((torch.arange(12).reshape(3, 4) % 5).to(dtype))
    target = view(torch.zeros(3, 4, dtype=dtype))
    buffer, finish = staging.incoming(target)
    buffer[...] = staging.outgoing(source)
    assert not target.any()
    assert finish() is target and torch.equal(target, source)


def test_several_receives_under_way_have_memory_of_their_own(staging):
    targets = [torch.zeros(5) for _ in range(4)]
    started = [staging.incoming(target) for target in targets]
    for number, (buffer, _) in enumerate(started):
        buffer[...] = number
    for _, finish in reversed(started):
        finish()
    assert [target[4].item() for target in targets] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.ranks(2, 3)
def test_staged_messages_of_odd_sizes_under_way_at_once(spmd):
    def body(comm):
        ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        wrong = []
        with staged(comm):
            for turn in range(3):  # memory of earlier turns is used again
                received = [comm.irecv(torch.empty(size), behind) for size in SIZES]
                sent = []
                for size in SIZES:
                    message = torch.arange(size) + 100.0 * comm.rank + turn
                    sent.append(comm.isend(message, ahead))
                for size, finish in zip(SIZES, received, strict=True):
                    if not torch.equal(finish(), torch.arange(size) + 100.0 * behind + turn):
                        wrong.append((turn, size))
                for wait in sent:
                    wait()
        return wrong

    assert not any(spmd(body))


@pytest.mark.ranks(2, 3)
def test_a_staged_tensor_may_be_overwritten_at_once(spmd):
    def body(comm):
        with staged(comm):
            message = torch.full((50_000,), float(comm.rank))
            waits = []
            for _ in range(4):
                waits.append(comm.isend(message, (comm.rank + 1) % comm.size))
                message += 10
            source = (comm.rank - 1) % comm.size
            got = [comm.recv(torch.empty(50_000), source) - source for _ in waits]
            for wait in waits:
                wait()
        return [(part.min().item(), part.max().item()) for part in got]

    assert all(found == [(0.0, 0.0), (10.0, 10.0), (20.0, 20.0), (30.0, 30.0)] for found in spmd(body))


@pytest.mark.ranks(1, 2, 3)
def test_staged_views_and_messages_of_all_ranks(spmd):
    def body(comm):
        grid = torch.arange(24.0).reshape(4, 6)
        with staged(comm):
            out = torch.zeros(6, 8)[:, ::2]
            if comm.rank == comm.size - 1:
                out = grid.T
            comm.broadcast(out, comm.size - 1)
            counts = [rank % 3 for rank in range(comm.size)]
            rows = grid[: counts[comm.rank], ::2] + comm.rank
            joined = comm.allgather(rows, counts)
        expected = torch.cat([grid[:count, ::2] + rank for rank, count in enumerate(counts)])
        return torch.equal(out, grid.T) and torch.equal(joined, expected)

    assert all(spmd(body))


@pytest.mark.parametrize(
    ("environ", "said", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"XBRAID_CUDA_AWARE": "1"}, False, True),
        ({"XBRAID_CUDA_AWARE": "0", "MPICH_GPU_SUPPORT_ENABLED": "1"}, True, False),
        ({"MPICH_GPU_SUPPORT_ENABLED": "1"}, False, True),
        ({"MPICH_GPU_SUPPORT_ENABLED": "0"}, True, False),
        ({"MPIR_CVAR_ENABLE_GPU": "0"}, True, False),
        ({"MPIR_CVAR_ENABLE_GPU": "1"}, False, False),
        ({"OMPI_MCA_opal_cuda_support": "False"}, True, False),
        ({"OMPI_MCA_opal_cuda_support": "true"}, True, True),
    ],
)
def test_who_decides_whether_mpi_reads_the_device(environ, said, expected):
    assert cuda_aware(lambda: said, environ) is expected


def test_the_override_is_0_or_1():
    with pytest.raises(ValueError, match="^XBRAID_CUDA_AWARE=yes is neither 0 nor 1; use 0"):
        cuda_aware(lambda: True, {"XBRAID_CUDA_AWARE": "yes"})


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool], ids=str)
def test_messages_between_tensors_of_a_gpu(spmd, dtype):
    # Long work on the device before every message: it has to wait for the work, and memory for its copies.
    def body(comm):
        ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        total = torch.zeros((), dtype=torch.int64, device="cuda")
        for turn in range(20):
            message = torch.zeros(10_001, dtype=dtype, device="cuda")
            torch.cuda._sleep(1_000_000)
            message += turn % 2
            wait = comm.isend(message, ahead) if comm.size > 1 else None
            got = comm.recv(torch.empty_like(message), behind) if wait else message
            torch.cuda._sleep(1_000_000)
            total += (got != turn % 2).sum()
            if wait:
                wait()
        out = torch.full((7, 3), float(comm.rank), device="cuda").T
        comm.broadcast(out, comm.size - 1)
        rows = torch.full((2, 3), float(comm.rank), device="cuda")
        joined = comm.allgather(rows, [2] * comm.size)
        return total.item(), out.device.type, out.cpu().unique().tolist(), joined.device.type, joined[::2, 0].tolist()

    results = spmd(body)
    ranks = [float(rank) for rank in range(len(results))]
    assert all(found == (0, "cuda", [ranks[-1]], "cuda", ranks) for found in results)


@needs_gpu
def test_memory_for_the_gpu_is_pinned_and_used_again():
    staging = Staging()
    tensor = torch.zeros(1000, device="cuda")
    buffer, finish = staging.incoming(tensor)
    assert torch.from_numpy(buffer).is_pinned()
    address = buffer.ctypes.data
    del buffer, finish
    torch.cuda.synchronize()
    assert staging.outgoing(tensor).ctypes.data == address
