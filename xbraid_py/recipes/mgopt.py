"""MG/OPT in depth as a job: options, problems and training of the very deep and very thin networks of paper 000.

Shape letters: `F` features, `B` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from xbraid_py.comm import Communicator
from xbraid_py.data import peaks
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.multilevel.depth.mgopt import CycleRecord, MGOpt
from xbraid_py.planner import Workload
from xbraid_py.problem.portions import Samples
from xbraid_py.problem.problem import perceptron_weights
from xbraid_py.recipes.options.mgopt import MGOptRunOptions
from xbraid_py.recipes.planned import by_plan, train_by_plan
from xbraid_py.run.engine import Row, State, Training
from xbraid_py.run.store.read import Checkpoint

MAP_SIZE = 200


class DepthTraining(Training):
    """A run of MG/OPT in depth: cycles until a validation reaches the goal, or so many.

    `batches(k)`, if given, are the samples of cycle k; without it all are taken in every cycle. `plane(x, y)`, if
    given, is the class of points in the plane: then a map of the classes is drawn as well. `scale` is the standard
    deviation of the initial weights of the layers.
    """

    plan = ""

    def __init__(
        self,
        options: MGOptRunOptions,
        method: MGOpt,
        validation: Samples,
        batches: Callable[[int], Samples] | None = None,
        plane: Callable | None = None,
        scale: float = 1.0,
    ):
        self.options, self.method, self.validation, self.batches = options, method, validation, batches
        self.plane = plane
        self.unit = method.schedule.work(options.mgopt.cycle, method.costs)  # work units of a cycle
        cycles = options.max_cycles if options.max_work is None else int(options.max_work / self.unit)
        self.total = max(1, min(options.max_cycles, cycles))
        method.x = perceptron_weights(method.network, options.seed, scale)

    def steps(self) -> Iterator[Row]:
        for record in self.method.run(self.total, self.batches):
            yield self._row(record)

    def _row(self, record: CycleRecord) -> Row:
        evaluation = record.evaluation
        return {
            "level": 0,
            "num_layers": self.method.network.grid.num_layers,
            "update": record.cycle,
            "cycle": record.cycle,
            "work": record.work,
            "counted_work": record.counted,
            "gradients": record.gradients,
            "seconds": record.seconds,
            "objective": evaluation.value,
            "loss": evaluation.loss,
            "train_accuracy": evaluation.accuracy,
            "state_residual": evaluation.residual,
            "final": record.cycle == self.total,
        }

    def is_due(self, row: Row) -> bool:
        return row["update"] % self.options.validate_every == 0

    def validate(self) -> Row:
        accuracy = self.accuracy()
        return {"val_accuracy": accuracy} | ({"final": True} if accuracy >= self.options.goal else {})

    def accuracy(self) -> float:
        """Share of the validation samples that are classified rightly at present; collective."""
        features, labels = self.validation
        return float((self.method.network.predict(self.method.x, features) == labels).double().mean())

    def state(self) -> State:
        return self.method.state()

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint)

    def is_over(self, row: Row) -> bool:
        return row["update"] >= self.total or self.has_reached(row)

    def has_reached(self, row: Row) -> bool:
        """Whether a row says that the goal is reached."""
        return row.get("val_accuracy") is not None and row["val_accuracy"] >= self.options.goal

    def describe(self) -> str:
        return "\n".join(filter(None, [self.plan, f"{self.method.schedule}, {self.unit:.2f} work units a cycle"]))

    def draw(self, rows: list[Row], figures: Path) -> None:
        classes = mesh = None
        if self.plane is not None:
            mesh = peaks.mesh(MAP_SIZE, self.method.network.dtype)
            classes = self.method.network.predict(self.method.x, mesh).reshape(MAP_SIZE, MAP_SIZE)
        if not rows:
            return
        from xbraid_py.recipes.pictures.curves import over_cycles  # matplotlib takes its time: on one rank only
        from xbraid_py.recipes.pictures.style import class_map

        validated = [row for row in rows if row.get("val_accuracy") is not None]
        over_cycles({str(self.method.schedule): validated}, figures / "cycles.png")
        if classes is not None:
            assert mesh is not None and self.plane is not None
            true = self.plane(*mesh.double().numpy()).reshape(classes.shape)
            class_map(classes, true, ["elsewhere", "ring"], figures / "classes.png")

    def say(self, row: Row) -> str:
        accuracy, missed = row.get("val_accuracy"), "" if self.has_reached(row) else ", not the goal,"
        found = "no validation" if accuracy is None else f"validation accuracy {100 * accuracy:.2f} %"
        return (
            f"{found}{missed} after {row['update']} cycles, {row['work']:.1f} work units "
            f"(counted: {row['counted_work']:.1f}), {row['seconds']:.2f} seconds"
        )


def training_of(options: MGOptRunOptions, comm: Communicator) -> DepthTraining:
    """The training by some options, at its beginning; reads files, sends no message."""
    method, validation, more = options.start(comm)
    return DepthTraining(options, method, validation, **more)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from features (B, F) to logits (B, classes)."""
    return to_sequential(checkpoint.path)


def prepare(options: MGOptRunOptions, comm: Communicator, recipe: str) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : MGOptRunOptions
    comm : Communicator
    recipe : str
        See `run.engine.train`.
    """

    def prepared(options: MGOptRunOptions, plan: str = "", **claimed) -> Callable[[], Row]:
        def training(comm: Communicator, options: MGOptRunOptions) -> DepthTraining:
            made = training_of(options, comm)
            made.plan = plan
            return made

        return train_by_plan("mgopt", training, options, comm, recipe=recipe, **claimed)

    options.hold(comm)
    shape = {"architecture": options.network, "dtype": options.torch_dtype}
    workload = Workload(num_layers=options.num_layers, batch=options.batch, **shape)
    return by_plan(options, workload, comm, prepared)
