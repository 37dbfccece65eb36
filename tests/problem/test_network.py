"""The whole network over a communicator: predictions, dot products, and how a problem is put together."""

from __future__ import annotations

import re

import pytest
import torch
from refusal import refusal
from small_problem import ALL_RANKS, CLASSES, CONVERGED, N, T, data, exact, problem, weights

from xbraid_py.comm import SerialCommunicator
from xbraid_py.kernels import activation
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.problem import network
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.options import ACTIVATIONS, DenseResNetOptions


@ALL_RANKS
@pytest.mark.parametrize("batch", [1, 20, 21, 57])
def test_predicted_classes_are_those_of_the_serial_network(spmd, monkeypatch, batch):
    """In portions of 20 samples; for fewer samples than that, exactly that many, and more."""
    monkeypatch.setattr(network, "PREDICT_CHUNK", 20)
    net = problem(SerialCommunicator()).network(N)
    x = weights(net)
    features, _ = data(batch)
    classes = exact("none", "tanh", batch=batch)[3]
    assert batch < 20 or len(set(classes.tolist())) == CLASSES

    def body(comm):
        own = problem(comm).network(N)
        return own.predict(weights(own), features)

    assert torch.equal(net.predict(x, features), classes)
    for found in spmd(body):
        assert found.dtype == torch.int64 and torch.equal(found, classes)


def test_predict_in_portions_of_the_usual_size(spmd):
    """More samples than one portion, and the bits of the logits do not depend on the ranks."""
    features, _ = data(network.PREDICT_CHUNK + 7)
    net = problem(SerialCommunicator()).network(N)
    expected = net.predict(weights(net), features)

    def body(comm):
        own = problem(comm).network(N)
        return own.predict(weights(own), features)

    assert len(expected) == features.shape[1] and len(set(expected.tolist())) == CLASSES
    assert all(torch.equal(found, expected) for found in spmd(body))


@pytest.mark.parametrize("options", [CONVERGED, MGRIT(max_levels=1)], ids=["intervals", "layers"])
def test_dots_are_sums_over_all_weights(spmd, options):
    def body(comm):
        objective = problem(comm, forward=options).objective(N)
        a, b, c = (weights(objective.network, scale) for scale in (0.5, 1.0, 2.0))
        return objective.dots([a, b], [a, b, c]), objective.dots([c, b], [a]), torch.stack([a, b, c])

    parts = spmd(body)
    whole = torch.cat([part[2] for part in parts], 1)
    for dots, other, _ in parts:
        assert torch.allclose(dots, whole[:2] @ whole.T, rtol=1e-13, atol=1e-13)
        assert torch.equal(dots[0, 1], dots[1, 0]) and torch.equal(dots[0, 2], other[0, 0])
        assert torch.equal(dots, parts[0][0]), "the same on all ranks"


def test_solvers_and_network_share_one_partition():
    made = problem(SerialCommunicator())
    other = Hierarchy.plan(CONVERGED, LayerGrid(2 * N, T), 1)
    good = Solver(CONVERGED, Hierarchy.plan(CONVERGED, LayerGrid(N, T), 1), made.comm)
    for solvers in ((good, Solver(CONVERGED, other, made.comm)), (Solver(CONVERGED, other, made.comm), good)):
        with pytest.raises(ValueError, match="must share one partition of the layers"):
            NetworkObjective(made.network(N), made.features, made.labels, made.regularization, *solvers)


@pytest.mark.ranks(3, 5)
def test_different_factors_of_states_and_adjoints(spmd):
    def body(comm):
        made = problem(comm, adjoint=MGRIT(cfactor=8, max_levels=2, min_coarse=1))
        return refusal(ValueError, made.objective, N)

    for message in spmd(body):
        assert message.startswith("adjoint.cfactor=8 must begin with the same coarsening factor as mgrit.cfactor=4")


def test_the_activations_are_those_of_the_kernels():
    assert ACTIVATIONS == tuple(activation.ACTIVATIONS)


def test_bad_architecture_names_what_works():
    for options, message in (
        ({"width": 0}, "width=0 must be at least 1; use 8"),
        ({"T": -1.0}, "T=-1.0 must be positive"),
        ({"activation": "elu"}, "activation='elu' must be one of"),
        ({"bias": "none"}, "bias='none' must be vector or scalar"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            DenseResNetOptions(**options)
