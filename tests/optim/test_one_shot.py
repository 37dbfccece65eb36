"""What the one-shot optimizer asks of its objective, how often, and how it ends."""

import math

import pytest
import torch
from objectives import Valleys, evaluation

from xbraid_py.comm.agreement import RunError
from xbraid_py.optim import OneShot, OneShotOptions


def optimizer(objective, **options) -> OneShot:
    return OneShot(objective, OneShotOptions(**options), objective.start)


class Lying(Valleys):
    """Points uphill in solves that are not `accurate` enough, once `calm` gradients have been right."""

    def __init__(self, calm: int, accurate: float, **of_valleys):
        super().__init__(2, **of_valleys)
        self.calm, self.accurate = calm, accurate

    def gradient(self, x, max_iter=None, exact=False):
        self.calm -= 1
        right = self.calm >= 0 or (max_iter or 0) >= self.accurate
        return super().gradient(x, max_iter) * (1 if right else -1)


@pytest.mark.parametrize("method", ["lbfgs", "bfgs", "steepest"])
def test_an_accepted_trial_is_not_evaluated_again(method):
    objective = Valleys(3)
    updates = list(optimizer(objective, method=method).run(30))
    backtracks = [update.backtracks for update in updates]
    assert len(updates) == 30 and sum(backtracks) > 0
    # After the last yield comes one more update, whose gradient nobody needs.
    kinds = "".join(kind[0] for kind, _, _ in objective.calls)
    expected = "eg" + "".join("e" * (count + 1) + "g" for count in backtracks[1:])
    assert kinds.startswith(expected)
    assert set(kinds[len(expected) :]) == {"e"}


def test_a_gradient_is_asked_for_where_the_objective_was_evaluated_last():
    objective = Valleys(3)
    points = [(one_shot.x, one_shot.gradient) for one_shot in (optimizer(objective),) for _ in one_shot.run(30)]
    gradients = [k for k, (kind, _, _) in enumerate(objective.calls) if kind == "gradient"]
    assert len(gradients) == 30
    for k, (x, gradient) in zip(gradients, points, strict=True):
        assert torch.equal(objective.calls[k][1], objective.calls[k - 1][1])
        assert torch.equal(objective.calls[k][1], x)
        assert torch.equal(objective.gradient_at(x), gradient)


def test_an_update_describes_the_present_point():
    objective = Valleys(3)
    one_shot = optimizer(objective)
    before = None
    for number, update in enumerate(one_shot.run(12)):
        assert update.number == one_shot.number == number
        assert update.evaluation.value == objective.value_at(one_shot.x)
        assert update.grad_norm == pytest.approx(float(objective.gradient_at(one_shot.x).norm()), rel=1e-14)
        if before is None:
            assert (update.step, update.backtracks) == (0.0, 0)
        else:
            assert update.step == 0.5**update.backtracks
            assert update.evaluation.value < before.value
        before = update.evaluation
    assert number == 11


@pytest.mark.parametrize("boosted", [0, 1, 3])
def test_more_iterations_for_the_first_updates_only(boosted):
    objective = Valleys(3)
    updates = list(optimizer(objective, boost_updates=boosted, boost_iter=7).run(8))
    assert len(updates) == 8
    expected = [7 if boosted else None] * 2
    for number, update in enumerate(updates[1:]):
        # The trials that lead away from state `number`, and the gradient at the next state.
        expected += [7 if number < boosted else None] * (update.backtracks + 1)
        expected += [7 if number + 1 < boosted else None]
    assert [max_iter for _, _, max_iter in objective.calls][: len(expected)] == expected
    assert all(max_iter is None for _, _, max_iter in objective.calls[len(expected) :])


def test_updates_are_made_up_to_a_number_in_one_run_or_two():
    objective, other = Valleys(3), Valleys(3)
    once, twice = optimizer(objective), optimizer(other)
    expected = [(update, once.x.tolist()) for update in once.run(12)]
    found = [(update, twice.x.tolist()) for updates in (5, 12) for update in twice.run(updates)]
    # The pair across the seam is not known: the first part ends without a gradient.
    assert found[:5] == expected[:5] and [update.number for update, _ in found] == list(range(12))
    # Only the point where the first part began had to be evaluated for its own sake.
    kinds = [[kind for kind, _, _ in asked.calls].count("evaluate") for asked in (objective, other)]
    assert kinds[1] == 1 + sum(update.backtracks + 1 for update, _ in found[1:]) + twice.backtracks + 1
    assert not list(twice.run(12)) and not list(optimizer(Valleys(1)).run(0))


@pytest.mark.parametrize("gtol", [1e-1, 1e-6])
def test_a_level_ends_at_the_first_small_gradient(gtol):
    objective = Valleys(3)
    one_shot = optimizer(objective, gtol=gtol)
    norms = [update.grad_norm for update in one_shot.run(500)]
    assert norms[-1] <= gtol < min(norms[:-1])
    assert len(norms) == one_shot.number + 1 < 500 and one_shot.note is None
    assert objective.calls[-1][0] == "gradient"
    # A little less, and the level goes on.
    more = list(optimizer(Valleys(3), gtol=0.9999 * norms[-1]).run(500))
    assert len(more) > len(norms)
    # As little as an earlier gradient had at least, and the level ends there; a little less, and it goes on to here.
    least = min(norms[:-1])
    assert len(list(optimizer(Valleys(3), gtol=least).run(500))) == norms.index(least) + 1
    assert len(list(optimizer(Valleys(3), gtol=0.9999 * least).run(500))) == len(norms)


