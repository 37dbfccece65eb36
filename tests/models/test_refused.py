"""Models that no stack can be put into, or not so: the errors, each with the way out, and what is switched off."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from model_cases import case, distance, gradients
from model_zoo import package
from torch import nn

from xbraid_py import MGRIT, parallelize, to_sequential
from xbraid_py import nn as xnn

EXACT = {"mgrit": MGRIT(max_levels=1)}


class Perceptron(nn.Module):
    """F without the sum."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, u):
        return self.second(torch.tanh(self.first(self.norm(u))))


class Adds(nn.Module):
    """A model whose own loop has the sum."""

    def __init__(self, h: float = 1.0, used: bool = True):
        super().__init__()
        self.h, self.used = h, used
        self.blocks = nn.ModuleList([Perceptron() for _ in range(6)])
        self.head = nn.Linear(4, 2)

    def forward(self, u):
        seen = []
        for block in self.blocks:
            u = u + self.h * block(u)
            seen.append(u)
        return self.head(u if self.used else sum(seen))


class Residual(Perceptron):
    """With the sum."""

    def forward(self, u):
        return u + super().forward(u)


class Pair(Residual):
    """Gives more than the state."""

    def forward(self, u):
        end = super().forward(u)
        return end, end.mean()


class Loop(nn.Module):
    """The loop of most models, over blocks of a list."""

    def __init__(self, *blocks: nn.Module, entry: int | None = None):
        super().__init__()
        self.blocks, self.entry = nn.ModuleList(blocks), entry

    def forward(self, u):
        for block in self.blocks:
            u = block(u) if self.entry is None else block(u)[self.entry]
        return u


def loop(kind=Residual, count: int = 4, **options) -> Loop:
    torch.manual_seed(0)
    return Loop(*(kind() for _ in range(count)), **options)


U = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


# ---- What is found


@pytest.mark.ranks(1, 2, 3)
def test_a_loop_that_adds(spmd):
    # The blocks give increments: what stands in their place gives what the loop adds.
    torch.manual_seed(0)
    plain = Adds(0.5).double()
    loss = plain(U.double()).square().sum()
    loss.backward()

    def body(comm):
        model = parallelize(copy.deepcopy(plain).requires_grad_(True), comm, form="increment", T=3.0, **EXACT)
        model.zero_grad()
        found = model(U.double()).square().sum()
        found.backward()
        return float(found.detach() - loss.detach()), distance(gradients(model), gradients(plain))

    for of_loss, of_slopes in spmd(body):
        assert abs(of_loss) < 1e-12 and of_slopes < 1e-11


def test_a_form_that_is_wrong():
    with pytest.raises(ValueError, match=r"block=Perceptron forgets its state .*form='increment'.*form='map'"):
        parallelize(Adds())(U)
    # Linear layers with an activation in the loop are neither.
    with pytest.raises(ValueError, match="block=Linear forgets its state"):
        parallelize(Loop(*(nn.Linear(4, 4) for _ in range(3))))(U)


def test_a_form_in_doubt():
    class Turned(Residual):
        def forward(self, u):
            return Perceptron.forward(self, u) - u

    with pytest.raises(ValueError, match=r"cosine -1.00.* in doubt .*use form='map' .* form='increment'"):
        parallelize(loop(Turned))(U)


def test_an_example_that_the_model_makes_otherwise():
    example = (U,)
    parallelize(Adds(), form="increment", example=example, **EXACT)
    with pytest.raises(ValueError, match=r"blocks='blocks': of the example the model makes outputs that differ by"):
        parallelize(Adds(0.5), form="increment", example=example, **EXACT)
    with pytest.raises(ValueError, match="has to go into the next one and nowhere else"):
        parallelize(Adds(used=False), form="increment", example=example, **EXACT)
    parallelize(loop(), example={"u": U}, **EXACT)


def test_the_longest_run():
    torch.manual_seed(0)
    parts = [
        nn.Sequential(Residual(), Residual()),
        loop(count=5),
        nn.Sequential(nn.Linear(4, 4), *loop(count=3).blocks),
    ]
    model = parallelize(nn.ModuleList(parts))
    assert [name for name, part in model.named_modules() if hasattr(part, "restored")] == ["1.blocks.0"]
    model = parallelize(model, blocks="2")
    assert list(model[2]._modules) == ["0", "1"]
    assert type(model[2]) is nn.Sequential
    plain = to_sequential(model)
    assert [len(model[0]), len(plain[1].blocks), list(plain[2]._modules)] == [2, 5, ["0", "1", "2", "3"]]


def test_runs_that_are_as_long():
    with pytest.raises(
        ValueError, match=r"several runs as long: 0.blocks \(4\), 2.blocks \(4\); use blocks='0.blocks'"
    ):
        parallelize(nn.ModuleList([loop(), nn.Linear(4, 4), loop()]))
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration has several runs as long.*blocks='encoder.block'"
    ):
        parallelize(case("T5").model)


def test_no_run():
    with pytest.raises(ValueError, match="Linear has no ModuleList or Sequential with like blocks .*from_blocks"):
        parallelize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"blocks='h' is no ModuleList .*; there are blocks \(4\)"):
        parallelize(loop(), blocks="h")


