"""Recurrent networks that are parallel over the steps of a sequence."""

from xbraid_py.sequence_parallel.function import SequenceRecord
from xbraid_py.sequence_parallel.gru import ParallelGRU

__all__ = ["ParallelGRU", "SequenceRecord"]
