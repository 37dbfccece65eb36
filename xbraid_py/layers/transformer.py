"""A causal language model of pre-norm decoder blocks: embedding, the F of a block's u + h F(u), head.

Shape letters: `B` sequences, `S` tokens in a sequence, `C` width, `V` tokens of the alphabet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xbraid_py.layers.norm_dropout import Dropout


class CausalSelfAttention(nn.Module):
    """Attention of every token of a sequence to itself and to those before it, by heads of C / heads features.

    Raises `ValueError` if `heads` does not divide the width C.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"heads={heads} must be at least 1 and divide width={width}; use {_fitting(width, heads)}")
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)  # queries, keys and values, in this order
        self.outputs = nn.Linear(width, width)

    def forward(self, u: Tensor) -> Tensor:
        """u (B, S, C) to (B, S, C)."""
        parts = self.inputs(u).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, heads, C / heads)
        queries, keys, values = parts.movedim(-2, -4).unbind(-2)  # (B, heads, S, C / heads)
        # Not `scaled_dot_product_attention`: for short sequences it is no faster, and vmap takes it apart into a loop.
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5  # (B, heads, S, S)
        future = scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
        found = (scores + future).softmax(-1) @ values
        return self.outputs(found.transpose(-3, -2).flatten(-2))


class DecoderBlock(nn.Module):
    """F(u) of a pre-norm decoder block: u + F(u) is v + M(N v) with v = u + A(N u).

    A is causal self-attention, M a perceptron of one hidden layer (GELU), N a layer normalization. What A and M yield
    goes through dropout.

    Parameters
    ----------
    width : int
        C, features of a token.
    heads : int
        Of the attention; divides `width`.
    hidden : int, optional
        Features of the hidden layer; 4 C by default.
    dropout : float
        Probability. The masks are those of `nn.Dropout` here: in a layer-parallel stack they depend on the layer and
        the update alone.
    scale : float
        Factor of the initial weights of the last linear maps of A and M: the smaller, the nearer the block is to 0.

    Raises
    ------
    ValueError
        If a number is out of its range, or `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, hidden: int | None = None, dropout: float = 0.0, scale: float = 1.0):
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1; use {4 * width}")
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(first, nn.GELU(), last)
        self.attention_dropout, self.mlp_dropout = Dropout(dropout), Dropout(dropout)
        for layer in (self.attention.inputs, self.attention.outputs, first, last):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.attention.outputs.weight *= scale
            last.weight *= scale

    def forward(self, u: Tensor) -> Tensor:
        """u (B, S, C) to (B, S, C)."""
        change = self.attention_dropout(self.attention(self.attention_norm(u)))
        return change + self.mlp_dropout(self.mlp(self.mlp_norm(u + change)))


class TokenEmbedding(nn.Module):
    """The first state of a sequence of up to `length` tokens: a vector (C,) for each of V tokens, plus one for its
    place.
    """

    def __init__(self, tokens: int, width: int, length: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        # Entries of the sum have a variance of 1. The normalization of the first layers is as steep as they are small.
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.5**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S), int64, to (B, S, C); `ValueError` if a sequence is too long."""
        length = self.places.num_embeddings
        if tokens.shape[-1] > length:
            raise ValueError(f"tokens.shape={tuple(tokens.shape)} must have at most {length} places; use the last ones")
        return self.tokens(tokens) + self.places.weight[: tokens.shape[-1]]


class TokenHead(nn.Module):
    """Logits of the next of V tokens from the last state (C,) of each: a layer normalization and a linear map."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, tokens)
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)  # nearly the same chance for every token
        nn.init.zeros_(self.linear.bias)

    def forward(self, u: Tensor) -> Tensor:
        """u (B, S, C) to logits (B, S, V)."""
        return self.linear(self.norm(u))


def generate(model: nn.Module, tokens: Tensor, count: int, length: int, seed: int = 0) -> Tensor:
    """Tokens (S + count,), int64: a text that goes on, each token drawn from what the model says of the next one.

    With a layer-parallel stack in the model every rank calls it, and every rank gets the same text.

    Parameters
    ----------
    model : nn.Module
        Maps tokens (1, S) to logits (1, S, V). It is evaluated in evaluation mode, without gradients.
    tokens : (S,) tensor of int64
        The text so far, at least one token.
    count : int
        Tokens to draw.
    length : int
        Tokens that the model is shown at most, the last ones.
    seed : int
        Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(count):
                shown = tokens[-length:]
                # Padded behind, where no token can look: all calls are of one shape.
                padded = nn.functional.pad(shown, (0, length - len(shown)))
                chances = model(padded[None])[0, len(shown) - 1].double().softmax(0).cpu()
                drawn = torch.multinomial(chances, 1, generator=generator)
                tokens = torch.cat([tokens, drawn.to(tokens.device)])
    finally:
        model.train(was_training)
    return tokens


def _fitting(width: int, heads: int) -> int:
    """The greatest number of heads up to the one asked for that divides the width."""
    return max((found for found in range(1, min(heads, width) + 1) if width % found == 0), default=1)
