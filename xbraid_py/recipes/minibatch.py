"""Training on minibatches as a job: options, updates with validations, and the picture, for whatever is learned."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import AVERAGE, WEIGHTS, MinibatchState, check_weights, load_weights
from xbraid_py.layer_parallel.minibatch.updates import Batch, check_alike, train
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import Layer
from xbraid_py.recipes.planned import of_modules
from xbraid_py.run import engine
from xbraid_py.run.engine import Row, State, Training, state_of
from xbraid_py.run.options import from_dict
from xbraid_py.run.run_options import RunOptions, free
from xbraid_py.run.store.read import Checkpoint, CheckpointError
from xbraid_py.run.store.write import Score


@dataclass(frozen=True, kw_only=True)
class MinibatchOptions(RunOptions):
    """What all jobs on minibatches are told.

    Parameters
    ----------
    batch_size
        Samples of an update, of all replicas together.
    learning_rate
        Of the optimizer.
    clip
        2-norm above which the gradient is scaled down; not at all if not given.
    seed
        Of initial weights and of the order of the samples.
    replicas
        Copies of the network, each on as many ranks, that share out every batch; divides the number of ranks. Those of
        the plan if not given, which is made by rule from the sizes of the network and the number of ranks.
    exact
        Propagate layer after layer, or step after step of a sequence, instead of by MGRIT.
    validate_every
        Updates between two validations; the last update has one in any case.
    mgrit
        Solver of the states; that of the plan if nothing of it is given.
    adjoint
        Solver of the adjoints; what is left at its default is taken from mgrit.
    """

    batch_size: int = 50
    learning_rate: float = 5e-3
    clip: float | None = None
    seed: int = 0
    replicas: int | None = free(None)
    exact: bool = False
    validate_every: int = free(300)
    checkpoint_every: int = free(100)
    checkpoint_best: bool = free(True)
    mgrit: MGRIT | None = None
    adjoint: MGRIT = MGRIT()

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, batch_size=1, replicas=1, validate_every=1)
        for name in ("learning_rate", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                good = getattr(type(self), name) or 1.0
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")
        if self.batch_size < (self.replicas or 1):
            raise ValueError(f"batch_size={self.batch_size} is less than replicas={self.replicas}; use {self.replicas}")

    @property
    @abstractmethod
    def depth(self) -> int:
        """Layers, or steps, that are propagated through."""

    @property
    @abstractmethod
    def layer(self) -> Layer:
        """What one of them costs, for the plan by rule."""

    @property
    def lagged(self) -> MGRIT:
        """Solver where the lagged cycle is chosen: what the members of `mgrit` are by default."""
        field = next(each for each in fields(self) if each.name == "mgrit")
        return field.metadata.get("members", MGRIT())

    def planned(self, ranks: int) -> tuple[Self, str]:
        """These options with solver and replicas, by rule where they are not given, and the plan in words."""
        return of_modules(self, self.depth, self.layer, self.lagged, ranks)

    @property
    def solvers(self) -> dict[str, Any]:
        """The arguments `mgrit` and `adjoint` of what is solved for: without coarse levels if it is to be exact."""
        both = {"mgrit": self.mgrit or MGRIT(), "adjoint": self.adjoint}
        return {name: replace(each, max_levels=1) for name, each in both.items()} if self.exact else both


OptionsT = TypeVar("OptionsT", bound=MinibatchOptions)


class MinibatchTraining(Training, Generic[OptionsT]):
    """Updates on minibatches, so many in all, with validations in between; `trained` is at the beginning.

    Attributes
    ----------
    plan : str
        What solver and replicas were chosen, and why.
    """

    plan = ""

    def __init__(self, options: OptionsT, trained: MinibatchState, total: int):
        self.options, self.trained, self.total = options, trained, total

    @property
    def how(self) -> dict[str, Any]:
        """Further arguments of `layer_parallel.minibatch.updates.train`."""
        return {}

    @abstractmethod
    def batches(self, done: int) -> Iterable[Batch]:
        """Inputs and targets of the updates behind so many, whole batches, the same on all ranks."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the samples of a batch."""

    def steps(self) -> Iterator[Row]:
        trained = self.trained
        assert trained.optimizer is not None
        for row in train(
            trained.model,
            self.batches(trained.update),
            self.loss,
            trained.optimizer,
            scheduler=trained.scheduler,
            clip=self.options.clip,
            grid=trained.grid,
            average=trained.average,
            done=trained.update,
            seconds=trained.seconds,
            **self.how,
        ):
            trained.update, trained.seconds = row["update"], row["seconds"]
            yield {**row, "final": row["update"] == self.total}
        if trained.update < self.total:
            raise ValueError(f"batches end after update {trained.update}, total={self.total}; use as many batches")

    def is_due(self, row: Row) -> bool:
        return row["update"] % self.options.validate_every == 0

    def score(self, row: Row) -> Score:
        # The loss of one minibatch says nothing: what was not validated is never the best.
        values = (row.get(name) for name in ("val_accuracy", "val_loss"))
        accuracy, loss = (value if value is not None and math.isfinite(value) else None for value in values)
        return Score(accuracy=accuracy, objective=loss)

    def state(self) -> State:
        return self.trained.state()

    def load(self, checkpoint: Checkpoint) -> None:
        self.trained.load(checkpoint)

    def describe(self) -> str:
        stacks = [f"levels of a stack\n{stack.table()}" for stack in self.trained.stacks]
        return "\n".join(filter(None, [self.plan, *stacks]))

    def draw(self, rows: list[Row], figures: Path) -> Row | None:
        if rows:
            from xbraid_py.recipes.pictures.curves import picture  # matplotlib takes its time to load

            picture(rows, figures / "training.png")


