"""The study of multilevel training in width (paper 002): its tables 1 to 4, figures 3, 4 and 6 to 9, and a scan.

With its defaults it is a day and more of work on two cores; what is committed in benchmarks/results/width is far
smaller.

Poisson and Darcy, fully-connected and convolutional networks, numbers of levels, learning rates of the levels; and,
each with a learning rate tuned on seeds of its own, the damping, the transfers, the minibatches of tau and Adam. Runs
that are over are not made again. Try

    python drivers/width_study.py
    python drivers/width_study.py --num_train=2000 --num_val=500 --max_work=3000 --parts="[tuned, scan]"
    python drivers/width_study.py --parts="[scan]" --methods="[two levels, no tau, sgd alone]"
    python drivers/width_study.py --parts="[table1_conv, table3_conv]" --device=cuda --workers=1
    python drivers/width_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from studies import width
from studies.study import Parts, Result, Settings, Study, run_study
from studies.width.case import options_of
from studies.width.parts import WidthStudyOptions as Options

from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

CONV = {"kind": "convolutional", "channels": (8,), "kernels": (3,), "strides": (2,)}
PRESETS = {
    "smoke": {
        "seeds": 2,
        "tuning_seeds": 1,
        "num_train": 80,
        "num_val": 20,
        "darcy_train": 80,
        "darcy_val": 20,
        "mesh": 8,
        "max_work": 60.0,
        "validate_every": 20.0,
        "batch_size": 10,
        "poisson": {"widths": (32, 32)},
        "poisson_conv": CONV | {"widths": (32, 32)},
        "darcy": {"widths": (64, 64)},
        "darcy_conv": CONV | {"widths": (64, 64)},
        "rates": (0.01, 0.1),
        "adam_rates": (1e-3,),
        "methods": ("two levels", "no tau", "adam", "sgd alone", "adam alone"),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    folder = str(options.data_dir or options.out / "data")
    options.device_of(0)
    study = Study(options.out, partial(width.runs.train, data_dir=folder, device=options.device), options.workers)

    def first(rows: Mapping[str, Result]) -> Parts:
        print(f"at most {options.work_ahead(study.finished()):,.0f} work units, tau included", flush=True)
        return with_samples(options.first_stage(rows))

    def second(rows: Mapping[str, Result]) -> Parts:
        return with_samples(options.second_stage(rows))

    def with_samples(parts: Parts) -> Parts:
        # The workers would all write the same files.
        for source in dict.fromkeys(options_of(each, folder).samples for part in parts.values() for each in part):
            source.samples(comm)
        return parts

    return run_study(study, {"runs": first, "tuned runs": second}, width.page.write, comm, said)


def said(settings: Settings) -> str:
    """How a run that fails is called."""
    training, kind = settings["training"], settings["network"]["kind"]
    return (
        f"{settings['problem']}, {kind}, {training['method']}, levels={training['levels']}, "
        f"learning_rate={training['learning_rate']}, seed={settings['seed']}"
    )


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
