"""The study of MG/OPT in depth (paper 000): its tables 1 and 2, its figures 4 and 5, and what does the work.

Circles, MNIST and peaks; levels, depths, schedules, hyper-parameters, transfers, weights that are frozen on some
levels, gradients in L2(0, T), other optimizers of the levels, each with a learning rate tuned on seeds of its own.
Runs that are over are not made again. Try

    python drivers/mgopt_study.py
    python drivers/mgopt_study.py --parts="[table1, table2]"
    python drivers/mgopt_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable

from studies import mgopt
from studies.mgopt.parts import MGOptStudyOptions as Options
from studies.mgopt.rows import words
from studies.study import Settings, Study, run_study

from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "seeds": 2,
        "few_seeds": 1,
        "mnist_seeds": 1,
        "tuning_seeds": 1,
        "num_layers": 128,
        "peaks_layers": 128,
        "mnist_layers": 128,
        "blocks": (128, 256),
        "num_train": 100,
        "num_val": 100,
        "mnist_samples": 2000,
        "mnist_work": 30.0,
        "max_work": 30.0,
        "parts": ("table1", "figure5", "table2", "ablation"),
    }
}


def said(settings: Settings) -> str:
    """How a run that fails is called."""
    chosen = words(settings)
    return ", ".join(f"{name}={chosen[name]}" for name in ("problem", "levels", "method", "learning_rate", "seed"))


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    study = Study(options.out, mgopt.runs.train, options.workers)
    stages = {"runs": options.first_stage, "tuned runs": options.second_stage}
    return run_study(study, stages, mgopt.page.write, comm, said)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
