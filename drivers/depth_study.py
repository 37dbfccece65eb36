"""The study of training loops over depth: nested iteration and MG/OPT on minibatches, beside the plain loop.

Convolutional MNIST and a small transformer, by AdamW and by gradient descent, for as many work units each: all layers
from the start; layers that are cut in two (paper 001); V-cycles over networks of 1/2 and 1/4 of the layers (paper 000).
Learning rates are chosen on a seed of their own. Runs that are over are not made again. Try

    python drivers/depth_study.py
    python drivers/depth_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable

from studies import depth
from studies.depth.options import DepthStudyOptions as Options
from studies.study import Settings, Study, run_study

from xbraid_py import data
from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "seeds": 1,
        "problems": ("text",),  # which needs no files
        "optimizers": ("sgd",),
        "work": 12.0,
        "num_layers": 8,
        "width": 4,
        "num_train": 500,
    }
}


def said(settings: Settings) -> str:
    """How a run that fails is called."""
    return ", ".join(f"{name}={settings[name]}" for name in ("problem", "optimizer", "loop", "learning_rate", "seed"))


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if {*options.problems} - {"text"}:
        data.mnist.load(options.data_dir)  # what is wrong with the files is said now
    study = Study(options.out, depth.runs.train, options.workers)
    stages = {"runs with other rates": options.tuning, "runs": options.compared}
    return run_study(study, stages, depth.page.write, comm, said)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
