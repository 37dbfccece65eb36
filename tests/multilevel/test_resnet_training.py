"""Multi-level training of residual networks: against a literal loop, resumed, on several ranks, in all precisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refusal import refusal
from torch import nn

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.images import Augmentation, Images, standardize
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.resnet.options import CosineCycles, ResNetTrainingOptions, plan
from xbraid_py.multilevel.resnet.refinement import refined_tensors
from xbraid_py.multilevel.resnet.training import Pipeline, ResNetTraining
from xbraid_py.run.store.read import CheckpointError, load
from xbraid_py.run.store.write import Shard, save

CYCLES = CosineCycles(epochs=(2, 1, 1), eta_max=0.1)
CLASSES = 3
PIPELINE = Pipeline(Augmentation(pad=1, seed=3), standardize)


def images(count, seed):
    """Noise of 8 x 8 pixels, with one corner brighter for each class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    pixels = torch.randint(0, 120, (count, 3, 8, 8), generator=random)
    for i, label in enumerate(labels.tolist()):
        pixels[i, label, :4, :] += 100
    return Images(pixels.to(torch.uint8), labels)


TRAIN, TEST = images(24, 0), images(11, 1)


def training(model="multilevel", grid=None, norm="group", step_sizes=None, **changes):
    options = ResNetTrainingOptions(**({"cycles": CYCLES, "batch_size": 7, "precision": "float64"} | changes))

    def make(level):
        with own_random_numbers(5):
            return ImageResNet(level.blocks, (4, 8), CLASSES, step_size=level.step_size, norm=norm)

    levels = plan(model, (1, 2), len(options.cycles.epochs))
    return ResNetTraining(make, levels, TRAIN, TEST, PIPELINE, options, seed=4, grid=grid)


def timeless(records):
    return [replace(record, seconds=0.0) for record in records]


def arrays(run):
    """The arrays of a state; those of rank 0."""
    return {name: shard.rows for name, shard in run.state()[0].items()}


def stored(path, rows, numbers):
    """A state as the file that `load` reads."""
    shards = {name: Shard(value, 0, len(value)) for name, value in rows.items()}
    save(path, SerialCommunicator(), shards, {"state": numbers})
    return path


def loaded(run, path):
    """The run, which goes on from the file."""
    with load(path) as checkpoint:
        run.load(checkpoint)
    return run


