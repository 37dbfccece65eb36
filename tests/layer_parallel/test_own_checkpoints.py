"""Checkpoints of training loops of one's own: bitwise on as many ranks, exact on others; and states of other layers."""

from __future__ import annotations

import copy
import io
import json
import re

import pytest
import torch
from blocks import linear, reduced
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbraid_py import (
    MGRIT,
    DenseBlock,
    GradientControl,
    GradScaler,
    LayerParallel,
    ParallelGRU,
    PipelineParallel,
    layer_views,
    load_checkpoint,
    save_checkpoint,
)
from xbraid_py.nn import Dropout
from xbraid_py.run.store.plain import from_plain, to_plain

UPDATES, MIDDLE = 6, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adam, layer by layer": lambda p: torch.optim.Adam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}
schedules = torch.optim.lr_scheduler
SCHEDULES = {
    "steps": lambda o: schedules.MultiStepLR(o, [2, 4], 0.5),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=UPDATES + 1),
    "warm-up": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 4)], [2]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
}


class Everything(nn.Module):
    """Sequences (B, L, 3) through units over their steps, a stack with masks, a pipeline, and plain layers around."""

    def __init__(self, comm):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.gru = ParallelGRU(3, 4, batch_first=True, comm=comm, mgrit=MGRIT(max_levels=1)).double()
        self.norm = nn.BatchNorm1d(4).double()
        self.stack = LayerParallel(
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Dropout(0.2)).double(),
            8,
            2.0,
            comm,
            mgrit=MGRIT(cycle="V", cfactor=2, max_iter=1, min_coarse=2),
            accuracy=GradientControl(gradient_error=1e-3, check=2, max_level=3),
            vmap=False,
        )
        makers = [lambda: nn.Linear(4, 5).double(), nn.Tanh, lambda: nn.Linear(5, 5).double(), nn.Tanh]
        self.pipeline = PipelineParallel([*makers, lambda: nn.Linear(5, 2).double()], comm, portions=2)

    def forward(self, x):
        states, _ = self.gru(self.scale * x)
        return self.pipeline(self.stack(self.norm(states[:, -1])))


class Training:
    """The loop that a user writes."""

    def __init__(self, comm, optimizer="adam", schedule=None, scale=1):
        self.model = Everything(comm)
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.mul_(scale)
        by_layer = optimizer.endswith("layer by layer")
        parameters = layer_views(self.model) if by_layer else self.model.parameters()
        self.optimizer = OPTIMIZERS[optimizer](parameters)
        self.scheduler = None if schedule is None else SCHEDULES[schedule](self.optimizer)

    @property
    def parts(self):
        return (self.model, self.optimizer), {"scheduler": self.scheduler}

    def losses(self, first, last):
        found = []
        for update in range(first, last):
            random = torch.Generator().manual_seed(update)
            x = torch.randn(6, 5, 3, generator=random, dtype=torch.float64)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), (x.sum((1, 2)) > 0).long())
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step(*[float(loss.detach())] * isinstance(self.scheduler, schedules.ReduceLROnPlateau))
            found.append(float(loss.detach()))
        return found


def whole(comm, path, **options):
    """Losses of all updates, with a checkpoint in the middle, and the weights in the end."""
    training = Training(comm, **options)
    losses = training.losses(0, MIDDLE)
    parts, named = training.parts
    save_checkpoint(path, *parts, **named, extra={"update": MIDDLE, "shape": (1, 2), 5: [torch.tensor(0.1)]})
    return losses + training.losses(MIDDLE, UPDATES), training.model.state_dict()


def rest(comm, path, **options):
    training = Training(comm, scale=0, **options)
    parts, named = training.parts
    extra = load_checkpoint(path, *parts, **named)
    assert extra["shape"] == (1, 2) and torch.equal(extra[5][0], torch.tensor(0.1))
    return training.losses(extra["update"], UPDATES), training.model.state_dict()


def is_bitwise(comm, path, **options):
    losses, weights = whole(comm, path, **options)
    found, state = rest(comm, path, **options)
    return found == losses[MIDDLE:] and all(torch.equal(state[key], weights[key]) for key in weights)


