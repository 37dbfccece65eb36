"""`solve`: gradients of a loop over the steps, and what is refused or said.

Shape letters: `C` width, `B` batch.
"""

from __future__ import annotations

import doctest
import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
import reference as ref
import torch
from torch import nn

import xbraid_py
from xbraid_py import MGRIT, TimeStepper, solve
from xbraid_py.comm import SerialCommunicator

RANKS = pytest.mark.ranks(1, 2, 3, long=(5,))
EXACT = MGRIT(cycle="V", tol=1e-13)


def uneven(steps: int) -> torch.Tensor:
    """Times on [0, 1] at distances that grow."""
    lengths = torch.linspace(1, 3, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1).double(), lengths.cumsum(0) / lengths.sum()])


def marched(step, u0, t):
    """All states, one step after the other."""
    states = [u0]
    for t0, t1 in pairwise(t.tolist()):
        states.append(step(states[-1], t0, t1))
    return torch.stack(states)


# ---- Gradients.


class Field(nn.Module):
    """u + h tanh(W u + b + t) for states (C, B)."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(ref.random(3, 3, seed=1))
        self.b = nn.Parameter(ref.random(3, 1, seed=2))
        self.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, u, t0, t1):
        return u + (t1 - t0) * self.frozen * torch.tanh(self.W @ u + self.b + t0)


def losses(states: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A loss that every state has a share in."""
    return ((1 + t)[:, None, None] * (states - 0.1).square()).sum()


@RANKS
@pytest.mark.parametrize("output", ["all", "own", "end"])
def test_gradients_are_those_of_a_loop(spmd, output):
    """By the first state and all parameters; on each number of ranks the same bits."""
    options = [EXACT, MGRIT(cycle="F", cfactor=2, max_levels=4, tol=1e-13), MGRIT(cfactor=4, tol=1e-13)]
    options += [MGRIT(max_levels=1)]

    def gradients(field, u0, loss):
        return torch.autograd.grad(loss, [u0, field.W, field.b])

    def body(comm):
        found = []
        for steps, each in [(24, each) for each in options] + [(19, EXACT)]:
            t = uneven(steps)
            field, u0 = Field(), ref.random(3, 2, seed=3).requires_grad_()
            solved = solve(TimeStepper(field), u0, t, comm, mgrit=each, output=output)
            found.append(gradients(field, u0, losses(solved.states, solved.t)))
            assert (solved.adjoint_residuals == []) == (each.max_levels == 1)
        return found

    serial = body(SerialCommunicator())
    ranks = spmd(body)
    for number, steps in enumerate([24] * len(options) + [19]):
        t = uneven(steps)
        field, u0 = Field(), ref.random(3, 2, seed=3).requires_grad_()
        states = marched(field, u0, t)
        if output == "end":
            states, t = states[-1:], t[-1:]
        expected = gradients(field, u0, losses(states, t))
        for of_rank in ranks:
            for one, alone, by_loop in zip(of_rank[number], serial[number], expected, strict=True):
                assert float((one - by_loop).abs().max()) <= 1e-10 * float(by_loop.abs().max())
                assert torch.equal(one, alone)


def test_gradients_are_slopes():
    """Against central differences, of an implicit step with a parameter that is computed from another."""
    rate, u0 = torch.tensor(0.3).double().requires_grad_(), ref.random(4, seed=1).requires_grad_()
    t = 2 * uneven(40)

    def end(rate, u0):
        matrix = torch.eye(4).double() * rate.exp() + 0.1 * ref.random(4, 4, seed=2)

        def step(u, t0, t1):
            return torch.linalg.solve(torch.eye(4).double() + (t1 - t0) * matrix, u)

        return solve(TimeStepper(step, parameters=[matrix]), u0, t, mgrit=EXACT).end.square().sum()

    assert torch.autograd.gradcheck(end, (rate, u0), eps=1e-5, atol=1e-8)


def test_a_second_backward_pass_and_what_torch_says_of_graphs():
    field, u0 = Field(), ref.random(3, 2, seed=3).requires_grad_()
    loss = solve(TimeStepper(field), u0, torch.linspace(0, 1, 33)).end.sum()
    first = torch.autograd.grad(loss, [u0, field.W], retain_graph=True)
    again = torch.autograd.grad(loss, [u0, field.W], retain_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="create_graph=True: solve has no second derivatives"):
        torch.autograd.grad(loss, u0, create_graph=True)
    with torch.no_grad():
        field.W.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- What is refused, and what is said.