def test_options_reach_the_pairs():
    for method, memory, check in (("lbfgs", 2, True), ("bfgs", 3, False)):
        found = optimizer(Valleys(1), method=method, memory=memory, curvature_check=check).quasi_newton
        assert (found.method, found.memory, found.curvature_check) == (method, memory, check)


def test_a_failed_line_search_starts_again_from_an_accurate_gradient():
    objective = Lying(calm=4, accurate=10)
    one_shot = optimizer(objective, boost_updates=0)
    notes, kept, values = [], [], []
    for update in one_shot.run(7):
        notes.append(one_shot.note)
        kept.append(len(one_shot.quasi_newton.s))
        values.append(update.evaluation.value)
    assert len(notes) == 7 and values == sorted(values, reverse=True)
    # The note of an update is there at the state that it led to.
    expected = "update {}: no descent along the direction; the line search starts again"
    assert notes == [None] * 5 + [expected.format(4), expected.format(5)]
    # The pairs were dropped, and with an uphill gradient on one side the new one has no positive curvature.
    assert kept[:4] == [0, 1, 2, 3] and kept[5] <= 1
    accurate = [(kind, max_iter) for kind, _, max_iter in objective.calls if max_iter is not None]
    assert accurate[:2] == [("evaluate", 10), ("gradient", 10)] and len(accurate) in (4, 6)


def test_a_note_does_not_outlive_its_update():
    objective = Lying(calm=3, accurate=10)
    one_shot = optimizer(objective, boost_updates=0)
    notes = []
    for _ in one_shot.run(8):
        notes.append(one_shot.note)
        if one_shot.note is not None:
            objective.calm = 100  # from the next gradient on: the present one is uphill still
    assert [note is None for note in notes] == [True] * 4 + [False] * 2 + [True] * 2


def test_a_level_ends_where_the_accurate_gradient_is_no_descent_either():
    objective = Lying(calm=2, accurate=math.inf)
    one_shot = optimizer(objective, boost_updates=0)
    updates = list(one_shot.run(9))
    assert [update.number for update in updates] == [0, 1, 2]
    assert one_shot.note == "update 2: no descent along the gradient either; this level ends here"
    assert one_shot.number == 2 and one_shot.evaluation.value == objective.value_at(one_shot.x)


class Breaking(Valleys):
    """Has a bad value or a bad gradient from the given call of that kind on, or in accurate solves only."""

    def __init__(self, kind: str, call: int, bad: float, accurate: bool = False):
        super().__init__(2)
        self.kind, self.call, self.bad, self.accurate = kind, call, bad, accurate

    def _is_bad(self, kind, max_iter):
        number = sum(asked == kind for asked, _, _ in self.calls)
        return kind == self.kind and number >= self.call and (not self.accurate or max_iter == 10)

    def evaluate(self, x, max_iter=None, error=None):
        bad = self._is_bad("evaluate", max_iter)
        found = super().evaluate(x, max_iter)
        return evaluation(self.bad) if bad else found

    def gradient(self, x, max_iter=None, exact=False):
        bad = self._is_bad("gradient", max_iter)
        return super().gradient(x, max_iter).fill_(self.bad) if bad else super().gradient(x, max_iter)


def message(bad, what, update):
    return (
        f"the {what} is {bad} at update {update}: it must be finite. The last checkpoint holds the weights before; "
        f"start with smaller weights (initial.layers=1e-2) or a shorter time (network.T=1.0)"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "call", "options", "update"),
    [
        ("gradient", 0, {}, 0),
        ("gradient", 3, {}, 3),
        ("evaluate", 0, {}, 0),
        ("evaluate", 3, {"method": "steepest", "fixed_step": 1e-3}, 2),
    ],
)
def test_what_is_not_finite_ends_the_run(bad, kind, call, options, update):
    one_shot, found = optimizer(Breaking(kind, call, bad), **options), []
    with pytest.raises(RunError) as caught:
        for made in one_shot.run(9):
            found.append(made.number)
    what = (abs(bad), "norm of the gradient") if kind == "gradient" else (bad, "objective")
    assert str(caught.value) == message(*what, update) and found == list(range(call))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind, what", [("evaluate", "objective"), ("gradient", "norm of the gradient")])
def test_values_of_the_second_attempt_must_be_finite_too(bad, kind, what):
    objective = Breaking(kind, 0, bad, accurate=True)
    one_shot = OneShot(objective, OneShotOptions(boost_updates=0), objective.start)
    updates = one_shot.run(9)
    next(updates)
    objective.value_at = lambda x: 1e9  # more than at the start, whatever the trial
    with pytest.raises(RunError, match=f"^the {what} is {bad} at update 0: it must be finite"):
        list(updates)