@pytest.mark.ranks(1, 2, 3)
def test_it_goes_on_bitwise(spmd, shared_tmp_path):
    results = spmd(lambda comm: is_bitwise(comm, shared_tmp_path / "a.h5"))
    assert results == [True] * len(results)
    assert [path.name for path in shared_tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("optimizer", "schedule"), [*((name, None) for name in OPTIMIZERS), *(("momentum", name) for name in SCHEDULES)]
)
def test_whatever_the_optimizer_and_the_schedule(spmd, shared_tmp_path, optimizer, schedule):
    options = {"optimizer": optimizer, "schedule": schedule}
    results = spmd(lambda comm: is_bitwise(comm, shared_tmp_path / "a.h5", **options))
    assert results == [True] * len(results)


@pytest.mark.ranks(1, 2, 3)
def test_muon_of_matrices_layer_by_layer(spmd, shared_tmp_path):
    """What is kept of all layers is one array, and goes to other ranks as weights do."""

    def make(comm):
        stack = LayerParallel(lambda: nn.Linear(4, 4, bias=False).double(), 7, 1.0, comm)
        return stack, torch.optim.Muon(layer_views(stack), lr=0.01)

    def train(stack, optimizer, updates):
        for _ in range(updates):
            optimizer.zero_grad()
            stack(torch.ones(3, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return stack.state_dict()

    def body(comm):
        stack, optimizer = make(comm)
        train(stack, optimizer, 2)
        save_checkpoint(shared_tmp_path / "a.h5", stack, optimizer)
        whole = train(stack, optimizer, 2)
        again, fresh = make(comm), make(None)
        load_checkpoint(shared_tmp_path / "a.h5", *again)
        comm.barrier()
        alone = None
        if comm.rank == 0:
            load_checkpoint(shared_tmp_path / "a.h5", *fresh)
            alone = train(*fresh, 2)
        alone, other, views = comm.bcast(alone), train(*again, 2), layer_views(stack)
        partly = [
            reduced(
                comm, lambda each=each: save_checkpoint(shared_tmp_path / "b.h5", stack, torch.optim.SGD(each, 0.1))
            )
            for each in (views[:-1], views[::-1])
        ]
        return whole, other, alone, partly

    for whole, other, alone, partly in spmd(body):
        assert all(torch.equal(whole[key], other[key]) for key in whole)
        assert all(torch.allclose(whole[key], alone[key], rtol=1e-12, atol=0) for key in whole)
        assert "some layers of" in partly[0] and "in another order" in partly[1]


@pytest.mark.ranks(2, 3)
def test_it_goes_on_on_other_ranks(spmd, shared_tmp_path):
    """Written by all and read by one; then written by one and read by all."""

    def body(comm):
        losses, _ = whole(comm, shared_tmp_path / "all.h5")
        first = rest(None, shared_tmp_path / "all.h5")[0] if comm.rank == 0 else None
        comm.barrier()
        if comm.rank == 0:
            alone, _ = whole(None, shared_tmp_path / "one.h5")
        comm.barrier()
        then, _ = rest(comm, shared_tmp_path / "one.h5")
        return losses, comm.bcast((first, alone) if comm.rank == 0 else None), then

    for losses, (first, alone), then in spmd(body):
        assert first == pytest.approx(losses[MIDDLE:], rel=1e-9)
        assert then == pytest.approx(alone[MIDDLE:], rel=1e-9)


@pytest.mark.ranks(1, 2)
def test_half_precision_and_a_loss_scale(spmd, shared_tmp_path):
    def make(comm, seed):
        stack = LayerParallel(lambda: DenseBlock(4, "tanh"), 8, 1.0, comm, mgrit=MGRIT(max_levels=1), seed=seed)
        model = nn.Sequential(stack.to(torch.bfloat16))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, GradScaler(comm, init_scale=8.0, growth_interval=2)

    def update(model, optimizer, scaler):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4, dtype=torch.bfloat16)).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def body(comm):
        model, optimizer, scaler = make(comm, 1)
        for _ in range(3):
            update(model, optimizer, scaler)
        save_checkpoint(shared_tmp_path / "a.h5", model, optimizer, scaler=scaler)
        other = make(comm, 2)
        load_checkpoint(shared_tmp_path / "a.h5", *other[:2], scaler=other[2])
        same = other[2].state_dict() == scaler.state_dict()
        for parts in ((model, optimizer, scaler), other):
            update(*parts)
        moments = [[o.state[p]["exp_avg"] for p in m.parameters()] for m, o in ((model, optimizer), other[:2])]
        same = same and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*moments, strict=True))
        return same and all(torch.equal(a, b) for a, b in zip(model.parameters(), other[0].parameters(), strict=True))

    results = spmd(body)
    assert results == [True] * len(results)


