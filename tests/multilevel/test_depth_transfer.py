"""Transfers in depth: literal matrices, adjointness, consistency of the restrictions, and the linear opening."""

import pytest
import torch
from mgopt_runs import EXACT, problem
from small_runs import gathered

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.dense import LinearMap
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import INTERPOLATIONS, RESTRICTIONS
from xbraid_py.multilevel.depth.transfer import DepthTransfer
from xbraid_py.problem.options import InitialScales

SCALES = InitialScales(1.0, 1.0, 1.0)
INTERVALS = MGRIT(cfactor=4, max_levels=2, min_coarse=1)  # layers change hands between the levels


def interpolation_matrix(N: int, interpolation: str) -> torch.Tensor:
    """I (2N, N), entry by entry."""
    matrix = torch.zeros(2 * N, N, dtype=torch.float64)
    for k in range(N):
        matrix[2 * k, k] = 1
        shares = {k: 1.0} if interpolation == "constant" or k == N - 1 else {k: 0.5, k + 1: 0.5}
        for column, share in shares.items():
            matrix[2 * k + 1, column] = share
    return matrix


def restriction_matrix(N: int, interpolation: str, restriction: str) -> torch.Tensor:
    """What restricts weights, (N, 2N)."""
    if restriction == "transpose":
        return interpolation_matrix(N, interpolation).T
    matrix = torch.zeros(N, 2 * N, dtype=torch.float64)
    for k in range(N):
        matrix[k, 2 * k : 2 * k + 2] = torch.tensor([1.0, 0.0] if restriction == "inject" else [0.5, 0.5])
    return matrix


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("N, mgrit", [(1, EXACT), (7, EXACT), (8, INTERVALS), (12, INTERVALS)])
def test_transfers_are_their_matrices(spmd, N, mgrit, interpolation):
    def body(comm):
        coarse, fine = (problem(comm, mgrit).network(layers) for layers in (N, 2 * N))
        x = fine.initial(SCALES, seed=3)
        kept = x.clone()
        found = {}
        for restriction in RESTRICTIONS:
            transfer = DepthTransfer(coarse, fine, interpolation, restriction)
            found[restriction] = gathered(coarse, transfer.restrict(x))
        found["gradient"] = gathered(coarse, transfer.restrict_gradient(x))
        y = coarse.initial(SCALES, seed=4)
        found["prolonged"] = gathered(fine, transfer.prolong(y))
        moved = coarse.partition.refine(2) != fine.partition
        return torch.equal(x, kept), moved, gathered(fine, x), gathered(coarse, y), found

    results = spmd(body)
    for intact, moved, fine, coarse, found in results:
        assert intact
        assert moved or (len(results), N) not in ((2, 7), (3, 7), (3, 8))  # what the test is about
        matrix = interpolation_matrix(N, interpolation)
        expected = {name: restriction_matrix(N, interpolation, name) for name in RESTRICTIONS}
        expected["gradient"] = matrix.T
        for name, transposed in expected.items():
            torch.testing.assert_close(found[name]["layers"], transposed @ fine["layers"], rtol=1e-14, atol=1e-15)
            for end in ("opening", "classification"):
                assert torch.equal(found[name][end], fine[end])
        assert torch.equal(found["prolonged"]["layers"], matrix @ coarse["layers"])  # paper 001, eq. 8
        for end in ("opening", "classification"):
            assert torch.equal(found["prolonged"][end], coarse[end])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradients_are_restricted_by_the_adjoint_of_the_prolongation(interpolation):
    coarse, fine = (problem().network(layers) for layers in (9, 18))
    transfer = DepthTransfer(coarse, fine, interpolation)
    g, e = fine.initial(SCALES, seed=1), coarse.initial(SCALES, seed=2)
    assert float(g @ transfer.prolong(e)) == pytest.approx(float(transfer.restrict_gradient(g) @ e), rel=1e-13)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("restriction, factor", [("inject", 1), ("average", 1), ("transpose", 2)])
