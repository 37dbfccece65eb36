"""The list notation of cycles, and their cost by eq. 10 of paper 000."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from xbraid_py.multilevel.schedule import Schedule

TABLE_1 = {
    "[{1}]": 1.00,
    "[(1), {2}]": 3.00,
    "[(1), 1, 2, {2}]": 5.00,
    "[(1), 1, 1, 2, 2, {2}]": 5.25,
    "[(1), 1, 1, 1, 2, 2, 2, {2}]": 5.19,
}
TABLE_2 = {  # the costs of the first two rows are swapped in print
    "[1, 1, 1, 1, 1, 1, 1, {1}]": 5.96,
    "[1, 1, 1, 1, 1, 1, 1, {2}]": 5.97,
    "[1, 1, 1, 1, 1, 1, 1, {5}]": 5.99,
    "[1, 1, 1, 1, 1, 1, 1, {10}]": 6.03,
    "[1, 1, 1, 1, 2, 2, 2, {2}]": 6.19,
    "[(1), 1, 1, 1, 2, 2, 2, {2}]": 5.19,
}
counts = some.integers(0, 30)


@given(some.lists(some.tuples(counts, counts), max_size=9), some.integers(1, 30))
def test_what_is_printed_is_read_again(steps, coarse):
    schedule = Schedule(tuple(pre for pre, _ in steps), tuple(post for _, post in steps), coarse)
    assert Schedule.parse(str(schedule)) == schedule


def test_entries():
    found = Schedule.parse(" [(1),2 , ( 3 ),4/5,{ 6 }] ")
    assert found == Schedule((1, 2, 3, 4), (0, 2, 0, 5), 6)
    assert str(found) == "[(1), 2, (3), 4/5, {6}]"


@pytest.mark.parametrize("text, work", [*TABLE_1.items(), *TABLE_2.items()])
def test_equation_10_gives_the_papers_costs(text, work):
    assert abs(Schedule.parse(text).work() - work) < 0.0051  # two decimals are printed


@pytest.mark.parametrize("levels, text", list(zip((1, 2, 4, 6, 8), TABLE_1, strict=True)))
def test_setup_of_the_paper(levels, text):
    assert str(Schedule.of_paper(levels)) == text


def test_cost_of_w_cycles_and_of_a_full_multigrid_start():
    schedule = Schedule((1, 1, 2), (0, 1, 1), 3)
    # Visits 1, 2, 4 and, of the coarsest, one for each visit of the level above it: 4.
    assert schedule.work("W") == 2 + 2 * 3 / 2 + 4 * 4 / 4 + 4 * 3 / 8
    coarsest, second, first = 3 / 8, (4 + 3 / 2) / 4, (3 + 4 / 2 + 3 / 4) / 2
    assert schedule.full_multigrid_work(2) == coarsest + 2 * (second + first + schedule.work())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(1), {2}", "must be a list in square brackets"),
        ("[]", "entry 1, ''"),
        ("[(1), 1, 2]", "entry 3, '2': the last entry and no other stands in curly brackets"),
        ("[(1), {2}, {2}]", r"entry 2, '\{2\}': the last entry and no other"),
        ("[(1), -1, {2}]", "entry 2, '-1', must be n"),
        ("[(1), 1.5, {2}]", "entry 2, '1.5'"),
        ("[(1, {2}]", r"entry 1, '\(1'"),
        ("[(1), {0}]", "coarse=0 must be at least 1"),
    ],
)
def test_malformed_lists_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"pre=\[1, 1\] and post=\[1\] must have one number"):
        Schedule((1, 1), (1,), 1)
    with pytest.raises(ValueError, match=r"pre=\[-1\] must all be at least 0"):
        Schedule((-1,), (1,), 1)
    with pytest.raises(ValueError, match="levels=0 must be at least 1"):
        Schedule.of_paper(0)


def test_costs_of_levels_that_are_narrower_too():
    schedule, costs = Schedule((1, 2), (0, 2), 3), [1.0, 1 / 8, 1 / 64]
    assert schedule.work(costs=costs) == 2 + 5 / 8 + 3 / 64
    assert schedule.full_multigrid_work(1, costs=costs) == 3 / 64 + (5 / 8 + 3 / 64) + schedule.work(costs=costs)
