"""Text: a character-level language model of many decoder blocks, trained in parallel over its layers.

    u_0 = embedding(text),   u_{n+1} = u_n + h F(u_n, theta_n),  n = 0 .. N-1,  h = T/N,   logits = head(u_N),

where u + F(u) is a pre-norm decoder block of causal self-attention and a perceptron. AdamW. Try

    mpirun -n 4 python drivers/transformer.py
    mpirun -n 4 python drivers/transformer.py --resume auto
    mpirun -n 4 python drivers/transformer.py --source generated --replicas 2
    python drivers/transformer.py --smoke --exact
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes import TextOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "source": "generated",
        "num_characters": 5000,
        "num_layers": 16,
        "width": 8,
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
    return recipes.text.prepare_text(options, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