def test_equals_a_literal_loop():
    """Minibatches, eq. 9, SGD with momentum and decay, all by hand and without an interpolation."""
    run = training("first", momentum=0.8, weight_decay=0.01)
    network = run.make(run.levels[0]).double()
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for epoch, record in enumerate(run.run()):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch))
        losses, wrong = [], 0
        for step in range(3):
            chosen = order[7 * step : 7 * step + 7]
            pixels = standardize(Augmentation(pad=1, seed=3)(TRAIN.pixels[chosen], chosen, epoch), torch.float64)
            logits = network(pixels)
            loss = nn.functional.cross_entropy(logits, TRAIN.labels[chosen])
            losses.append(loss.item())
            wrong += int((logits.argmax(1) != TRAIN.labels[chosen]).sum())
            rate = CYCLES.learning_rate(3 * epoch + step, 3)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for p, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                    v.copy_(0.8 * v + g + 0.01 * p)
                    p -= rate * v
        assert record.loss == pytest.approx(sum(losses) / 3, rel=1e-10)
        assert record.error == pytest.approx(wrong / 21) and record.learning_rate == rate
        with torch.no_grad():
            logits = network(standardize(TEST.pixels, torch.float64))
        test_loss, test_error = run.evaluate()
        assert test_loss == pytest.approx(nn.functional.cross_entropy(logits, TEST.labels).item(), rel=1e-10)
        assert test_error == pytest.approx(float((logits.argmax(1) != TEST.labels).double().mean()))
    for ours, theirs in zip(run.network.parameters(), network.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_records_of_a_run():
    run = training(batch_size=6)
    records = list(run.run())
    shapes = [(1, 1, (1, 2)), (2, 1, (1, 2)), (3, 2, (2, 4)), (4, 3, (4, 8))]
    assert [(r.epoch, r.cycle, r.blocks) for r in records] == shapes
    assert [r.block_evaluations for r in records] == [72, 144, 288, 576]
    assert all(a.seconds < b.seconds for a, b in zip(records, records[1:], strict=False))
    assert run.network.step_size == 0.25


def test_work_is_what_the_blocks_have_done():
    run, counted = training("last", batch_size=6, cycles=CosineCycles(epochs=(1, 1))), []
    for stage in run.network.stages:
        for block in stage:
            block.register_forward_hook(lambda one, _, output: counted.append(len(output) if one.training else 0))
    assert [record.block_evaluations for record in run.run()] == [sum(counted) // 2, sum(counted)] == [144, 288]


def test_all_models_see_the_same_images():
    seen = {}
    for model in ("first", "last", "multilevel"):
        run, pixels = training(model), []

        def augment(some, indices, epoch, pixels=pixels):
            found = PIPELINE.augment(some, indices, epoch)
            pixels.append((indices.clone(), found))
            return found

        run.pipeline = Pipeline(augment, standardize)
        list(run.run())
        seen[model] = pixels
    assert len(seen["first"]) == 12
    for other in ("last", "multilevel"):
        for (i, a), (j, b) in zip(seen["first"], seen[other], strict=True):
            assert torch.equal(i, j) and torch.equal(a, b)
    assert not torch.equal(seen["first"][0][0], seen["first"][3][0])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_deeper_networks_begin_where_shallow_ones_end(norm):
    """After its first epoch the refined network is better than a deep one that begins at random."""
    cycles = CosineCycles(epochs=(8, 2), eta_max=0.05)
    records = {model: list(training(model, norm=norm, cycles=cycles).run()) for model in ("last", "multilevel")}
    assert records["multilevel"][8].blocks == records["last"][0].blocks == (2, 4)
    assert records["multilevel"][8].loss < 0.8 * records["last"][0].loss
    first = list(training("first", norm=norm, cycles=cycles).run())
    assert timeless(first[:8]) == timeless(records["multilevel"][:8])


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("interpolation", ["constant", "linear"])
def test_momentum_at_an_interpolation(carry, interpolation):
    run = training(carry_momentum=carry, interpolation=interpolation)
    for record in run.run():
        if record.epoch == 2:
            break

    def momenta():
        prefix = "momentum/"
        return {name.removeprefix(prefix): v for name, v in arrays(run).items() if name.startswith(prefix)}

    coarse, before = run.network, momenta()
    assert before.keys() == dict(coarse.named_parameters()).keys()
    run.interpolate()
    after, expected = momenta(), refined_tensors(coarse, before, interpolation)
    assert after.keys() == (expected.keys() if carry else set())
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert [record.blocks for record in run.run()] == [(2, 4), (4, 8)]
    assert momenta().keys() == dict(run.network.named_parameters()).keys()


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "batch"},
        {"carry_momentum": True, "interpolation": "linear"},
        {"momentum": 0.0},
        {"precision": "float32", "channels_last": True, "norm": "batch"},
        {"precision": "float16"},
    ],
    ids=str,
)
def test_goes_on_bitwise(changes, after, tmp_path):
    """From before the first interpolation, and from the epochs around it."""
    undisturbed = training(**changes)
    expected = list(undisturbed.run())
    first, records = training(**changes), []
    for record in first.run():
        records.append(record)
        if record.epoch == after:
            path = stored(tmp_path / "state.h5", arrays(first), first.state()[1])
            break
    second = loaded(training(**changes), path)
    assert second.seconds == records[-1].seconds
    records += second.run()
    assert timeless(records) == timeless(expected)
    ours, theirs = arrays(second), arrays(undisturbed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_ranks_share_every_minibatch(spmd, precision, norm):
    """Seven images of a minibatch go into no number of ranks but 1; an interpolation lies between."""
    changes = {"precision": precision, "norm": norm}
    alone = training(**changes)
    expected = list(alone.run())

    def body(comm):
        run = training(grid=ProcessGrid(comm, comm.size), **changes)
        return timeless(run.run()), run.evaluate(), run.network.state_dict(), len(run.state()[0])

    results = spmd(body)
    tolerance = 1e-10 if precision == "float64" else 1e-6
    assert [count > 0 for *_, count in results] == [True, *[False] * (len(results) - 1)]  # all have the same
    for records, tested, state, _ in results:
        assert (records, tested) == results[0][:2]
        assert all(torch.equal(state[name], results[0][2][name]) for name in state)
        for found, wanted in zip(records, expected, strict=True):
            assert found.loss == pytest.approx(wanted.loss, rel=tolerance)
            assert found.error == pytest.approx(wanted.error)
            assert found.block_evaluations == wanted.block_evaluations
        assert tested == pytest.approx(alone.evaluate(), rel=tolerance)
        for name, value in alone.network.state_dict().items():
            assert torch.allclose(state[name], value, rtol=10 * tolerance, atol=tolerance), name


@pytest.mark.ranks(2, 3)
def test_statistics_are_those_of_all_ranks(spmd):
    """The running statistics after one step are the means of those of the shares."""
    cycles = CosineCycles(epochs=(1,), eta_max=0.0, eta_min=0.0)
    changes = {"cycles": cycles, "norm": "batch", "batch_size": 24}

    def body(comm):
        run = training(grid=ProcessGrid(comm, comm.size), **changes)
        stem = run.network.stem.weight.detach().clone()
        list(run.run())
        return run.evaluate(), run.network.state_dict(), stem, comm.size

    results = spmd(body)
    _, state, stem, size = results[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4 * 1_000_003))
    pixels = standardize(PIPELINE.augment(TRAIN.pixels[order], order, 0), torch.float64)
    means = [nn.functional.conv2d(part, stem, padding=1).mean((0, 2, 3)) for part in pixels.chunk(size)]
    expected = 0.1 * torch.stack(means).mean(0)
    name = next(name for name in state if name.startswith("stages.0.0") and name.endswith("running_mean"))
    assert torch.allclose(state[name], expected, rtol=1e-10, atol=1e-13)
    for loss, other, _, _ in results:
        assert loss == results[0][0] and all(torch.equal(other[key], state[key]) for key in state)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_near(precision):
    exact = list(training(precision="float32").run())
    run = training(precision=precision, channels_last=True)
    for found, wanted in zip(run.run(), exact, strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=0.05)
        assert found.loss != wanted.loss
    assert run.network.stem.weight.dtype == torch.float32
    assert run.network.stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.ranks(1, 2)
