"""The plan of multi-level training: table 1 and 2 of paper 003, its learning rate, bad input."""

from __future__ import annotations

import math

import pytest

from xbraid_py.multilevel.resnet.options import CosineCycles, Discretization, plan


def test_table1():
    growing = [Discretization((2, 2, 2), 1.0), Discretization((4, 4, 4), 0.5), Discretization((8, 8, 8), 0.25)]
    assert list(plan("multilevel", (2, 2, 2), 3)) == growing
    assert list(plan("first", (2, 2, 2), 3)) == growing[:1] * 3
    assert list(plan("last", (2, 2, 2), 3)) == growing[-1:] * 3
    assert plan("last", (5, 5, 5), 3, 2.0, last_step_size=1.0) == (Discretization((20, 20, 20), 1.0),) * 3
    assert plan("multilevel", (1, 3), 1) == (Discretization((1, 3), 1.0),)


@pytest.mark.parametrize("interpolations", range(6))
def test_table2(interpolations):
    k = interpolations
    cycles = CosineCycles(epochs=(7,) * (k + 1))
    assert cycles.time_saved == pytest.approx(1 - (2 ** (k + 1) - 1) / (2**k * (k + 1)))
    assert round(100 * cycles.time_saved) == (0, 25, 42, 53, 61, 67)[k]


def test_the_epochs_of_the_paper():
    cycles = CosineCycles()
    assert (cycles.total, cycles.ends, cycles.time_saved) == (160, (60, 110, 160), 0.4375)
    assert [cycles.cycle_of(epoch) for epoch in (0, 59, 60, 109, 110, 159)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("reset", [True, False])
def test_learning_rate_is_that_of_equation_9(reset):
    cycles = CosineCycles(epochs=(3, 2, 4), eta_max=0.5, eta_min=0.001, reset=reset)
    found = [cycles.learning_rate(step, 5) for step in range(45)]
    expected = []
    for epochs in (3, 2, 4) if reset else (9,):
        total = epochs * 5
        for current in range(total):
            expected.append(0.001 + 0.5 * (0.5 - 0.001) * (1 + math.cos(current / total * math.pi)))
    assert found == pytest.approx(expected, rel=1e-14)
    starts = [0, 15, 25] if reset else [0]
    assert [step for step in range(45) if found[step] == 0.5] == starts
    assert all(found[step] < found[step - 1] for step in range(45) if step not in starts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": ()}, r"^epochs=\[\] must be numbers of at least 1"),
        ({"epochs": (3, 0)}, r"^epochs=\[3, 0\] must be numbers of at least 1, one for each cycle; use 60,50,50$"),
        ({"eta_min": 0.6}, "^eta_min=0.6 and eta_max=0.5 must be ordered"),
        ({"eta_max": math.inf}, "must be ordered, at least 0 and finite; use 0.001 and 0.5$"),
        ({"eta_max": math.nan}, "must be ordered"),
    ],
)
def test_bad_cycles(changes, message):
    with pytest.raises(ValueError, match=message):
        CosineCycles(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("middle", (2, 2), 2), "^model='middle' must be first, last or multilevel; use multilevel$"),
        (("last", (2, 0), 2), r"^blocks=\[2, 0\] must be numbers of at least 1"),
        (("multilevel", (1, 1, 2), 2), r"^blocks=\[1, 1, 2\]: stages behind the first .*; use \[1, 2, 2\]$"),
        (("first", (2,), 2, 0.0), "^step_size=0.0 must be positive and finite; use 1.0$"),
        (("last", (2,), 2, 1.0, -1.0), "^last_step_size=-1.0 must be positive"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_epochs_beyond_the_end():
    with pytest.raises(ValueError, match=r"^epoch=160 must lie in 0 .. 159; use 0$"):
        CosineCycles().cycle_of(160)
