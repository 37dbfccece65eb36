"""The study of nested iteration on peaks (paper 001, figures 3 and 4), in the paper's regime and in ours.

Widths 5 and 8, 64 layers, initial magnitudes {0, 1e-6}, Tikhonov {1e-5, 1e-7}, 12 initializations: 48 networks trained
by nested iteration, 48 with all layers from the start; then what the paper leaves open, and where the one is ahead.
Runs that are over are not made again. Try

    python drivers/nested_study.py
    python drivers/nested_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable

from studies import nested
from studies.nested.options import NestedStudyOptions as Options
from studies.study import Study, run_study

from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "seeds": 2,
        "num_layers": 16,
        "updates": (6, 4, 3),
        "num_train": 100,
        "num_val": 100,
        "validate_every": 1,
        "parts": ("figure3", "interpolation"),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    study = Study(options.out, nested.runs.train, options.workers)
    stages = {
        "runs": lambda rows: {"all": options.settings()},
        "tuned runs": lambda rows: {"tuned": options.second_stage(rows)},
    }
    return run_study(study, stages, lambda parts, out: nested.page.write(sum(parts.values(), []), out), comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