@pytest.mark.ranks(1, 2)
def test_several_models(spmd, shared_tmp_path):
    """A model and its average in one file, which is none of the model alone."""

    def make(comm, scale):
        training = Training(comm, scale=scale)
        average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        return training, average, nn.ModuleDict({"model": training.model, "average": average})

    def body(comm):
        training, average, both = make(comm, 1)
        for update in range(3):
            training.losses(update, update + 1)
            average.update_parameters(training.model)
        save_checkpoint(shared_tmp_path / "a.h5", both, training.optimizer)
        other, _, again = make(comm, 0)
        load_checkpoint(shared_tmp_path / "a.h5", again, other.optimizer)
        found, wanted = again.state_dict(), both.state_dict()
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        differs = not torch.equal(found["average.module.scale"], found["model.scale"])
        said = reduced(comm, lambda: load_checkpoint(shared_tmp_path / "a.h5", training.model))
        return same, differs, int(average.n_averaged), "holds another network" in said

    results = spmd(body)
    assert results == [(True, True, 3, True)] * len(results)


@pytest.mark.ranks(1, 2)
def test_what_cannot_be_saved_or_loaded(spmd, shared_tmp_path):
    def make(comm, width=4):
        stack = LayerParallel(lambda: DenseBlock(width, "tanh"), 4, 1.0, comm)
        model = nn.Sequential(linear(width, width, 1).float(), stack)
        return model, torch.optim.SGD(model.parameters(), 0.1)

    def body(comm):
        model, optimizer = make(comm)
        file, adam = shared_tmp_path / "a.h5", shared_tmp_path / "adam.h5"
        save_checkpoint(file, model)
        save_checkpoint(adam, model, torch.optim.Adam(model.parameters()))
        comm.barrier()
        if comm.rank == 0:
            content = bytearray(file.read_bytes())
            content[len(content) // 2 :] = content[len(content) // 2 :][::-1]
            (shared_tmp_path / "damaged.h5").write_bytes(content)
        comm.barrier()
        before = [p.clone() for p in model.parameters()]
        found = [
            reduced(comm, call)
            for call in (
                lambda: load_checkpoint(shared_tmp_path / "none.h5", model),
                lambda: load_checkpoint(shared_tmp_path / "damaged.h5", model),
                lambda: load_checkpoint(file, *make(comm, 6)),
                lambda: load_checkpoint(file, model, optimizer),
                lambda: load_checkpoint(file, model, scaler=GradScaler(comm)),
                lambda: load_checkpoint(adam, model, torch.optim.AdamW(model.parameters())),
                lambda: load_checkpoint(adam, model, torch.optim.Adam(reversed([*model.parameters()]))),
                lambda: save_checkpoint(file, model, extra={"f": len}),
                lambda: save_checkpoint(file, model, make(comm)[1]),
                lambda: save_checkpoint(file, model, grid=object()),
            )
        ]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        with torch.no_grad():
            next(iter(model[1].parameters()))[...] = torch.nan
        found.append(reduced(comm, lambda: save_checkpoint(file, model)))
        return found, unchanged, load_checkpoint(file, model) is None

    for messages, unchanged, good in spmd(body):
        wanted = [
            "CheckpointError: checkpoint .*none.h5: No such file",
            "CheckpointError: checkpoint .*damaged.h5",
            "CheckpointError: .* holds another network than this run's: 0.weight of",
            "CheckpointError: .* was written with another optimizer",
            "CheckpointError: .* was written without a scaler; leave it out",
            "CheckpointError: .* with another optimizer: Adam of \\[4\\] parameters, not AdamW of \\[4\\]",
            "CheckpointError: .* with another optimizer: Adam of \\[4\\] parameters, not Adam of \\[4\\], or of others",
            "TypeError: extra\\['f'\\] is a builtin_function_or_method, and a checkpoint holds numbers",
            "ValueError: optimizer holds a parameter that is not the model's",
            "ValueError: comm is not given, but grid is",
            "RunError: .*weights that are not finite",
        ]
        for message, pattern in zip(messages, wanted, strict=True):
            assert message and re.match(pattern, message), message
        assert unchanged and good


def test_plain_values():
    value = {"a": (1, [2.5, None]), 3: {"!tuple": "no mark"}, "t": torch.tensor([1.0, float("inf")])}
    found = from_plain(json.loads(json.dumps(to_plain(value, "value"))))
    assert torch.equal(found.pop("t"), value.pop("t")) and found == value


# ---- States of an optimizer that are those of other layers


def of_dense(comm, layers):
    return LayerParallel(lambda: DenseBlock(4, "tanh"), layers, 1.0, comm, mgrit=MGRIT(max_levels=1))


PARTS = {
    "stack": of_dense,
    "copy": lambda comm, layers: copy.deepcopy(of_dense(comm, layers)),
    "windows": lambda comm, layers: LayerParallel(lambda: DenseBlock(4), layers, comm=comm, windows=2),
    "pipeline": lambda comm, layers: PipelineParallel([lambda: nn.Linear(4, 4)] * layers, comm),
}


def stepped(comm, part, layers, state=None):
    """Model and optimizer after a step, from a state that was saved."""
    model = nn.Sequential(linear(4, 4, 1).float(), PARTS[part](comm, layers))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    if state is not None:
        optimizer.load_state_dict(state)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def through_a_file(state):
    held = io.BytesIO()
    torch.save(state, held)
    held.seek(0)
    return torch.load(held)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("part", PARTS)
def test_the_state_of_rank_0_is_refused_on_the_others(spmd, part):
    """As of `if rank == 0: torch.save(optimizer.state_dict())`: shapes fit where all have as many layers."""

    def body(comm):
        layers = 4 * comm.size
        own = through_a_file(stepped(comm, part, layers)[1].state_dict())
        first = comm.bcast(own if comm.rank == 0 else None)
        with torch.random.fork_rng(devices=[]):
            alone = comm.bcast(stepped(None, part, layers)[1].state_dict() if comm.rank == 0 else None)
        return [
            reduced(comm, lambda state=state: stepped(comm, part, layers, state) and None) for state in (own, first)
        ], (reduced(comm, lambda: stepped(comm, part, layers, alone)) if part == "stack" else None)

    for rank, ((of_own, of_first), of_one) in enumerate(spmd(body)):
        assert of_own is None, "each rank may keep a file of its own"
        assert (of_first is None) == (rank == 0)
        if rank:
            assert re.match(
                r"RuntimeError: optimizer: its state is that of layers 0 to \d.* has layers [1-9]", of_first
            )
            assert of_first.endswith("use xbraid_py.save_checkpoint and load_checkpoint")
        if part == "stack":
            assert "its state is that of layers 0 to" in of_one


@pytest.mark.ranks(2)
def test_a_step_that_is_refused_changes_nothing(spmd):
    def body(comm):
        model, optimizer = stepped(comm, "stack", 8)
        state = comm.bcast(optimizer.state_dict() if comm.rank == 0 else None)
        before = [p.clone() for p in model.parameters()]
        optimizer.load_state_dict(state)
        said = reduced(comm, optimizer.step)
        return (said is None) == (comm.rank == 0), all(map(torch.equal, before, model.parameters())) == (comm.rank > 0)

    assert set(spmd(body)) == {(True, True)}


def test_what_optimizers_may_go_on_with():
    """Groups that come later, states loaded again and again, and optimizers of plain modules."""
    model, optimizer = stepped(None, "stack", 4)
    head = nn.Linear(4, 2)
    optimizer.add_param_group({"params": head.parameters()})
    head(model(torch.ones(3, 4))).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    plain = torch.optim.Adam(head.parameters())
    plain.step()
    plain.load_state_dict(plain.state_dict())
    plain.step()
    assert set(plain.state_dict()["param_groups"][0]) == set(torch.optim.Adam(head.parameters()).param_groups[0])
