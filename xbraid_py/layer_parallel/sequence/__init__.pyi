from .gru import ParallelGRU as ParallelGRU
from .lstm import ParallelLSTM as ParallelLSTM
from .update import SequenceRecord as SequenceRecord
