"""The objective: value and gradient against autograd and differences, and the same bits on any number of ranks."""

from __future__ import annotations

import re

import pytest
import reference as ref
import torch
from small_problem import (
    ALL_RANKS,
    BATCH,
    TERMS,
    N,
    data,
    exact,
    problem,
    weights,
)

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.problem.options import InitialScales
from xbraid_py.problem.regularization import Regularization


@ALL_RANKS
@pytest.mark.parametrize("activation", ["smooth_relu", "relu", "tanh"])
@pytest.mark.parametrize("term", TERMS)
def test_value_and_gradient_against_autograd(spmd, term, activation):
    """16 layers in intervals of 4: on 5 and 8 ranks some have no layer."""
    value, loss, accuracy, _, states, gradient = exact(term, activation)

    def body(comm):
        objective = problem(comm, TERMS[term], activation=activation).objective(N)
        x = weights(objective.network)
        found = objective.evaluate(x)
        return found, objective.gradient(x), objective.states, objective.adjoint_residual

    parts = spmd(body)
    for found, *_, adjoint_residual in parts:
        assert found.value == pytest.approx(value, rel=1e-12) and found.loss == pytest.approx(loss, rel=1e-12)
        assert found.accuracy == accuracy
        assert found.residual < 1e-14 and adjoint_residual < 1e-14
    found = torch.cat([part[1] for part in parts])
    assert (found - gradient).abs().max() < 1e-12 * gradient.abs().max()
    assert (torch.cat([part[2] for part in parts]) - states).abs().max() < 1e-12 * states.abs().max()


@pytest.mark.parametrize("bias", ["vector", "scalar"])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_few_layers_propagated_one_after_the_other(spmd, num_layers, bias):
    value, _, _, _, _, gradient = exact("all, integral", "tanh", bias, num_layers)

    def body(comm):
        options = MGRIT(max_levels=1)
        objective = problem(comm, TERMS["all, integral"], options, bias=bias).objective(num_layers)
        x = weights(objective.network)
        return objective.evaluate(x).value, objective.gradient(x)

    parts = spmd(body)
    assert all(part[0] == pytest.approx(value, rel=1e-13) for part in parts)
    assert (torch.cat([part[1] for part in parts]) - gradient).abs().max() < 1e-12 * gradient.abs().max()


@pytest.mark.parametrize("term", TERMS)
def test_gradient_against_finite_differences(spmd, term):
    eps = 1e-5

    def body(comm):
        # Two levels and four intervals: exact after two iterations.
        objective = problem(comm, TERMS[term], MGRIT(cycle="V", cfactor=4, max_levels=2, max_iter=2)).objective(N)
        net = objective.network
        x, pairs = weights(net), []
        rows = {stack.name: stack.total for stack in net.layout.stacks}
        for name in rows:
            # In every stack on its own: a wrong factor of a small part must not hide behind a large one.
            d = net.initial(InitialScales(**{stack: float(stack == name) for stack in rows}), 5)
            ahead, behind = objective.evaluate(x + eps * d).value, objective.evaluate(x - eps * d).value
            objective.evaluate(x)
            pairs.append(((ahead - behind) / (2 * eps), float(objective.dots([objective.gradient(x)], [d]))))
        return pairs

    for pairs in spmd(body):
        for difference, slope in pairs:
            assert abs(slope) > 1e-4, "nothing to compare"
            assert slope == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("measure", ["sum", "integral"])
def test_regularization_of_smooth_weights_at_two_depths(measure):
    """As time integrals the terms do not depend on the depth; as sums they grow, or fall, with it."""

    def terms(num_layers, tikhonov, ddt):
        made = Regularization(tikhonov=tikhonov, ddt=ddt, classification=0.0, measure=measure)
        net = problem(SerialCommunicator(), made, MGRIT(max_levels=1)).network(num_layers)
        x = net.layout.zeros()
        rows = net.layout.rows(x)["layers"]
        rows.copy_(ref.smooth_weights(num_layers, rows.shape[1], 1.0, seed=6))
        return float(made.terms(net, x, num_layers)[0].sum())

    factor = 1.0 if measure == "integral" else 2.0
    assert terms(400, 0.5, 0.0) / terms(200, 0.5, 0.0) == pytest.approx(factor, rel=1e-2)
    assert terms(400, 0.0, 0.5) / terms(200, 0.0, 0.5) == pytest.approx(factor, rel=1e-2)


