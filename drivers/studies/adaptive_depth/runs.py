"""How a run of the study of adaptive depth is made."""

from __future__ import annotations

from studies.study import Settings, until_told
from xbraid_py.comm import Communicator
from xbraid_py.data import mnist, peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.recipes.classification import NestedTraining
from xbraid_py.recipes.options.classification import ClassificationOptions
from xbraid_py.run.engine import rows_of
from xbraid_py.run.options import from_dict

# Initial weights of the opening layer: 784 pixels add up to more than two coordinates do.
OPENING = {"peaks": 1.0, "mnist": 0.1}


def samples(settings: Settings) -> tuple[Dataset, Dataset]:
    """Training and validation samples."""
    numbers = settings["num_train"], settings["num_val"]
    if settings["data"] == "peaks":
        return peaks.generate(*numbers, settings["seed"])
    halves = mnist.columns(mnist.load(settings["data_dir"]), num_train=numbers[0], num_test=numbers[1])
    return tuple(Dataset(*half.samples(), mnist.NUM_CLASSES) for half in halves)


def options_of(settings: Settings) -> ClassificationOptions:
    """The options of the recipe that the settings of a run stand for."""
    return ClassificationOptions(
        num_layers=settings["num_layers"],
        seed=settings["seed"],
        validate_every=settings["validate_every"],
        network=DenseResNetOptions(width=settings["width"]),
        initial=InitialScales(opening=OPENING[settings["data"]]),
        nested=from_dict(NestedOptions, settings["nested"]),
        mgrit=from_dict(MGRIT, settings["mgrit"]),
    )


def train(settings: Settings, comm: Communicator) -> dict:
    """One run in memory: accuracies, size, grids, and the curve of its validations."""
    options, (points, validation) = options_of(settings), samples(settings)
    training = NestedTraining(options, options.problem(points, comm), validation)
    run, curve, grids = training.method, [], []
    for row in until_told(rows_of(training), comm):
        if not grids or row["num_layers"] != len(grids[-1]):
            grids.append(run.grid.sizes())
        if "val_accuracy" in row:
            curve.append([row["update"], round(row["work"], 3), row["num_layers"], row["val_accuracy"]])
    return {
        "val_accuracy": row["val_accuracy"],
        "train_accuracy": row["train_accuracy"],
        "objective": row["objective"],
        "num_layers": row["num_layers"],
        "num_parameters": run.network.layout.num_parameters,
        # In units of the uniform run's network, whatever the run.
        "work": row["work"] * run.problem.work_unit(options.num_layers) / run.problem.work_unit(settings["unit"]),
        "seconds": row["seconds"],
        "grids": grids,
        "curve": curve,
    }
