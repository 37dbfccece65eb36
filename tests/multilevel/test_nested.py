"""Nested iteration: transfers between depths, schedules, work units, and the same run on any number of ranks."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from refusal import refusal
from small_runs import MIXED, ONE_SHOT, SEQUENTIAL, gathered, nested, problem, same_bits, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.multilevel.depth.transfer import prolong_depth
from xbraid_py.optim import Armijo, OneShotOptions

F_CYCLES = MGRIT(cfactor=(4, 2), max_levels=3, min_coarse=1, cycle="F", nrelax=0)
LOOSE = replace(ONE_SHOT, tol=1e6)  # one iteration, whatever comes out
CYCLES = {"V": MIXED, "F": F_CYCLES, "lagged": ONE_SHOT}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(refinements=-1), "refinements=-1 must be at least 0 and at most 20; use 2"),
        (
            dict(refinements=1, updates=(5, 5, 5)),
            "updates=[5, 5, 5] must have refinements + 1 = 2 numbers, the coarsest level first; use [100, 100]",
        ),
        (dict(refinements=1, updates=(5, -1)), "updates=[5, -1] must all be at least 0; use [100, 100]"),
        (dict(interpolation="cubic"), "interpolation='cubic' must be constant or linear; use constant"),
    ],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        NestedOptions(**options)
    assert str(caught.value) == message


def test_depths():
    assert NestedOptions().depths(64) == [16, 32, 64]
    assert NestedOptions(refinements=0, updates=(1,)).depths(7) == [7]
    assert NestedOptions(refinements=3, updates=(1,) * 4).depths(8) == [1, 2, 4, 8]
    with pytest.raises(ValueError, match=r"^num_layers=30 is not a multiple of 2\^refinements=4; use 28 or 32$"):
        NestedOptions().depths(30)
    with pytest.raises(ValueError, match=r"^num_layers=3 is not a multiple of 2\^refinements=4; use 4$"):
        NestedOptions().depths(3)


@pytest.mark.parametrize("num_layers", [0, -4])
def test_no_layers_is_no_network(num_layers):
    with pytest.raises(ValueError, match="num_layers=.* must be at least 1"):
        NestedOptions().depths(num_layers)


@pytest.mark.parametrize(
    "updates, equal_work", [((200, 125, 75), 188), ((200, 100, 50), 150), ((200, 200, 200), 350), ((7,), 7)]
)
def test_the_run_of_comparison_makes_as_much_work(updates, equal_work):
    given = NestedOptions(refinements=len(updates) - 1, updates=updates, interpolation="linear")
    expected = NestedOptions(refinements=0, updates=(equal_work,), interpolation="linear")
    assert given.non_nested() == expected


@pytest.mark.parametrize("mgrit", [MIXED, F_CYCLES, SEQUENTIAL, LOOSE], ids=["V", "F", "sequential", "lagged"])
def test_an_update_without_backtracking_costs_a_work_unit(mgrit):
    boosted = 2
    # With every trial accepted an update is one state solve and one adjoint solve.
    one_shot = OneShotOptions(fixed_step=1e-2, boost_updates=boosted, boost_iter=6)
    records = list(nested(SerialCommunicator(), (8,), mgrit, num_layers=16, one_shot=one_shot).run())
    costs = [after.work - before.work for before, after in zip(records, records[1:], strict=False)]
    assert costs[boosted:-1] == pytest.approx([1.0] * (7 - boosted), rel=1e-12)
    # The last update needs no gradient at its end.
    assert 0.0 < costs[-1] < 0.5
    assert [record.evaluations for record in records] == list(range(1, 10))
    if mgrit in (SEQUENTIAL, LOOSE):
        assert records[0].work == pytest.approx(1.0, rel=1e-12)
    else:
        assert min(records[0].work, *costs[:boosted]) > 1.5


def test_an_update_costs_half_as_much_on_the_next_coarser_level():
    one_shot = OneShotOptions(fixed_step=1e-2)
    records = list(nested(SerialCommunicator(), (4, 4, 4), SEQUENTIAL, num_layers=16, one_shot=one_shot).run())
    costs = [after.work - before.work for before, after in zip(records, records[1:], strict=False)]
    # A state solve is a third of the whole; a level ends without a gradient and the next begins with both.
    end, begin = 1 / 3, 1.0
    expected = [0.25] * 3 + [0.25 * end + 0.5 * begin] + [0.5] * 3 + [0.5 * end + begin] + [1.0] * 3 + [end]
    assert costs == pytest.approx(expected, rel=1e-12)
    # State solves: one where a level begins, and one for each update.
    assert [record.evaluations for record in records] == [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 15]


def test_a_rejected_trial_is_paid_for():
    records = list(nested(SerialCommunicator(), (12,), SEQUENTIAL, num_layers=16).run())
    costs = [after.work - before.work for before, after in zip(records, records[1:], strict=False)]
    expected = [1.0 + record.backtracks / 3 for record in records[1:-1]]
    assert sum(record.backtracks for record in records) > 0
    assert costs[:-1] == pytest.approx(expected, rel=1e-12)
    spent = [after.evaluations - before.evaluations for before, after in zip(records, records[1:], strict=False)]
    assert spent == [1 + record.backtracks for record in records[1:]]


def test_one_record_for_each_update_and_one_at_the_end():
    records = list(nested(SerialCommunicator(), (3, 0, 2)).run())
    assert [(record.level, record.num_layers, record.update) for record in records] == [
        *((2, 8, update) for update in (0, 1, 2)),
        *((0, 32, update) for update in (3, 4, 5)),
    ]
    assert [record.final for record in records] == [False] * 5 + [True]
    assert [record.grad_norm is None for record in records] == [False] * 5 + [True]
    seconds = [record.seconds for record in records]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_level_that_ends_early_hands_its_note_on():
    # Nothing goes down as far as this line search asks for.
    one_shot = OneShotOptions(line_search=Armijo(decrease=0.999999, max_backtracks=0))
    records = list(nested(SerialCommunicator(), (3, 2), one_shot=one_shot, num_layers=16).run())
    note = "update 0: no descent along the gradient either; this level ends here"
    assert [(record.level, record.update, record.note) for record in records] == [
        (1, 0, None),
        (0, 1, note),
        (0, 2, note),
    ]
    assert [record.final for record in records] == [False, False, True]


def test_a_level_begins_where_the_prolonged_weights_are():
    run = nested(SerialCommunicator(), (3, 2), interpolation="linear", num_layers=16)
    coarse = None
    for record in run.run():
        if record.level == 1:
            last = run.one_shot
        elif coarse is None:
            coarse, fine = last.x, run.weights
    network = run.problem.network(8)
    expected = prolong_depth(network, run.network, coarse, "linear")
    assert last.number == 3 and torch.equal(fine, expected)
    assert not torch.equal(run.weights, expected)


@cache
def trained(cycle: str, comm=None):
    """Records and final weights of 20 updates on three levels."""
    run = nested(comm or SerialCommunicator(), (8, 6, 6), CYCLES[cycle])
    records = [timeless(record) for record in run.run()]
    return records, gathered(run.network, run.weights)


@pytest.mark.parametrize("cycle", CYCLES)
def test_a_run_of_20_updates_is_bitwise_the_same_on_any_number_of_ranks(spmd, cycle):
    expected, weights = trained(cycle)
    assert expected[-1].update == 20 and expected[-1].evaluation.value < 0.9 * expected[0].evaluation.value
    for records, found in spmd(lambda comm: trained.__wrapped__(cycle, comm)):
        assert records == expected
        assert same_bits(found, weights)


def test_the_runs_above_move_levels_between_ranks():
    for size in (3, 5):
        levels = problem(_Size(size)).hierarchies(32)[0].levels
        assert len(levels) == 3 and any(level.induced != level.rows for level in levels)


class _Size(SerialCommunicator):
    """Enough of a communicator to plan hierarchies for many ranks."""

    def __init__(self, size):
        self.size = size


@pytest.mark.ranks(2, 3, 5)
def test_more_ranks_than_layers_are_refused(spmd):
    def message(comm, num_layers):
        return refusal(ValueError, nested, comm, (1,), SEQUENTIAL, num_layers=num_layers)

    found = spmd(lambda comm: message(comm, comm.size - 1))
    size = len(found)
    assert found == [f"{size} ranks are more than num_layers={size - 1}; use at most {size - 1} ranks"] * size
    assert set(spmd(lambda comm: message(comm, comm.size))) == {None}


@pytest.mark.ranks(2, 5)
def test_a_coarsest_level_with_fewer_layers_than_ranks_is_fine(spmd):
    def body(comm):
        return [timeless(record) for record in nested(comm, (2, 2, 2), SEQUENTIAL, num_layers=8).run()]

    expected = body(SerialCommunicator())
    assert all(records == expected for records in spmd(body))


def test_solvers_on_different_partitions_are_refused():
    with pytest.raises(ValueError) as caught:
        nested(_Size(3), (1,), MIXED, adjoint=MGRIT(cycle="V", cfactor=8))
    assert str(caught.value) == (
        "adjoint.cfactor=8 must begin with the same coarsening factor as mgrit.cfactor=(4, 2), "
        "and both or neither have max_levels=1"
    )