def decay(u, t0, t1):
    return u * (1 + t0 - t1)


REFUSED = {
    "not a stepper": (lambda comm: solve(decay, 1.0, [0, 1], comm), "stepper=function must be a TimeStepper; use"),
    "no function": (lambda comm: TimeStepper(3), "step=3 is no function; use lambda u, t0, t1"),
    "no tensors": (lambda comm: TimeStepper(decay, parameters=[1.0]), "parameters has float; use tensors"),
    "integers": (lambda comm: solve(TimeStepper(decay), 1, [0, 1], comm), "u0 has the type torch.int64 and must"),
    "one time": (lambda comm: solve(TimeStepper(decay), 1.0, [0.0], comm), r"t has the shape \(1,\) and must be 2 to"),
    "times": (
        lambda comm: solve(TimeStepper(decay), 1.0, [0, 1, 1], comm),
        r"t\[1\]=1 and t\[2\]=1: times must be finite and rise, or fall",
    ),
    "nan": (lambda comm: solve(TimeStepper(decay), 1.0, [0, 1, np.nan], comm), r"t\[1\]=1 and t\[2\]=nan: times must"),
    "slopes of times": (
        lambda comm: solve(TimeStepper(decay), 1.0, torch.linspace(0, 1, 5, requires_grad=True), comm),
        "t requires a gradient, and times have none; use t.detach",
    ),
    "shape": (
        lambda comm: solve(TimeStepper(lambda u, t0, t1: u[:1]), torch.ones(2), [0, 1], comm),
        r"step\(u, 0, 1\) gives \(1,\) float32 on cpu; use a state like u, \(2,\) float32 on cpu",
    ),
    "type": (
        lambda comm: solve(TimeStepper(lambda u, t0, t1: u.double()), torch.ones(2), [0, 1], comm),
        r"step\(u, 0, 1\) gives \(2,\) float64 on cpu; use a state like u",
    ),
    "nothing": (
        lambda comm: solve(TimeStepper(lambda u, t0, t1: None), torch.ones(2), [0, 1], comm),
        r"step\(u, 0, 1\) gives NoneType; use a tensor like u",
    ),
    "in place": (
        lambda comm: solve(TimeStepper(lambda u, t0, t1: u.mul_(2)), torch.ones(2), [0, 1], comm),
        r"step\(u, 0, 1\) writes into u; use u.clone\(\) there",
    ),
    "coarse": (
        lambda comm: solve(TimeStepper(decay, coarse=[decay, lambda u, t0, t1: None]), np.ones(2), [0, 1], comm),
        r"coarse\[1\]\(u, 0, 1\) gives NoneType; use an array of numpy like u",
    ),
    "detached": (
        lambda comm: solve(
            TimeStepper(lambda u, t0, t1: torch.from_numpy(u.detach().numpy() * 2)),
            torch.ones(3, requires_grad=True),
            [0, 1],
            comm,
        ),
        "step gives a state without a gradient: something in it is computed outside of torch",
    ),
    "lost parameters": (
        lambda comm: solve(
            TimeStepper(Field().forward),
            torch.ones(3, 1).double().requires_grad_(),
            [0, 1],
            comm,
        ),
        r"step uses a tensor of shape \(3, [13]\) that requires a gradient and is not among the parameters",
    ),
    "pipeline": (
        lambda comm: solve(TimeStepper(decay), 1.0, [0, 1], comm, mgrit=MGRIT(cycle="pipeline")),
        "cycle='pipeline' with portions=None: an equation has no samples",
    ),
    "scheme": (
        lambda comm: solve(TimeStepper(decay), 1.0, [0, 1], comm, mgrit=MGRIT(cycle="V", coarse_step="euler")),
        "coarse_step='euler', coarse_weights='average' are for layers; leave them out, and use TimeStepper",
    ),
    "output": (
        lambda comm: solve(TimeStepper(decay), 1.0, [0, 1], comm, output="last"),
        "output='last' must be 'all' or 'end' or 'own'; use 'all'",
    ),
    "options": (lambda comm: solve(TimeStepper(decay), 1.0, [0, 1], comm, mgrit="V"), "mgrit='V' must be of MGRIT"),
    "ranks": (
        lambda comm: comm.rank < 0 or solve(TimeStepper(decay), 1.0 + comm.rank, [0, 1], comm),
        r"arguments of solve: u0=.* on rank 0 but .* on rank.*; every rank must have the same",
    ),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_so_on_all_ranks_in_one_sentence(spmd, name):
    call, words = REFUSED[name]

    def body(comm):
        try:
            return call(comm)
        except (ValueError, TypeError) as error:
            return str(error)

    for text in spmd(body):
        assert re.search(words, text)


def test_an_error_of_one_rank_is_one_of_all(spmd):
    def body(comm):
        step = (lambda u, t0, t1: u[:1]) if comm.rank == comm.size - 1 else decay
        try:
            solve(TimeStepper(step), torch.ones(2), np.linspace(0, 1, 33), comm)
        except ValueError as error:
            return str(error)

    assert all("gives (1,) float32 on cpu" in text for text in spmd(body))


def test_what_is_not_asked_for_need_not_fit():
    """A step with parameters of which no gradient is wanted, and one outside of torch."""
    found = solve(TimeStepper(Field().forward), torch.ones(3, 1).double(), uneven(9))
    assert found.converged and not found.states.requires_grad
    with torch.no_grad():
        start = torch.ones(3, requires_grad=True)
        assert solve(TimeStepper(lambda u, t0, t1: torch.from_numpy(u.numpy() * 2)), start, [0, 1]).end[0] == 2.0


@RANKS
def test_what_has_not_converged_is_said_once_forwards_and_backwards(spmd):
    """And that there is no coarse level; of a fixed number of iterations nothing."""
    t = torch.linspace(0, 5, 65)

    def body(comm):
        def call(t, **options):
            start = torch.ones(1, 1).double().requires_grad_()
            options = {"cycle": "V", "cfactor": 2, "nrelax": 0, "max_iter": 1, **options}
            found = solve(TimeStepper(decay), start, t, comm, mgrit=MGRIT(**options))
            found.end.sum().backward()
            return found.converged

        return call(t, tol=1e-12), call(t, tol=0.0), call(t[:5])

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = spmd(body)
    assert results == [(False, None, True)] * len(results)
    # Ranks that are threads have one list of warnings.
    first, *others = spmd(lambda comm: [str(each.message) for each in said])
    assert all(each in ([], first) for each in others)
    states, adjoints, *turns = first
    for text, what in ((states, "states"), (adjoints, "adjoints")):
        assert re.match(
            r"solve has stopped at max_iter=1 with a relative residual of \d\.\de-\d\d of the " + what, text
        )
        assert text.endswith("above tol=1e-12; use a greater max_iter, a smaller cfactor or a greater nrelax")
    assert len(turns) == (len(results) > 1)
    assert all(each.startswith("t has 5 points, too few for a coarse level: the ranks take turns") for each in turns)


def test_coarse_steps_that_blow_up_are_named_and_left_behind():
    """Two more intervals are exact after each iteration, whatever the coarse level makes of the others."""
    cubic, t = TimeStepper(lambda u, t0, t1: u - (t1 - t0) * u**3), torch.linspace(0, 0.64, 65, dtype=torch.float64)
    start = torch.full((1,), 9.0, dtype=torch.float64)
    with pytest.warns(UserWarning, match="residual of nan of the states, above .* since coarse steps blow up"):
        solve(cubic, start, t, mgrit=MGRIT(cycle="V", max_iter=2, tol=1e-9))
    found = solve(cubic, start, t)
    assert found.converged and found.iterations <= 9
    assert torch.allclose(found.states, marched(cubic.step, start, t), rtol=1e-9)


def test_names_and_the_example_of_the_docstring():
    (test,) = doctest.DocTestFinder(recurse=False).find(solve, "solve", globs={})
    failed, attempted = doctest.DocTestRunner().run(test)
    assert attempted == 4 and failed == 0
    assert xbraid_py.solve is solve and xbraid_py.TimeStepper is TimeStepper
    assert xbraid_py.Trajectory.__name__ == "Trajectory"


def test_arrays_for_an_array_whatever_the_times_are():
    found = solve(TimeStepper(lambda u, t0, t1: 2 * u), np.ones(2), torch.linspace(0, 1, 3))
    assert isinstance(found.states, np.ndarray) and found.end.tolist() == [4.0, 4.0]
    assert isinstance(found.t, torch.Tensor)
