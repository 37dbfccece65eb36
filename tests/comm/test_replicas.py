"""Replicas: shares of a batch, averages of gradients, and what one rank has read, handed to all."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from unittest import mock

import pytest
import torch
from refusal import refusal

from xbraid_py.comm import replicas as grid
from xbraid_py.comm.replicas import ProcessGrid, broadcast_batch
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.testing import run_threads

Batch = namedtuple("Batch", "images labels")


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


@pytest.mark.ranks(1, 2, 3, 4, 6)
def test_ranks_of_a_replica_are_neighbors(spmd):
    def body(comm):
        found = []
        for replicas in divisors(comm.size):
            made = ProcessGrid(comm, replicas)
            layers = made.layers.bcast(made.layers.gather(comm.rank))
            data = made.data.bcast(made.data.gather(comm.rank))
            found.append((replicas, made.replicas, made.replica, layers, data, made.layers.rank, made.data.rank))
        return found

    results = spmd(body)
    size = len(results)
    for rank, found in enumerate(results):
        for asked, replicas, replica, layers, data, layer_rank, data_rank in found:
            per_replica = size // replicas
            assert replicas == asked and replica == rank // per_replica == data_rank
            assert layers == list(range(replica * per_replica, (replica + 1) * per_replica))
            assert data == list(range(rank % per_replica, size, per_replica)) and layers[layer_rank] == rank


@pytest.mark.parametrize("replicas", [0, -1, 1000, 1.0, "2"])
def test_replicas_divide_the_ranks(spmd, replicas):
    results = spmd(lambda comm: refusal(ValueError, lambda: ProcessGrid(comm, replicas)))
    size = len(results)
    fits = {1: "1", 4: "1, 2 or 4"}.get(size, f"1 or {size}")
    assert results == [f"replicas={replicas!r} does not divide the {size} rank(s); use {fits}"] * size


def test_the_numbers_that_work_are_named():
    assert grid.divisors(12) == "1, 2, 3, 4, 6 or 12" and grid.divisors(1) == "1" and grid.divisors(9) == "1, 3 or 9"


@pytest.mark.ranks(2, 3)
def test_ranks_with_other_replicas_are_met(spmd):
    results = spmd(lambda comm: refusal(ValueError, lambda: ProcessGrid(comm, 1 + (comm.rank == 1))))
    assert len(set(results)) == 1
    assert results[0].startswith("replicas=1 on rank") and "2 on rank 1: every rank must pass the same" in results[0]


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("samples", [5, 7, 12])
def test_shares_join_to_the_batch(spmd, samples):
    images, labels = torch.arange(samples * 6.0).reshape(samples, 2, 3), torch.arange(samples)

    def body(comm):
        found = []
        for replicas in divisors(comm.size):
            made = ProcessGrid(comm, replicas)
            part = made.shard({"x": (images, [labels]), "mask": None, "pair": Batch(images, labels)})
            assert part["mask"] is None and part["pair"].images.equal(part["x"][0])
            found.append((replicas, made.replica, part["x"][0], part["x"][1][0]))
        return found

    results = spmd(body)
    for case in zip(*results, strict=True):
        shares = {replica: (x, y) for _, replica, x, y in case}
        assert sorted(shares) == list(range(case[0][0]))
        assert torch.cat([shares[r][0] for r in sorted(shares)]).equal(images)
        assert torch.cat([shares[r][1] for r in sorted(shares)]).equal(labels)
        lengths = [len(shares[r][1]) for r in sorted(shares)]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@pytest.mark.ranks(2, 3)
def test_batches_that_cannot_be_shared_out(spmd):
    def body(comm):
        made = ProcessGrid(comm, comm.size)
        return [
            refusal(ValueError, lambda: made.shard([torch.zeros(comm.size - 1, 3)])),
            refusal(ValueError, lambda: made.shard((torch.zeros(8), torch.zeros(9)))),
            refusal(ValueError, lambda: made.shard(torch.tensor(1.0))),
            refusal(TypeError, lambda: made.shard({"names": "abc"})),
        ]

    results = spmd(body)
    size = len(results)
    for small, uneven, single, other in results:
        assert small.startswith(f"batch of {size - 1} sample(s) is too small for replicas={size}; use at least {size}")
        assert uneven.startswith("batch holds tensors of [8, 9] samples")
        assert single.startswith("batch holds a tensor of shape ()")
        assert other.startswith("batch holds a str; use tensors")


def network(dtype=torch.float64) -> torch.nn.Sequential:
    with own_random_numbers(3):  # ranks that are threads share one generator
        layers = [torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def gradients(module, inputs, targets) -> list[torch.Tensor]:
    module.zero_grad()
    torch.nn.functional.cross_entropy(module(inputs), targets).backward()
    return [p.grad for p in module.parameters()]


def batch_of(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (samples,), generator=generator)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("message_bytes", [grid.MESSAGE_BYTES, 80], ids=["one message", "many"])
def test_averages_are_the_gradients_of_the_joined_batch(spmd, message_bytes):
    # 13 samples: the replicas have shares of different lengths.
    def body(comm):
        found = []
        for replicas in divisors(comm.size):
            made, module = ProcessGrid(comm, replicas), network()
            inputs, targets = made.shard(batch_of(13))
            gradients(module, inputs, targets)
            made.average_gradients(module, samples=len(targets))
            found.append([p.grad for p in module.parameters()])
        return found

    with mock.patch.object(grid, "MESSAGE_BYTES", message_bytes):
        results = spmd(body)
    serial = gradients(network(), *batch_of(13))
    for found in results:
        for averaged in found:
            assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(averaged, serial, strict=True))
    for case in zip(*results, strict=True):  # the same bits in all replicas
        assert all(a.equal(b) for other in case for a, b in zip(case[0], other, strict=True))


@pytest.mark.ranks(2, 3)
def test_messages_hold_so_many_bytes(spmd):
    def body(comm):
        made, sizes = ProcessGrid(comm, comm.size), []
        parameters = [torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (3, 0, 25, 2, 4, 10)]
        for parameter in parameters:
            parameter.grad = torch.arange(len(parameter), dtype=torch.float64) + comm.rank
        ordered_sum = made.data.ordered_sum

        def watched(rows, counts):
            sizes.append(rows.numel())
            return ordered_sum(rows, counts)

        with mock.patch.object(made.data, "ordered_sum", watched):
            made.average_gradients(parameters)
        return sizes, [p.grad.tolist() for p in parameters]

    with mock.patch.object(grid, "MESSAGE_BYTES", 80):
        results = spmd(body)
    shift = (len(results) - 1) / 2
    for sizes, found in results:
        # Ten numbers a message: 3 | 10 and 10 of the 25 | its last 5, with 2 | 4 | 10.
        assert sizes == [3, 10, 10, 5 + 2, 4, 10]
        assert all(torch.allclose(torch.tensor(g), torch.arange(len(g)) + shift) for g in found)


@pytest.mark.ranks(3, 4, 5)
@pytest.mark.parametrize("length", [2, 5, 1000])
def test_long_gradients_are_summed_in_shares(spmd, length):
    """Bit by bit what every replica would sum by itself; also where some have no share."""

    def body(comm):
        parameter = torch.nn.Parameter(torch.zeros(length, dtype=torch.float64))
        parameter.grad = torch.randn(length, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
        ProcessGrid(comm, comm.size).average_gradients([parameter])
        return parameter.grad

    def with_shares_from(start):
        # The name of the module is one for all threads that stand for ranks.
        with mock.patch.object(grid, "SHARED_FROM", start):
            return spmd(body)

    for shared, whole in zip(with_shares_from(0), with_shares_from(10**9), strict=True):
        assert torch.equal(shared, whole)


@pytest.mark.ranks(1, 2, 3)
def test_types_and_layouts_are_kept(spmd):
    def body(comm):
        made = ProcessGrid(comm, comm.size)
        parameters = [
            torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype))
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
        ]
        parameters += [torch.nn.Parameter(torch.zeros(4, 2).T), torch.nn.Parameter(torch.zeros(2), requires_grad=False)]
        for parameter in parameters[:-1]:
            parameter.grad = torch.empty_like(parameter)  # with the parameter's strides
            parameter.grad.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + 2 * comm.rank)
        kept = [parameter.grad for parameter in parameters]
        made.average_gradients(iter(parameters))
        return [
            (p.grad is k and p.grad.dtype == p.dtype and p.grad.stride() == p.stride(), p.grad.double())
            for p, k in zip(parameters[:-1], kept, strict=False)
        ], parameters[-1].grad

    for found, none in (results := spmd(body)):
        assert none is None
        for same, gradient in found:
            assert same
            expected = torch.arange(gradient.numel(), dtype=torch.float64).reshape(gradient.shape) + len(results) - 1
            assert torch.allclose(gradient, expected, rtol=1e-2)  # a fifth is no sum of halves


@pytest.mark.ranks(1, 2, 3)
def test_missing_gradients_count_as_zero(spmd):
    # The first parameter has a gradient on the last replica only, the second on all, the third on none.
    def body(comm):
        made = ProcessGrid(comm, comm.size)
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        if comm.rank == comm.size - 1:
            parameters[0].grad = torch.full((2,), 6.0)
        parameters[1].grad = torch.full((2,), 1.0 + comm.rank)
        made.average_gradients(parameters)
        return [None if p.grad is None else p.grad.tolist() for p in parameters]

    results = spmd(body)
    size = len(results)
    for first, second, none in results:
        assert first == pytest.approx([6.0 / size] * 2, rel=1e-6) and none is None
        assert second == pytest.approx([(size + 1) / 2] * 2, rel=1e-6)


@pytest.mark.ranks(2, 3)
def test_replicas_that_do_not_fit_together(spmd):
    def body(comm):
        made = ProcessGrid(comm, comm.size)
        odd = comm.rank == 1
        weight = torch.nn.Parameter(torch.zeros(3 + odd))
        weight.grad = torch.ones(3 + odd)
        fitting = torch.nn.Parameter(torch.zeros(3))
        fitting.grad = torch.ones(3)
        module = torch.nn.Linear(2, 2 + odd)
        return [
            refusal(ValueError, lambda: made.average_gradients([weight])),
            *(
                refusal(ValueError, lambda samples=samples: made.average_gradients([fitting], samples))
                for samples in (None if odd else 4, -1 if odd else 4, 2.5, 0)
            ),
            refusal(ValueError, lambda: made.broadcast_parameters(module)),
            fitting.grad.tolist(),
        ]

    results = spmd(body)
    for rank, (shapes, mixed, negative, broken, zero, modules, kept) in enumerate(results):
        assert shapes == f"parameters differ between the replicas, this is replica {rank}; build them alike"
        assert mixed.startswith(f"samples={None if rank == 1 else 4} on replica {rank}: every replica must pass")
        assert negative.startswith(f"samples={-1 if rank == 1 else 4} on replica {rank}")
        assert broken.startswith("samples=2.5 on") and zero.startswith("samples=0 on")
        assert modules.startswith("parameters=[('weight', (2, 2)") and "but [('weight', (3, 2)" in modules
        assert kept == [1.0] * 3


@pytest.mark.ranks(1, 2, 3, 4)
def test_all_replicas_start_alike(spmd):
    def body(comm):
        found = []
        for replicas in divisors(comm.size):
            made = ProcessGrid(comm, replicas)
            with own_random_numbers(comm.rank):
                module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
            module[1].num_batches_tracked += comm.rank
            made.broadcast_parameters(module)
            found.append((made.layers.rank, {name: value.clone() for name, value in module.state_dict().items()}))
        return found

    for rank, found in enumerate(results := spmd(body)):
        for case, (first, state) in enumerate(found):
            # The owner of the same stretch of layers in the first replica is the rank of that number.
            assert all(state[name].equal(value) for name, value in results[first][case][1].items()), rank
            assert state["1.num_batches_tracked"] == first


def test_what_one_rank_knows_is_known_to_all(spmd):
    def value():
        return {
            "batch": Batch(torch.arange(6.0).reshape(2, 3).T, torch.tensor([1, 2])),
            "more": [torch.tensor(True), (), torch.zeros(0, 4, dtype=torch.bfloat16), None],
            "words": defaultdict(list, {"a": ["text", 2.5, torch.float64]}),
            "order": OrderedDict(b=torch.ones(1, requires_grad=True), a=torch.Size([3])),
        }

    def body(comm):
        root = comm.size - 1
        return broadcast_batch(value() if comm.rank == root else None, comm, root)

    expected = value()
    for found in spmd(body):
        assert list(found) == list(expected) and type(found["batch"]) is Batch
        assert found["batch"].images.is_contiguous() and found["batch"].images.equal(expected["batch"].images)
        assert found["batch"].labels.equal(expected["batch"].labels)
        assert found["more"][0].item() is True and found["more"][1] == () and found["more"][3] is None
        assert found["more"][2].shape == (0, 4) and found["more"][2].dtype == torch.bfloat16
        assert found["words"] == expected["words"] and found["words"]["new"] == []
        assert list(found["order"]) == ["b", "a"] and isinstance(found["order"]["a"], torch.Size)
        assert found["order"]["b"].tolist() == [1.0] and not found["order"]["b"].requires_grad


def test_a_tensor_alone_and_a_word_alone(spmd):
    def body(comm):
        known = comm.rank == 0
        return broadcast_batch(torch.ones(3) if known else None, comm), broadcast_batch("stop" if known else None, comm)

    assert all(tensor.equal(torch.ones(3)) and word == "stop" for tensor, word in spmd(body))


def test_what_cannot_be_sent_is_an_error_on_all_ranks(spmd):
    def body(comm):
        values = ({"f": lambda: 0}, [torch.ones(2).to_sparse()], (torch.ones(2), (i for i in ())))
        return [refusal(TypeError, lambda value=value: broadcast_batch(value, comm)) for value in values]

    results = spmd(body)
    assert all(found == results[0] for found in results)
    assert all(text.startswith("value on rank 0 cannot be sent: ") for text in results[0])


def test_ranks_do_not_share_memory():
    def body(comm):
        got = broadcast_batch([torch.zeros(2), {"n": 0}] if comm.rank == 0 else None, comm)
        comm.barrier()
        got[0] += comm.rank
        got[1]["n"] = comm.rank
        comm.barrier()
        return got[0].tolist(), got[1]["n"]

    assert run_threads(3, body) == [([float(rank)] * 2, rank) for rank in range(3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_batch_on_the_gpu(spmd):
    def body(comm):
        value = {"x": torch.arange(4.0)} if comm.rank == 0 else None
        there = broadcast_batch(value, comm, device="cuda")["x"]
        back = broadcast_batch({"x": there}, comm)["x"]
        parameter = torch.nn.Parameter(torch.zeros(4, device="cuda"))
        parameter.grad = there + comm.rank
        ProcessGrid(comm, comm.size).average_gradients([parameter])
        return there.device.type, back.device.type, back.tolist(), parameter.grad.tolist()

    results = spmd(body)
    mean = [number + (len(results) - 1) / 2 for number in range(4)]
    assert results == [("cuda", "cpu", [0.0, 1.0, 2.0, 3.0], mean)] * len(results)


@pytest.mark.ranks(1, 2, 4, 6)
def test_replicas_of_a_stage_may_be_neighbors(spmd):
    def body(comm):
        made = ProcessGrid(comm, 1 if comm.size % 2 else 2, "replicas")
        return made.replica, made.layers.rank, made.data.rank, made.layers.size, made.data.size

    results = spmd(body)
    replicas = 1 if len(results) % 2 else 2
    for rank, found in enumerate(results):
        stage, replica = divmod(rank, replicas)
        assert found == (replica, stage, replica, len(results) // replicas, replicas)
