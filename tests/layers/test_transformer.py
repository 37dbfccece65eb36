"""Decoder blocks: the usual block of torch, causality, dropout, the layer-parallel stack; embedding, head, sampling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import CausalSelfAttention, DecoderBlock, TokenEmbedding, TokenHead, generate
from xbraid_py.nn import Dropout

WIDTH, HEADS, LENGTH, TOKENS = 12, 3, 7, 5


def make_block(seed=0, **options):
    with own_random_numbers(seed):  # ranks that are threads share one generator
        return DecoderBlock(WIDTH, HEADS, **options).double()


def states(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def torch_layer(block: DecoderBlock) -> nn.TransformerEncoderLayer:
    """PyTorch's pre-norm layer with the weights of a block."""
    hidden = block.mlp[0].out_features
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    pairs = {
        "self_attn.in_proj_": block.attention.inputs,
        "self_attn.out_proj.": block.attention.outputs,
        "linear1.": block.mlp[0],
        "linear2.": block.mlp[2],
        "norm1.": block.attention_norm,
        "norm2.": block.mlp_norm,
    }
    weights = {f"{name}{end}": getattr(part, end) for name, part in pairs.items() for end in ("weight", "bias")}
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("hidden", [None, 5])
def test_the_sum_is_the_block_of_torch(hidden):
    block = make_block(hidden=hidden)
    with torch.no_grad():
        for parameter in block.parameters():  # biases and norms too
            parameter += 0.3 * torch.randn_like(parameter)
    layer, u = torch_layer(block), states()
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    slope = torch.randn_like(u)
    outputs, gradients = [], []
    for value, u_in in (
        (lambda v: v + block(v), u.clone().requires_grad_()),
        (lambda v: layer(v, src_mask=mask, is_causal=True), u.clone().requires_grad_()),
    ):
        outputs.append(value(u_in))
        gradients.append(torch.autograd.grad((outputs[-1] * slope).sum(), u_in)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [0, 3, LENGTH - 1])
def test_a_token_sees_itself_and_what_came_before(place):
    block, u = make_block(), states(1).requires_grad_()
    (gradient,) = torch.autograd.grad(block(u)[0, place].sum(), u)
    seen = gradient[0].abs().sum(1) > 0
    assert seen.tolist() == [other <= place for other in range(LENGTH)]


def test_without_weights_behind_it_the_block_is_zero():
    block = make_block(scale=0.0)
    assert torch.equal(block(states()), torch.zeros(2, LENGTH, WIDTH, dtype=torch.float64))


def test_the_block_is_batched_by_vmap_without_a_warning(recwarn):
    block, u = make_block(), states(6).view(3, 2, LENGTH, WIDTH)
    found = torch.func.vmap(block)(u)
    torch.testing.assert_close(found, torch.stack([block(each) for each in u]), rtol=0, atol=1e-13)
    assert not recwarn.list


def test_dropout_falls_on_both_parts_and_not_in_evaluation_mode():
    block, u = make_block(dropout=0.5), states()
    plain = make_block()
    torch.manual_seed(0)
    assert not torch.equal(block(u), plain(u))
    for part in (block.attention_dropout, block.mlp_dropout):
        assert isinstance(part, Dropout) and part.p == 0.5, "one that draws the same in every sweep"
    block.eval()
    assert torch.equal(block(u), plain(u))
    block.train()
    block.attention_dropout.p = 0.0
    with torch.no_grad():
        change = plain.attention(plain.attention_norm(u))
        kept = block(u) - change
        whole = plain(u) - change
    dropped = kept == 0
    torch.testing.assert_close(kept[~dropped], 2 * whole[~dropped], rtol=1e-10, atol=1e-12)
    assert 0.3 < dropped.double().mean() < 0.7


def test_embedding_adds_the_place():
    torch.manual_seed(0)
    embedding = TokenEmbedding(TOKENS, WIDTH, LENGTH)
    found = embedding(torch.tensor([[1, 1, 4]]))
    expected = embedding.tokens.weight[[1, 1, 4]] + embedding.places.weight[:3]
    assert torch.equal(found, expected[None])
    with pytest.raises(ValueError, match=r"tokens.shape=\(1, 8\) must have at most 7 places; use the last ones"):
        embedding(torch.zeros(1, LENGTH + 1, dtype=torch.int64))


def test_states_begin_with_a_variance_of_one_and_logits_nearly_alike():
    torch.manual_seed(0)
    u = TokenEmbedding(90, 64, 32)(torch.randint(90, (50, 32)))
    assert 0.9 < u.var() < 1.1
    logits = TokenHead(64, 90)(u)
    assert logits.shape == (50, 32, 90) and logits.std() < 0.2


class NextIs(nn.Module):
    """After token t comes t + 1, by far; what it is shown is kept."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, tokens):
        assert not self.training and not torch.is_grad_enabled()
        self.shown.append(tokens)
        return 50.0 * nn.functional.one_hot((tokens + 1) % TOKENS, TOKENS).float()


def test_generate_goes_on_from_the_last_token():
    model = NextIs()
    found = generate(model, torch.tensor([2, 3]), 6, 4)
    assert found.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert model.training  # as it was before
    assert [shown.tolist() for shown in model.shown[:2]] == [[[2, 3, 0, 0]], [[2, 3, 4, 0]]]
    assert model.shown[-1].tolist() == [[0, 1, 2, 3]]


def test_generate_draws_by_the_chances():
    def even(tokens):
        return torch.zeros(*tokens.shape, TOKENS)

    class Even(nn.Module):
        forward = staticmethod(even)

    one, same, other = (generate(Even(), torch.tensor([0]), 500, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    counts = torch.bincount(one, minlength=TOKENS)
    assert counts.min() > 60 and len(one) == 501


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CausalSelfAttention(12, 5), "heads=5 must be at least 1 and divide width=12; use 4"),
        (lambda: DecoderBlock(12, 0), "heads=0 must be at least 1 and divide width=12; use 1"),
        (lambda: DecoderBlock(12, 3, hidden=0), "hidden=0 must be at least 1; use 48"),
        (lambda: DecoderBlock(12, 3, dropout=1.0), "p=1.0 must be at least 0 and below 1; use 0.1"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
