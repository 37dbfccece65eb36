"""(Multi-level) training on images as a job: options, runs, and the network of a checkpoint (paper 003)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.image_sets import ImageSplit
from xbraid_py.data.images import Augmentation, standardize
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.resnet.options import Discretization
from xbraid_py.multilevel.resnet.training import PRECISIONS, EpochRecord, Pipeline, ResNetTraining, load_network
from xbraid_py.recipes.options.images import KIND, ImageRunOptions, MultiLevelOptions
from xbraid_py.run.engine import Row, State, Training, state_of, train
from xbraid_py.run.options import from_dict
from xbraid_py.run.store.read import Checkpoint, no_state, restoring


class ImageTraining(Training):
    """Epochs of (multi-level) training, with validations on the test images.

    Parameters
    ----------
    options : MultiLevelOptions
    method : ResNetTraining
    """

    def __init__(self, options: MultiLevelOptions, method: ResNetTraining):
        self.options, self.method, self.total = options, method, method.options.cycles.total
        self._last_blocks = options.levels("last")[-1].blocks
        self._ranks = method.grid.replicas if method.grid else 1
        self._other_ranks = ""

    def steps(self) -> Iterator[Row]:
        for record in self.method.run():
            yield self._row(record)

    def _row(self, record: EpochRecord) -> Row:
        method = self.method
        images = method.steps_per_epoch * method.options.batch_size
        return {
            "level": len({level.blocks for level in method.levels[record.cycle - 1 :]}) - 1,
            "num_layers": sum(record.blocks),
            "update": record.epoch,
            "epoch": record.epoch,
            "cycle": record.cycle,
            "blocks": list(record.blocks),
            # The unit is an epoch of the last cycle's network.
            "work": record.block_evaluations / (images * sum(self._last_blocks)),
            "block_evaluations": record.block_evaluations,
            "seconds": record.seconds,
            "loss": record.loss,
            "train_error": record.error,
            "train_accuracy": 1.0 - record.error,
            "learning_rate": record.learning_rate,
            "final": record.epoch == self.total,
        }

    def is_due(self, row: Row) -> bool:
        return row["epoch"] % self.options.validate_every == 0 or row["epoch"] in self.method.options.cycles.ends

    def validate(self) -> Row:
        loss, error = self.method.evaluate()
        return {"val_loss": loss, "val_error": error, "val_accuracy": 1.0 - error}

    def state(self) -> State:
        arrays, numbers = self.method.state()
        return arrays, {**numbers, "ranks": self._ranks}

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint)
        before = checkpoint.meta["state"].get("ranks", self._ranks)
        if self.options.norm == "batch" and before != self._ranks:
            self._other_ranks = (
                f"norm=batch takes the mean of each rank's images: on {self._ranks} rank(s) after {before} this is not "
                f"the run that it was; go on with {before}, or train with --norm=group, the same on any number\n"
            )

    def describe(self) -> str:
        network, last = self.method.network, "-".join(map(str, self._last_blocks))
        blocks = "-".join(map(str, network.blocks))
        said, self._other_ranks = self._other_ranks, ""
        return f"{said}{blocks} blocks, h = {network.step_size:g}; work is in epochs of {last} blocks"

    def draw(self, rows: list[Row], figures: Path) -> None:
        if rows:
            from xbraid_py.recipes.pictures.curves import over_epochs  # takes its time to load: on one rank only

            over_epochs([row for row in rows if row["kind"] == "update"], figures / "epochs.png")

    def say(self, row: Row) -> str:
        return f"test error {100 * row['val_error']:.2f} % after {row['epoch']} epochs, {row['seconds']:.1f} seconds"


def training_of(
    options: MultiLevelOptions, model: str, seed: int, samples: ImageSplit, grid: ProcessGrid | None = None
) -> ImageTraining:
    """The training of a model, at its beginning; all of a seed have the same minibatches and the same augmentation.

    Raises `ValueError` if there are too few images, or there is no such model or device.
    """

    def make(level: Discretization) -> ImageResNet:
        with own_random_numbers(seed):
            return options.network(level, samples.num_classes)

    method = ResNetTraining(
        make,
        options.levels(model),
        samples.train,
        samples.test,
        Pipeline(Augmentation(pad=options.border, flip=options.flip, seed=seed), standardize),
        options.optimization,
        seed=seed,
        grid=grid,
        device=options.device_of(grid.data.rank if grid else 0),
    )
    return ImageTraining(options, method)


def prepare(
    options: ImageRunOptions, samples: ImageSplit, comm: Communicator, driver: Path | None = None
) -> Callable[[], Row]:
    """Claim the folder of a run alone and find out where it goes on, without a message; returns the run.

    The options are one of `ImageRunOptions.runs`; for `driver` see `train`.
    """
    (model,), (seed,) = options.models, options.seeds
    options.check(samples, comm.size)
    for name, each in (("training images", samples.train), ("test images", samples.test)):
        hold(comm, name, each.pixels, each.labels)
    torch.backends.cudnn.benchmark = True  # all minibatches have one shape

    def make() -> ImageTraining:
        return training_of(options, model, seed, samples, ProcessGrid(comm, comm.size))

    sizes = {"num_classes": samples.num_classes}
    run = train(KIND, make, options, comm, sizes=sizes, recipe="images", driver=driver)

    def named() -> Row:
        if comm.rank == 0:
            print(f"{options.out}:", flush=True)
        return run()

    return named


def network(checkpoint: Checkpoint) -> ImageResNet:
    """The network of a checkpoint, at any epoch; it maps standardized images (B, 3, H, W) to logits (B, classes)."""
    meta = state_of(checkpoint)
    options = from_dict(ImageRunOptions, meta["configuration"])
    cycle = options.optimization.cycles.cycle_of(meta["update"] - 1)
    level, num_classes = options.levels(options.models[0])[cycle], meta["sizes"]["num_classes"]
    if sum(level.blocks) > len(checkpoint.names()):  # of each block there are arrays
        raise no_state(checkpoint.path, f"blocks={level.blocks}, but {len(checkpoint.names())} arrays")
    with own_random_numbers(0), restoring(checkpoint.path):  # as if none were drawn
        with torch.device("meta"):  # first without memory: the file may name any sizes
            load_network(checkpoint, options.network(level, num_classes).to(PRECISIONS[options.precision][0]))
        made = options.network(level, num_classes)
    made = made.to(PRECISIONS[options.precision][0])
    load_network(checkpoint, made)
    return made.eval()
