"""Stochastic depth, and what else a block may have that is another one each time: it works, or the way out is named.

Shape letters: `N` layers, `B` batch, `C` width.
"""

from __future__ import annotations

import pytest
import torch
from blocks import B, C, Case, L, distance, gradients, loop, loop_gradients, loss_of, two_calls, unstacked
from blocks import reduced as message_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import xbraid_py.nn
from xbraid_py import MGRIT, GradientControl, PipelineParallel
from xbraid_py.layers.module_block import own_random_numbers

N, T, P, SEED = 9, 2.0, 0.4, 5


class Branch(nn.Module):
    """A branch that some samples leave out; u (B, L, C)."""

    def __init__(self, drop):
        super().__init__()
        self.linear, self.drop = nn.Linear(C, C), drop

    def forward(self, u):
        return self.drop(torch.tanh(self.linear(u)))


CASE = Case(lambda: Branch(xbraid_py.nn.DropPath(P)), (B, L, C))


def literal(weights: dict[str, Tensor], u: Tensor, draw: int) -> Tensor:
    """u_N by formulas, the masks drawn here: one number for a sample."""
    for n in range(N):
        generator = torch.Generator().manual_seed(hash((SEED, draw, n, 0)) & (2**63 - 1))
        kept = torch.rand((B, 1, 1), generator=generator, dtype=torch.float32) >= P
        change = torch.tanh(u @ weights["linear.weight"][n].T + weights["linear.bias"][n])
        u = u + T / N * change * kept / (1.0 - P)
    return u


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("solve", ["exact", "V", "one-shot 3"])
def test_one_mask_for_each_layer_sample_and_update(spmd, solve, recompute):
    def body(comm):
        stack = CASE.stack(comm, N, T, solve, seed=SEED, recompute=recompute)
        found = two_calls(stack, CASE)
        with torch.no_grad():
            return found, stack.state_dict(), stack.eval()(CASE.input())

    for found, state, plain in spmd(body):
        weights = {key.removeprefix("layers."): value.clone().requires_grad_() for key, value in state.items()}
        for update, (output, slopes) in enumerate(found):
            wanted = literal(weights, CASE.input(), update + 1)
            loss_of(wanted).backward()
            assert distance(output, wanted.detach()) < 1e-10
            assert distance(slopes, {name: value.grad for name, value in weights.items()}) < 1e-10
            for value in weights.values():
                value.grad = None
        modules = unstacked(state, CASE).eval()
        assert distance(plain, loop(modules, CASE.input()).detach()) < 1e-12
        assert distance(found[0][0], found[1][0]) > 1e-3, "another update has other masks"


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("mgrit", [MGRIT(cycle="pipeline", portions=2), MGRIT(cycle="V", cfactor=3, max_iter=1)])
def test_masks_are_the_same_on_any_number_of_ranks(spmd, mgrit):
    def body(comm):
        stack = CASE.stack(comm, N, T, mgrit=mgrit, accuracy=GradientControl(check=0, adapt=False))
        modules = PipelineParallel([CASE.block] * 4, comm, portions=2)
        outputs = [model(CASE.input()) for model in (stack, modules)]
        sum(loss_of(output) for output in outputs).backward()
        return [output.detach() for output in outputs], gradients(stack)

    (serial, slopes), results = body(None), spmd(body)
    for outputs, found in results:
        assert all(a.equal(b) for a, b in zip(outputs, serial, strict=True))
        assert all(found[name].equal(value) for name, value in slopes.items())


def test_outside_of_a_stack_it_is_stochastic_depth():
    drop, u = xbraid_py.nn.DropPath(0.25), torch.ones(4000, 2, 3).double()
    with own_random_numbers(0):
        found = drop(u)
    rows = found.flatten(1)
    assert (rows == rows[:, :1]).all() and set(found.unique().tolist()) == {0.0, 1.0 / 0.75}
    assert abs(float(found.mean()) - 1.0) < 0.05
    assert drop.eval()(u) is u and xbraid_py.nn.DropPath(0.0)(u) is u
    with pytest.raises(ValueError, match=r"p=1.0 must be at least 0 and below 1"):
        xbraid_py.nn.DropPath(1.0)


# ---- What is refused, with what to take


