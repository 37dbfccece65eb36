"""Ranks that call a stack in different ways, and ranks without layers."""

from __future__ import annotations

import pytest
import torch
from blocks import UNCHECKED, C, Case, Convolution, loss_of, reduced
from mismatches import MISMATCHES, MLP, odd_one

import xbraid_py
from xbraid_py import MGRIT

SEVERAL = pytest.mark.ranks(2, 3)


@SEVERAL
@pytest.mark.parametrize("call", MISMATCHES)
def test_ranks_that_do_not_agree(spmd, call):
    messages = spmd(lambda comm: reduced(comm, lambda: call(comm)))
    last = len(messages) - 1
    for message in messages:
        assert message.startswith("ValueError") and f"on rank {last}" in message
        assert "every rank must pass the same" in message


@SEVERAL
def test_a_stack_works_on_after_an_error(spmd):
    def body(comm):
        stack = MLP.stack(comm, 9)
        for u in (MLP.input(batch=5 + odd_one(comm)), MLP.input().float(), MLP.input()[:, :2]):
            assert reduced(comm, lambda u=u: stack(u)) is not None
        loss_of(stack(MLP.input())).backward()
        return stack.record.update

    assert set(spmd(body)) == {1}


@SEVERAL
def test_ranks_without_layers_take_part_in_everything(spmd):
    """Two intervals; the ranks behind have nothing, not even rows in the state."""
    case = Case(Convolution, (2, C, 3, 3))

    def body(comm):
        stack = case.stack(comm, 2, mgrit=MGRIT(cycle="V", cfactor=2, min_coarse=1, max_levels=2), accuracy=UNCHECKED)
        optimizer = torch.optim.Adam(stack.parameters(), 0.1)
        before = stack.state_dict()["layers.convolution.weight"].clone()
        loss_of(stack(case.input(batch=2))).backward()
        norm = xbraid_py.clip_grad_norm_(stack, 1.0)
        optimizer.step()
        return len(stack.own_layers), norm, (stack.state_dict()["layers.convolution.weight"] != before).any().item()

    results = spmd(body)
    assert [own for own, _, _ in results] == [2] + [0] * (len(results) - 1)
    assert len({norm for _, norm, _ in results}) == 1 and all(moved for _, _, moved in results)


JOB = """
import sys
import mismatches
from blocks import reduced
from xbraid_py.comm import world

comm = world()
calls = [*mismatches.MISMATCHES, lambda comm: mismatches.MLP.stack(comm, 9)(mismatches.MLP.input()[:, :2].float())]
for number, call in enumerate(calls):
    message = reduced(comm, lambda: call(comm))
    # In one piece, so that lines of several ranks do not mix.
    sys.stdout.write(f"call {number}: {message.splitlines()[0]}\\n")
    sys.stdout.flush()
"""


@pytest.mark.job
def test_a_job_with_all_these_errors_ends(run_job):
    found = run_job(["-c", JOB], ranks=3, timeout=120)
    assert found.returncode == 0, found.stderr
    for number in range(len(MISMATCHES) + 1):
        lines = [line for line in found.stdout.splitlines() if line.startswith(f"call {number}: ValueError")]
        assert len(lines) == 3 and len(set(lines)) == 1, found.stdout
