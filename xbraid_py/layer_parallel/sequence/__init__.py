"""Recurrent networks that are parallel over the steps of a sequence."""

from xbraid_py.layer_parallel.sequence.gru import ParallelGRU
from xbraid_py.layer_parallel.sequence.lstm import ParallelLSTM
from xbraid_py.layer_parallel.sequence.update import SequenceRecord

__all__ = ["ParallelGRU", "ParallelLSTM", "SequenceRecord"]