@ALL_RANKS
def test_the_same_bits_on_any_number_of_ranks(spmd):
    """One-shot: two iterations, warm starts, new weights every time, far from converged."""
    options = MGRIT(cfactor=2, max_levels=3, min_coarse=1, max_iter=2, cycle="F")

    def body(comm):
        objective = problem(comm, TERMS["all, integral"], options, batch=60).objective(N)
        record, gradients = [], []
        for update in range(3):
            x = weights(objective.network, 0.2 * update)
            record.append(objective.evaluate(x))
            gradients.append(objective.gradient(x))
            record += [objective.adjoint_residual, objective.dots(gradients, gradients).tolist(), objective.work]
            record.append(float(objective.dots(gradients[:1], [x])))
        return record, gradients

    record, gradients = body(SerialCommunicator())
    parts = spmd(body)
    assert all(part[0] == record for part in parts)
    for update, gradient in enumerate(gradients):
        assert torch.equal(torch.cat([part[1][update] for part in parts]), gradient)
    assert record[0].residual > 1e-8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_an_evaluation_that_is_not_finite_keeps_the_old_warm_start(spmd, value):
    options = MGRIT(cycle="V", cfactor=4, max_levels=2, min_coarse=1, max_iter=1)

    def body(comm, spoil):
        objective = problem(comm, TERMS["all, sum"], options).objective(N)
        x = weights(objective.network)
        first, kept = objective.evaluate(x), objective.warm[0].clone()
        objective.gradient(x)
        spoiled = None
        if spoil:
            spoiled = x.clone()
            objective.network.layout.rows(spoiled)["layers"].fill_(value)
            spoiled = objective.evaluate(spoiled).value
            assert torch.equal(objective.warm[0], kept)
        again = objective.evaluate(weights(objective.network, 0.1))
        return first, spoiled, again, objective.gradient(weights(objective.network, 0.1)), objective.evaluations

    with_it, without = spmd(lambda comm: body(comm, True)), spmd(lambda comm: body(comm, False))
    for (first, spoiled, again, gradient, count), (same, _, expected, other, fewer) in zip(
        with_it, without, strict=True
    ):
        assert not abs(spoiled) < float("inf") and first == same
        assert again == expected and torch.equal(gradient, other) and count == fewer + 1 == 3


def test_warm_starts_come_from_the_last_solve(spmd):
    options = MGRIT(cycle="V", cfactor=4, max_levels=2, min_coarse=1, max_iter=1)

    def body(comm):
        objective = problem(comm, TERMS["none"], options).objective(N)
        x = weights(objective.network)
        history = []
        for _ in range(4):
            residual = objective.evaluate(x).residual
            objective.gradient(x)
            history.append((residual, objective.adjoint_residual))
        more = problem(comm, TERMS["none"], options).objective(N)
        residual = more.evaluate(x, max_iter=6).residual
        more.gradient(x, max_iter=6)
        return history, (residual, more.adjoint_residual)

    for history, more in spmd(body):
        for fall, six in zip(zip(*history, strict=True), more, strict=True):
            # One iteration an evaluation, each from where the last one ended: exact after 4 / 2 of them.
            assert fall[0] > 1e-4 and fall[-1] < 1e-13 and six < 1e-13
            assert fall[1] < 0.5 * fall[0]


def test_float32(spmd):
    value, loss, *_, gradient = exact("all, sum", "tanh")

    def body(comm):
        objective = problem(comm, dtype=torch.float32).objective(N)
        x = weights(objective.network)
        return x.dtype, objective.evaluate(x), objective.gradient(x), objective.network.predict(x, data()[0].float())

    parts = spmd(body)
    for dtype, found, rows, classes in parts:
        assert dtype == rows.dtype == torch.float32 and len(classes) == BATCH
        assert found.value == pytest.approx(value, rel=1e-5) and found.loss == pytest.approx(loss, rel=1e-5)
    assert (torch.cat([part[2] for part in parts]) - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_work_is_that_of_the_plan(spmd):
    options = MGRIT(cycle="V", cfactor=4, max_levels=3, min_coarse=1, max_iter=2)

    def body(comm):
        made = problem(comm, forward=options)
        objective = made.objective(N)
        x = weights(objective.network)
        objective.evaluate(x), objective.gradient(x)
        cold = objective.work
        objective.evaluate(x), objective.gradient(x)
        return objective.work - cold, made.work_unit(N), cold

    for warm, unit, cold in spmd(body):
        assert warm == unit and cold > unit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tikhonov": -1.0}, "tikhonov=-1.0 must be at least 0 and finite; use 1e-6"),
        ({"ddt": float("nan")}, "ddt=nan must be at least 0 and finite"),
        ({"classification": float("inf")}, "classification=inf must be at least 0 and finite"),
        ({"measure": "mean"}, "measure='mean' must be sum or integral; use integral"),
    ],
)
def test_bad_regularization_names_what_works(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Regularization(**options)
