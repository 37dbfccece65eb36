"""Training on minibatches: updates, evaluation, the record of a run, its checkpoints and its picture.

Everything here is collective unless it says otherwise: all ranks call it with the same arguments and the same batches.
"""

from xbraid_py.minibatch.drawing import picture
from xbraid_py.minibatch.resume import Position, is_of_minibatches, read_resumed
from xbraid_py.minibatch.run import follow
from xbraid_py.minibatch.state import Trained, load_weights
from xbraid_py.minibatch.updates import evaluate, solve_records, train

__all__ = [
    "Position",
    "Trained",
    "evaluate",
    "follow",
    "is_of_minibatches",
    "load_weights",
    "picture",
    "read_resumed",
    "solve_records",
    "train",
]
