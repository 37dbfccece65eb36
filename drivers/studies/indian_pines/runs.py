"""How a run of the study of nested iteration on Indian Pines is made."""

from __future__ import annotations

import torch

from studies.indian_pines.options import options_of
from studies.rows import curve_of, end_of
from studies.study import Settings, until_told
from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.data import indian_pines
from xbraid_py.recipes.classification import NestedTraining, Scores
from xbraid_py.run.engine import rows_of


def train(settings: Settings, comm: Communicator | None = None) -> dict:
    """One run in memory: its accuracies, and the curve of its validations; collective."""
    options = options_of(settings)
    scene = indian_pines.load(
        options.data_dir,
        source=options.source,
        split=options.split,
        num_train=options.num_train,
        seed=options.seed,
        dtype=options.torch_dtype,
    )
    nested = options.nested if settings["run"] == "nested" else options.nested.non_nested()
    comm = as_communicator(comm)
    problem = options.problem(scene.train, comm)
    training = NestedTraining(options, problem, scene.validation, nested=nested)
    rows = list(until_told(rows_of(training), comm))
    network, weights = training.method.network, training.method.weights
    predicted = network.predict(weights, scene.validation.features)
    classes = network.predict(weights, scene.pixels)
    return {
        **end_of(rows),
        "ranks": comm.size,
        "scores": Scores.of(predicted, scene.validation.labels, scene.train.num_classes).as_dict(),
        # Of one seed, for the picture.
        "classes": classes.to(torch.uint8).tolist() if settings["seed"] == 0 else None,
        "curve": curve_of(rows),
    }
