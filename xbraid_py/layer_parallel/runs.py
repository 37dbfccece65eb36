"""The run of like blocks in a model that exists: found, taken out of its container and its weights, and put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """Consecutive like blocks of a container.

    Parameters
    ----------
    path : str
        Name of the container.
    container : nn.Module
    names : tuple of str
        Of the blocks in it.
    """

    path: str
    container: nn.Module
    names: tuple[str, ...]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks."""
        return [self.container.get_submodule(name) for name in self.names]

    def put(self, part: nn.Module) -> None:
        """Put one module in the place of all of them."""
        kept = {}
        for name, child in self.container._modules.items():
            if name == self.names[0]:
                kept[name] = part
            elif name not in self.names:
                kept[name] = child
        fill(self.container, kept)


def fill(container: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Give a container these children, in their order; those of a list are numbered anew."""
    is_list = isinstance(container, nn.ModuleList)
    container._modules.clear()
    for number, (name, child) in enumerate(children.items()):
        container.add_module(str(number) if is_list else name, child)


def kind_of(block: nn.Module) -> tuple:
    """What like blocks have in common."""
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in block.named_parameters()]
    buffers = [(name, tuple(b.shape), b.dtype) for name, b in block.named_buffers()]
    return type(block), tuple(parameters), tuple(buffers)


def _longest(path: str, container: nn.Module, unlike: bool) -> Run:
    """The first of the longest runs of like blocks in a container, or of any with weights."""
    runs: list[list[str]] = []
    kind = None
    for name, child in container._modules.items():
        before, kind = kind, None
        if child is not None and any(True for _ in child.parameters()):
            kind = () if unlike else kind_of(child)
            if kind == before:
                runs[-1].append(name)
            else:
                runs.append([name])
    return Run(path, container, tuple(max(runs, key=len, default=[])))


def find_run(model: nn.Module, blocks: str | None, unlike: bool = False) -> Run:
    """The longest run of like blocks in a model, or that of the container with a name; of any blocks, if asked for.

    Raises `ValueError` if there is none, or several are as long.
    """
    containers = {
        name: part
        for name, part in model.named_modules(remove_duplicate=True)
        if isinstance(part, nn.ModuleList | nn.Sequential)
    }
    runs: list[Run] = []
    for name, part in containers.items():
        # Not the parts of a block of a run that was found.
        above = (f"{run.path}.{each}".lstrip(".") for run in runs for each in run.names)
        run = _longest(name, part, unlike)
        if len(run.names) > 1 and not any(f"{name}.".startswith(f"{each}.") for each in above):
            runs.append(run)
    known = ", ".join(f"{run.path or '(model)'} ({len(run.names)})" for run in runs) or "none"
    what = "blocks" if unlike else "like blocks"
    more = "" if unlike else "; for blocks that differ use unlike=True"
    if blocks is not None:
        run = _longest(blocks, containers[blocks], unlike) if blocks in containers else None
        if run is None or len(run.names) < 2:
            raise ValueError(
                f"blocks={blocks!r} is no ModuleList or Sequential with {what} in a row; there are {known}{more}"
            )
        return run
    if not runs:
        raise ValueError(
            f"model={type(model).__name__} has no ModuleList or Sequential with {what} in a row; use "
            f"LayerParallel.from_blocks for blocks that are kept elsewhere{more}"
        )
    most = max(len(run.names) for run in runs)
    first, *others = [run for run in runs if len(run.names) == most]
    if others:
        raise ValueError(f"model={type(model).__name__} has several runs as long: {known}; use blocks={first.path!r}")
    return first


def check_weights(model: nn.Module, run: Run, must_be_alike: bool) -> None:
    """Raise `ValueError` for weights that a stack cannot have: shared with others, or frozen in some of like layers."""
    blocks = run.blocks
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError(
            f"{run.path}: one module stands for several layers, whose weights would no longer be the same; use copies "
            f"of it (copy.deepcopy), or leave the model as it is"
        )
    inside = {id(part) for block in blocks for part in block.modules()}
    owners: dict[int, str] = {
        id(p): f"{name}.{key}".lstrip(".")
        for name, part in model.named_modules()
        if id(part) not in inside
        for key, p in part._parameters.items()
        if p is not None
    }
    for name, block in zip(run.names, blocks, strict=True):
        path = f"{run.path}.{name}".lstrip(".")
        for key, p in block.named_parameters():
            if id(p) in owners:
                raise ValueError(f"{path}.{key} is {owners[id(p)]} too; weights that are shared cannot be in a stack")
        owners |= {id(p): f"{path}.{key}" for key, p in block.named_parameters()}
        pairs = zip(block.named_parameters(), blocks[0].parameters(), strict=True) if must_be_alike else ()
        for (key, p), other in pairs:
            if p.requires_grad != other.requires_grad:
                raise ValueError(
                    f"{path}.{key} has requires_grad={p.requires_grad}, that of the first block {other.requires_grad}; "
                    f"the layers of a stack learn together: freeze all of them or none, or use "
                    f"mgrit=MGRIT(cycle='pipeline')"
                )


def take_weights(block: nn.Module) -> None:
    """Leave nothing of the weights of a block but their shapes."""
    made: dict[int, nn.Parameter] = {}
    for part in block.modules():
        for key, p in part._parameters.items():
            if p is not None:
                empty = torch.empty_like(p, device="meta")
                part._parameters[key] = made.setdefault(id(p), nn.Parameter(empty, requires_grad=p.requires_grad))


def without_weights(block: nn.Module) -> nn.Module:
    """A copy of a block that has nothing of its weights but their shapes."""
    metas = {
        p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in block.parameters()
    }
    return copy.deepcopy(block, {id(p): meta for p, meta in metas.items()})


def give_weights(block: nn.Module, tensors: Mapping[str, tuple[Tensor, bool]], like: nn.Module) -> None:
    """The opposite: weights and buffers by their names, and whether they learn; other buffers of a type as there."""
    made: dict[int, nn.Parameter] = {}
    for name, p in block.named_parameters():
        tensor, wanted = tensors[name]
        made[id(p)] = nn.Parameter(tensor.clone(), requires_grad=wanted)
    for part in block.modules():
        for key, p in part._parameters.items():
            if p is not None:
                part._parameters[key] = made[id(p)]
    for name, buffer in list(block.named_buffers()):
        above, _, last = name.rpartition(".")
        value = tensors[name][0].clone() if name in tensors else buffer.to(like.get_buffer(name))
        block.get_submodule(above)._buffers[last] = value
