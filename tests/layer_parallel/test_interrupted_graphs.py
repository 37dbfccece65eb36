"""What a pass has kept for its way back is freed where there is none, or where one of the two breaks off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import xbraid_py as xb
from xbraid_py.mgrit import MGRIT
from xbraid_py.run.memory import give_back

LAYERS, WIDTH, BATCH = 8, 32, 4096  # states of a megabyte, float64
STATES = LAYERS * WIDTH * BATCH * 8


class Stop(Exception):
    """What breaks a pass off."""


class Block(nn.Module):
    """A layer; after so many calls of all of them the next one breaks off, if that is asked for."""

    calls_left = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, u):
        if Block.calls_left is not None:
            Block.calls_left -= 1
            if Block.calls_left < 0:
                raise Stop
        return torch.tanh(self.linear(u))


def layers(**options):
    return xb.LayerParallel(Block, LAYERS, 1.0, **options)


MODELS = {
    "lagged": lambda: layers(mgrit=MGRIT()),
    "V": lambda: layers(mgrit=MGRIT(cycle="V", cfactor=4, max_iter=1)),
    "recompute": lambda: layers(mgrit=MGRIT(), recompute=True),
    "windows": lambda: layers(windows=2),
    "pipeline": lambda: layers(mgrit=MGRIT(cycle="pipeline")),
    "modules": lambda: xb.PipelineParallel([Block() for _ in range(LAYERS)]),
    "gru": lambda: xb.ParallelGRU(WIDTH, WIDTH, dtype=torch.float64),
}


def resident() -> int:
    """Bytes of this process in memory, without what the allocator keeps of freed blocks."""
    give_back()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(once) -> int:
    """Bytes that stay of four passes: of graphs that are not freed at least four times the states."""
    for _ in range(2):  # which make what stays for good
        once()
    before = resident()
    for _ in range(4):
        once()
    return resident() - before


def forget(model, x):
    model(x)


def break_off(model, x):
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out

    def stop(gradient):
        raise Stop

    x.register_hook(stop)  # behind all layers, on the way back
    with pytest.raises(Stop):
        out.sum().backward()


def break_off_at_once(model, x):
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out

    def stop(gradient):
        raise Stop

    out.register_hook(stop)
    with pytest.raises(Stop):
        out.sum().backward()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("interrupted", [forget, break_off, break_off_at_once], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_states_of_a_graph_without_a_way_back_are_freed(name, interrupted):
    torch.manual_seed(0)
    model = MODELS[name]()
    shape = (LAYERS, BATCH, WIDTH) if name == "gru" else (BATCH, WIDTH)

    def once():
        interrupted(model, torch.randn(shape, dtype=torch.float64, requires_grad=True))

    assert grown(once) < STATES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gru"])
def test_states_of_a_pass_that_breaks_off_forwards_are_freed(name, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]()

    def once():
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        monkeypatch.setattr(Block, "calls_left", None)
        out = model(x)
        monkeypatch.setattr(Block, "calls_left", LAYERS // 2)
        with pytest.raises(Stop):
            model(out)  # which alone holds the graph of the first pass

    assert grown(once) < STATES
