"""Batch normalization that moves: its state, its plain form, and what cannot be normalized."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, SOLVES, C, Case, distance, loop, loss_of, reduced
from normed import SHAPES, Literal, N, Normed, T, batch, case_of, train, trained
from torch import nn

import xbraid_py.nn
from xbraid_py import ImageResNet, LayerParallel, parallel_stages, to_sequential

KINDS = pytest.mark.parametrize("dims", [1, 2, 3])


class Plain(nn.Module):
    """A loop over the modules of a stack's state."""

    def __init__(self, state: dict, case: Case):
        super().__init__()
        self.blocks = nn.ModuleList(case.block() for _ in range(N))
        for n, block in enumerate(self.blocks):
            block.load_state_dict({name.removeprefix("layers."): value[n] for name, value in state.items()})

    def forward(self, u):
        return loop(self.blocks, u, T)

    def state(self) -> dict:
        every = [block.state_dict() for block in self.blocks]
        return {f"layers.{name}": torch.stack([state[name] for state in every]) for name in every[0]}


@KINDS
def test_a_plain_loop_over_the_blocks_is_the_same_network(dims):
    """Outside of a stack a call in training mode is an update; bitwise, as exact propagation is."""
    case = case_of(dims)
    stack = case.stack(None, N, T, "exact")
    start, record = trained(stack, case)
    plain = Plain(start, case)
    optimizer = torch.optim.SGD(plain.parameters(), 0.2, momentum=0.9)
    for update, found in enumerate(record):
        optimizer.zero_grad()
        output = plain(batch(case, update))
        loss_of(output).backward()
        optimizer.step()
        assert distance(output.detach(), found["output"]) < 1e-12
        assert all(distance(value, found["state"][name]) < 1e-12 for name, value in plain.state().items())


@KINDS
def test_it_takes_the_place_of_the_one_of_torch(dims):
    """The same names; the other's state; in evaluation mode the same function."""
    ours, theirs = Normed(dims), Normed(dims, norm=getattr(nn, f"BatchNorm{dims}d"))
    assert isinstance(ours.norm, type(theirs.norm))
    theirs(case_of(dims).input().float())
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    u = case_of(dims).input(2).float()
    assert ours.eval()(u).equal(theirs.eval()(u))
    assert repr(ours.norm) == f"Moving{theirs.norm!r}"


def test_a_first_batch_counts_once(spmd):
    """Weights of a trained network of torch: its statistics stay, and move from there."""
    case = case_of()
    theirs = [Normed(norm=nn.BatchNorm1d).double() for _ in range(N)]
    for number, block in enumerate(theirs):
        block(case.input(number))
    state = {f"layers.{name}": torch.stack([b.state_dict()[name] for b in theirs]) for name in theirs[0].state_dict()}
    fixed = spmd(lambda comm: state)[0]

    def body(comm):
        stack = case.stack(comm, N, T, "V")
        stack.load_state_dict(fixed)
        stack(batch(case, 1))
        return stack.state_dict()

    literal = Literal(fixed, 1)
    literal.propagate(batch(case, 1))
    for found in spmd(body):
        assert distance(found["layers.norm.running_mean"], literal.mean) < 1e-10
        assert found["layers.norm.num_batches_tracked"].tolist() == [2] * N


def test_a_run_goes_on_from_its_state_on_any_number_of_ranks(spmd):
    case = case_of()
    stack = case.stack(None, N, T, "exact")
    train(stack, stack, case, 2)
    middle = {name: value.clone() for name, value in stack.state_dict().items()}
    wanted = train(stack, stack, case, 1)[0]

    def body(comm):
        other = case.stack(comm, N, T, "exact", seed=3)
        other.load_state_dict(middle)
        found = train(other, other, case, 1)[0]
        plain = to_sequential(other)
        with torch.no_grad():
            outputs = [part.eval()(case.input(5)) for part in (other, plain)]
        tracked = [int(step.block.norm.num_batches_tracked) for step in plain]
        return found, outputs, tracked, [step.block.norm.training for step in plain.train()]

    for found, (mine, plain), tracked, modes in spmd(body):
        assert found["output"].equal(wanted["output"]), "without the momentum of the optimizer"
        running = [name for name in wanted["state"] if "running" in name]
        assert all(found["state"][name].equal(wanted["state"][name]) for name in running)
        assert distance(plain, mine) < 1e-13 and tracked == [3] * N and all(modes)


