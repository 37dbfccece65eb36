"""Layers before and behind the solver's: the same network, a better gradient.

Shape letters: `N` layers, `S` shape of a state.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import CASES, SOLVES, UNCHECKED, Case, are_the_same, copied, distance, run_updates
from normed import SHAPES, Normed

from xbraid_py import MGRIT, LayerParallel, Splines, broadcast_loss, to_sequential

ALL = {**CASES, "moving": Case(Normed, SHAPES[1])}
T = 2.0


def stack_of(case: Case, comm, num_layers: int, ends: tuple[int, int], mgrit: MGRIT, **options) -> LayerParallel:
    defaults = {"accuracy": UNCHECKED, "vmap": False}
    return LayerParallel(case.block, num_layers, T, comm, serial_ends=ends, mgrit=mgrit, **{**defaults, **options})


@pytest.mark.parametrize(
    ("block", "num_layers", "ends", "solve", "recompute"),
    [
        ("dense", 15, (1, 2), "one-shot 3", False),
        ("dropout", 17, (2, 0), "V", True),
        ("moving", 16, (0, 1), "V", False),
        ("convolution", 12, (2, 2), "lagged", "states"),
        ("mlp", 10, (3, 1), "V", "all"),
        ("attention", 10, (2, 2), "V", False),
    ],
)
def test_converged_is_the_network_without_ends(spmd, block, num_layers, ends, solve, recompute):
    case = ALL[block]

    def body(comm):
        return run_updates(stack_of(case, comm, num_layers, ends, SOLVES[solve], recompute=recompute), case)

    exact = run_updates(case.stack(None, num_layers, T, "exact"), case)
    for found in spmd(body):
        are_the_same(found, exact)


def test_where_the_layers_are(spmd):
    def body(comm):
        stack = stack_of(CASES["mlp"], comm, 13, (2, 3), MGRIT(cfactor=2, max_levels=2))
        return stack.own_layers, [window.own_layers for window in stack.windows], stack.table(), stack.last_rank

    found = spmd(body)
    assert sorted(layer for own, *_ in found for layer in own) == list(range(13))
    of_windows = [windows for _, windows, *_ in found]
    inner_owners = [rank for rank, windows in enumerate(of_windows) if len(windows[1])]
    assert [len(windows[0]) for windows in of_windows] == [2 * (rank == inner_owners[0]) for rank in range(len(found))]
    assert [len(windows[2]) for windows in of_windows] == [3 * (rank == inner_owners[-1]) for rank in range(len(found))]
    assert all("8" in table.splitlines()[1] for *_, table, _ in found), "8 layers of the solver have 9 points"
    assert {last for *_, last in found} == {inner_owners[-1]}


@pytest.mark.parametrize("ends", [(1, 0), (1, 1), (2, 3)])
def test_the_inner_solve_is_that_of_a_stack_between_two_loops(spmd, ends):
    """Bit by bit, unconverged: the inner layers alone, with the first and the last ones as modules around them."""
    case, before, behind = CASES["mlp"], *ends
    mgrit = MGRIT(cycle="V", cfactor=2, max_levels=2, max_iter=1, tol=0.0)
    num_layers = 8 + before + behind

    def body(comm):
        whole = stack_of(case, comm, num_layers, ends, mgrit)
        steps = to_sequential(whole)
        inner = LayerParallel(case.block, 8, T * 8 / num_layers, comm, mgrit=mgrit, accuracy=UNCHECKED, vmap=False)
        inner.load_state_dict({k: v[before : before + 8] for k, v in whole.state_dict().items()})
        u = case.input(0).requires_grad_()
        end = whole(u)
        end.square().sum().backward()
        x = u.detach().requires_grad_()
        between = steps[before + 8 :](inner(steps[:before](x)))
        between.square().sum().backward()
        return (end - between).abs().max(), (u.grad - x.grad).abs().max(), whole.record == inner.record

    for difference, of_input, is_alike in spmd(body):
        assert difference <= 1e-13
        assert of_input <= 1e-12
        assert is_alike


def test_the_output_on_the_last_rank_alone(spmd):
    def body(comm):
        stack = stack_of(CASES["mlp"], comm, 8, (2, 2), MGRIT(cfactor=2, max_iter=4, tol=0.0), output="last")
        u = CASES["mlp"].input(0).requires_grad_()
        output = stack(u)
        loss = broadcast_loss(output.square().sum(), comm, stack.last_rank)
        loss.backward()
        return float(loss), u.grad, comm.rank == stack.first_rank, bool(output.any()), comm.rank == stack.last_rank

    plain = CASES["mlp"].stack(None, 8, T, "exact")
    u = CASES["mlp"].input(0).requires_grad_()
    wanted = plain(u).square().sum()
    wanted.backward()
    for loss, grad, is_first, has_output, is_last in spmd(body):
        assert loss == pytest.approx(wanted.item(), rel=1e-10)
        assert has_output == is_last
        if is_first:
            assert distance(grad, u.grad) < 1e-10
        else:
            assert not grad.any()


def test_state_goes_from_and_to_stacks_without_ends(spmd):
    def body(comm):
        case = CASES["mlp"]
        mgrit = MGRIT(cfactor=2, max_levels=2)
        one, other = (LayerParallel(case.block, 8, T, comm, mgrit=mgrit, serial_ends=ends) for ends in ((2, 2), (0, 0)))
        run_updates(one, case, 3)
        other.load_state_dict(one.state_dict())
        other.load_solver_state(one.solver_state())
        back = LayerParallel(case.block, 8, T, comm, mgrit=mgrit, serial_ends=(2, 2))
        back.load_state_dict(other.state_dict())
        back.load_solver_state(one.solver_state())
        again = copy.deepcopy(one)
        same = [copied(each.state_dict()) for each in (one, other, back)]
        runs = [run_updates(each, case, 2) for each in (one, back, again)]
        return same, runs, one.solver_state()["draws"], other.solver_state()["draws"]

    for same, runs, draws, of_other in spmd(body):
        assert all(torch.equal(same[0][key], each[key]) for each in same[1:] for key in same[0])
        for found in runs[1:]:
            for mine, wanted in zip(found, runs[0], strict=True):
                assert torch.equal(mine["output"], wanted["output"])
                assert torch.equal(mine["input"], wanted["input"])
        assert draws == of_other + 2 == 5


def test_evaluation_is_exact(spmd):
    def body(comm):
        stack = stack_of(CASES["mlp"], comm, 9, (2, 3), MGRIT(cfactor=2, max_iter=1)).eval()
        with torch.no_grad():
            return stack(CASES["mlp"].input(0))

    plain = CASES["mlp"].stack(None, 9, T, "exact").eval()
    with torch.no_grad():
        wanted = plain(CASES["mlp"].input(0))
    assert all(distance(found, wanted) < 1e-12 for found in spmd(body))


@pytest.mark.parametrize("wrong", [2, (2,), (1, -1), (1.0, 1), "ab"])
def test_what_is_no_pair_of_numbers_is_refused(wrong):
    with pytest.raises(ValueError, match="serial_ends="):
        LayerParallel(CASES["mlp"].block, 8, serial_ends=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serial_ends": (4, 4)}, "leave nothing for the solver"),
        ({"serial_ends": (1, 1), "windows": 2}, "need windows=1"),
        ({"serial_ends": (1, 1), "mgrit": MGRIT(cycle="pipeline")}, "exact in all layers"),
        ({"serial_ends": (1, 1), "splines": Splines(4)}, "run through all layers"),
        ({"serial_ends": (1, 0), "mgrit": MGRIT(cfactor=2)}, "num_layers=7 is not a multiple"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LayerParallel(CASES["mlp"].block, 8, **options)
