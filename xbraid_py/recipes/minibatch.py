"""Training on minibatches as a job: options, updates with validations, and the picture, for whatever is learned."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import AVERAGE, WEIGHTS, MinibatchState, check_weights, load_weights
from xbraid_py.layer_parallel.minibatch.updates import Batch, check_alike, train
from xbraid_py.recipes.options.minibatch import MinibatchOptions
from xbraid_py.run import engine
from xbraid_py.run.engine import Row, State, Training, state_of
from xbraid_py.run.options import from_dict
from xbraid_py.run.store.read import Checkpoint, CheckpointError
from xbraid_py.run.store.write import Score

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
