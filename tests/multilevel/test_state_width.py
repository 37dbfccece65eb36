"""Coarse networks that are narrower and shallower: transfers of the state's width, and cycles over both."""

import pytest
import torch
from mgopt_runs import by_autograd, last, mgopt, problem
from small_runs import gathered

from xbraid_py.multilevel.depth.options import LevelOptions, MGOptOptions
from xbraid_py.multilevel.depth.transfer import DepthTransfer
from xbraid_py.multilevel.vcycle import ComposedTransfer
from xbraid_py.multilevel.width.matching import StateWidthTransfer, gram, match_rows, match_state
from xbraid_py.optim.levels import Point

SCALINGS = ("mean", "norms", "sums")
RATES = (0.05, 0.04, 0.03)


def networks(width=5, num_layers=4, comm=None, activation="relu"):
    """A network and one of half its width."""
    return tuple(
        problem(comm, width=each, activation=activation).network(num_layers) for each in (width, (width + 1) // 2)
    )


def weights(network, seed=3):
    """The same on any number of ranks, biases included."""
    x = network.layout.zeros()
    for stack in network.layout.stacks:
        random = torch.Generator().manual_seed(seed)
        drawn = torch.randn(stack.total, stack.row_size, generator=random, dtype=x.dtype)
        network.layout.rows(x)[stack.name].copy_(drawn[stack.first : stack.first + stack.count])
    return x


def matrix(function, size):
    """The matrix of a linear map."""
    return torch.stack([function(unit) for unit in torch.eye(size, dtype=torch.float64)], 1)


def transfers(kind, scaling="norms", width=5, num_layers=4, comm=None):
    """Width alone, or width and depth, matched by random weights."""
    fine, between = networks(width, num_layers, comm)
    found = StateWidthTransfer(between, fine, scaling)
    if kind == "both":
        coarse = problem(comm, width=(width + 1) // 2, activation="relu").network(num_layers // 2)
        found = ComposedTransfer([found, DepthTransfer(coarse, between, "constant", "average")])
    return found.renewed(weights(fine)), fine


@pytest.mark.parametrize("kind", ["width", "both"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_matrices(kind, scaling):
    transfer, fine = transfers(kind, scaling)
    P = matrix(transfer.prolong, transfer.restrict(weights(fine)).numel())
    Pi = matrix(transfer.restrict, fine.layout.size)
    R = matrix(transfer.restrict_gradient, fine.layout.size)
    torch.testing.assert_close(R, P.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(Pi @ P, torch.eye(P.shape[1], dtype=P.dtype), rtol=0, atol=1e-14)
    torch.testing.assert_close(P @ Pi @ P @ Pi, P @ Pi, rtol=0, atol=1e-13)
    assert P.shape[1] < P.shape[0] / (1.9 if kind == "width" else 3.5)


@pytest.mark.parametrize("kind", ["width", "both"])
def test_on_ranks(spmd, kind):
    """<g, P e> = <R g, e> and Pi P e = e, whoever owns the layers; the matching is that of one rank."""

    def body(comm):
        transfer, fine = transfers(kind, num_layers=8, comm=comm)
        g, few = weights(fine, 5), transfer.restrict(weights(fine, 6))
        inner = [fine.layout.zeros().new_tensor([[torch.dot(*pair)]]) for pair in pairs(transfer, g, few)]
        left, right = (float(comm.ordered_sum(each, [1] * comm.size).sum()) for each in inner)
        again = transfer.restrict(transfer.prolong(few))  # collective: also where there are no layers
        error = max((again - few).abs().tolist(), default=0.0)
        first = transfer if kind == "width" else transfer.parts[0]
        return left, right, error, first.matrices.matching.partner.tolist()

    def pairs(transfer, g, few):
        return (g, transfer.prolong(few)), (transfer.restrict_gradient(g), few)

    partners = transfers(kind, num_layers=8)[0]
    partners = (partners if kind == "width" else partners.parts[0]).matrices.matching.partner.tolist()
    for left, right, error, found in spmd(body):
        assert left == pytest.approx(right, rel=1e-12)
        assert error < 1e-13 and found == partners


def test_matching_is_that_of_all_rows_together(spmd):
    def body(comm):
        fine = networks(6, 8, comm)[0]
        x = weights(fine)
        return gram(fine, x), match_state(fine, x)

    fine = networks(6, 8)[0]
    named = fine.layout.named(weights(fine))
    opening, layers, bias = named["opening.weight"], named["layers.weight"], named["layers.bias"]
    rows = torch.cat([opening[0], layers.transpose(0, 1).flatten(1), bias.T], 1)
    wanted = match_rows(rows, threshold=-1.0)
    for products, (matching, norms) in spmd(body):
        torch.testing.assert_close(products, rows @ rows.T, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(norms, rows.norm(dim=1), rtol=1e-13, atol=0)
        assert torch.equal(matching.partner, wanted.partner)


@pytest.mark.parametrize("width", [2, 5, 6])
@pytest.mark.parametrize("values", ["random", "zeros", "opposite"])
def test_half_the_width_whatever_the_weights(width, values):
    fine = networks(width)[0]
    x = weights(fine)
    if values == "zeros":
        x.zero_()
    if values == "opposite":
        for name, each in fine.layout.named(x).items():
            if not name.startswith("classification"):
                each[:, ::2], each[:, 1::2] = 1.0, -1.0
    assert match_state(fine, x)[0].num_coarse == (width + 1) // 2


@pytest.mark.parametrize(
    "scaling, activation, factor", [("mean", "tanh", 1.0), ("norms", "relu", 3.0), ("sums", "relu", 3.0)]
)
def test_neurons_that_are_alike_become_one_without_changing_the_function(scaling, activation, factor):
    """Neuron 2k + 1 of the state is `factor` times neuron 2k."""
    fine, coarse = networks(6, 4, activation=activation)
    x = weights(fine) / 2
    named = fine.layout.named(x)
    for name in ("opening.weight", "layers.weight", "layers.bias"):
        named[name][:, 1::2] = factor * named[name][:, 0::2]
    transfer = StateWidthTransfer(coarse, fine, scaling).renewed(x)
    assert transfer.matrices.matching.partner.tolist() == [1, 0, 3, 2, 5, 4]
    logits = [classified(network, y) for network, y in ((fine, x), (coarse, transfer.restrict(x)))]
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


def classified(network, x):
    """Logits (2, B) of the points, layer after layer, with plain torch."""
    named, sigma = network.layout.named(x), {"relu": torch.relu, "tanh": torch.tanh}[network.block.activation]
    u = named["opening.weight"][0] @ problem().features
    for W, b in zip(named["layers.weight"], named["layers.bias"], strict=True):
        u = u + network.grid.h * sigma(W @ u + b[:, None])
    return named["classification.weight"][0] @ u + named["classification.bias"][0][:, None]


def narrow(comm=None, narrow=1, width=4, levels=3, scaling="norms", num_layers=16, **options):
    others = {"width": width, "activation": "relu"}
    optim = LevelOptions(learning_rate=RATES)
    return mgopt(comm, num_layers, levels=levels, others=others, narrow=narrow, scaling=scaling, optim=optim, **options)


def test_levels():
    run = narrow(narrow=2, width=7, schedule="[(1), 2, {2}]")
    assert [(each.network.block.outputs, each.network.grid.num_layers) for each in run.objectives] == [
        (7, 16),
        (4, 8),
        (2, 4),
    ]
    assert run.costs == [1.0, (4 / 7) ** 2 / 2, (2 / 7) ** 2 / 4]
    record = last(run, 2)
    assert record.work == pytest.approx(2 * (2 + 5 * run.costs[1] + 2 * run.costs[2]))
    assert record.counted == pytest.approx(record.work)  # layer by layer, each by the numbers of its matrix


def test_first_order_consistency():
    """grad H there is the restricted gradient, and the objective goes down along the correction."""
    run = narrow()
    point = Point(run.x).complete(run.objectives[0])
    run.cycle.transfers[0] = run.cycle.transfers[0].renewed(run.x)
    objective, start = run.cycle.coupled(0, point)
    transfer = run.cycle.transfers[0]
    wanted = transfer.restrict_gradient(point.gradient)
    coarse = by_autograd(start.x, 8, torch.relu, 2e-2, width=2)[1]
    torch.testing.assert_close(objective.shift + coarse, wanted, rtol=1e-12, atol=1e-14)
    step = transfer.prolong(-1e-3 * wanted)
    assert run.objectives[0].evaluate(run.x + step).value < point.evaluation.value


def test_cycle_written_out():
    """One two-level cycle against its definition, with the transfers' matrices."""
    run = narrow(levels=2, schedule="[1, {2}]")
    x, rates = run.x, RATES
    x = x - rates[0] * by_autograd(x, 16, torch.relu, 2e-2, width=4)[1]
    transfer = narrow(levels=2, schedule="[1, {2}]").cycle.transfers[0].renewed(x)
    fine = by_autograd(x, 16, torch.relu, 2e-2, width=4)[1]
    start = transfer.restrict(x)
    shift = transfer.restrict_gradient(fine) - by_autograd(start, 8, torch.relu, 2e-2, width=2)[1]
    y = start
    for _ in range(2):
        y = y - rates[1] * (by_autograd(y, 8, torch.relu, 2e-2, width=2)[1] + shift)
    x = x + transfer.prolong(y - start)
    x = x - rates[0] * by_autograd(x, 16, torch.relu, 2e-2, width=4)[1]
    last(run, 1)
    torch.testing.assert_close(run.x, x, rtol=1e-11, atol=1e-12)


def test_cycles_are_those_on_one_rank(spmd):
    def body(comm):
        run = narrow(comm, narrow=2, num_layers=32, min_layers=8, full_multigrid=1)
        record = last(run, 3)
        return record.evaluation.value, record.work, gathered(run.network, run.x)

    alone = narrow(narrow=2, num_layers=32, min_layers=8, full_multigrid=1)
    record = last(alone, 3)
    for value, work, x in spmd(body):
        assert value == pytest.approx(record.evaluation.value, rel=1e-9)
        assert work == record.work
        for name, rows in gathered(alone.network, alone.x).items():
            torch.testing.assert_close(x[name], rows, rtol=1e-9, atol=1e-11)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"^narrow=3 must lie in 0 .. 2, the coarse levels; use 0$"):
        MGOptOptions(levels=3, narrow=3)
    with pytest.raises(ValueError, match=r"^scaling='half' must be mean or norms or sums; use mean$"):
        MGOptOptions(scaling="half")
    with pytest.raises(ValueError, match="^narrow=1 is for optimizers that keep nothing .* use optim.keep=False$"):
        MGOptOptions(narrow=1, optim=LevelOptions(method=("adam",)))
    fine, coarse = networks(6, activation="tanh")
    with pytest.raises(ValueError, match="^scaling='norms' needs an activation .* not tanh; use mean$"):
        StateWidthTransfer(coarse, fine, "norms")
    with pytest.raises(ValueError, match=r"^coarse width=6 must be 3, half"):
        StateWidthTransfer(fine, fine)
    with pytest.raises(ValueError, match="^coarse and fine network must have the same layers"):
        StateWidthTransfer(networks(6, 8)[1], fine)
    with pytest.raises(ValueError, match="^matrices=None: the neurons are not matched yet"):
        StateWidthTransfer(coarse, fine).restrict(weights(fine))
    x = weights(fine)
    x[5] = torch.nan
    with pytest.raises(ValueError, match="^the weights have NaN or inf in them"):
        match_state(fine, x)
