"""Stacks of blocks that exist, solved in many ways, and a block with further inputs of all kinds."""

from __future__ import annotations

import reference as ref
import torch
from blocks import SOLVES, UNCHECKED, B, C, L, loss_of
from torch import nn

from xbraid_py import MGRIT, LayerParallel
from xbraid_py.layers.module_block import own_random_numbers

PIPELINE = MGRIT(cycle="pipeline", portions=3)
WAYS = {
    "exact": {"mgrit": SOLVES["exact"]},
    "pipeline": {"mgrit": PIPELINE},
    "pipeline, one forward, one backward": {"mgrit": PIPELINE, "recompute": "states"},
    "V": {"mgrit": SOLVES["V"]},
    "V, states again": {"mgrit": SOLVES["V"], "recompute": "all"},
    "V, batched": {"mgrit": SOLVES["V"], "vmap": True},
    "V 3 levels": {"mgrit": SOLVES["V 3 levels"]},
    "lagged": {"mgrit": SOLVES["lagged"], "recompute": True},
    "one-shot parts": {"mgrit": SOLVES["one-shot parts"]},
    "windows": {"mgrit": SOLVES["V"], "windows": 3},
}
LAYERS = {"lagged": 10, "one-shot parts": 8, "windows": 18, "V 3 levels": 12}


def made(count: int, kind) -> nn.ModuleList:
    with own_random_numbers(3):
        return nn.ModuleList(kind() for _ in range(count)).double()


def stack_of(comm, kind, way: str, **options) -> LayerParallel:
    options = {"accuracy": UNCHECKED, "vmap": False, "form": "map", **WAYS[way], **options}
    return LayerParallel.from_blocks(made(LAYERS.get(way, 9), kind), comm, **options)


class Decoder(nn.Module):
    """Self-attention with a mask, attention to a memory, a table of positions, a gain for each sample and options."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.kv, self.out = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, u, memory, *, mask=None, tables=(), scale=1.0, option=None):
        x = self.norm(u)
        for table in tables:
            x = x + table
        k, v = self.kv(torch.cat([x, memory], 1)).chunk(2, -1)
        scores = self.q(x) @ k.transpose(-1, -2) / 2.0
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        change = self.out(scores.softmax(-1) @ v)
        return u + scale / 8 * (option["gain"][:, None, None] * change if option else change)


def decoder_inputs(with_gradients: bool) -> tuple[tuple, dict]:
    memory = ref.random(B, 2, C, seed=2)
    gain, table = ref.random(B, seed=3), ref.random(1, L, C, seed=4)
    mask = torch.ones(B, L, L + 2, dtype=torch.bool)
    mask[::2, :, 1], mask[1, 0, 0] = False, False
    for tensor in (memory, gain, table):
        tensor.requires_grad_(with_gradients)
    named = {
        "mask": mask,
        "tables": (table, torch.ones(C, dtype=torch.float64)),
        "scale": 0.5,
        "option": {"gain": gain},
    }
    return (memory,), named


def input_of() -> torch.Tensor:
    return ref.random(B, L, C, seed=1)


def plain(count: int, kind, u, inputs=(), named=None, of=lambda y: y) -> dict:
    """Output of the loop over so many blocks, and what is summed up as its loss sends back to their weights."""
    blocks = made(count, kind)
    x = u
    for block in blocks:
        x = block(x, *inputs, **(named or {}))
    loss_of(of(x)).backward()
    names = [name for name, _ in blocks[0].named_parameters()]
    rows = {name: torch.stack([dict(b.named_parameters())[name].grad for b in blocks]) for name in names}
    return {"output": x, "weights": rows}
