"""What one rank has read is handed to all."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest
import torch
from test_process_grid import Batch, caught

from xbraid_py.comm.replicas import ProcessGrid, broadcast_batch
from xbraid_py.testing import run_threads


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
        return [caught(TypeError, lambda value=value: broadcast_batch(value, comm)) for value in values]

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
