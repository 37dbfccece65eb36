"""Models whose blocks differ, in a `PipelineParallel`: losses and gradients of the plain model, and the errors."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from blocks import reduced
from model_cases import LAYERS, WIDTH, Case, case, distance, gradients
from model_zoo import package
from torch import nn

from xbraid_py import MGRIT, PipelineParallel, parallelize, to_sequential
from xbraid_py.layers.module_block import own_random_numbers

PIPELINE = {"mgrit": MGRIT(cycle="pipeline", portions=2)}
RANKS = pytest.mark.ranks(1, 2, 3)


def gpt2_of_widths(**changes) -> Case:
    """GPT-2 whose perceptrons have other widths in every block."""
    found = case("GPT-2", **changes)
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    with own_random_numbers(2):
        for number, block in enumerate(found.model.transformer.h):
            block.mlp = GPT2MLP(WIDTH + 4 * number, found.model.config).double()
    return found


def bert_of_two_kinds() -> Case:
    """BERT of which some blocks have another epsilon: other blocks, weights of the same shapes."""
    found = case("BERT")
    for layer in found.model.bert.encoder.layer[3:5]:
        layer.output.LayerNorm.eps = 0.1
    return found


def gpt2_partly_frozen() -> Case:
    found = case("GPT-2")
    found.model.transformer.h[:3].requires_grad_(False)
    return found


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH), nn.Dropout(0.0)

    def forward(self, u, mask=None):
        change = self.dropout(self.down(torch.tanh(self.up(u)))) / 4
        return change if mask is None else change * mask


class Returning(Block):
    """Hands the mask on."""

    def forward(self, u, mask=None):
        return mask, u + super().forward(u, mask)


class Loop(nn.Module):
    """A loop that adds, or that takes an entry; it looks at a block for what its configuration has asked for."""

    def __init__(self, kind=Block, looks: str | None = None, count: int = LAYERS):
        super().__init__()
        self.blocks = nn.ModuleList(kind(3 + n) for n in range(count))
        self.head, self.looks = nn.Linear(WIDTH, 2), looks

    def forward(self, x, mask):
        for block in self.blocks:
            if self.looks is not None:
                getattr(block, self.looks)
            end = block(x, mask=mask)
            mask, x = end if isinstance(end, tuple) else (mask, x + end)
        return self.head(x)


def loop_of(kind=Block, **options) -> Case:
    with own_random_numbers(4):
        model = Loop(kind, **options).double()
        x, mask = torch.randn(6, WIDTH).double(), torch.rand(6, 1).double()
    found = Case(model, {"x": x, "mask": mask}, lambda out: out.square().mean())
    found.options = [{"form": "increment"} if kind is Block else {"returns": 1}]
    return found


UNLIKE = {
    "GPT-2 of widths": (gpt2_of_widths, {"unlike": True}),
    "BERT of two kinds": (bert_of_two_kinds, {}),
    "GPT-2, partly frozen": (gpt2_partly_frozen, {}),
    "increments": (loop_of, {"unlike": True}),
    "tuples": (lambda: loop_of(Returning), {"unlike": True}),
}


@RANKS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", UNLIKE)
def test_losses_and_gradients(spmd, name, recompute):
    make, options = UNLIKE[name]
    wanted = make()
    plain = copy.deepcopy(wanted.model)
    loss = wanted.loss(plain)
    loss.backward()
    slopes = gradients(plain)

    def body(comm):
        model = wanted.parallel(comm, **PIPELINE, **options, recompute=recompute)
        stacks = [part for part in model.modules() if isinstance(part, PipelineParallel)]
        assert len(stacks) == 1 and stacks[0].partition.num_rows == LAYERS
        found = wanted.loss(model)
        found.backward()
        with torch.no_grad():
            of_evaluation = wanted.loss(model.eval())
        return found.detach(), of_evaluation, gradients(model)

    alone = body(None)
    for found, of_evaluation, own in spmd(body):
        assert abs(float(found - loss.detach())) < 1e-12 * abs(float(loss.detach()))
        assert abs(float(of_evaluation - loss.detach())) < 1e-12 * abs(float(loss.detach()))
        assert distance(own, slopes) < 1e-10
        assert torch.equal(found, alone[0]) and [key for key in own if not torch.equal(own[key], alone[2][key])] == []


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", UNLIKE)
def test_back_to_their_own_classes(spmd, name):
    make, options = UNLIKE[name]
    wanted = make()
    learned = copy.deepcopy(wanted.model)
    optimizer = torch.optim.SGD(learned.parameters(), 0.1)
    wanted.loss(learned).backward()
    optimizer.step()

    def body(comm):
        model = wanted.parallel(comm, **PIPELINE, **options)
        optimizer = torch.optim.SGD([{"params": list(model.parameters())}], 0.1)
        wanted.loss(copy.deepcopy(model)).backward()  # the copy has nothing to do with it
        wanted.loss(model).backward()
        optimizer.step()
        plain = to_sequential(model)
        kinds = [(name, type(part), part.training) for name, part in wanted.model.named_modules()]
        assert [(name, type(part), part.training) for name, part in plain.named_modules()] == kinds
        asks = {name: p.requires_grad for name, p in wanted.model.named_parameters()}
        assert {name: p.requires_grad for name, p in plain.named_parameters()} == asks
        assert list(plain.state_dict()) == list(wanted.model.state_dict())
        assert torch.equal(wanted.loss(plain), wanted.loss(copy.deepcopy(plain)))
        return distance(dict(plain.named_parameters()), dict(learned.named_parameters()))

    assert max(spmd(body)) < 1e-10


@pytest.mark.ranks(1, 2)
def test_an_example_of_blocks_that_differ(spmd):
    """A loop that hands each block something else: what is not told from the blocks, an example tells."""

    class Counting(Loop):
        def forward(self, x, mask):
            for number, block in enumerate(self.blocks):
                x = x + block(x, mask=mask * number)
            return self.head(x)

    def body(comm):
        found = []
        for kind in (Loop, Counting):
            with own_random_numbers(4):
                model = kind().double()
            example = loop_of().inputs
            options = {"form": "increment", "unlike": True, "example": example, **PIPELINE}
            found.append(reduced(comm, lambda m=model, o=options: parallelize(m, comm, **o)))
        return found

    for fine, wrong in spmd(body):
        assert fine is None and "of the example the model makes outputs that differ by" in wrong


@RANKS
def test_dropout_within_attention(spmd):
    def body(comm):
        wanted = gpt2_of_widths(attn_pdrop=0.25)
        first = wanted.parallel(comm, unlike=True, **PIPELINE)
        error = reduced(comm, lambda: wanted.loss(first))
        losses = []
        for _ in range(2):
            model = wanted.parallel(comm, unlike=True, torch_random=True, **PIPELINE)
            losses += [wanted.loss(model).detach() for _ in range(2)]
        return error, losses

    alone = body(None)[1]
    assert torch.equal(alone[0], alone[2]) and not torch.equal(alone[0], alone[1])
    for error, losses in spmd(body):
        assert "draws random numbers of torch's own" in error and "config.attn_pdrop=0.25" in error
        assert all(torch.equal(a, b) for a, b in zip(losses, alone, strict=True))


# ---- What is refused


def test_what_needs_like_blocks():
    with pytest.raises(
        ValueError, match=r"Loop has no ModuleList .* with like blocks .*; for blocks that differ use unl"
    ):
        loop_of().parallel(None, **PIPELINE)
    with pytest.raises(
        ValueError, match=r"blocks: blocks\[0\] and blocks\[1\] differ: shape of up.weight .*cycle='pipel"
    ):
        loop_of().parallel(None, unlike=True)
    with pytest.raises(ValueError, match=r"encoder.layer: .*eps is .*use mgrit=MGRIT\(cycle='pipeline'\)"):
        bert_of_two_kinds().parallel(None)
    with pytest.raises(ValueError, match=r"freeze all of them or none, or use mgrit=MGRIT\(cycle='pipeline'\)"):
        gpt2_partly_frozen().parallel(None)
    with pytest.raises(TypeError, match="vmap is an option of like blocks"):
        loop_of().parallel(None, unlike=True, vmap=True, **PIPELINE)


@RANKS
def test_a_first_block_that_makes_what_others_are_handed(spmd):
    """T5's first block has the table of positions; by default it stays beside the run."""
    wanted = case("T5")

    def body(comm):
        model = parallelize(
            copy.deepcopy(wanted.model), comm, "encoder.block", returns=0, form="map", unlike=True, **PIPELINE
        )
        return reduced(comm, lambda: wanted.loss(model))

    for error in spmd(body):
        assert "block=T5Block returns a Tensor as entry 1, which is neither None nor an input handed on" in error