def test_arguments():
    with pytest.raises(TypeError, match="model=function must be an nn.Module"):
        parallelize(lambda u: u)
    with pytest.raises(TypeError, match="blocks=list must be the name of a container"):
        parallelize(loop(), blocks=[1])
    with pytest.raises(ValueError, match="form='maps' must be map or increment"):
        parallelize(loop(), form="maps")
    with pytest.raises(ValueError, match="an nn.Sequential hands on what a block gives; use form='map'"):
        parallelize(nn.Sequential(Residual(), Residual()), form="increment")


# ---- Weights


def test_one_module_for_all_layers():
    block = Residual()
    with pytest.raises(ValueError, match=r"blocks: one module stands for several layers.*copy.deepcopy"):
        parallelize(Loop(block, block, block))
    package("transformers")
    from transformers import AlbertConfig, AlbertModel

    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "embedding_size": 8,
        "vocab_size": 30,
    }
    with pytest.raises(ValueError, match="AlbertModel has no ModuleList or Sequential with like blocks in a row"):
        parallelize(AlbertModel(AlbertConfig(num_hidden_layers=8, **sizes)))


def test_weights_shared_with_others():
    model = loop()
    model.blocks[2].first.weight = model.blocks[0].first.weight
    with pytest.raises(ValueError, match=r"blocks.2.first.weight is blocks.0.first.weight too"):
        parallelize(model)
    model = loop()
    model.head = nn.Linear(4, 8)
    model.head.weight = model.blocks[3].first.weight
    with pytest.raises(ValueError, match=r"blocks.3.first.weight is head.weight too"):
        parallelize(model)


def test_some_layers_are_frozen():
    model = loop()
    model.blocks[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks.1.norm.weight has requires_grad=True.*freeze all of them or none"):
        parallelize(model)
    model = parallelize(loop().requires_grad_(False))
    assert not any(p.requires_grad for p in (*model.parameters(), *to_sequential(model).parameters()))


# ---- What blocks return and are given


def test_blocks_that_return_more():
    with pytest.raises(ValueError, match=r"block=Pair returns a tuple; .* returns=0"):
        parallelize(loop(Pair, entry=0))(U)
    with pytest.raises(ValueError, match=r"block=Pair returns a Tensor as entry 1, which is neither None nor an input"):
        parallelize(loop(Pair, entry=0), returns=0)(U)
    with pytest.raises(ValueError, match="block=Residual returns a Tensor, no tuple; leave returns out"):
        parallelize(loop(entry=0), returns=0)(U)


def test_a_cache_of_keys_and_values():
    example = case("GPT-2", use_cache=True)
    with pytest.warns(UserWarning, match="use_cache=True of the model's configuration is switched off"):
        model = parallelize(copy.deepcopy(example.model), **EXACT)
    example.loss(model).backward()
    with pytest.raises(ValueError, match="call the model with use_cache=False"):
        model(input_ids=example.inputs["input_ids"], use_cache=True)
    assert to_sequential(model).config.use_cache and not model.config.use_cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallelize(case("GPT-2").model, **EXACT)


def test_what_lies_between_the_blocks():
    example = case("BERT")
    model = example.parallel(None, **EXACT)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=rf"{name}=True: what lies between .* use {name}=False, or to_sequential"):
            model(input_ids=example.inputs["input_ids"], **{name: True})
    plain = to_sequential(model)
    assert len(plain(input_ids=example.inputs["input_ids"], output_hidden_states=True).hidden_states) > 1


# ---- Dropout and norms


@pytest.mark.ranks(1, 2)
def test_dropout_becomes_ours_and_back(spmd):
    example = case("GPT-2", resid_pdrop=0.25)

    def body(comm):
        model = example.parallel(comm, **EXACT)
        first, second = (example.loss(model) for _ in range(2))
        first.backward()
        kinds = {type(part) for part in model.transformer.h[0].stack.windows[0].block.module.modules()}
        back = to_sequential(model)
        return (
            float(first.detach()),
            float(second.detach()),
            xnn.Dropout in kinds,
            [(n, type(p)) for n, p in back.named_modules()],
        )

    results = spmd(body)
    assert len({first for first, _, _, _ in results}) == 1  # on any rank
    for first, second, is_ours, kinds in results:
        assert first != second  # another update, another mask
        assert is_ours and kinds == [(n, type(p)) for n, p in example.model.named_modules()]


@pytest.mark.parametrize(("name", "option"), [("GPT-2", "attn_pdrop"), ("BERT", "attention_probs_dropout_prob")])
def test_dropout_within_attention(name, option):
    example = case(name, **{option: 0.1})
    model = example.parallel(None, **EXACT)
    with pytest.raises(ValueError, match=rf"config.{option}=0.1.*use 0"):
        example.loss(model)
    with torch.no_grad():
        model.eval()
        example.loss(model)


def test_batch_norm():
    example = case("torchvision ResNet", norm=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="BatchNorm"):
        example.loss(example.parallel(None, **EXACT))
    plain = copy.deepcopy(example.model)
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval().running_var.fill_(2.0)
    model = parallelize(copy.deepcopy(plain), **EXACT)
    first, second = example.loss(plain), example.loss(model)
    assert float(first.detach() - second.detach()) == pytest.approx(0.0, abs=1e-12)
    first.backward()
    second.backward()
    assert distance(gradients(model), gradients(plain)) < 1e-10


def test_gradient_checkpointing_of_the_model():
    example = case("GPT-2")
    example.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="recompute=True"):
        example.loss(example.parallel(None, **EXACT))
