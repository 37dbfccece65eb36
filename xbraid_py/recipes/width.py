"""Multilevel training in width as a job: options, samples, networks and training of paper 002, which learns a PDE.

Shape letters: `B` samples, `D` numbers of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf, nan, prod
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.pde_dataset import PdeDataset, Standardization
from xbraid_py.multilevel.stochastic import Minibatches
from xbraid_py.multilevel.width.training import WidthRecord, WidthTraining, errors
from xbraid_py.multilevel.width.transfer import WidthLayout
from xbraid_py.recipes.options.width import ERRORS, PROBLEMS, WidthRunOptions
from xbraid_py.run import memory
from xbraid_py.run.engine import Row, State, Training, state_of, train
from xbraid_py.run.options import from_dict
from xbraid_py.run.store.read import Checkpoint, check_total, restoring
from xbraid_py.run.store.write import Score


class WidthRun(Training):
    """A run of multilevel training in width, with its samples and its validation, up to so many work units.

    Parameters
    ----------
    options : WidthRunOptions
    train, validation : PdeDataset
        As they are, see `WidthRunOptions.samples`.
    grid : ProcessGrid, optional
        Replicas that share the minibatches.

    Attributes
    ----------
    method : WidthTraining
    seen, unseen : pair of Tensor
        Inputs (B, ...) and targets (B, D) of training samples, as many as there are for the validation, or all if these
        are fewer; and those of the validation.
    scale : float
        What errors are multiplied by: the targets' deviation where they are standardized.
    best : dict of str to float
        The least validation errors so far.

    Raises
    ------
    ValueError
        If the network does not fit the samples, or there are too few of them.
    """

    def __init__(
        self, options: WidthRunOptions, train: PdeDataset, validation: PdeDataset, grid: ProcessGrid | None = None
    ):
        self.options, self.total, self.scale = options, options.cycles, 1.0
        device = options.device_of(grid.data.rank if grid else 0)
        if options.standardize:
            statistics = Standardization.of(train)
            train, validation = statistics.apply(train), statistics.apply(validation)
            self.scale = float(statistics.target_scale)
        inputs, targets = train.inputs.to(device), train.targets.flatten(1).to(device)
        module = options.layers.module(_shape(inputs), targets.shape[1], options.seed, inputs.dtype).to(device)
        minibatches = Minibatches(inputs, targets, options.batch_size, options.seed)
        self.method = WidthTraining(module, nn.functional.mse_loss, minibatches, options.training, grid)
        few = min(len(inputs), validation.num_samples)
        self.seen = inputs[:few], targets[:few]
        self.unseen = validation.inputs.to(device), validation.targets.flatten(1).to(device)
        self.best = {"val_l2": inf, "val_linf": inf}

    def steps(self) -> Iterator[Row]:
        for record in self.method.run(self.total):
            yield self._row(record)

    def _row(self, record: WidthRecord) -> Row:
        return {
            "level": 0,
            "update": record.cycle,
            "cycle": record.cycle,
            "work": record.work,
            "work_without_tau": record.work_without_tau,
            "counted_work": record.counted,
            "seconds": record.seconds,
            "matching_seconds": record.matching_seconds,
            "objective": record.loss,
            "loss": record.loss,
            "widths": record.widths,
            "final": record.cycle == self.total,
        }

    def is_due(self, row: Row) -> bool:
        """At the last cycle before each multiple of `validate_every` work units."""
        unit, every = self.options.training.work()[0], self.options.validate_every
        return (row["work"] + unit) // every > row["work"] // every

    def validate(self) -> Row:
        found = self.errors()
        self.best = {name: min(least, found[name]) for name, least in self.best.items()}
        return found

    def errors(self) -> dict[str, float | None]:
        """The `ERRORS` of the network as it is, and of the first auxiliary one, if there is one."""
        found: dict[str, float | None] = dict.fromkeys(ERRORS)
        for level, prefix in enumerate(("", "aux_")):
            if level > len(self.method.transfers):
                break
            layout, x = self.method.auxiliary(level)
            module = layout.module(x)
            for name, samples in (("train", self.seen), ("val", self.unseen)):
                square, largest = errors(module, *samples)
                found[f"{prefix}{name}_l2"] = self.scale**2 * square
                found[f"{prefix}{name}_linf"] = self.scale * largest
        return found

    def mean_error(self) -> float:
        """Mean square validation error of the mean training target, point by point, whatever the input."""
        mean = self.method.minibatches.targets.mean(0)
        return self.scale**2 * float((self.unseen[1] - mean).double().square().mean())

    def predict(self, sample: int) -> tuple[Tensor, Tensor]:
        """Target and prediction (D,) of one validation sample, as they were trained."""
        layout, x = self.method.auxiliary(0)
        inputs, targets = self.unseen
        with torch.no_grad():
            return targets[sample].cpu(), layout.module(x)(inputs[sample : sample + 1])[0].cpu()

    def score(self, row: Row) -> Score:
        return Score(objective=row.get("val_l2"))

    def state(self) -> State:
        arrays, numbers = self.method.state()
        return arrays, {**numbers, "best": self.best}

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint)
        self.best = {name: float(checkpoint.meta["state"]["best"][name]) for name in self.best}

    def is_over(self, row: Row) -> bool:
        return row["update"] >= self.total

    def describe(self) -> str:
        return "{:g} work units a cycle, {:g} without those of tau".format(*self.options.training.work())

    def draw(self, rows: list[Row], figures: Path) -> None:
        """Errors over work units, and the first validation sample if it is a field."""
        if not rows:
            return
        from xbraid_py.recipes.pictures.curves import fields, over_work  # takes its time to load: on one rank only

        validated = [row for row in rows if row.get("val_l2") is not None]
        over_work({"": validated}, figures / "errors.png")
        exact, learned = self.predict(0)
        size = self.unseen[0].shape[-1]
        if exact.numel() == size * size:
            fields(exact.view(size, size), learned.view(size, size), figures / "sample.png")

    def say(self, row: Row) -> str:
        return (
            f"validation L2 {row.get('val_l2', nan):.3e} (best {self.best['val_l2']:.3e}), "
            f"Linf {row.get('val_linf', nan):.3f} (best {self.best['val_linf']:.3f}) after {row['cycle']} cycles, "
            f"{row['work']:g} work units (without tau {row['work_without_tau']:g}, counted {row['counted_work']:.1f}), "
            f"{row['seconds']:.2f} seconds"
        )


def _shape(inputs: Tensor) -> tuple[int, int, int]:
    """C, H and W of samples (N, C, H, W)."""
    _, channels, height, width = inputs.shape
    return channels, height, width


def set_up(options: WidthRunOptions, comm: Communicator) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run, in which ranks share every minibatch.

    Raises `ValueError` or `OSError` for whatever is wrong with options, files or folder; on every rank, or on rank 0
    alone.
    """
    if options.batch_size < comm.size:
        raise ValueError(f"batch_size={options.batch_size} is less than one for each of {comm.size} ranks; use 200")
    options.device_of(0)
    source, dtype = options.samples, options.torch_dtype
    # Files that are there are read now; what has to be made, by all ranks together, in the run.
    found, problem = None, source.problem
    if problem is None:
        found = source.load(dtype=dtype)
        for name, each in zip(("training samples", "validation samples"), found, strict=True):
            hold(comm, name, each.inputs, each.targets)
        shape, outputs = _shape(found[0].inputs), found[0].targets[0].numel()
    else:
        shape, outputs = source.shape, prod(problem.shapes[source.target or problem.targets[0]])
    assert shape is not None
    with torch.device("meta"):  # no memory: only what it takes, and whether the kernels fit
        weights = options.layers.module(shape, outputs, options.seed).parameters()
        memory.require(torch.finfo(dtype).bits // 8 * sum(each.numel() for each in weights))
    if problem is not None:
        memory.require(8 * (options.num_train + options.num_val) * sum(map(prod, problem.shapes.values())))

    def make() -> WidthRun:
        training = WidthRun(options, *(found or source.load(comm, dtype)), ProcessGrid(comm, comm.size))
        training.method.match()  # whether there can be so many levels
        return training

    sizes = {"channels": shape[0], "mesh": shape[1], "outputs": outputs}
    return train("width", make, options, comm, sizes=sizes, recipe=options.name)


def network(checkpoint: Checkpoint) -> nn.Sequential:
    """The trained network of a checkpoint, from inputs (B, C, n, n) to targets (B, D), both as they were trained.

    Raises `CheckpointError` if it holds another network.
    """
    meta = state_of(checkpoint)
    with restoring(checkpoint.path):
        options, sizes = from_dict(PROBLEMS[meta["recipe"]], meta["configuration"]), meta["sizes"]
        shape = (sizes["channels"], sizes["mesh"], sizes["mesh"])
        with torch.device("meta"):  # first without memory: the file may name any sizes
            plan = options.layers.module(shape, sizes["outputs"], options.seed, options.torch_dtype)
        check_total(checkpoint.path, checkpoint.total("weights"), sum(each.numel() for each in plan.parameters()))
        module = options.layers.module(shape, sizes["outputs"], options.seed, options.torch_dtype)
        return WidthLayout.of(module).module(checkpoint.rows("weights"))