def test_which_restrictions_keep_the_equation(interpolation, restriction, factor):
    """Weights that do not depend on t: the coarse network has to have the same, and so nearly the same output."""
    coarse, fine = (problem(tikhonov=0.0).objective(layers) for layers in (64, 128))
    x = fine.network.layout.zeros()
    torch.manual_seed(0)
    for rows in fine.network.layout.rows(x).values():
        rows.copy_(torch.randn(rows.shape[1], dtype=torch.float64))
    restricted = DepthTransfer(coarse.network, fine.network, interpolation, restriction).restrict(x)
    inside = coarse.network.layout.rows(restricted)["layers"][1:-1]  # at the ends the linear I^T has other sums
    assert torch.equal(inside, factor * fine.network.layout.rows(x)["layers"][1:63])
    distance = abs(coarse.evaluate(restricted).loss - fine.evaluate(x).loss)
    assert (distance < 0.01) == (factor == 1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_coarse_gradients_tend_to_restricted_ones(interpolation):
    """The gradient of the coarse network is R times that of the fine one but for O(h), for weights smooth in t."""

    def error(layers):
        coarse, fine = (problem(tikhonov=0.0).objective(n) for n in (layers, 2 * layers))
        x = fine.network.initial(SCALES, seed=1)
        rows = fine.network.layout.rows(x)["layers"]
        t = torch.arange(2 * layers, dtype=torch.float64)[:, None] / (2 * layers)
        rows.copy_(torch.sin(t * torch.arange(1, 13) + torch.arange(12)))
        transfer = DepthTransfer(coarse.network, fine.network, interpolation)
        y = transfer.restrict(x)
        fine.evaluate(x)
        restricted = transfer.restrict_gradient(fine.gradient(x))
        coarse.evaluate(y)
        own = coarse.gradient(y)
        return float((own - restricted).norm() / own.norm())

    errors = [error(layers) for layers in (16, 32, 64)]
    assert errors[0] < 0.2
    for a, b in zip(errors, errors[1:], strict=False):
        assert a / b > 1.7


def test_what_is_no_transfer_is_refused():
    coarse, fine, other = (problem().network(layers) for layers in (8, 16, 24))
    with pytest.raises(ValueError, match="^fine num_layers=24 must be 16, twice the coarse$"):
        DepthTransfer(coarse, other)
    with pytest.raises(ValueError, match="^interpolation='cubic' must be constant or linear; use constant$"):
        DepthTransfer(coarse, fine, "cubic")
    with pytest.raises(ValueError, match="^restriction='sum' must be inject or average or transpose; use inject$"):
        DepthTransfer(coarse, fine, restriction="sum")


def test_linear_map_against_autograd():
    torch.manual_seed(3)
    layer = LinearMap(2, 4)
    theta, u, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (3, 2, 5), (3, 4, 5)))
    theta.requires_grad_()
    u.requires_grad_()
    out = layer.forward(theta, u)
    torch.testing.assert_close(out, torch.einsum("noi,nib->nob", theta.view(3, 4, 2), u))
    expected = torch.autograd.grad(out, (u, theta), v)
    with torch.no_grad():
        for found, wanted in zip(layer.vjp(theta, u, v, True), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
        assert layer.vjp(theta, u, v, False, back=False) == (None, None)
    assert layer.num_parameters == 8
    with pytest.raises(ValueError, match="^inputs=0 and outputs=4 must be at least 1; use 3$"):
        LinearMap(0, 4)


def test_network_with_a_linear_opening_starts_at_Qx():
    network = problem(SerialCommunicator()).network(4)
    x = network.initial(SCALES, seed=0)
    features = torch.randn(2, 7, dtype=torch.float64)
    Q = network.layout.named(x)["opening.weight"][0]
    torch.testing.assert_close(network.open(x, features), Q @ features)
    assert "opening.bias" not in network.layout.named(x)
