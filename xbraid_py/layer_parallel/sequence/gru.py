"""A gated recurrent network as a torch module, parallel over the steps of its sequences."""

from __future__ import annotations

from torch import nn

from xbraid_py.layer_parallel.sequence.recurrent import ParallelRecurrent
from xbraid_py.layers.gru import GruCell


class ParallelGRU(ParallelRecurrent):
    """`torch.nn.GRU`, its time steps solved for all at once; all arguments are those of `ParallelRecurrent`."""

    cell_type, torch_type = GruCell, nn.GRU
