"""Recurrent networks that are used wrongly: one message on every rank, at once, and never a hang."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sequence_cases import B, D, F, H, L, drawn, made

from xbraid_py import MGRIT, ParallelGRU


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be a whole number, at least 1"),
        ({"num_layers": 1.5}, "num_layers=1.5 must be a whole number"),
        ({"windows": 0}, "windows=0 must be a whole number, at least 1"),
        ({"kind": "lstm"}, "kind='lstm' must be plain or implicit; use plain"),
        ({"coarse": "midpoint"}, "coarse='midpoint' must be compose or euler; use compose"),
        ({"output": "none"}, "output='none' must be all or last or own; use all"),
        ({"dt": 0.0}, "dt=0.0 must be positive and finite; use 1.0"),
        ({"mgrit": MGRIT(coarse_step="midpoint")}, "coarse_step='midpoint' of mgrit"),
    ],
)
def test_bad_arguments_are_refused_on_all_ranks(spmd, options, message):
    def body(comm):
        with pytest.raises(ValueError) as caught:
            ParallelGRU(**{"input_size": F, "hidden_size": H, "comm": comm, **options})
        return str(caught.value)

    assert all(message in found for found in spmd(body))


@pytest.mark.parametrize(
    ("x", "h_0", "message"),
    [
        (np.zeros((L, B, F)), None, "x=ndarray must be a tensor (L, B, F)"),
        ([torch.zeros(L, F)], None, "x=list must be a tensor (L, B, F) or (L, F), or a PackedSequence; use torch.nn."),
        (torch.zeros(L).double(), None, "x has shape (29,)"),
        (torch.zeros(L, F + 1).double(), None, "x has shape (29, 5)"),
        (torch.zeros(L, B, F + 1).double(), None, "it must be (L, B, F), or (L, F), with F=input_size=4"),
        (torch.zeros(0, B, F).double(), None, "and not empty"),
        (torch.zeros(L, B, F), None, "x is torch.float32 on cpu, the weights are torch.float64 on cpu; use x.to(...)"),
        (torch.zeros(L, B, F).double(), torch.zeros(1, B, H).double(), "h_0=(1, 3, 5) must be a tensor"),
        (torch.zeros(L, B, F).double(), torch.zeros(D, B, H), "h_0 is torch.float32"),
        (torch.zeros(L, B, F).double(), 0.0, "h_0=float must be a tensor"),
    ],
)
def test_bad_inputs_are_refused_on_all_ranks(spmd, x, h_0, message):
    def body(comm):
        with pytest.raises(ValueError) as caught:
            made(comm)(x, h_0)
        return str(caught.value)

    assert all(message in found for found in spmd(body))


@pytest.mark.ranks(2, 3)
def test_ranks_that_differ_are_told(spmd):
    def body(comm):
        last = comm.rank == comm.size - 1
        found = []
        for act in (
            lambda: made(comm, seed=int(last)),
            lambda: made(comm)(torch.zeros(L + last, B, F).double()),
            lambda: made(comm).train(not last)(torch.zeros(L, B, F).double()),
        ):
            with pytest.raises(ValueError) as caught:
                act()
            found.append(str(caught.value))
        return found

    for arguments, shape, mode in spmd(body):
        assert arguments.startswith("arguments: seed=0 on ")
        assert "shape and mode of the input=" in shape and "shape and mode of the input=" in mode


def test_derivatives_of_derivatives_are_refused():
    model = made()
    output, _ = model(drawn(L, B, F))
    with pytest.raises(RuntimeError, match="create_graph=True: a ParallelGRU has no second derivatives"):
        torch.autograd.grad(output.sum(), tuple(model.parameters()), create_graph=True)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_second_backward_needs_the_graph(windows):
    model = made(windows=windows)
    loss = model(drawn(L, B, F))[0].square().sum()
    weights = tuple(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


def test_weights_that_have_changed_since_are_noticed():
    model = made(windows=2)
    loss = model(drawn(L, B, F))[0].sum()
    with torch.no_grad():
        model.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
