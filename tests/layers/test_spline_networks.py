"""Networks whose weights are splines in depth: against autograd, free weights, refinement, checkpoints, refusals."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from functools import cache

import pytest
import reference as ref
import torch
from small_problem import BATCH, CLASSES, TERMS, N, T, data, problem
from small_runs import MIXED, SEQUENTIAL, load_state, save_state, timeless
from spline_cases import CASES, matrix, middles

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.options import AdaptiveOptions, MGOptOptions, NestedOptions
from xbraid_py.multilevel.depth.transfer import DepthTransfer, prolong_depth
from xbraid_py.multilevel.width.matching import StateWidthTransfer
from xbraid_py.optim import OneShotOptions
from xbraid_py.problem.options import InitialScales
from xbraid_py.run.options import to_dict

ALL_RANKS = pytest.mark.ranks(1, 2, 3, 5, 8)
SCALES = InitialScales(1.5, 0.5, 1.5)


def with_splines(made, splines):
    return replace(made, architecture=replace(made.architecture, splines=splines))


def weights(network, shift: float = 0.0) -> torch.Tensor:
    """Random coefficients and weights of the ends, moved along a second random direction."""
    return network.initial(SCALES, 8) + shift * network.initial(InitialScales(1.0, 1.0, 1.0, "uniform"), 4)


@cache
def exact(case: str, term: str):
    """Value and gradient of the literal network at the literal weights, as one flat vector of coefficients."""
    splines = CASES[case]
    net = with_splines(problem(SerialCommunicator(), forward=MGRIT(max_levels=1)), splines).network(N)
    named = net.layout.named(weights(net))
    B = matrix(splines, middles(N))
    layers = {
        f"layers.{kind}": torch.einsum("nj,j...->n...", B, named[f"layers.{kind}"]) for kind in ("weight", "bias")
    }
    value, *_, gradients = ref.objective({**named, **layers}, *data(BATCH), T / N, "tanh", asdict(TERMS[term]))
    flat = net.layout.zeros()
    for name, view in net.layout.named(flat).items():
        found = gradients[name]
        view.copy_(torch.einsum("nj,n...->j...", B, found) if name.startswith("layers") else found)
    return value, flat


@ALL_RANKS
@pytest.mark.parametrize("term", ["all, sum", "all, integral"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_against_autograd(spmd, case, term):
    value, gradient = exact(case, term)

    def body(comm):
        objective = with_splines(problem(comm, TERMS[term]), CASES[case]).objective(N)
        x = weights(objective.network)
        return objective.evaluate(x).value, objective.gradient(x), objective.network.layout.num_parameters

    parts = spmd(body)
    assert all(part[0] == pytest.approx(value, rel=1e-12) for part in parts)
    found = torch.cat([part[1] for part in parts])
    assert (found - gradient).abs().max() < 1e-12 * gradient.abs().max()
    assert {part[2] for part in parts} == {len(gradient)}


@pytest.mark.parametrize("case", ["linear", "quadratic, own knots", "cubic"])
def test_gradient_against_finite_differences(spmd, case):
    """Along a direction of the coefficients of one spline after the other."""
    eps, splines = 1e-5, CASES[case]

    def body(comm):
        objective = with_splines(problem(comm, TERMS["all, integral"]), splines).objective(N)
        network = objective.network
        x, pairs = weights(network), []
        for row in range(splines.num):
            d = network.layout.zeros()
            for own in network.layout.rows(d)["layers"][row : row + 1]:
                own.copy_(ref.random(len(own), seed=row))
            ahead, behind = (objective.evaluate(x + step * d).value for step in (eps, -eps))
            objective.evaluate(x)
            pairs.append(((ahead - behind) / (2 * eps), float(objective.dots([objective.gradient(x)], [d]))))
        return pairs

    for pairs in spmd(body):
        assert all(slope == pytest.approx(found, rel=1e-5, abs=1e-9) for slope, found in pairs), pairs


@ALL_RANKS
@pytest.mark.parametrize("case", ["cubic", "linear", "quadratic, more than layers"])
def test_the_same_bits_on_any_number_of_ranks(spmd, case):
    """One-shot: two iterations, warm starts, new weights every time, far from converged."""
    options = MGRIT(cfactor=2, max_levels=3, min_coarse=1, max_iter=2, cycle="F")

    def body(comm):
        objective = with_splines(problem(comm, TERMS["all, integral"], options), CASES[case]).objective(N)
        record, gradients = [], []
        for update in range(3):
            x = weights(objective.network, 0.2 * update)
            record.append(objective.evaluate(x))
            gradients.append(objective.gradient(x))
            record += [objective.dots(gradients, gradients).tolist(), float(objective.dots(gradients[:1], [x]))]
        return record, gradients, objective.network.predict(x, data()[0]).tolist()

    record, gradients, classes = body(SerialCommunicator())
    parts = spmd(body)
    assert all((part[0], part[2]) == (record, classes) for part in parts)
    for update, gradient in enumerate(gradients):
        assert torch.equal(torch.cat([part[1][update] for part in parts]), gradient)


@pytest.mark.parametrize(
    "splines", [Splines(N, 0), Splines(N, 1), Splines(N, 2, "centered"), Splines(N, 3, "centered")]
)
def test_as_many_functions_as_layers_are_free_weights(spmd, splines):
    def body(comm):
        made = problem(comm, TERMS["all, integral"])
        free, objective = made.objective(N), with_splines(made, splines).objective(N)
        y = weights(free.network)
        x, layout = objective.network.layout.zeros(), objective.network.layout
        theta = comm.allgather(free.network.layout.rows(y)["layers"], free.network.partition.counts)
        rows, others = layout.rows(x), free.network.layout.rows(y)
        rows["layers"].copy_(splines.fit(middles(N), theta)[: len(rows["layers"])])
        for end in ("opening", "classification"):
            rows[end].copy_(others[end])
        values = [each.evaluate(at) for each, at in ((objective, x), (free, y))]
        gradient, other = objective.gradient(x), free.gradient(y)
        back = objective.network.contract(other)
        same = torch.equal(objective.network.initial(SCALES, 3).sort()[0], free.network.initial(SCALES, 3).sort()[0])
        return values, (gradient - back).abs().max().item() if len(gradient) else 0.0, comm.size == 1 and same

    for (found, expected), error, same in spmd(body):
        assert found.value == pytest.approx(expected.value, rel=1e-13 if splines.degree else 0, abs=0)
        assert found.accuracy == expected.accuracy and error < (1e-12 if splines.degree else 1e-300)
        assert same or len(spmd(lambda comm: comm.rank)) > 1


@pytest.mark.parametrize("splines", [Splines(4, 0), Splines(5, 1), Splines(6, 3)])
def test_refinement_changes_the_output_by_the_order_of_h(splines):
    """The coefficients stay as they are: N = 8 to 256 layers of the same function of the depth."""
    made = with_splines(problem(SerialCommunicator(), forward=MGRIT(max_levels=1)), splines)
    networks = [made.network(8 << level) for level in range(6)]
    x = weights(networks[0])
    outputs = []
    for coarse, fine in zip(networks, [*networks[1:], None], strict=True):
        u = coarse.open(x, data()[0])[None]
        outputs.append(coarse.classify(x, coarse.steps(x).relax(u, coarse.grid.num_layers, None, None)[0]))
        if fine is not None:
            y = prolong_depth(coarse, fine, x, "constant")
            assert torch.equal(y, x) and fine.layout.num_parameters == coarse.layout.num_parameters
    changes = [float((b - a).norm()) for a, b in zip(outputs, outputs[1:], strict=False)]
    rates = [a / b for a, b in zip(changes, changes[1:], strict=False)]
    assert changes[0] > 0.1 and all(1.8 < rate < 2.4 for rate in rates[1:]) and rates[-1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("case", ["constant", "linear", "cubic", "quadratic, own knots"])
def test_inserted_knots_keep_the_functions(spmd, case):
    splines = CASES[case]

    def body(comm):
        coarse, fine = (
            with_splines(problem(comm, forward=SEQUENTIAL), each).network(depth)
            for each, depth in ((splines, 7), (splines.refine(), 14))
        )
        x = weights(coarse)
        y = prolong_depth(coarse, fine, x, "constant")
        same = [torch.equal(coarse.layout.rows(x)[end], fine.layout.rows(y)[end]) for end in ("opening",)]
        return same, coarse.layout.rows(x)["layers"], fine.layout.rows(y)["layers"]

    parts = spmd(body)
    assert all(all(same) for same, *_ in parts)
    times = [k / 40 for k in range(41)]
    before, after = (torch.cat([part[k] for part in parts]) for k in (1, 2))
    change = matrix(splines.refine(), times) @ after - matrix(splines, times) @ before
    assert change.abs().max() < 1e-13
    made = problem(SerialCommunicator(), forward=SEQUENTIAL)
    spline, free = with_splines(made, splines).network(7), made.network(14)
    for pair in ((spline, free), (made.network(7), with_splines(made, splines).network(14))):
        with pytest.raises(ValueError, match="must both be splines, or both None; use Splines"):
            prolong_depth(*pair, pair[0].layout.zeros(), "constant")


def nested(comm, splines=CASES["cubic"], mgrit=MIXED, **others):
    """A nested iteration of 8, 16 and 32 layers."""
    made = with_splines(problem(comm, TERMS["all, integral"], mgrit), splines)
    options = NestedOptions(**{"refinements": 2, "updates": (3, 2, 3), **others})
    return NestedIteration(
        made, 32, options=options, one_shot=OneShotOptions(boost_updates=2, boost_iter=4), scales=SCALES, seed=1
    )


REFINED = dict(splines=Splines(4 * 3 + 3, 3), spline_refine=True)
ADAPTIVE = dict(adaptive=AdaptiveOptions(indicator="both"), refinements=1, updates=(3, 3))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("options", [{}, REFINED, ADAPTIVE], ids=["kept", "knots inserted", "adaptive"])
def test_a_checkpoint_goes_on_and_is_exported_on_any_number_of_ranks(spmd, shared_tmp_path, tmp_path, options):
    def body(comm, out=shared_tmp_path / "together"):
        run, records, paths = nested(comm, **options), [], []
        for record in run.run():
            records.append(timeless(record))
            configuration = {"network": to_dict(run.problem.architecture)}
            paths.append(save_state(out, run, record.update, configuration=configuration))
        return records, paths, run.network.splines, run.weights, run.network.predict(run.weights, data()[0])

    parts = spmd(body)
    records, paths, splines, _, classes = parts[0]
    x = torch.cat([part[3] for part in parts])
    alone = body(SerialCommunicator(), tmp_path / "alone")  # each rank over MPI makes its own
    assert alone[0] == records and torch.equal(alone[3], x), "the same run on any number of ranks"
    if not options:
        assert [record.num_layers for record in records] == [8] * 3 + [16] * 2 + [32] * 4
        assert (
            splines == CASES["cubic"]
            and len(x) == nested(SerialCommunicator()).problem.network(8).layout.num_parameters
        )
    elif "spline_refine" in options:
        assert splines == options["splines"] and splines.coarsen(4) == Splines(6, 3)

    def rest(comm, path):
        run = load_state(path, nested(comm, **options))
        return [timeless(record) for record in run.run()], run.weights

    for k in (1, 4):  # written on these ranks, read on one, and the other way round
        found, last = rest(SerialCommunicator(), paths[k])
        assert found == records[k + 1 :] and torch.equal(last, x)
        ends = spmd(lambda comm, k=k: rest(comm, alone[1][k]))
        assert all(end[0] == records[k + 1 :] for end in ends)
        assert torch.equal(torch.cat([end[1] for end in ends]), x)

    plain = to_sequential(paths[-1])
    assert len(plain[1]) == records[-1].num_layers
    assert torch.equal(plain(data()[0].T).argmax(1), classes)


def test_a_damaged_or_other_checkpoint_is_refused(tmp_path):
    run = nested(SerialCommunicator())
    next(run.run())
    path = save_state(tmp_path, run, 0)
    for splines, word in ((Splines(8, 3), "7 rows or vectors where this run has 8"), (None, "rows or vectors")):
        with pytest.raises(ValueError, match=word):
            load_state(path, nested(SerialCommunicator(), splines))


def test_where_splines_are_not_supported_they_are_refused():
    made = with_splines(problem(SerialCommunicator(), forward=SEQUENTIAL), Splines(5, 1))
    with pytest.raises(ValueError, match=r"^splines=Splines\(num=5.*must be None for MG/OPT.*; use splines=None"):
        MGOpt(made, 16, MGOptOptions())
    with pytest.raises(ValueError, match="must be None for MG/OPT"):
        DepthTransfer(made.network(8), made.network(16))
    narrow = replace(made, architecture=replace(made.architecture, width=2))
    with pytest.raises(ValueError, match="must be None for MG/OPT"):
        StateWidthTransfer(narrow.network(8), made.network(8))
    with pytest.raises(ValueError, match="^spline_refine=True needs a network with splines; give network.splines.num"):
        nested(SerialCommunicator(), None, spline_refine=True)
    with pytest.raises(ValueError, match=re.escape("num=7 makes num - degree = 4 intervals, not a multiple of 8")):
        nested(SerialCommunicator(), refinements=3, updates=(1, 1, 1, 1), spline_refine=True)


def test_layers_of_different_sizes(spmd):
    """The middles of the steps; value and gradient against the network with free weights."""
    grid, splines = LayerGrid.of_lengths((1, 2, 1, 4, 4, 1, 2, 1), T), Splines(5, 2)
    B = matrix(splines, grid.middles())

    def body(comm):
        made = problem(comm, TERMS["all, integral"], MGRIT(cycle="V", cfactor=2, max_levels=2, max_iter=4))
        objective, free = with_splines(made, splines).objective(grid), made.objective(grid)
        x = weights(objective.network)
        y = objective.network.expand(x)
        same = objective.evaluate(x).value == free.evaluate(y).value
        theta = free.network.layout.rows(y)["layers"]
        slopes = free.network.layout.rows(free.gradient(y))["layers"]
        return same, objective.network.layout.rows(x)["layers"], theta, slopes, objective.gradient(x)

    parts = spmd(body)
    assert all(part[0] for part in parts)
    coefficients, theta, slopes = (torch.cat([part[k] for part in parts]) for k in (1, 2, 3))
    assert (theta - B @ coefficients).abs().max() < 1e-14
    expected = (B.T @ slopes).flatten()
    found = torch.cat([part[4] for part in parts])
    first = len(found) - len(expected) - (CLASSES * 5)
    assert (found[first : first + len(expected)] - expected).abs().max() < 1e-13 * expected.abs().max()
