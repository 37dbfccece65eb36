"""How a run of the study of nested iteration is made."""

from __future__ import annotations

from studies.nested.convergence import measure
from studies.nested.options import PAPER, options_of
from studies.rows import curve_of, end_of
from studies.study import Settings
from xbraid_py.comm import as_communicator
from xbraid_py.data import peaks
from xbraid_py.recipes.classification import NestedTraining
from xbraid_py.run.engine import rows_of


def train(settings: Settings) -> dict:
    """One run in memory: validation accuracy, objective, and the curve of its validations."""
    options = options_of(settings)
    # The points are the same in all runs: what differs is the initialization.
    numbers = settings["num_train"], settings["num_val"]
    points, validation = peaks.generate(*numbers, 0, options.torch_dtype, balanced=True)
    _, square = peaks.generate(*numbers, 0, options.torch_dtype)
    nested = options.nested if settings["run"] == "nested" else options.nested.non_nested()
    problem = options.problem(points, as_communicator(None))
    training = NestedTraining(options, problem, validation, nested=nested)
    if settings.get("change", "").startswith("convergence"):
        return measure(training, problem, PAPER.mgrit)
    rows = list(rows_of(training))
    return {**end_of(rows), "square_accuracy": training.accuracy(square), "curve": curve_of(rows)}
