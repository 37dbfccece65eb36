"""Translation: an encoder and a decoder learn to reverse or sort sequences, each in parallel over its layers.

The network is an `nn.Transformer` of pre-norm blocks; `xbraid_py.parallelize` puts a stack into each half, and what the
encoder gives goes into all layers of the decoder, its gradient back from all of them. AdamW. Try

    mpirun -n 2 python drivers/translate.py
    mpirun -n 2 python drivers/translate.py --task sort --out runs/sort
    mpirun -n 2 python drivers/translate.py --resume auto
    python drivers/translate.py --smoke --exact
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes import TranslateOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "length": 4,
        "num_tokens": 6,
        "width": 8,
        "heads": 2,
        "updates": 8,
        "batch_size": 8,
        "warmup": 2,
        "validate_every": 4,
        "validation_batches": 1,
        "checkpoint_every": 4,
        "mgrit": MGRIT(cfactor=2),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Check everything, without a message; returns the run."""
    return recipes.translate.prepare_translate(options, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
