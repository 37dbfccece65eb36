"""Multilevel training in width: against torch's optimizers, algorithm 2 of paper 002 written out, and other ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.stochastic import Minibatches
from xbraid_py.multilevel.width.matching import match_rows
from xbraid_py.multilevel.width.options import WidthOptions, WidthTrainingOptions
from xbraid_py.multilevel.width.training import WidthTraining, errors
from xbraid_py.optim.levels import Point
from xbraid_py.run.store.read import CheckpointError, load
from xbraid_py.run.store.write import save

mse = nn.functional.mse_loss


def dense(seed=0, width=12, inputs=5, outputs=3):
    with own_random_numbers(seed):
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        ).double()


def convolutional(seed=0):
    with own_random_numbers(seed):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 8), nn.ReLU(), nn.Linear(8, 3)
        ).double()


def stream(shape=(5,), batch_size=8, samples=40, seed=3):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, *shape, generator=random, dtype=torch.float64)
    flat = inputs.flatten(1)
    targets = torch.stack([flat[:, 0] * flat[:, 1], flat.sum(1).sin(), flat[:, -1].abs()], 1)
    return Minibatches(inputs, targets, batch_size, seed)


def trained(network, minibatches, cycles, grid=None, **options):
    training = WidthTraining(network, mse, minibatches, WidthTrainingOptions(**options), grid)
    return training, list(training.run(cycles))


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_one_level_is_torchs_optimizer_bitwise(method):
    network, given = dense(), dense()
    options = {"learning_rate": 0.05, "weight_decay": 1e-3} if method == "sgd" else {"learning_rate": 0.01}
    training, records = trained(given, stream(), 3, levels=1, method=method, **options)
    plain = {
        "sgd": lambda: torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        "adam": lambda: torch.optim.Adam(network.parameters(), lr=0.01),
    }[method]()
    minibatches = stream()
    for _ in range(3 * 4):
        inputs, targets = minibatches.draw()[0]
        plain.zero_grad()
        mse(network(inputs), targets).backward()
        plain.step()
    assert torch.equal(training.x, training.layout.vector(network))
    assert [record.work for record in records] == [4.0, 8.0, 12.0] == [record.counted for record in records]
    assert torch.equal(training.layout.vector(given), training.layout.vector(dense())), "the given one is left alone"


def halves(weights):
    """P and pi of eq. 34 of each hidden layer, as matrices, by greedy matching of rows with biases."""
    found = []
    for W, b in zip(weights[0:-2:2], weights[1:-2:2], strict=True):
        rows = torch.cat([W, b[:, None]], 1)
        zeta = match_rows(rows).aggregate
        P = torch.zeros(len(W), int(zeta.max()) + 1).double()
        P[torch.arange(len(W)), zeta] = 1.0
        D = torch.diag(rows.norm(dim=1))
        found.append((D @ P, torch.linalg.inv(P.T @ D @ P) @ P.T))
    return found


def apply(weights, left, right):
    """W to left_k W right_{k-1} and b to left_k b, the ends of the network as they are."""
    count = len(weights) // 2
    found = []
    for k in range(count):
        L = left[k] if k < count - 1 else torch.eye(len(weights[2 * k])).double()
        R = right[k - 1] if k else torch.eye(weights[2 * k].shape[1]).double()
        found += [L @ weights[2 * k] @ R, L @ weights[2 * k + 1]]
    return found


def gradients(weights, inputs, targets):
    weights = [each.clone().requires_grad_() for each in weights]
    y = inputs
    for k in range(0, len(weights), 2):
        y = y @ weights[k].T + weights[k + 1]
        y = y.relu() if k < len(weights) - 2 else y
    return list(torch.autograd.grad(mse(y, targets), weights))


def by_hand(network, minibatches, cycles, options):
    """Algorithm 2 with two levels, s steps, new pairs in every cycle, for a dense network; with explicit matrices."""
    s, momentum, rate = options.steps, options.momentum, options.learning_rate
    coarse = options.coarse_steps or s
    x = [p.detach().clone() for p in network.parameters()]
    m = None

    def smooth(x, m, batches, rate, shift=None):
        for inputs, targets in batches:
            g = gradients(x, inputs, targets)
            g = g if shift is None else [a - b for a, b in zip(g, shift, strict=True)]
            m = g if m is None else [momentum * a + b for a, b in zip(m, g, strict=True)]
            x = [a - rate * b for a, b in zip(x, m, strict=True)]
        return x, m

    for _ in range(cycles):
        matrices = halves(x)  # at the start of the cycle
        pairs = [P != 0 for P, _ in matrices]
        x, m = smooth(x, m, minibatches.draw(s), rate)
        # The same pairs with the norms of the weights as they are at the restriction.
        matrices = []
        for (W, b), where in zip(zip(x[0:-2:2], x[1:-2:2], strict=True), pairs, strict=True):
            D, P = torch.diag(torch.cat([W, b[:, None]], 1).norm(dim=1)), where.double()
            matrices.append((D @ P, torch.linalg.inv(P.T @ D @ P) @ P.T))
        P, pi = [each[0] for each in matrices], [each[1] for each in matrices]
        R, right = [each.T for each in P], [each.T for each in pi]
        xc = start = apply(x, pi, P)  # eq. 25
        mc = sent = apply(m, pi, P)
        subset = minibatches.draw(coarse)
        fine = [sum(each) / coarse for each in zip(*(gradients(x, *batch) for batch in subset), strict=True)]
        below = [sum(each) / coarse for each in zip(*(gradients(xc, *batch) for batch in subset), strict=True)]
        tau = [a - b for a, b in zip(below, apply(fine, R, right), strict=True)]  # eq. 35 and 28
        xc, mc = smooth(xc, mc, subset, rate / options.eta, [options.gamma * each for each in tau])
        for fine_vector, coarse_vector, before, share in (
            (x, xc, start, options.alpha_p),
            (m, mc, sent, options.alpha_m),
        ):
            change = [a - b for a, b in zip(coarse_vector, before, strict=True)]
            for each, more in zip(fine_vector, apply(change, P, pi), strict=True):  # eq. 27
                each += share * more
        x, m = smooth(x, m, minibatches.draw(s), rate)
    return torch.cat([each.flatten() for each in x])


@pytest.mark.parametrize("coarse_steps, damping", [(0, (1.0, 1.0, 1.0)), (0, (0.125, 0.7, 0.2)), (5, (0.5, 1.0, 0.2))])
def test_two_levels_are_algorithm_2(coarse_steps, damping):
    gamma, alpha_p, alpha_m = damping
    how = {"levels": 2, "steps": 2, "learning_rate": 0.05, "rematch_every": 1, "eta": 2.0}
    how |= {"gamma": gamma, "alpha_p": alpha_p, "alpha_m": alpha_m, "coarse_steps": coarse_steps}
    training, _ = trained(dense(), stream(), 4, **how)
    expected = by_hand(dense(), stream(), 4, WidthTrainingOptions(**how))
    torch.testing.assert_close(training.x, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make, shape", [(dense, (5,)), (convolutional, (2, 3, 4))])
def test_first_order_consistency(make, shape):
    """At its start the coarse objective has the restricted gradient, over the minibatches that will be used there."""
    training, _ = trained(make(), stream(shape), 1, levels=3, gamma=1.0, steps=2)
    cycle = training._cycle
    objective, point = cycle.objectives[0], Point(training.x)
    for level in (0, 1):
        point = cycle._ready(level, objective, point)
        below, start = cycle.coupled(level, point)
        wanted = cycle.transfers[level].restrict_gradient(point.gradient)
        below.evaluate(start.x)
        torch.testing.assert_close(below.gradient(start.x), wanted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(start.gradient, wanted, rtol=1e-12, atol=1e-14)
        objective, point = below, start


def test_no_tau_where_gradients_are_equal():
    """A network of equal halves: its coarse network has the same function, and its gradient is the restricted one."""
    network = dense(width=6)
    with torch.no_grad():
        for number in (0, 2):
            network[number].weight[3:] = network[number].weight[:3]
            network[number].bias[3:] = network[number].bias[:3]
            network[number + 2].weight[:, 3:] = network[number + 2].weight[:, :3]
    training, _ = trained(network, stream(), 0, levels=2, gamma=1.0)
    training.match()
    cycle = training._cycle
    below, _ = cycle.coupled(0, cycle._ready(0, cycle.objectives[0], Point(training.x)))
    assert training.transfers[0].coarse.widths == (3, 3)
    assert below.shift.abs().max() < 1e-15


def test_work_units():
    """Eq. 40: 6 s - 10 s / 4^(k-1); the example of the paper has 7 for s=2 on two levels, 4.5 without tau."""
    assert WidthTrainingOptions(levels=2, steps=2).work() == (7.0, 4.5)
    assert WidthTrainingOptions(levels=2, steps=4).work() == (14.0, 9.0)
    assert WidthTrainingOptions(levels=2, steps=4, gamma=0.0).work() == (9.0, 9.0)
    for levels in range(2, 7):
        assert WidthTrainingOptions(levels=levels, steps=3).work()[0] == pytest.approx(18 - 30 / 4 ** (levels - 1))
    assert WidthTrainingOptions(levels=1, steps=4).work() == (4.0, 4.0)
    assert WidthTrainingOptions(levels=1, steps=4, coarse_steps=9).work() == (4.0, 4.0)
    assert WidthTrainingOptions(levels=2, steps=1, coarse_steps=32, gamma=0.0).work() == (10.0, 10.0)
    assert WidthTrainingOptions(levels=3, steps=1, coarse_steps=8).work() == (7.5 + 0.5, 3.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_counted_work(gamma):
    """With layers of 5 x 64, 64 x 64 and 64 x 3 numbers, and all neurons paired on both levels."""
    options = {"levels": 3, "steps": 2, "gamma": gamma, "pairs": WidthOptions(threshold=-1.0)}
    training, records = trained(dense(width=64), stream(), 2, **options)
    assert records[-1].widths == ((64, 64), (32, 32), (16, 16))
    costs = [8 * w + w * w for w in (64, 32, 16)]
    steps = (4, 4, 2)
    expected = sum(s * c for s, c in zip(steps, costs, strict=True))
    if gamma:
        expected += sum(steps[level] * (costs[level] + costs[level - 1]) for level in (1, 2))
    assert records[-1].counted == pytest.approx(2 * expected / costs[0])
    assert records[-1].work == 2 * WidthTrainingOptions(**options).work()[0]
    minibatches_a_cycle = 4 + 4 + 2
    assert training.minibatches.drawn == 2 * minibatches_a_cycle


def test_other_minibatches_for_tau():
    same, other = (trained(dense(), stream(), 2, gamma=1.0, tau=tau)[0] for tau in ("same", "other"))
    assert (same.minibatches.drawn, other.minibatches.drawn) == (2 * 12, 2 * 16)
    assert not torch.equal(same.x, other.x)


@pytest.mark.parametrize("make, shape", [(dense, (5,)), (convolutional, (2, 3, 4))])
def test_it_learns(make, shape):
    training, _ = trained(make(), stream(shape), 40, levels=2, learning_rate=0.03)
    learned, untrained = training.layout.module(training.x), make()
    found, before = (errors(network, *stream(shape).draw(5)[0])[0] for network in (learned, untrained))
    assert found < before / 2


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("levels", [1, 3])
def test_replicas_share_the_minibatches(spmd, levels):
    options = {"levels": levels, "steps": 2, "learning_rate": 0.05, "rematch_every": 2}

    def body(comm):
        grid = ProcessGrid(comm, comm.size)
        training, records = trained(dense(), stream(), 4, grid, **options)
        return training.x, records[-1].loss, [each.matchings[0].partner.tolist() for each in training.transfers]

    alone, records = trained(dense(), stream(), 4, **options)
    expected = [each.matchings[0].partner.tolist() for each in alone.transfers]
    found = spmd(body)
    for x, loss, partners in found:
        torch.testing.assert_close(x, alone.x, rtol=1e-10, atol=1e-11)
        assert loss == pytest.approx(records[-1].loss, rel=1e-10) and partners == expected
        assert torch.equal(x, found[0][0])


def test_auxiliary_networks_and_errors():
    training, _ = trained(dense(), stream(), 1, levels=3)
    inputs, targets = stream().inputs, stream().targets
    for level in range(3):
        layout, x = training.auxiliary(level)
        assert layout.widths == ((12, 12), *(each.coarse.widths for each in training.transfers))[level]
        with torch.no_grad():
            error = layout.module(x)(inputs) - targets
        found = errors(layout.module(x), inputs, targets, portion=7)
        assert found == pytest.approx((float(error.square().mean()), float(error.abs().max())), rel=1e-12)


def stored(training, path, **changes):
    """A state of a run as the file that `load` reads."""
    arrays, numbers = training.state()
    save(path, SerialCommunicator(), arrays, {"state": numbers | changes})
    return path


@pytest.mark.parametrize(
    "how",
    [
        {"levels": 1},
        {"levels": 3},
        {"levels": 2, "alpha_m": 0.0, "tau": "other"},
        {"levels": 2, "method": "adam", "alpha_m": 0.0, "learning_rate": 0.01},
    ],
)
@pytest.mark.parametrize("first", [3, 4])
def test_a_run_goes_on_bitwise_from_its_state(how, first, tmp_path):
    """Within a matching of four cycles, and where the next one is due."""
    how = {"steps": 2, "learning_rate": 0.05, "rematch_every": 4} | how
    whole, records = trained(dense(), stream(), 7, **how)
    before, _ = trained(dense(), stream(), first, **how)
    after = WidthTraining(dense(), mse, stream(), WidthTrainingOptions(**how))
    with load(stored(before, tmp_path / "state.h5")) as checkpoint:
        after.load(checkpoint)
    rest = list(after.run(7))
    assert [record.cycle for record in rest] == list(range(first + 1, 8)) and torch.equal(after.x, whole.x)
    for one, other in zip(rest, records[first:], strict=True):
        clocks = {"seconds": 0.0, "matching_seconds": 0.0}
        assert replace(one, **clocks) == replace(other, **clocks)
        assert one.seconds > before.state()[1]["seconds"]


def test_a_state_of_something_else_is_refused(tmp_path):
    run, _ = trained(dense(), stream(), 1)
    with load(stored(run, tmp_path / "a.h5")) as checkpoint, pytest.raises(ValueError, match="^x has the shape"):
        trained(dense(width=10), stream(), 0)[0].load(checkpoint)
    for changes in ({"cycle": -1}, {"drawn": 1.5}):
        path = stored(run, tmp_path / "b.h5", **changes)
        with load(path) as checkpoint, pytest.raises(CheckpointError, match="holds no state of a training run"):
            trained(dense(), stream(), 0)[0].load(checkpoint)
    save(tmp_path / "c.h5", SerialCommunicator(), run.state()[0], {"state": {}})
    with load(tmp_path / "c.h5") as checkpoint, pytest.raises(LookupError):
        trained(dense(), stream(), 0)[0].load(checkpoint)


def test_divergence_is_said():
    with pytest.raises(RunError, match=r"^cycle \d+: the loss is (nan|inf); use a smaller learning rate"):
        trained(dense(), stream(), 50, learning_rate=1e6)


def test_what_does_not_fit_is_refused():
    for changes, message in (
        ({"levels": 0}, "^levels=0 must be at least 1; use 2$"),
        ({"gamma": 1.5}, r"^gamma=1.5 must lie in \[0, 1\]; use 0.2$"),
        ({"eta": 0.5}, "^eta=0.5 must be at least 1 and finite; use 1.4$"),
        ({"method": "lbfgs"}, "^method='lbfgs' must be sgd or adam; use sgd$"),
        ({"method": "adam"}, "^alpha_m=0.2 must be 0 with method=adam and several levels; use 0$"),
        ({"tau": "none"}, "^tau='none' must be same or other; use same$"),
    ):
        with pytest.raises(ValueError, match=message):
            WidthTrainingOptions(**changes)
    with pytest.raises(ValueError, match="^levels=9: the hidden layers of level "):
        trained(dense(), stream(), 1, levels=9, pairs=WidthOptions(threshold=-1.0))


def test_minibatches():
    numbers = torch.arange(10.0)[:, None]
    minibatches = Minibatches(numbers, numbers, 4, seed=2)
    drawn = torch.cat([inputs for inputs, _ in minibatches.draw(5)]).flatten().tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    again = Minibatches(numbers, numbers, 4, seed=2)
    again.drawn = 3
    assert again.draw()[0][0].flatten().tolist() == drawn[12:16]
    for arguments, message in (
        ((numbers, numbers, 11), "^batch_size=11 must lie in 1 .. 10, the samples there are; use 10$"),
        ((numbers, numbers[:3], 2), "^inputs has 10 samples and targets 3; both must have as many$"),
    ):
        with pytest.raises(ValueError, match=message):
            Minibatches(*arguments)
