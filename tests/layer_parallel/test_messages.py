"""States and adjoints rounded to a shorter type where they go from rank to rank."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, UNCHECKED, distance, gradients, loss_of

from xbraid_py import MGRIT, LayerParallel
from xbraid_py.comm.short import ShortMessages

T, N = 2.0, 12
SOLVES = {
    "exact": MGRIT(max_levels=1),
    "pipeline": MGRIT(cycle="pipeline", portions=2),
    "V": MGRIT(cycle="V", cfactor=2, max_levels=2, max_iter=6, tol=0.0),
    "lagged": MGRIT(cfactor=2, max_levels=2, max_iter=6, tol=0.0),
}


def results(comm, solve: str, messages=None, **options):
    stack = LayerParallel(
        CASES["mlp"].block, N, T, comm, mgrit=SOLVES[solve], accuracy=UNCHECKED, messages=messages, **options
    )
    u = CASES["mlp"].input(0).requires_grad_()
    output = stack(u)
    loss_of(output).backward()
    with torch.no_grad():
        return {"output": output.detach(), "input": u.grad} | gradients(stack) | {"eval": stack.eval()(u)}


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize(("messages", "digits"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-23)])
@pytest.mark.ranks(1, 2, 3)
def test_borders_round_and_nothing_else_does(spmd, solve, messages, digits):
    exact = results(None, "exact")
    for found in spmd(lambda comm: (results(comm, solve, messages), comm.size)):
        values, size = found
        errors = [distance(values[name], exact[name]) for name in exact]
        if size == 1:
            assert max(errors) < 1e-9
        else:
            # A rounding at each border, of what is as large as the state.
            assert digits / 1e3 < max(errors) < 30 * digits


@pytest.mark.ranks(2)
def test_states_pass_in_the_short_type(spmd):
    def body(comm):
        sent = []

        class Watched(type(comm)):
            def isend(self, tensor, dest):
                sent.append(tensor.dtype)
                return super().isend(tensor, dest)

        comm.__class__ = Watched
        results(comm, "V", torch.bfloat16)
        return sent

    for sent in spmd(body):
        assert torch.bfloat16 in sent and torch.float64 not in sent


@pytest.mark.ranks(2, 3)
def test_tensors_of_other_kinds_are_as_they_are(spmd):
    def body(comm):
        short, ahead, behind = ShortMessages(comm, torch.float16), (comm.rank + 1) % comm.size, comm.rank - 1
        found = []
        for tensor in (torch.tensor([2**40 + comm.rank]), torch.tensor([1 / 3], dtype=torch.bfloat16)):
            wait = short.isend(tensor, ahead)
            found.append(short.recv(torch.empty_like(tensor), behind % comm.size))
            wait()
        return [*(each.item() for each in found), behind % comm.size]

    for number, third, behind in spmd(body):
        assert number == 2**40 + behind
        assert third == torch.tensor(1 / 3, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("wrong", ["bfloat16", torch.int8, torch.float64, 16])
def test_other_types_are_refused(wrong):
    with pytest.raises(ValueError, match=r"messages=.* use torch.bfloat16"):
        LayerParallel(CASES["mlp"].block, N, messages=wrong)
