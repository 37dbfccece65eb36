"""The study of nested iteration on Indian Pines (paper 001, figure 5): accuracy over work units, several seeds.

Nested iteration over 32, 64, 128 layers by two schedules, 200/100/50 and 200/200/200 updates, and 128 layers from the
start with as much work as the longer one, which serves both comparisons. By default the propagation is serial and
exact, and runs are made side by side; under mpirun all ranks make each run together. Runs that are over are not made
again. Try

    python drivers/indian_pines_study.py
    mpirun -n 4 python drivers/indian_pines_study.py --propagations="[V, lagged]" --splits="[random, published]" \\
        --first_seed=10
    python drivers/indian_pines_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from studies import indian_pines
from studies.indian_pines.options import PinesStudyOptions as Options
from studies.study import PAGE, RUNS, Study, run_study, together

from xbraid_py import data
from xbraid_py.comm import Communicator
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
        names = data.indian_pines.names(scene.train.num_classes)
        indian_pines.page.write(parts["all"], out, names, scene.truth.numpy())

    def on_all_ranks() -> None:
        with together(options.out, indian_pines.runs.train, comm) as make:
            rows = []
            for each in options.settings():
                rows.append(make(each))
                if comm.rank == 0:
                    print(f"{len(rows)} of {len(options.settings())} runs are over", flush=True)
            if comm.rank == 0:
                write({"all": rows}, options.out)
                print(f"{len(rows)} runs in {options.out / RUNS}; tables in {options.out / PAGE}", flush=True)

    if comm.size > 1:
        return on_all_ranks
    study = Study(options.out, indian_pines.runs.train, options.workers)
    return run_study(study, {"runs": lambda rows: {"all": options.settings()}}, write, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