@RANKS
def test_blocks_that_hand_on_something_else(spmd):
    class Late(Returning):
        def forward(self, u, mask=None):
            mask, end = super().forward(u, mask)
            return (None if self.up.out_features == 5 else mask), end

    def body(comm):
        model = loop_of(Late).parallel(comm, unlike=True, **PIPELINE)
        return reduced(comm, lambda: loop_of().loss(model))

    for error in spmd(body):
        assert "block 2 hands on (None, None) of its inputs, the first block ('mask', None)" in error


@RANKS
def test_the_form_of_every_block_is_looked_at(spmd):
    class Mixed(Block):
        def forward(self, u, mask=None):
            return super().forward(u) + (u if self.up.out_features != 5 else 0.0)

    class Chain(Loop):
        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x)
            return x

    def body(comm):
        with own_random_numbers(4):
            model = Chain(Mixed).double()
        parallelize(model, comm, unlike=True, **PIPELINE)
        return reduced(comm, lambda: loop_of().loss(model))

    for error in spmd(body):
        assert "block=Mixed forgets its state where its matrices are zero" in error


def test_what_a_loop_looks_at_and_blocks_differ_in():
    class Typed(Block):
        def __init__(self, width: int):
            super().__init__(width)
            self.attention_type, self.layer_idx = ("sliding" if width % 2 else "full"), width

    wanted = loop_of(Typed, looks="attention_type")
    with pytest.raises(ValueError, match="attention_type is 'sliding' in the first block and 'full' in block 1"):
        wanted.loss(wanted.parallel(None, unlike=True, form="increment", **PIPELINE))
    wanted = loop_of(Typed, looks="layer_idx")  # of which nothing depends
    wanted.options = [{}]
    wanted.loss(wanted.parallel(None, unlike=True, form="increment", **PIPELINE))


def test_layers_of_several_types():
    package("transformers")
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 30, "hidden_size": WIDTH, "num_hidden_layers": 4, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False, "pad_token_id": 0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))
    for options in ({}, PIPELINE):
        with pytest.raises(
            ValueError, match=r"layer_types=\['full_attention', 'sliding_attention'\] of the model's conf"
        ):
            parallelize(model, **options)
    wanted = loop_of()
    wanted.model.config = SimpleNamespace(layer_types=["full"] * LAYERS)
    wanted.parallel(None, unlike=True, **PIPELINE)
