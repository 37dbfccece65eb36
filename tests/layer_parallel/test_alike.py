"""Ranks that go apart say so: other batches, other heads, gradients that are clipped on each rank by itself.

Shape letters: `B` batch, `C` width.
"""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, B, C
from blocks import reduced as message_of
from torch import nn

from xbraid_py import (
    MGRIT,
    LayerParallel,
    ParallelGRU,
    PipelineParallel,
    Splines,
    check_replicas,
    clip_grad_norm_,
)
from xbraid_py.layer_parallel.alike import Watch, compare
from xbraid_py.layers.module_block import own_random_numbers

UPDATES = 20


def linear(seed: int) -> nn.Linear:
    with own_random_numbers(seed):
        return nn.Linear(C, C).double()


def stack_of(comm, kind: str) -> nn.Module:
    if kind == "pipeline":
        return PipelineParallel([lambda: CASES["mlp"].block() for _ in range(6)], comm, portions=2)
    options = {"exact": {"mgrit": MGRIT(max_levels=1)}, "windows": {"windows": 2}, "ends": {"serial_ends": (1, 1)}}
    return CASES["mlp"].stack(comm, 14 if kind == "ends" else 12, **options.get(kind, {}))


def train(comm, kind: str, habit: str) -> None:
    """A program, with something that is done wrong in it."""
    wrong = comm.rank == 1
    model = nn.Sequential(linear(3), stack_of(comm, kind), linear(4 + (wrong and habit == "head")))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(5 + (wrong and habit == "batch"))
    for _ in range(UPDATES):
        u = torch.randn(B, C, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(u).square().sum().backward()
        if habit == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        else:
            clip_grad_norm_(model, 0.5)
        optimizer.step()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("kind", ["V", "exact", "windows", "ends", "pipeline"])
@pytest.mark.parametrize(
    ("habit", "what"), [("batch", "the input"), ("head", "the gradient of the output"), ("clipping", "the ")]
)
def test_what_makes_ranks_go_apart_is_named(spmd, kind, habit, what):
    messages = spmd(lambda comm: message_of(comm, lambda: train(comm, kind, habit)))
    assert len(set(messages)) == 1, "all ranks end alike"
    assert messages[0].startswith(f"ValueError: {what}") and " is not that of rank 0" in messages[0]
    assert "xbraid_py.clip_grad_norm_" in messages[0]


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["V", "pipeline"])
def test_what_is_done_right_goes_on(spmd, kind):
    assert spmd(lambda comm: message_of(comm, lambda: train(comm, kind, "nothing")))[0] is None


@pytest.mark.ranks(2)
def test_integers_masks_and_further_inputs_are_looked_at(spmd):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, u, mask):
            return self.linear(u) * mask[:, None]

    def body(comm):
        stack = LayerParallel(Masked, 8, 1.0, comm)
        mask = torch.ones(B, dtype=torch.int64)
        mask[2] = comm.rank
        return message_of(comm, lambda: stack(torch.ones(B, C), mask))

    for message in spmd(body):
        assert "the input, tensor 1 of rank " in message and "is not that of rank 0" in message


@pytest.mark.ranks(2)
def test_it_is_looked_at_in_the_first_calls_and_then_now_and_then(spmd, monkeypatch):
    def body(comm):
        watch = Watch(comm)
        return [number for number in range(1, 301) if watch.next_is_due()]

    assert spmd(body)[0] == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300]
    monkeypatch.setenv("XBRAID_CHECK_INPUTS", "0")
    assert spmd(body)[0] == []


@pytest.mark.ranks(2, 3)
def test_rounding_is_no_difference(spmd):
    def body(comm):
        tensors = {}
        for dtype, off in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            u = torch.linspace(-1, 1, 1000, dtype=torch.float64)
            tensors[str(dtype)] = (u * (1.0 + off * comm.rank)).to(dtype)
        tensors |= {"nan": torch.full((3,), torch.nan), "none": torch.empty(0, 3), "complex": torch.ones(2) * 1j}
        return message_of(comm, lambda: compare(comm, tensors))

    assert spmd(body)[0] is None


@pytest.mark.ranks(2, 3)
def test_check_replicas_finds_weights_that_differ_around_stacks(spmd):
    def body(comm):
        model = nn.ModuleDict(
            {
                "opening": linear(1),
                "stack": CASES["mlp"].stack(comm, 9),
                "splines": CASES["mlp"].stack(comm, 9, splines=Splines(4)),
                "parts": PipelineParallel([lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2)], comm),
                "gru": ParallelGRU(3, 2, comm=comm),
                "norm": nn.BatchNorm1d(4),
            }
        )
        # Layers differ from rank to rank, as they should.
        check_replicas(model)
        found = []
        for name, tensor in (
            ("norm.running_mean", model["norm"].running_mean),
            ("opening.bias", model["opening"].bias.detach()),
            ("gru.weight_ih_l0", model["gru"].weight_ih_l0.detach()),
            ("splines.layers.net.1.bias", dict(model["splines"].named_parameters())["layers.net.1.bias"].detach()),
        ):
            kept = tensor.clone()
            tensor.add_(1e-3 * (comm.rank == 1))
            found.append((name, message_of(comm, lambda: check_replicas(model))))
            tensor.copy_(kept)
        check_replicas(model)
        return found

    for found in spmd(body):
        for name, message in found:
            assert f"{name} of rank 1 is not that of rank 0" in message
