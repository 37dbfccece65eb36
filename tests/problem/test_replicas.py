"""Replicas times layers: exact by a pipeline, and the same bits on any number of ranks and of replicas."""

import pytest
import torch
from small_problem import BATCH, TERMS, N, data, exact, problem, weights

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT
from xbraid_py.problem.options import InitialScales

PIPELINE = MGRIT(cycle="pipeline", portions=6)
SPLITS = pytest.mark.ranks(1, 2, 3, 4, 6)


def of_owner(comm, network, flat: torch.Tensor) -> torch.Tensor:
    """The whole vector, from the parts of all ranks."""
    sizes = [network.layout_of(rank).size for rank in range(comm.size)]
    return comm.allgather(flat, sizes)


def results(comm, replicas: int, forward=PIPELINE, **options):
    made = problem(comm, forward=forward, replicas=replicas, **options)
    objective = made.objective(N)
    network = objective.network
    x = weights(network) if network.splines is None else network.initial(InitialScales(1.5, 0.5, 1.5), 8)
    found = objective.evaluate(x)
    gradient = objective.gradient(x)
    dots = objective.dots([x, gradient], [gradient])
    classes = network.predict(x, data()[0])
    return found, of_owner(comm, network, gradient), dots, classes, objective.work


def divisors(size: int) -> list[int]:
    return [each for each in range(1, size + 1) if size % each == 0]


@SPLITS
@pytest.mark.parametrize("term", ["none", "all, sum"])
def test_value_and_gradient_are_exact(spmd, term):
    value, loss, *_, gradient = exact(term, "tanh")
    right = int((results(SerialCommunicator(), 1)[3] == data()[1]).sum())
    for found in spmd(lambda comm: [results(comm, r, regularization=TERMS[term]) for r in divisors(comm.size)]):
        for evaluation, flat, dots, _, work in found:
            assert evaluation.value == pytest.approx(float(value), rel=1e-13)
            assert evaluation.loss == pytest.approx(float(loss), rel=1e-13)
            assert evaluation.residual == 0.0 and round(evaluation.accuracy * BATCH) == pytest.approx(right)
            torch.testing.assert_close(flat, gradient, rtol=1e-12, atol=1e-14)
            assert float(dots[1, 0]) == pytest.approx(float(gradient @ gradient), rel=1e-12)
            assert work == 3 * N


@SPLITS
@pytest.mark.parametrize("splines", [None, Splines(5, 1)], ids=["free", "splines"])
def test_bits_are_those_of_one_rank(spmd, splines):
    def with_splines(comm, replicas):
        return results(comm, replicas, splines=splines)

    evaluation, gradient, dots, classes, _ = with_splines(SerialCommunicator(), 1)
    for found in spmd(lambda comm: [with_splines(comm, r) for r in divisors(comm.size)]):
        for each in found:
            assert each[0] == evaluation
            assert torch.equal(each[1], gradient) and torch.equal(each[2], dots) and torch.equal(each[3], classes)


@SPLITS
@pytest.mark.parametrize("cycle", ["lagged", "V"])
def test_with_portions_mgrit_has_the_same_bits_too(spmd, cycle):
    forward = MGRIT(cycle=cycle, portions=6, cfactor=2, max_iter=2)
    evaluation, gradient, _, classes, work = results(SerialCommunicator(), 1, forward)
    for found in spmd(lambda comm: [results(comm, r, forward) for r in divisors(comm.size)]):
        for each in found:
            # Replicas sum the terms of regularization by themselves: in another order.
            assert each[0].loss == evaluation.loss and each[0].value == pytest.approx(evaluation.value, rel=1e-14)
            assert torch.equal(each[1], gradient) and torch.equal(each[3], classes)
            assert each[4] == pytest.approx(work, rel=1e-14)


def test_one_portion_is_layer_after_layer():
    one, plain = (
        results(SerialCommunicator(), 1, each) for each in (MGRIT(cycle="pipeline", portions=1), MGRIT(max_levels=1))
    )
    assert one[0].loss == plain[0].loss and torch.equal(one[1], plain[1])


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "forward", [PIPELINE, MGRIT(cycle="lagged", portions=4, cfactor=2)], ids=["pipeline", "lagged"]
)
def test_samples_are_exchanged(spmd, forward):
    def body(comm, replicas):
        objective = problem(comm, forward=forward, replicas=replicas).objective(N)
        x = weights(objective.network)
        objective.evaluate(x)
        features, labels = data()
        objective.use(features.flip(1)[:, :20].contiguous(), labels.flip(0)[:20])
        return objective.evaluate(x), of_owner(comm, objective.network, objective.gradient(x))

    evaluation, gradient = body(SerialCommunicator(), 1)
    for found in spmd(lambda comm: [body(comm, r) for r in (1, 2, 4)]):
        for own, flat in found:
            assert own.loss == evaluation.loss and torch.equal(flat, gradient)


@pytest.mark.ranks(4)
def test_what_solves_start_from_is_that_of_all_samples(spmd):
    forward = MGRIT(cycle="lagged", portions=4, cfactor=4)

    def body(comm, replicas):
        objective = problem(comm, forward=forward, replicas=replicas).objective(N)
        x = weights(objective.network)
        objective.evaluate(x)
        objective.gradient(x)
        kept = [tuple(rows.clone() for rows in warm) for warm in (objective.warm, objective.adjoint_warm)]
        ends = objective.evaluate(x), objective.gradient(x)
        other = problem(comm, forward=forward, replicas=replicas).objective(N)
        other.warm, other.adjoint_warm = kept
        again = other.evaluate(x), other.gradient(x)
        assert again[0] == ends[0] and torch.equal(again[1], ends[1])
        stages = objective.forward.hierarchy.intervals
        return [torch.cat([rows]) for rows in kept[0]], stages.bounds[comm.rank // replicas :][:2]

    (whole,), _ = body(SerialCommunicator(), 1)
    assert whole.shape[-1] == BATCH
    for found in spmd(lambda comm: [body(comm, r) for r in (1, 2, 4)]):
        for (rows,), (first, stop) in found:
            assert torch.equal(rows, whole[first:stop])


def test_more_replicas_than_portions_are_refused():
    class Four(SerialCommunicator):
        size = 4

    with pytest.raises(ValueError, match=r"replicas=4 are more than the portions=2 .*use at most 2 replicas"):
        problem(Four(), forward=MGRIT(cycle="pipeline", portions=2), replicas=4)
    with pytest.raises(ValueError, match=r"replicas=3 does not divide the 4 rank\(s\); use 1, 2 or 4"):
        problem(Four(), replicas=3)
