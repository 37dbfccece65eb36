"""Models that exist, with one stack in place of their blocks: losses and gradients of the plain model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_cases import CASES, case, distance, gradients

from xbraid_py import MGRIT, to_sequential

EXACT = {
    "layer after layer": {"mgrit": MGRIT(max_levels=1)},
    "pipeline": {"mgrit": MGRIT(cycle="pipeline", portions=2)},
    "recompute": {"mgrit": MGRIT(cycle="pipeline"), "recompute": "states"},
}
ITERATED = {"mgrit": MGRIT(cfactor=2, tol=1e-12, max_iter=12)}


def expected(wanted):
    """Loss and gradients of the plain model, by autograd."""
    model = copy.deepcopy(wanted.model)
    loss = wanted.loss(model)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", EXACT)
@pytest.mark.ranks(1, 2, 3)
def test_exact(spmd, name, how):
    wanted = case(name)
    loss, slopes = expected(wanted)

    def body(comm):
        model = wanted.parallel(comm, **EXACT[how])
        found = wanted.loss(model)
        found.backward()
        return float(found.detach() - loss), distance(gradients(model), slopes)

    for of_loss, of_slopes in spmd(body):
        assert abs(of_loss) < 1e-12 * abs(loss)
        assert of_slopes < 1e-10


@pytest.mark.parametrize("name", CASES)
@pytest.mark.ranks(1, 2, 3)
def test_mgrit(spmd, name):
    wanted = case(name)
    loss, slopes = expected(wanted)
    # Intervals of two layers, of which the ResNet has none.
    options = ITERATED if name != "torchvision ResNet" else {"mgrit": MGRIT(cfactor=5, tol=1e-12, max_iter=12)}

    def body(comm):
        model = wanted.parallel(comm, **options)
        found = wanted.loss(model)
        found.backward()
        return float(found.detach() - loss), distance(gradients(model), slopes)

    for of_loss, of_slopes in spmd(body):
        assert abs(of_loss) < 1e-9 * abs(loss)
        assert of_slopes < 1e-7


@pytest.mark.parametrize("name", CASES)
@pytest.mark.ranks(1, 2, 3)
def test_evaluation(spmd, name):
    # Without gradients the samples go through the ranks in portions, and so do the masks of each.
    wanted = case(name)
    plain = copy.deepcopy(wanted.model).eval()
    with torch.no_grad():
        loss = wanted.loss(plain)

    def body(comm):
        model = wanted.parallel(comm, mgrit=MGRIT(portions=None)).eval()
        with torch.no_grad():
            return float(wanted.loss(model) - loss)

    assert max(map(abs, spmd(body))) < 1e-12 * abs(loss)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.ranks(1, 2)
def test_back_to_its_own_classes(spmd, name):
    wanted = case(name)
    learned = copy.deepcopy(wanted.model)
    optimizer = torch.optim.SGD(learned.parameters(), 0.1)
    wanted.loss(learned).backward()
    optimizer.step()

    def body(comm):
        model = wanted.parallel(comm, mgrit=MGRIT(max_levels=1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        wanted.loss(model).backward()
        optimizer.step()
        plain = to_sequential(model)
        original = copy.deepcopy(wanted.model)
        original.load_state_dict(plain.state_dict())
        # Looked at on each rank: models of torchvision cannot be pickled.
        assert list(plain.state_dict()) == list(wanted.model.state_dict())
        kinds = [(name, type(part), part.training) for name, part in wanted.model.named_modules()]
        assert [(name, type(part), part.training) for name, part in plain.named_modules()] == kinds
        assert torch.equal(wanted.loss(plain), wanted.loss(original))
        return distance(dict(original.named_parameters()), dict(learned.named_parameters()))

    assert max(spmd(body)) < 1e-10


@pytest.mark.parametrize("name", CASES)
@pytest.mark.ranks(2, 3)
def test_the_same_bits_on_any_number_of_ranks(spmd, name):
    wanted = case(name)

    def body(comm):
        model = wanted.parallel(comm, **EXACT["pipeline"])
        loss = wanted.loss(model)
        loss.backward()
        return loss.detach(), gradients(model)

    alone, slopes = body(None)
    for loss, found in spmd(body):
        assert torch.equal(loss, alone)
        assert [key for key in slopes if not torch.equal(found[key], slopes[key])] == []


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_copies_of_a_model(name):
    wanted = case(name)
    model = wanted.parallel(None, **EXACT["pipeline"])
    copied, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    loss = wanted.loss(model)
    loss.backward()
    slopes = gradients(model)
    for other in (copied, stored):
        assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
        found = wanted.loss(other)
        found.backward()
        assert torch.equal(found, loss)
        assert distance(gradients(other), slopes) == 0.0


def test_another_type_of_numbers():
    wanted = case("torchvision ResNet", norm=torch.nn.BatchNorm2d)
    wanted.model.float()
    for part in wanted.model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    model = wanted.parallel(None, **EXACT["pipeline"]).double()
    back = to_sequential(model)
    assert {each.dtype for each in back.state_dict().values()} == {torch.float64, torch.int64}
    assert float((wanted.loss(back) - wanted.loss(model)).detach()) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT-2", {"attn_pdrop": 0.2, "resid_pdrop": 0.1}),
        ("BERT", {"attention_probs_dropout_prob": 0.2}),
        ("nn.TransformerEncoder", {"dropout": 0.1}),
        ("timm ViT", {"drop_path_rate": 0.4}),
    ],
)
@pytest.mark.ranks(1, 2, 3)
def test_masks_of_attention_and_stochastic_depth(spmd, name, changes):
    """Of an iterated solve those of an exact one, whatever the ranks, and others in another update."""
    wanted = case(name, **changes)

    def body(comm):
        found = []
        for options in (EXACT["layer after layer"], ITERATED):
            model = wanted.parallel(comm, torch_random=True, seed=4, **options)
            losses = [wanted.loss(model) for _ in range(2)]
            losses[0].backward()
            found.append(([float(loss.detach()) for loss in losses], gradients(model)))
        return found

    exact = body(None)[0]
    assert abs(exact[0][0] - exact[0][1]) > 1e-6
    for found in spmd(body):
        for losses, slopes in found:
            assert losses == pytest.approx(exact[0], rel=1e-10)
            assert distance(slopes, exact[1]) < 1e-9
