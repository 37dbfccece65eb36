"""A long short-term memory as a torch module, parallel over the steps of its sequences."""

from __future__ import annotations

from torch import nn

from xbraid_py.layer_parallel.sequence.recurrent import ParallelRecurrent
from xbraid_py.layers.lstm import LstmCell


class ParallelLSTM(ParallelRecurrent):
    """`torch.nn.LSTM`, its time steps solved for all at once; all arguments are those of `ParallelRecurrent`.

    The states before and behind the sequences are pairs (h, c).
    """

    cell_type, torch_type = LstmCell, nn.LSTM