@pytest.mark.ranks(1, 3)
def test_single_precision(spmd):
    case = case_of()

    def body(comm):
        stack = case.stack(comm, N, T, "V").to(torch.float32)
        output = stack(case.input().float())
        loss_of(output).backward()
        return output.dtype, {name: value.dtype for name, value in stack.state_dict().items()}

    for dtype, types in spmd(body):
        assert dtype == torch.float32 and types.pop("layers.norm.num_batches_tracked") == torch.int64
        assert set(types.values()) == {torch.float32}


class Twice(Normed):
    def forward(self, u):
        return super().forward(self.norm(u))


class Unused(Normed):
    def forward(self, u):
        return self.map(u)


def test_norms_that_cannot_be_evaluated(spmd):
    cases = {
        "MovingBatchNorm1d twice, whose statistics are those of one place": Case(Twice, SHAPES[1]),
        "MovingBatchNorm1d (norm), which it does not use": Case(Unused, SHAPES[1]),
    }

    def body(comm):
        found = [reduced(comm, lambda case=case: case.stack(comm, N)(case.input())) for case in cases.values()]
        one = case_of().stack(comm, N)
        return [*found, reduced(comm, lambda: one(case_of().input(batch=1))), one.eval()(case_of().input(batch=1))]

    for *messages, single, evaluated in spmd(body):
        assert all(name in message for name, message in zip(cases, messages, strict=True)), messages
        assert "one value for each channel; use at least 2 samples" in single and evaluated.isfinite().all()


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_the_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="must be between 0 and 1, or None; use 0.1"):
        xbraid_py.nn.MovingBatchNorm2d(4, momentum=momentum)


@KINDS
def test_that_of_torch_is_refused_and_ours_is_named(dims):
    case = Case(lambda: Normed(dims, norm=getattr(nn, f"BatchNorm{dims}d")), SHAPES[dims])
    with pytest.raises(
        ValueError, match=f"use xbraid_py.nn.MovingBatchNorm{dims}d, whose statistics move once per update"
    ):
        case.stack(None, N)(case.input())


@pytest.mark.ranks(1, 3)
def test_a_norm_that_is_the_whole_block(spmd):
    def body(comm):
        def block():
            return xbraid_py.nn.MovingBatchNorm1d(C).double()

        stack = LayerParallel(block, N, T, comm, mgrit=SOLVES["V"])
        loss_of(stack(CASES["mlp"].input())).backward()
        return stack.state_dict()["layers.num_batches_tracked"].tolist()

    assert spmd(body)[0] == [1] * N


def test_stages_of_a_network_for_images(spmd):
    """The network as it is, its stages in parallel: two updates, then the plain network again."""
    shapes = {"blocks": (4, 4), "filters": (4, 8), "num_classes": 3, "step_size": 0.5, "norm": "moving"}
    images = CASES["convolution"].input(3)[:, :3].repeat(1, 1, 2, 2)
    seeded = ImageResNet(**shapes).double()
    start = spmd(lambda comm: {name: value.clone() for name, value in seeded.state_dict().items()})[0]

    def made():
        network = ImageResNet(**shapes).double()
        network.load_state_dict(start)
        return network

    def updates(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for update in range(2):
            optimizer.zero_grad()
            loss = loss_of(model((1.0 + update) * images))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def body(comm):
        model = parallel_stages(made(), comm, mgrit=SOLVES["V"])
        losses = updates(model)
        return losses, model.to_network().state_dict()

    plain = made()
    exact = updates(plain)
    for losses, state in spmd(body):
        assert losses == pytest.approx(exact, rel=1e-10)
        assert all(distance(state[name].double(), value.double()) < 1e-9 for name, value in plain.state_dict().items())
