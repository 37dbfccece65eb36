"""Adaptive depth: options, marking, indicators and weights of cut layers, against literal references."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import reference as ref
import torch
from adaptive_runs import CONVERGED, SCALES, UNEVEN
from hypothesis import given
from hypothesis import strategies as st
from small_runs import MIXED, ONE_SHOT, SEQUENTIAL, gathered, points, problem

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.adaptive import indicator, marked, suits
from xbraid_py.multilevel.depth.options import AdaptiveOptions, NestedOptions
from xbraid_py.multilevel.depth.transfer import prolong_depth
from xbraid_py.problem.options import InitialScales

# Options and marking.


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(indicator="size"), "indicator='size' must be richardson, goal, jump, both or even; use richardson"),
        (dict(marking="most"), "marking='most' must be bulk or share; use bulk"),
        (dict(fraction=0.0), "fraction=0.0 must be above 0 and at most 1; use 0.5"),
        (dict(fraction=float("nan")), "fraction=nan must be above 0 and at most 1; use 0.5"),
        (dict(max_layers=0), "max_layers=0 must be at least 1; use 64"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        AdaptiveOptions(**options)
    assert str(caught.value) == message


def test_fewer_layers_than_at_the_beginning_are_refused():
    options = NestedOptions(adaptive=AdaptiveOptions(max_layers=15))
    with pytest.raises(ValueError, match="^max_layers=15 is less than the 16 layers to begin with; use 64$"):
        options.depths(64)


def by_definition(options: AdaptiveOptions, values: list[float], fitting: list[int]) -> tuple[int, ...]:
    """The marking in the slowest way: try every number of layers."""
    ranked = [layer for _, layer in sorted((-value, layer) for layer, value in enumerate(values))]
    count = len(values)
    if options.marking == "share":
        wanted = next(k for k in range(1, count + 1) if k >= options.fraction * count)
    else:
        enough = [k for k in range(1, count) if sum(values[i] for i in ranked[:k]) >= options.fraction * sum(values)]
        wanted = min([*enough, count])
    best = None
    for new in range(2 * count, count, -1):
        if new in fitting and new <= (options.max_layers or new) and (best is None or abs(new - count - wanted) < best):
            best, chosen = abs(new - count - wanted), ranked[: new - count]
    return () if best is None else tuple(sorted(chosen))


@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=16),
    st.sampled_from(("bulk", "share")),
    st.sampled_from((0.125, 0.5, 0.75, 1.0)),
    st.sets(st.integers(2, 32)),
    st.none() | st.integers(1, 40),
)
def test_marking_is_what_it_says(values, marking, fraction, fitting, most):
    options = AdaptiveOptions(marking=marking, fraction=fraction, max_layers=most)
    assert marked(options, values, sorted(fitting)) == by_definition(options, values, sorted(fitting))


def test_where_all_are_alike_the_first_are_cut():
    options = AdaptiveOptions(marking="share", fraction=0.5)
    assert marked(options, [2.0] * 6, range(20)) == (0, 1, 2)
    assert marked(options, [1.0, 3.0, 3.0, 2.0], [5, 7]) == (0, 1, 2, 3)[1:4]  # 7 rather than 5: as near, and more
    assert marked(replace(options, marking="bulk"), [0.0] * 4, range(20)) == (0,)
    assert marked(replace(options, max_layers=6), [2.0] * 6, range(20)) == ()


@pytest.mark.parametrize(
    "mgrit, layers, good",
    [
        (SEQUENTIAL, 5, range(6, 11)),
        (MIXED, 8, (16,)),  # all factors that are given
        (MGRIT(cycle="V", cfactor=4, max_levels=2), 16, (20, 24, 28, 32)),
        (MGRIT(cycle="V", cfactor=4), 64, (80, 96, 112, 128)),  # three levels now, and then
        (MGRIT(), 16, (20, 28, 32)),  # 5, 7 and 8 intervals of 4 layers; 24 would be 8 of 3
        (MGRIT(), 32, (36, 40 + 2, 48, 50, 60, 64)),
        (MGRIT(), 4, range(5, 9)),  # too few for a coarse level in any case
    ],
)
def test_numbers_of_layers_that_suit_the_solvers(mgrit, layers, good):
    made = problem(SerialCommunicator(), mgrit)
    found = [count for count in range(layers + 1, 2 * layers + 1) if suits(made, made.grid(layers), count)]
    assert found == list(good)
    for count in found:
        made.hierarchies(count)  # is not refused


# Weights.


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("chosen", [(0,), (15,), (1, 2, 7, 12), (), tuple(range(16))])
def test_the_weights_of_layers_that_are_cut(spmd, interpolation, chosen):
    def body(comm):
        made = problem(comm, SEQUENTIAL)
        coarse, fine = made.network(UNEVEN), made.network(UNEVEN.halve(chosen))
        x = coarse.initial(SCALES, seed=2)
        return (
            gathered(coarse, x),
            gathered(fine, prolong_depth(coarse, fine, x, interpolation, chosen)),
            fine.partition,
        )

    for coarse, fine, partition in spmd(body):
        theta, expected = coarse["layers"], []
        for n, row in enumerate(theta):
            expected.append(row)
            if n in chosen:
                behind = theta[min(n + 1, 15)]
                expected.append(row if interpolation == "constant" else (row + behind) / 2)
        assert torch.equal(fine["layers"], torch.stack(expected))
        assert torch.equal(fine["opening"], coarse["opening"])
        assert torch.equal(fine["classification"], coarse["classification"])
        assert max(partition.counts) - min(partition.counts) <= 1  # dealt anew


def test_another_grid_than_the_cut_one_is_refused():
    made = problem(SerialCommunicator(), SEQUENTIAL)
    coarse, fine = made.network(4), made.network(LayerGrid(4, 2.0).halve((0,)))
    with pytest.raises(ValueError, match=r"^fine grid of 5 layers must be the coarse one with chosen=\(1,\) cut$"):
        prolong_depth(coarse, fine, coarse.layout.zeros(), "constant", (1,))


# Indicators.


@cache
def by_hand(interpolation: str) -> dict[str, list[float]]:
    """All indicators of a network on a grid that is not uniform, layer by layer, adjoints by autograd."""
    network = problem(SerialCommunicator(), SEQUENTIAL).network(UNEVEN)
    rows = network.layout.rows(network.initial(SCALES, 3))
    theta, h, data = rows["layers"], UNEVEN.sizes(), points()
    states = [ref.dense(rows["opening"][0], data.features, 3, "smooth_relu").requires_grad_()]
    for row, size in zip(theta, h, strict=True):
        states.append(ref.step(row, states[-1], size, "smooth_relu"))
    logits = ref.dense(rows["classification"][0], states[-1], data.num_classes, "identity")
    adjoints = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.T, data.labels), states)[1:]
    found = {"richardson": [], "goal": [], "jump": []}
    for n, (row, size) in enumerate(zip(theta, h, strict=True)):
        u, behind = states[n].detach(), theta[min(n + 1, 15)]
        second = row if interpolation == "constant" else (row + behind) / 2
        half = ref.step(row, u, size / 2, "smooth_relu")
        error = 2 * (ref.step(second, half, size / 2, "smooth_relu") - ref.step(row, u, size, "smooth_relu"))
        beside = [float((theta[m] - row).norm()) for m in (n - 1, n + 1) if 0 <= m < 16]
        found["richardson"].append(float(error.square().mean().sqrt()))
        effects = [float(adjoints[n][:, b] @ error[:, b]) for b in range(error.shape[1])]
        found["goal"].append(sum(abs(effect) for effect in effects))
        found["jump"].append(size * sum(beside) / len(beside))
    shares = {name: [value / sum(values) for value in values] for name, values in found.items()}
    shares["both"] = [a + b for a, b in zip(shares["richardson"], shares["jump"], strict=True)]
    return shares


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("kind", ["goal", "richardson", "jump", "both"])
def test_indicators_are_what_they_say(spmd, kind, interpolation):
    def body(comm):
        objective = problem(comm, CONVERGED).objective(UNEVEN)
        return indicator(kind, objective, objective.network.initial(SCALES, 3), interpolation)

    expected = by_hand(interpolation)[kind]
    results = spmd(body)
    assert results[0] == pytest.approx(expected, rel=1e-9)
    assert all(found == body(SerialCommunicator()) for found in results)  # to the last bit


@pytest.mark.parametrize("mgrit", [SEQUENTIAL, ONE_SHOT, MIXED], ids=["sequential", "lagged", "V"])
@pytest.mark.parametrize("kind", ["goal", "both"])
def test_indicators_of_unfinished_solves_have_the_same_bits_on_all_ranks(spmd, kind, mgrit):
    def body(comm):
        objective = problem(comm, mgrit).objective(UNEVEN)
        return indicator(kind, objective, objective.network.initial(SCALES, 3))

    expected = body(SerialCommunicator())
    assert spmd(body) == [expected] * len(spmd(lambda comm: 0))


def test_layers_that_do_nothing_are_not_cut():
    objective = problem(SerialCommunicator(), SEQUENTIAL).objective(12)
    x = objective.network.initial(SCALES, 3)
    rows = objective.network.layout.rows(x)["layers"]
    rows[:4], rows[7:] = 0.0, 0.0
    rows[:4, -3:] = rows[7:, -3:] = -9.0  # a bias far below 0: the activation is 0, and so is its slope
    for kind in ("goal", "richardson"):
        values = indicator(kind, objective, x, "constant")
        assert all(value > 0.0 for value in values[4:7]) and set(values[:4] + values[7:]) == {0.0}


@pytest.mark.parametrize("kind", ["richardson", "goal", "jump"])
def test_layers_come_where_the_weights_change(kind):
    """Weights with a pulse in depth: fewer layers make a smaller error of the output than more of them evenly."""
    made = problem(SerialCommunicator(), SEQUENTIAL)
    rows = ref.random(2, 12, seed=4)

    def at(grid):
        network = made.network(grid)
        x, h = network.initial(InitialScales(layers=0.0), 3), torch.tensor(grid.sizes(), dtype=torch.float64)
        begins = (h.cumsum(0) - h)[:, None]
        network.layout.rows(x)["layers"].copy_(0.2 * rows[0] + 4 * rows[1] * torch.exp(-(((begins - 1.3) / 0.05) ** 2)))
        objective = made.objective(grid)
        objective.evaluate(x)
        return x, objective, objective._portions[0].end

    exact = at(LayerGrid(8192, 2.0))[2]
    grid = LayerGrid(16, 2.0)
    options = AdaptiveOptions(marking="share", fraction=0.25)
    while grid.num_layers < 40:
        x, objective, _ = at(grid)
        grid = grid.halve(marked(options, indicator(kind, objective, x, "linear"), range(100)))
    errors = [float((at(each)[2] - exact).norm()) for each in (grid, LayerGrid(160, 2.0))]
    assert grid.num_layers < 50 and errors[0] < errors[1]
    begin, front = 0.0, []
    for size in grid.sizes():
        front += [size] * (abs(begin - 1.3) < 0.06)
        begin += size
    assert max(front) < 0.5 * max(grid.sizes())


def test_even_layers_are_spread():
    objective = problem(SerialCommunicator(), SEQUENTIAL).objective(12)
    values = indicator("even", objective, objective.network.layout.zeros())
    assert marked(AdaptiveOptions(marking="share", fraction=0.5), values, range(25)) == (0, 2, 4, 6, 8, 10)
    assert marked(AdaptiveOptions(marking="share", fraction=0.25), values, range(25)) == (2, 6, 10)
    assert len(set(values)) == 12
