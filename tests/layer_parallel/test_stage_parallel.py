"""Stages of residual networks for images shared among ranks, against the plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import UNCHECKED, distance, reduced
from image_networks import network, random

from xbraid_py import MGRIT, clip_grad_norm_
from xbraid_py.layer_parallel import LayerParallel
from xbraid_py.layer_parallel.stages import parallel_stages
from xbraid_py.layers.image_resnet import ImageResNet, with_blocks

SOLVES = {
    "exact": MGRIT(max_levels=1),
    # Converged for up to 4 intervals.
    "V": MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, max_iter=4, tol=0.0),
    "lagged": MGRIT(cfactor=2, max_levels=2, min_coarse=1, max_iter=5, tol=0.0),
}
BLOCKS = (5, 4, 2)
LABELS = torch.tensor([0, 3, 1, 4])


def plain(norm: str, seed: int = 3, **options) -> ImageResNet:
    """In double precision, frozen statistics no round numbers."""
    return network(seed, **{"norm": norm, "blocks": BLOCKS, "step_size": 0.3, **options})


def gradients(net: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits and loss, after a backward pass."""
    logits = net(images)
    loss = torch.nn.functional.cross_entropy(logits, LABELS)
    loss.backward()
    return logits.detach(), loss.item()


@pytest.mark.parametrize(
    ("norm", "solve"), [("group", "exact"), ("group", "V"), ("frozen", "exact"), ("frozen", "V"), ("none", "lagged")]
)
def test_logits_and_gradients_are_those_of_the_plain_network(spmd, norm, solve):
    images = random(4, 3, 8, 8)

    def body(comm):
        net = parallel_stages(plain(norm), comm, mgrit=SOLVES[solve], accuracy=UNCHECKED, vmap=False)
        logits, loss = gradients(net, images)
        with torch.no_grad():
            inference = net.eval()(images)
        return logits, loss, net.gradients(), inference, [stack.record.mode for stack in net.stacks]

    exact = plain(norm)
    logits, loss = gradients(exact, images)
    wanted = {name: p.grad for name, p in exact.named_parameters()}
    for found, found_loss, found_gradients, inference, modes in spmd(body):
        assert distance(found, logits) < 1e-10 and found_loss == pytest.approx(loss, rel=1e-10)
        assert distance(found_gradients, wanted) < 1e-10
        assert distance(inference, logits) < 1e-10, "without moving statistics the mode changes nothing"
        assert modes == (["exact"] * 3 if solve == "exact" else ["mgrit"] * 2 + ["exact"])


def test_training_is_that_of_the_plain_network(spmd):
    """Three updates with momentum, weight decay and clipping, and back to a plain network."""

    def trained(net, clip):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
        losses, norms = [], []
        for update in range(3):
            optimizer.zero_grad()
            losses.append(gradients(net, random(4, 3, 8, 8, seed=update))[1])
            norms.append(float(clip(net, 0.5)))
            optimizer.step()
        return losses, norms

    def body(comm):
        net = parallel_stages(plain("group"), comm, mgrit=SOLVES["V"], accuracy=UNCHECKED, vmap=False)
        found = trained(net, clip_grad_norm_)
        back = net.to_network()
        return found, back.options(), back.training, back.state_dict()

    def clipped(net, most):  # as the library's, without its 1e-6 in the denominator
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        for p in net.parameters():
            p.grad *= min(1.0, most / norm)
        return norm

    exact = plain("group")
    losses, norms = trained(exact, clipped)
    assert norms[0] > 0.5
    for found, options, training, state in spmd(body):
        assert found[0] == pytest.approx(losses, rel=1e-9) and found[1] == pytest.approx(norms, rel=1e-9)
        assert options == exact.options() and training
        assert distance(state, exact.state_dict()) < 1e-9


