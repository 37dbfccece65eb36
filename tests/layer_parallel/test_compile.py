"""Blocks by `torch.compile`: the same values and gradients as without.

Most tests take a backend that writes no code, since what a compiler makes of each block takes half a minute.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import CASES, SOLVES, UNCHECKED, distance, run_updates
from torch import nn

import xbraid_py.nn
from xbraid_py import LayerParallel
from xbraid_py.layers.transformer import DecoderBlock

T, N = 2.0, 6
EXACT = {"mgrit": SOLVES["exact"], "accuracy": UNCHECKED}
# One state of torch's compiler for all threads of a process.
pytestmark = pytest.mark.ranks(1, 2)


class WithMemory(nn.Module):
    """u (B, C) and a further input, which has a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, u, memory, *, scale=1.0):
        return (torch.tanh(self.linear(u) + memory) * scale,)


@pytest.mark.parametrize(("block", "solve"), [("mlp", "exact"), ("mlp", "V"), ("attention", "one-shot 3")])
def test_as_without(spmd, block, solve):
    case = CASES[block]

    def body(comm):
        stacks = [
            LayerParallel(case.block, N, T, comm, mgrit=SOLVES[solve], accuracy=UNCHECKED, vmap=False, compile=backend)
            for backend in ("aot_eager", False)
        ]
        compiled = stacks[0].windows[0].block.compiled
        found = [run_updates(each, case) for each in stacks]
        with torch.no_grad():
            found += [each.eval()(case.input(3)) for each in stacks]
        return *found, comm.bcast(sum(comm.gather(compiled.calls) or [0]))

    for compiled, plain, end, wanted_end, calls in spmd(body):
        for mine, wanted in zip(compiled, plain, strict=True):
            assert all(distance(mine[key], wanted[key]) < 1e-12 for key in ("output", "input", "weights"))
        assert distance(end, wanted_end) < 1e-12
        assert calls


def test_further_inputs_and_entries_of_tuples(spmd):
    def body(comm):
        found = []
        for backend in ("aot_eager", False):
            stack = LayerParallel(
                WithMemory, N, T, comm, mgrit=SOLVES["V"], accuracy=UNCHECKED, returns=0, compile=backend
            ).double()
            u, memory = (torch.linspace(0, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_() for _ in range(2))
            output = stack(u, memory, scale=0.5)
            output.square().sum().backward()
            found.append([output.detach(), u.grad, memory.grad])
        return found

    for compiled, plain in spmd(body):
        assert all(distance(mine, wanted) < 1e-12 for mine, wanted in zip(compiled, plain, strict=True))


def test_a_copy_is_compiled_too():
    stack = LayerParallel(CASES["mlp"].block, N, T, compile="aot_eager")
    u = CASES["mlp"].input(0)
    wanted = stack(u)
    other = copy.deepcopy(stack)
    assert other.windows[0].block.compiled.module is other.windows[0].block.module
    assert torch.equal(other(u), wanted)
    assert other.windows[0].block.compiled.calls


@pytest.mark.long
@pytest.mark.ranks(1)
def test_by_the_compiler_of_torch(spmd):
    case = CASES["mlp"]

    def body(comm):
        made = [LayerParallel(case.block, N, T, comm, mgrit=SOLVES["V"], compile=each) for each in (True, False)]
        return [run_updates(each, case) for each in made]

    for compiled, plain in spmd(body):
        for mine, wanted in zip(compiled, plain, strict=True):
            assert all(distance(mine[key], wanted[key]) < 1e-10 for key in ("output", "input", "weights"))


def test_dropout_of_nothing_is_compiled():
    """In an evaluation, and where its probability is 0."""
    stack = LayerParallel(lambda: DecoderBlock(4, 2).double(), 2, T, compile="aot_eager", **EXACT)
    plain = LayerParallel(lambda: DecoderBlock(4, 2).double(), 2, T, **EXACT)
    assert distance(stack(CASES["decoder"].input()).detach(), plain(CASES["decoder"].input()).detach()) < 1e-12
    assert stack.windows[0].block.compiled.calls


@pytest.mark.job
def test_a_program_that_has_compiled_nothing_before(run_job, tmp_path):
    """Torch loads the parts of it that compile only then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom torch import nn\nimport xbraid_py\n"
        "stack = xbraid_py.LayerParallel(lambda: nn.Linear(4, 4), 3, compile='aot_eager')\n"
        "stack(torch.ones(2, 4)).sum().backward()\nprint(stack.windows[0].block.compiled.calls)\n"
    )
    done = run_job([program], fresh=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


class Timed(nn.Linear):
    """Asks for the time of its layer."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, t, u):
        return super().forward(u) * t


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), xbraid_py.nn.Dropout(0.1)), "has Dropout, which asks for its layer"),
        (lambda: nn.Sequential(nn.Linear(4, 4), xbraid_py.nn.MovingBatchNorm1d(4)), "has MovingBatchNorm1d"),
        (Timed, "has the time of its layer"),
        (lambda: xbraid_py.DenseBlock(4), "has kernels of its own"),
    ],
)
def test_what_is_another_function_in_each_layer_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        LayerParallel(block, N, compile=True)


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match="compile=3 must be True, False"):
        LayerParallel(CASES["mlp"].block, N, compile=3)
