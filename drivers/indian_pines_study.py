"""The study of nested iteration on Indian Pines (paper 001, figure 5): accuracy over work units, several seeds.

Nested iteration over 32, 64, 128 layers by two schedules, 200/100/50 and 200/200/200 updates, and 128 layers from the
start with as much work as the longer one, which serves both comparisons. Serial propagation: converged layer-parallel
runs are the same. Runs that are over are not made again. Try

    python drivers/indian_pines_study.py
    python drivers/indian_pines_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from studies.indian_pines import page
from studies.indian_pines.runs import PinesStudyOptions as Options
from studies.indian_pines.runs import train
from studies.study import Study, run_study

from xbraid_py.comm import Communicator
from xbraid_py.data import indian_pines
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "seeds": 2,
        "num_train": 160,
        "num_layers": 16,
        "width": 20,
        "schedules": (6, 4, 2, 6, 6, 6),
        "validate_every": 2,
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything; returns the study."""
    scene = options.scene()

    def write(parts: dict[str, list[dict]], out: Path) -> None:
        page.write(parts["all"], out, indian_pines.names(scene.train.num_classes), scene.truth.numpy())

    study = Study(options.out, train, options.workers)
    return run_study(study, {"runs": lambda rows: {"all": options.settings()}}, write, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
