"""Recurrent networks that are parallel over the steps of a sequence."""

from xbraid_py.layer_parallel.sequence.gru import ParallelGRU, SequenceRecord

__all__ = ["ParallelGRU", "SequenceRecord"]