def test_a_loss_that_is_not_finite(spmd):
    def body(comm):
        run = training(grid=ProcessGrid(comm, comm.size), cycles=CosineCycles(epochs=(2,), eta_max=1e200), norm="none")
        return refusal(RunError, list, run.run())

    for message in spmd(body):
        assert message.startswith("epoch 1, minibatch ") and message.endswith("; use a smaller eta_max")


def test_states_of_other_networks_are_refused(tmp_path):
    run = training()
    next(run.run())
    rows, numbers = arrays(run), run.state()[1]
    stem, momentum = "network/stem.weight", next(name for name in rows if name.startswith("momentum/"))

    def refused(error, message, without=(), **changes):
        held = {name: value for name, value in rows.items() if name not in without}
        with pytest.raises(error, match=message):
            loaded(training(), stored(tmp_path / "state.h5", held, numbers | changes))

    other = "holds no state of a training run .other arrays than this network has"
    refused(CheckpointError, other, epoch=3)  # of the network before the interpolation
    refused(CheckpointError, other, (stem,))
    refused(LookupError, momentum.removeprefix("momentum/"), (momentum,))
    for epoch in (0, 5, "1", 1.0):
        refused(CheckpointError, f"holds no state of a training run .epoch={epoch!r}", epoch=epoch)
    for seconds in ("long", None):
        refused((TypeError, ValueError), "float", seconds=seconds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "^batch_size=0 must be at least 1; use 100$"),
        ({"batch_size": 25}, "^batch_size=25 exceeds the 24 training images; use 24 at most$"),
        ({"momentum": 1.0}, "^momentum=1.0 must lie in 0 .. 1, 1 excluded; use 0.9$"),
        ({"weight_decay": -1.0}, "^weight_decay=-1.0 must be at least 0 and finite; use 2e-4$"),
        ({"interpolation": "cubic"}, "^interpolation='cubic' must be constant or linear; use constant$"),
        ({"precision": "half"}, "^precision='half' must be one of float64, .*; use float32$"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)
