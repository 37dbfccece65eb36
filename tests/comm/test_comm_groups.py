"""Tensors from one rank to all, groups of ranks, and whether ranks agree."""

from __future__ import annotations

import threading

import pytest
import torch
from refusal import refusal

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import agree_on_all, code, hold, same_data, same_installation
from xbraid_py.testing import run_threads

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
def test_all_ranks_get_the_tensor_of_the_root(spmd, shape, dtype):
    def value(rank):
        return (torch.arange(24)[: torch.Size(shape).numel()].reshape(shape) + rank).to(dtype)

    def body(comm):
        mine = value(comm.rank)
        return comm.broadcast(mine, comm.size - 1) is mine, mine

    results = spmd(body)
    assert all(kept and torch.equal(got, value(len(results) - 1)) for kept, got in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_of_all_types(spmd, dtype):
    def body(comm):
        value = torch.arange(6).reshape(2, 3).to(dtype)
        rows = torch.full((comm.rank, 3), 1).to(dtype)
        joined = comm.allgather(rows, list(range(comm.size)))
        if comm.size == 1:
            return joined.shape == (0, 3)
        sent = comm.isend(value, (comm.rank + 1) % comm.size)
        got = comm.recv(torch.empty(2, 3, dtype=dtype), (comm.rank - 1) % comm.size)
        sent()
        return torch.equal(got, value) and torch.equal(joined, torch.ones(sum(range(comm.size)), 3).to(dtype))

    assert all(spmd(body))


def test_strided_tensors_are_broadcast(spmd):
    def body(comm):
        value = torch.zeros(3, 8)[:, ::2].T
        if comm.rank == 0:
            value += torch.arange(12.0).reshape(4, 3)
        comm.broadcast(value)
        return value.tolist()

    assert all(found == torch.arange(12.0).reshape(4, 3).tolist() for found in spmd(body))


@pytest.mark.ranks(2, 3)
def test_strided_tensors_are_sent(spmd):
    def body(comm):
        sent = comm.isend(torch.arange(12.0).reshape(4, 3).T, (comm.rank + 1) % comm.size)
        out = torch.zeros(3, 8)[:, ::2]
        comm.recv(out, (comm.rank - 1) % comm.size)
        sent()
        return out.tolist()

    assert all(found == torch.arange(12.0).reshape(4, 3).T.tolist() for found in spmd(body))


def test_single_numbers_of_strided_tensors(spmd):
    """Torch calls a tensor of one number contiguous, whatever its strides are."""

    def body(comm):
        def one(value):
            return torch.full((4, 4), float(value)).T[3:4, 2:3][0, ::2]

        joined = comm.allgather(one(comm.rank), [1] * comm.size)
        told = comm.broadcast(one(comm.rank), comm.size - 1)
        if comm.size > 1:
            sent = comm.isend(one(comm.rank), (comm.rank + 1) % comm.size)
            comm.recv(told, (comm.rank - 1) % comm.size)
            sent()
        return joined.tolist(), told.item()

    results = spmd(body)
    ranks = [float(rank) for rank in range(len(results))]
    assert results == [(ranks, ranks[rank - 1]) for rank in range(len(results))]


def test_parameters_are_broadcast_in_place(spmd):
    def body(comm):
        weight = torch.nn.Parameter(torch.full((3,), float(comm.rank)))
        comm.broadcast(weight, comm.size - 1)
        return weight.tolist(), weight.requires_grad

    results = spmd(body)
    assert results == [([len(results) - 1.0] * 3, True)] * len(results)


@pytest.mark.ranks(1, 2, 3, 4, 5)
def test_groups_are_ordered_by_key_then_by_rank(spmd):
    def body(comm):
        by_rank = comm.split(comm.rank % 2)
        by_key = comm.split(0, -(comm.rank // 2))
        return by_rank.gather(comm.rank), by_rank.size, by_key.rank, by_key.bcast(by_key.gather(comm.rank))

    results = spmd(body)
    size = len(results)
    for rank, (members, group_size, place, order) in enumerate(results):
        expected = list(range(rank % 2, size, 2))
        assert group_size == len(expected) and members == (expected if rank < 2 else None)
        assert order == sorted(range(size), key=lambda other: (-(other // 2), other)) and order[place] == rank


@pytest.mark.ranks(2, 3, 5)
def test_messages_of_groups_do_not_mix(spmd):
    # The same two ranks talk in three groups at once, and receive in another order than they sent.
    def body(comm):
        inner, twin = comm.split(0), comm.split(0)
        ahead, behind = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        waits = [group.isend(torch.full((3,), float(i)), ahead) for i, group in enumerate((comm, inner, twin))]
        got = [group.recv(torch.empty(3), behind)[0].item() for group in (twin, comm, inner)]
        for wait in waits:
            wait()
        return got

    assert all(found == [2.0, 0.0, 1.0] for found in spmd(body))


@pytest.mark.ranks(2, 3)
def test_a_message_under_way_and_one_to_all_do_not_mix(spmd):
    def body(comm):
        wait = comm.isend(torch.tensor([1.0]), (comm.rank + 1) % comm.size)
        joined = comm.bcast("to all", 0), comm.broadcast(torch.tensor([2.0])).item()
        got = comm.recv(torch.empty(1), (comm.rank - 1) % comm.size).item()
        wait()
        return *joined, got

    assert all(found == ("to all", 2.0, 1.0) for found in spmd(body))


def test_all_messages_within_a_group(spmd):
    def body(comm):
        group = comm.split(int(comm.rank > 0))
        rows = torch.full((1, 2), float(comm.rank))
        group.barrier()
        return (
            isinstance(group, SerialCommunicator) == (group.size == 1),
            group.ordered_sum(rows, [1] * group.size)[0].item(),
            group.broadcast(rows.clone(), group.size - 1)[0, 0].item(),
            group.split(group.rank % 2).size,
        )

    results = spmd(body)
    size = len(results)
    assert results[0] == (True, 0.0, 0.0, 1)
    for rank in range(1, size):
        mine = (size - 1) // 2 if rank % 2 == 0 else size // 2
        assert results[rank] == (True, float(sum(range(1, size))), size - 1.0, mine)


@pytest.mark.parametrize("color", [-1, 1.5, None, 2**31])
def test_a_color_is_a_number(spmd, color):
    def body(comm):
        return refusal(ValueError, comm.split, color if comm.rank == comm.size - 1 else 0)

    results = spmd(body)
    rank = len(results) - 1
    assert results == [f"color={color!r} on rank {rank} is not an integer from 0 on; use 0"] * len(results)


def test_ranks_that_agree(spmd):
    assert spmd(lambda comm: comm.same({"num_layers": 64, "T": (5.0, "x")}, "options"))[0] is None


@pytest.mark.ranks(2, 3, 5)
def test_ranks_that_do_not_agree(spmd):
    def body(comm):
        found = []
        for value in (comm.rank, 64 if comm.rank != 1 else 32):
            try:
                comm.same(value, "num_layers")
            except ValueError as error:
                found.append(str(error))
        return found

    results = spmd(body)
    size = len(results)
    every = " but ".join(f"{rank} on rank {rank}" for rank in range(size))
    others = {2: "rank 0", 3: "ranks 0, 2"}.get(size, f"ranks 0, 2-{size - 1}")
    expected = [
        f"num_layers={found}: every rank must pass the same" for found in (every, f"64 on {others} but 32 on rank 1")
    ]
    assert results == [expected] * size


def test_a_failing_thread_ends_the_threads_of_other_groups():
    def body(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank == 3:
            raise ZeroDivisionError("rank 3")
        group.recv(torch.empty(1), 1 - group.rank)  # never sent

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 3"):
        run_threads(4, body)
    assert threading.active_count() == before


def test_abort_of_a_group_ends_all_threads():
    def body(comm):
        group = comm.split(int(comm.rank == 2))
        if comm.rank == 2:
            group.abort(3)
        group.recv(torch.empty(1), 1 - group.rank)

    with pytest.raises(SystemExit) as raised:
        run_threads(3, body)
    assert raised.value.code == 3


JOB = """
import torch
from xbraid_py.comm import world
comm = world()
group = comm.split(0 if comm.rank < ALONE else 1)
if comm.rank == comm.size - 1:
    group.abort(7)
comm.recv(torch.empty(1), comm.size - 1)
"""


@pytest.mark.parametrize("alone", [1, 2], ids=["group of two", "group of one"])
def test_abort_of_a_group_ends_the_job(run_job, alone):
    assert run_job(["-c", JOB.replace("ALONE", str(alone))], ranks=3).returncode == 7


@pytest.mark.ranks(2, 3, 5)
def test_all_that_differs_is_named_with_the_values(spmd):
    def body(comm):
        other = comm.rank == 1
        agree_on_all(comm, {"T": 5.0, "mgrit.cfactor": (4, 2)}, "options")
        named = {"num_layers": 32 if other else 64, "T": 5.0} | ({} if other else {"width": 8})
        with pytest.raises(ValueError) as caught:
            agree_on_all(comm, named, "options")
        return str(caught.value)

    results = spmd(body)
    others = {2: "rank 0", 3: "ranks 0, 2"}.get(len(results), f"ranks 0, 2-{len(results) - 1}")
    assert set(results) == {
        f"options: num_layers=64 on {others} but 32 on rank 1; width=8 on {others} but nothing on rank 1; "
        "every rank must have the same"
    }


@pytest.mark.ranks(2, 3)
def test_data_that_differ_are_named(spmd):
    def body(comm, shift):
        hold(comm, "images", torch.arange(6.0).view(3, 2), torch.arange(3))
        hold(comm, "text", torch.arange(4) + shift * (comm.rank == 1))
        try:
            same_data(comm)
        except ValueError as error:
            return str(error)

    assert set(spmd(lambda comm: body(comm, 0))) == {None}
    (found,) = set(spmd(lambda comm: body(comm, 1)))
    assert found.startswith("data: text='4 by digest ") and "images" not in found


@pytest.mark.ranks(2, 3)
def test_versions_that_differ_are_named(spmd):
    def body(comm, **other):
        comm.is_alike = False
        try:
            same_installation(comm, **(other if comm.rank == 1 else dict.fromkeys(other, "native")))
        except ValueError as error:
            return str(error)
        return comm.is_alike

    assert set(spmd(body)) == {True}
    (found,) = set(spmd(lambda comm: body(comm, kernels="torch")))
    assert found.startswith("versions: kernels='native' on ") and "'torch' on rank 1" in found


def test_the_digests_are_those_of_all_files_of_the_package():
    found = code()
    assert {"xbraid_py/__init__.py", "xbraid_py/comm/agreement.py"} <= found.keys()
    assert not any("site-packages" in name for name in found)