class DropPath(nn.Module):
    """As libraries have it."""

    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, u):
        if not self.drop_prob or not self.training:
            return u
        kept = torch.rand(len(u), *(1,) * (u.dim() - 1), dtype=u.dtype) >= self.drop_prob
        return u * kept / (1.0 - self.drop_prob)


class StochasticDepth(DropPath):
    """The same, with the attribute of another library."""

    def __init__(self, p):
        super().__init__(p)
        self.p = self.drop_prob
        del self.drop_prob

    def forward(self, u):
        return u * (torch.rand(len(u), 1, 1) >= self.p) if self.training else u


class Functional(nn.Module):
    """Dropout by a function."""

    def __init__(self, attention: bool):
        super().__init__()
        self.linear, self.attention = nn.Linear(C, C), attention

    def forward(self, u):
        x = self.linear(u)
        if self.attention:
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)
        return nn.functional.dropout(x, 0.5, self.training)


def spectral(old: bool) -> nn.Module:
    made = (nn.utils.spectral_norm if old else parametrizations.spectral_norm)(nn.Linear(C, C))
    return nn.Sequential(made, nn.Tanh())


REFUSED = {
    "timm": (
        lambda: Branch(DropPath(0.3)),
        "DropPath (drop): another mask in every sweep",
        "xbraid_py.nn.DropPath(0.3)",
    ),
    "torchvision": (lambda: Branch(StochasticDepth(0.3)), "StochasticDepth (drop)", "xbraid_py.nn.DropPath(0.3), one"),
    "attention": (
        lambda: nn.TransformerEncoderLayer(C, 2, 8, 0.2, batch_first=True),
        "MultiheadAttention (self_attn) with dropout=0.2 of its own",
        "use xbraid_py.nn.MultiheadAttention, as xbraid_py.replace_modules(block) does",
    ),
    "functional": (
        lambda: Functional(False),
        "two results for one state",
        "Dropout for dropout, also where functional",
    ),
    "dropout_p": (lambda: Functional(True), "two results for one state", "also where functional.dropout or dropout_p"),
    "spectral norm": (lambda: spectral(False), "power iteration", "W / torch.linalg.matrix_norm(W, 2)"),
    "spectral norm, old": (lambda: spectral(True), "power iteration", "torch.nn.utils.parametrize"),
}


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("which", REFUSED)
def test_parts_that_change_by_themselves_are_refused_with_the_way_out(spmd, which):
    make, reason, way_out = REFUSED[which]
    case = Case(make, (B, L, C))
    form = {"form": "map"} if which == "attention" else {}

    def body(comm):
        stack = case.stack(comm, N, **form)
        return message_of(comm, lambda: stack(case.input())), message_of(comm, lambda: stack.eval()(case.input()))

    for message, evaluated in spmd(body):
        assert message.startswith("ValueError: block") and reason in message and way_out in message
        assert evaluated is None, "in evaluation mode they do nothing"


def test_a_drop_path_that_drops_nothing_is_accepted():
    for rate in (None, 0.0):
        case = Case(lambda rate=rate: Branch(DropPath(rate)), (B, L, C))
        loss_of(case.stack(None, N)(case.input())).backward()


# ---- What to take for a spectral norm


class Divided(nn.Module):
    """W over its largest singular value."""

    def forward(self, weight):
        return weight / torch.linalg.matrix_norm(weight, 2)


def parametrized() -> nn.Module:
    linear = nn.Linear(C, C)
    parametrize.register_parametrization(linear, "weight", Divided())
    return nn.Sequential(linear, nn.Tanh())


PARAMETRIZED = {
    "spectral norm": parametrized,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(C, C)), nn.Tanh()),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("which", PARAMETRIZED)
def test_parametrizations_that_are_functions_of_the_weight(spmd, which, vmap):
    case = Case(PARAMETRIZED[which], (B, L, C))

    def body(comm):
        stack = case.stack(comm, N, T, vmap=vmap)
        output = stack(case.input())
        loss_of(output).backward()
        return stack.state_dict(), output.detach(), gradients(stack)

    for state, output, slopes in spmd(body):
        modules = unstacked(state, case)
        wanted = loop(modules, case.input(), T)
        loss_of(wanted).backward()
        assert distance(output, wanted.detach()) < 1e-10 and distance(slopes, loop_gradients(modules)) < 1e-10
