"""Fine-tuning: a GPT-2 of the package transformers learns from the bytes of a text, in parallel over its layers.

The model is that of `transformers`, from a folder that `save_pretrained` has written, or with random weights; its
blocks are propagated by MGRIT or in a pipeline (`xbraid_py.parallelize`). AdamW with weight decay for matrices alone,
warm-up and clipping; with micro-batches, bfloat16 and averaged weights where that is asked for. In the end the folder
`model` of the run holds the trained one, for `from_pretrained`. Try

    mpirun -n 4 python drivers/finetune.py
    mpirun -n 4 python drivers/finetune.py --accumulate 4 --autocast bfloat16 --ema 0.99 --out runs/averaged
    mpirun -n 4 python drivers/finetune.py --resume auto
    mpirun -n 4 python drivers/finetune.py --model runs/finetune/model --source README.md --out runs/readme
    python drivers/finetune.py --smoke --exact
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes import FinetuneOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "source": "generated",
        "num_characters": 5000,
        "num_layers": 16,
        "width": 16,
        "heads": 2,
        "context": 16,
        "updates": 8,
        "batch_size": 8,
        "warmup": 2,
        "validate_every": 4,
        "validation_batches": 1,
        "sample": 20,
        "checkpoint_every": 4,
        "mgrit": MGRIT(cfactor=4),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    return recipes.finetune.prepare_finetune(options, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