def network_of(
    checkpoint: Checkpoint, options_class: type[MinibatchOptions], build: Callable[..., nn.Module]
) -> nn.Module:
    """The trained network of a checkpoint without ranks, as `build(options, None, **sizes)` makes it.

    Raises `CheckpointError` if it holds another network.
    """
    meta = state_of(checkpoint)
    options, sizes = from_dict(options_class, meta["configuration"]), meta["sizes"]
    _check_sizes(checkpoint, options, sizes)
    model = build(options, None, **sizes)
    if getattr(options, "ema", None) is None:
        load_weights(checkpoint, model)
        return model
    averaged = AveragedModel(model)
    load_weights(checkpoint, averaged, AVERAGE)
    return averaged.module


def _check_sizes(checkpoint: Checkpoint, options: Any, sizes: Mapping[str, int]) -> None:
    """Raise `CheckpointError` for a network of more weights than a file has, before memory is asked for them."""
    held = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names() if name.startswith(f"{WEIGHTS}/"))
    name, width = next((name, getattr(options, name)) for name in ("width", "hidden_size") if hasattr(options, name))
    # Of each layer there is a matrix of this width, of each token and place a row.
    named = {"num_layers": options.num_layers, "context": getattr(options, "context", 0), **sizes}
    for size, number in named.items():
        if not isinstance(number, int) or number * width * (width if size == "num_layers" else 1) > held:
            raise CheckpointError(
                f"{checkpoint.path} says {size}={number} and {name}={width}, but holds only {held:,} weights; give "
                f"one of a run's checkpoints folder"
            )


def prepare(
    kind: str,
    recipe: str,
    options: MinibatchOptions,
    comm: Communicator,
    build: Callable[[Communicator | None], nn.Module],
    make: Callable[[nn.Module, ProcessGrid], MinibatchTraining],
    sizes: Mapping[str, int] | None = None,
    plan: str = "",
) -> Callable[[], Row]:
    """Check everything, without a message; returns the run.

    A run that goes on with another number of replicas shares the batches out otherwise: then losses agree as well as
    the solves are exact, and masks of dropout differ.

    Parameters
    ----------
    kind, recipe, options, comm, sizes
        See `xbraid_py.run.engine.train`.
    build : callable
        `build(comm)` makes the network on ranks, or without any for None.
    make : callable
        `make(model, grid)` makes the training.
    plan : str
        For the header.

    Raises
    ------
    ValueError
        If the replicas do not fit the ranks, or for what `build` and the checkpoint raise it.
    """
    replicas = options.replicas or 1
    if comm.size % replicas:
        raise ValueError(f"replicas={replicas} does not divide the {comm.size} rank(s); use 1")
    alone = build(None)  # it sends no message, and refuses what others would refuse

    def made() -> MinibatchTraining:
        grid = ProcessGrid(comm, replicas)
        model = build(grid.layers)
        check_alike(model, comm)
        training = make(model, grid)
        training.plan = plan
        return training

    def check(checkpoint: Checkpoint) -> None:
        check_weights(checkpoint, alone)

    return engine.train(kind, made, options, comm, sizes=sizes, recipe=recipe, check=check)
