"""What a checkpoint holds of a model, its optimizer and its solvers: global arrays and numbers, and back on any ranks.

Weights and moments of the layers of a stack are arrays of all N layers, of which each rank has its rows; those of a
module of a pipeline come from the rank that has it; whatever lies around is the same on every rank, and comes from rank
0. Of replicas, which are alike, the first one writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError, together
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.owners import OWNED
from xbraid_py.layer_parallel.sequence.recurrent import ParallelRecurrent
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.run.store.plain import from_plain, to_plain
from xbraid_py.run.store.read import Checkpoint, CheckpointError, no_state
from xbraid_py.run.store.write import Shard

WEIGHTS, MOMENTS, SCALARS, RANDOM = "weights", "optimizer", "optimizer_scalars", "random_state"
AVERAGE = "average"
_Part = TypeVar("_Part", StackedWeights, PipelineParallel)
# Held as float32, which has all their numbers.
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class MinibatchState:
    """All that changes while a model is trained.

    Parameters
    ----------
    model : Module
        With layer-parallel stacks in it or none.
    optimizer : torch.optim.Optimizer, optional
        Of `model.parameters()`; what it keeps of a parameter are numbers and tensors of the parameter's shape, as
        those of SGD, Adam and the like.
    comm : Communicator
        All ranks of the job.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
    scaler : torch.amp.GradScaler, optional
    average : torch.optim.swa_utils.AveragedModel, optional
        Of the model.
    grid : ProcessGrid, optional
        The model's stacks are on `grid.layers`.
    update : int
        Updates made.
    seconds : float
        Spent in them.

    Raises
    ------
    ValueError
        If the optimizer has a parameter that is not the model's, or some of its layers alone.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    comm: Communicator
    scheduler: Any = None
    scaler: Any = None
    average: AveragedModel | None = None
    grid: ProcessGrid | None = None
    update: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        _slots(self.optimizer, self.model)

    @property
    def stacks(self) -> list[LayerParallel]:
        """The stacks, in the order of the model."""
        return [part for part in self.model.modules() if isinstance(part, LayerParallel)]

    @property
    def _solved(self) -> list[LayerParallel | PipelineParallel | ParallelRecurrent]:
        parts = self.model.modules()
        return [part for part in parts if isinstance(part, LayerParallel | PipelineParallel | ParallelRecurrent)]

    @property
    def result(self) -> nn.Module:
        """What is validated and used in the end: the model, with averaged weights if there are any."""
        return self.model if self.average is None else self.average.module

    def state(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """What this rank writes, and what is not in the arrays, JSON-able; complete on rank 0. Collective.

        The arrays are "weights/NAME" with the names of `state_dict()`, "optimizer/KEY/NAME", and so on.

        Raises
        ------
        RunError
            On all ranks, if a weight is not finite.
        ValueError
            If the optimizer keeps something else than numbers and tensors of the parameters' shapes.
        """
        is_finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        bad = self.comm.first_error(None if is_finite else "not finite")
        if bad is not None:
            raise RunError(
                f"update {self.update}: rank {bad[0]} has weights that are not finite, so there is no checkpoint; "
                f"use a smaller learning rate, or clip the gradients"
            )
        return self._shards(), self._numbers()

    def _shards(self) -> dict[str, Shard]:
        found: dict[str, Shard] = {}
        is_first = self.grid is None or self.grid.replica == 0

        def add(name: str, tensor: Tensor, owner: StackedWeights | PipelineParallel | None) -> None:
            tensor = tensor.detach().to(torch.float32) if tensor.dtype in _HALVES else tensor.detach()
            if isinstance(owner, StackedWeights):
                if is_first:
                    partition = owner.partition
                    found[name] = Shard(tensor, partition.first(owner.comm.rank), partition.num_rows)
            elif self.comm.rank == 0 or (is_first and owner is not None):
                rows = tensor.reshape(tensor.shape or (1,))
                found[name] = Shard(rows, 0, len(rows))

        def add_all(model: nn.Module, kind: str) -> None:
            owners = weights_by_name(model) | modules_by_name(model)
            for name, tensor in tensors_by_name(model):
                add(f"{kind}/{name}", tensor, owners.get(name))

        with together(self.comm):
            add_all(self.model, WEIGHTS)
            if self.average is not None:
                add_all(self.average, AVERAGE)
            alone, rows = modules_by_name(self.model), weights_by_name(self.model)
            for slot in _slots(self.optimizer, self.model):
                name = slot.name
                for key, value in slot.kept().items():
                    if isinstance(value, Tensor) and value.shape == slot.parameter.shape:
                        add(f"{MOMENTS}/{key}/{name}", value, rows.get(name) or alone.get(name))
                    elif isinstance(value, Tensor) and value.dim() == 0:
                        add(f"{SCALARS}/{key}/{name}", value, alone.get(name))
                    else:
                        raise ValueError(
                            f"optimizer={type(self.optimizer).__name__} keeps a {key} that is no number and not of "
                            f"the shape of its parameter, which no checkpoint holds; use torch.optim.Adam"
                        )
            add(RANDOM, torch.get_rng_state(), None)
        return found

    def _numbers(self) -> dict[str, Any]:
        solvers = self.comm.gather([part.solver_state() for part in self._solved])
        replicas = self.grid.replicas if self.grid else 1
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        with together(self.comm):
            scheduler, scaler = (
                None if part is None else to_plain(part.state_dict(), name)
                for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler))
            )
        return {
            "update": self.update,
            "seconds": self.seconds,
            "groups": [
                {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k not in ("params", OWNED)}
                for group in groups
            ],
            "optimizer": self._optimizer(),
            "scheduler": scheduler,
            "scaler": scaler,
            # Each replica solves for other samples, so its solvers may have been tightened when others were not.
            "solvers": solvers[:: self.comm.size // replicas] if solvers else [],
        }

    def _optimizer(self) -> list | None:
        """What an optimizer is: its kind, and the names of the parameters of each group that all ranks know."""
        if self.optimizer is None:
            return None
        alone, groups = modules_by_name(self.model), [[] for _ in self.optimizer.param_groups]
        for slot in _slots(self.optimizer, self.model):
            if slot.name not in alone and not slot.is_by_layer:
                groups[slot.group].append(slot.name)
        return [type(self.optimizer).__name__, groups]

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over what `state` gave, whatever the number of ranks that wrote it; sends no message.

        With the number of replicas that wrote it each takes over the state of its own solvers. With another one all
        take that of the replica that solved most exactly.

        Parameters
        ----------
        checkpoint : Checkpoint
            Its numbers are `checkpoint.meta["state"]`.

        Raises
        ------
        CheckpointError, LookupError, RuntimeError, TypeError, ValueError
            If the file is damaged, or holds another model, another optimizer or none.
        """
        numbers = checkpoint.meta["state"]
        if type(numbers["update"]) is not int or numbers["update"] < 1:
            raise no_state(checkpoint.path, f"update={numbers['update']!r}")
        if (self.scheduler is None) != (numbers["scheduler"] is None):
            raise CheckpointError(f"{checkpoint.path} was written with another schedule; start without --resume")
        self.load_parts(checkpoint)

    def load_parts(self, checkpoint: Checkpoint) -> None:
        """The same, of what there is here: a file may hold an optimizer and the like besides."""
        numbers = checkpoint.meta["state"]
        for name in ("scheduler", "scaler"):
            if getattr(self, name) is not None and numbers.get(name) is None:
                raise CheckpointError(f"{checkpoint.path} was written without a {name}; leave it out")
        check_weights(checkpoint, self.model)
        own = self._optimizer()
        if own is not None and numbers.get("optimizer", own) != own:
            kind, groups = numbers["optimizer"] or ("none", [])
            raise CheckpointError(
                f"{checkpoint.path} was written with another optimizer: {kind} of {list(map(len, groups))} parameters, "
                f"not {own[0]} of {list(map(len, own[1]))}, or of others; "
                f"make it as it was"
            )
        load_weights(checkpoint, self.model)
        if self.average is not None:
            load_weights(checkpoint, self.average, AVERAGE)
        if self.optimizer is not None:
            self._load_optimizer(self.optimizer, checkpoint, numbers["groups"])
        for name in ("scheduler", "scaler"):
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(from_plain(dict(numbers[name])))
        grid = self.grid
        if grid and grid.replicas == len(numbers["solvers"]):
            states = numbers["solvers"][grid.replica]
        else:
            states = max(numbers["solvers"], key=_exactness)
        # Files of earlier versions have no state of recurrent networks.
        is_earlier = not states and all(isinstance(part, ParallelRecurrent) for part in self._solved)
        for part, state in () if is_earlier else zip(self._solved, states, strict=True):
            part.load_solver_state(state)
        self.update, self.seconds = numbers["update"], float(numbers["seconds"])
        torch.set_rng_state(checkpoint.rows(RANDOM))

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, saved: list[Mapping]) -> None:
        fresh = optimizer.state_dict()["param_groups"]
        if len(saved) != len(fresh):
            raise CheckpointError(f"{checkpoint.path} was written with another optimizer; start without --resume")
        owners = weights_by_name(self.model)
        slots = {slot.name: slot for slot in _slots(optimizer, self.model)}
        state: dict[int, dict[str, Tensor]] = {}
        for array in checkpoint.names():
            kind, _, rest = array.partition("/")
            key, _, name = rest.partition("/")
            if kind in (MOMENTS, SCALARS) and name in slots:
                slot = slots[name]
                rows = _own_rows(checkpoint, array, owners.get(name) if kind == MOMENTS else None)
                if kind == MOMENTS and slot.parameter.dtype in _HALVES:
                    rows = rows.to(slot.parameter.dtype)
                value = rows.reshape(slot.parameter.shape if kind == MOMENTS else ())
                for row in range(len(slot.parts)):
                    own = value[row].clone() if slot.is_by_layer and kind == MOMENTS else value.clone()
                    state.setdefault(slot.first + row, {})[key] = own
        groups = [
            own | {key: _like(own.get(key), value) for key, value in group.items()}
            for own, group in zip(fresh, saved, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        parts = [part for slot in slots.values() for part in slot.parts]
        for number, values in state.items():
            kept = optimizer.state[parts[number]]
            for key, value in values.items():
                # Of what is one number torch makes the type of the weights, with other bits.
                if kept[key].dtype != value.dtype:
                    kept[key] = value.to(kept[key].device)


def _like(own: Any, value: Any) -> Any:
    """A value of JSON, which knows neither tuples nor tensors, as the one that is there."""
    return own.new_tensor(value) if isinstance(own, Tensor) else tuple(value) if isinstance(own, tuple) else value


def load_weights(checkpoint: Checkpoint, model: nn.Module, kind: str = WEIGHTS) -> None:
    """Overwrite the parameters and buffers of a model by those of a checkpoint; sends no message.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : Module
        Like the one that was saved; its stacks may be on any number of ranks.
    kind : str
        `WEIGHTS`, or `AVERAGE` for an `AveragedModel`.

    Raises
    ------
    CheckpointError
        If the file is damaged, or holds another model.
    """
    check_weights(checkpoint, model, kind)
    owners = weights_by_name(model)
    for name, tensor in tensors_by_name(model):
        rows = _own_rows(checkpoint, f"{kind}/{name}", owners.get(name))
        with torch.no_grad():
            tensor.copy_(rows.reshape(tensor.shape))


def check_weights(checkpoint: Checkpoint, model: nn.Module, kind: str = WEIGHTS) -> None:
    """Raise `CheckpointError` unless a checkpoint holds just the parameters and buffers of a model; no message."""
    owners = weights_by_name(model)
    others = tuple(
        f"{path}.layers.{number}.".lstrip(".")
        for path, part in model.named_modules()
        if isinstance(part, PipelineParallel)
        for number in set(range(part.partition.num_rows)).difference(part.own_layers)
    )
    names = (name.partition("/")[2] for name in checkpoint.names() if name.startswith(f"{kind}/"))
    held = {name for name in names if not name.startswith(others)}
    wanted = dict(tensors_by_name(model))
    where = f"{checkpoint.path} holds another network than this run's"
    use = "start without --resume, or with the options and the data of that run"
    for name in sorted(held ^ wanted.keys()):
        raise CheckpointError(f"{where}: {'no ' if name in wanted else ''}{name}; {use}")
    for name, tensor in wanted.items():
        owner = owners.get(name)
        rows = owner.partition.num_rows if owner is not None else tensor.shape[0] if tensor.dim() else 1
        shape = (rows, *tensor.shape[1:])
        dtype = torch.float32 if tensor.dtype in _HALVES else tensor.dtype
        found = checkpoint.shape(f"{kind}/{name}"), checkpoint.rows(f"{kind}/{name}", 0, 0).dtype
        if found != (shape, dtype):
            raise CheckpointError(f"{where}: {name} of {found[0]} {found[1]}, not {shape} {dtype}; {use}")


def tensors_by_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under the names of `state_dict()`; what is shared under its first name only."""
    yield from model.named_parameters()
    passing = {
        f"{path}.{key}".lstrip(".") for path, part in model.named_modules() for key in part._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)


def weights_by_name(model: nn.Module) -> dict[str, StackedWeights]:
    """What a parameter or buffer with a row for each layer is a part of, by its name; others are missing."""
    found = _parts_by_name(model, StackedWeights)
    return {name: part for name, (part, inner) in found.items() if inner in part.divided}


def modules_by_name(model: nn.Module) -> dict[str, PipelineParallel]:
    """The pipeline that a parameter or buffer of this rank alone is a part of, by its name; others are missing."""
    return {name: part for name, (part, _) in _parts_by_name(model, PipelineParallel).items()}


def _parts_by_name(model: nn.Module, kind: type[_Part]) -> dict[str, tuple[_Part, str]]:
    """Of all tensors within parts of that kind, by their names in the model: the part, and the name in it."""
    return {
        f"{path}.{name}".lstrip("."): (part, name)
        for path, part in model.named_modules()
        if isinstance(part, kind)
        for name, _ in tensors_by_name(part)
    }


@dataclass(frozen=True)
class _Slot:
    """A parameter of the model in an optimizer: as it is, or layer by layer (`layer_views`).

    Attributes
    ----------
    optimizer : Optimizer
    name : str
        In the model.
    parameter : Tensor
        Of the model.
    group, first : int
        Of the optimizer's groups, and the number of its first part among all parameters of the optimizer.
    parts : list of Tensor
        What the optimizer has of it.
    is_by_layer : bool
    """

    optimizer: torch.optim.Optimizer
    name: str
    parameter: Tensor
    group: int
    first: int
    parts: list[Tensor]
    is_by_layer: bool

    def kept(self) -> dict[str, Any]:
        """What the optimizer keeps of it: of parts by layer one under the other, and of single numbers the first."""
        each = [self.optimizer.state.get(part, {}) for part in self.parts]
        if not self.is_by_layer:
            return each[0]
        if any(one.keys() != each[0].keys() for one in each):
            raise ValueError(f"optimizer keeps something of some layers of {self.name} and not of others")
        return {
            key: torch.stack([one[key] for one in each]) if _has_shape(value, self.parts[0]) else value
            for key, value in each[0].items()
        }


def _has_shape(value: Any, part: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == part.shape


def _slots(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> list[_Slot]:
    """The parameters of an optimizer in its order, those that it has layer by layer together."""
    if optimizer is None:
        return []
    named, stacked = dict(model.named_parameters()), weights_by_name(model)
    names = {id(parameter): name for name, parameter in named.items()}
    rows = {row.data_ptr(): (name, n) for name in stacked.keys() & named for n, row in enumerate(named[name].detach())}
    found: list[_Slot] = []
    number = 0
    for group, params in enumerate(group["params"] for group in optimizer.param_groups):
        for part in params:
            name, row = (names[id(part)], None) if id(part) in names else rows.get(part.data_ptr(), (None, None))
            if name is None:
                raise ValueError(
                    "optimizer holds a parameter that is not the model's; use model.parameters() or layer_views(model)"
                )
            if row:  # it follows the one before
                if not found or found[-1].name != name or found[-1].group != group or len(found[-1].parts) != row:
                    raise ValueError(f"optimizer has layers of {name} in another order; use layer_views(model)")
                found[-1].parts.append(part)
            else:
                found.append(_Slot(optimizer, name, named[name], group, number, [part], row is not None))
            number += 1
    for slot in found:
        if slot.is_by_layer and len(slot.parts) != len(slot.parameter):
            raise ValueError(f"optimizer has some layers of {slot.name} alone; use layer_views(model)")
    return found


def _own_rows(checkpoint: Checkpoint, name: str, owner: StackedWeights | None) -> Tensor:
    if owner is None:
        return checkpoint.rows(name)
    partition, rank = owner.partition, owner.comm.rank
    count = partition.count(rank)
    return checkpoint.rows(name, partition.first(rank) if count else 0, count)


def _exactness(states: list[Mapping]) -> tuple:
    """How exactly the stacks of a replica are solved."""
    controls = [state["accuracy"] for state in states if "accuracy" in state]
    return tuple((control["exact"], control["level"]) for control in controls)