def test_there_and_back_is_the_same_network(spmd):
    def body(comm):
        source = plain("frozen").eval()
        for number, (name, tensor) in enumerate(source.state_dict().items()):
            if name.endswith("tracked"):
                tensor.fill_(number)
        kept = copy.deepcopy(source.state_dict())
        net = parallel_stages(source, comm, mgrit=SOLVES["V"])
        back = net.to_network()
        with torch.no_grad():
            for tensor in net.parameters():
                tensor.zero_()
        intact = all(torch.equal(tensor, kept[name]) for name, tensor in source.state_dict().items())
        same = all(torch.equal(tensor, kept[name]) for name, tensor in back.state_dict().items())
        return intact, same, back.state_dict().keys() == kept.keys(), back.training, net.training

    assert spmd(body) == [(True, True, True, False, False)] * len(spmd(lambda comm: None))


def test_state_dicts_do_not_depend_on_the_number_of_ranks(spmd):
    def body(comm):
        net = parallel_stages(plain("group"), comm, mgrit=SOLVES["V"])
        other = parallel_stages(plain("group", seed=4), comm, mgrit=SOLVES["V"])
        other.load_state_dict(net.state_dict())
        return net.state_dict(), other.to_network().state_dict()

    serial = parallel_stages(plain("group"), mgrit=SOLVES["V"]).state_dict()
    for state, loaded in spmd(body):
        assert state.keys() == serial.keys() and all(torch.equal(state[name], serial[name]) for name in serial)
        assert distance(loaded, plain("group").state_dict()) == 0.0


@pytest.mark.parametrize(
    ("mgrit", "counts"),
    [
        (MGRIT(max_levels=1), [8, 7, 1]),
        (MGRIT(cfactor=2, min_coarse=2), [8, 6, 1]),
        (MGRIT(cfactor=4, min_coarse=2), [8, 7, 1]),
        (MGRIT(cycle="V", cfactor=(2, 3), min_coarse=1), [8, 6, 1]),
        (MGRIT(), [8, 7, 1]),
    ],
)
def test_stacks_are_what_the_coarsening_factor_leaves(mgrit, counts):
    """8, 7 and 1 blocks keep the shape; those left over are computed with the transition."""
    if isinstance(mgrit.cfactor, tuple):
        # 8 intervals of 2 blocks make no level of 3; the number of blocks is the caller's.
        with pytest.raises(ValueError, match="steps_of_level_1=4 is not a multiple of cfactor=3"):
            parallel_stages(plain("group", blocks=(8, 8, 2)), mgrit=mgrit)
        return
    net = parallel_stages(plain("group", blocks=(8, 8, 2)), mgrit=mgrit)
    assert [stack.grid.num_layers for stack in net.stacks] == counts
    assert [len(stage) - 1 for stage in net.stages] == [8 - counts[0], 8 - counts[1], 2 - counts[2]]
    for stack in net.stacks:
        assert stack.grid.h == pytest.approx(0.3, rel=1e-15)


def test_a_stage_may_be_a_transition_alone(spmd):
    images = random(4, 3, 8, 8)

    def body(comm):
        net = parallel_stages(plain("group", blocks=(1, 1, 3)), comm)
        return [isinstance(stage[-1], LayerParallel) for stage in net.stages], gradients(net, images)[0]

    logits = plain("group", blocks=(1, 1, 3))(images).detach()
    for kinds, found in spmd(body):
        assert kinds == [True, False, True] and distance(found, logits) < 1e-10


def test_what_cannot_be_shared_is_refused(spmd):
    def body(comm):
        lesioned = with_blocks(plain("group"), [[0], [1, 2], [0, 1]])
        found = [
            reduced(comm, lambda: parallel_stages(plain("batch"), comm)),
            reduced(comm, lambda: parallel_stages(lesioned, comm)),
            reduced(comm, lambda: parallel_stages(plain("group"), comm)(random(4, 1, 8, 8))),
        ]
        return found, reduced(comm, lambda: parallel_stages(plain("group", seed=comm.rank), comm))

    results = spmd(body)
    for (moving, lesioned, images), other in results:
        assert moving.startswith("ValueError: network.norm='batch'") and "norm='frozen'" in moving
        assert lesioned.startswith("ValueError: network lacks a transition, or a stage")
        assert images.startswith("ValueError: images.shape=(4, 1, 8, 8) must be")
        assert (other is None) == (len(results) == 1)
        assert other is None or "every rank must pass the same" in other
