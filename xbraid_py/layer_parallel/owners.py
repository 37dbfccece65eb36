"""An optimizer's state belongs to the layers of one rank: each says which, and is refused by the step of other layers.

`optimizer.state_dict()` is that of a rank, and its moments fit the layers of every rank that has as many of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from xbraid_py.comm import Communicator

# What makes one number of a whole parameter, or a matrix of it: of stacked ones that would be of all layers together.
WHOLE = frozenset({"Adafactor", "LAMB", "Lamb", "LARS", "Lars", "Muon", "NovoGrad", "SOAP", "Shampoo"})
OWNED = "owned_layers"  # of a group of an optimizer, beside its rate and the like
Place = tuple[int, int, int]


class Owner(nn.Module):
    """A module with parameters that are others on every rank; calls `watch` when it is made.

    Attributes
    ----------
    comm : Communicator
        The ranks that share the layers.
    is_stacked : bool
        Whether they have their layers on the first axis.
    """

    comm: Communicator
    is_stacked = False

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.watch()

    def watch(self) -> None:
        """From now on optimizers note which layers of this they have, and look at what they are told of it."""
        _hook()
        with _lock:
            _owners.add(self)

    def places(self) -> Iterable[tuple[nn.Parameter, Place]]:
        """Those parameters, each with the first of its layers, how many there are, and how many all ranks have."""
        raise NotImplementedError


_owners: WeakSet[Owner] = WeakSet()
_lock = Lock()  # ranks may be threads
# What this has written into the groups of an optimizer: after `load_state_dict` these are other objects.
_known: WeakKeyDictionary[torch.optim.Optimizer, list[list | None]] = WeakKeyDictionary()


@cache
def _hook() -> None:
    # Of all optimizers: nobody says when one is made, and with which parameters.
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raise `RuntimeError` if an optimizer is about to use the state of other layers than it has."""
    groups, known = optimizer.param_groups, _known.get(optimizer, ())
    if len(groups) == len(known) and all(group.get(OWNED) is own for group, own in zip(groups, known, strict=True)):
        return
    with _lock:
        places = {id(p): list(place) for owner in _owners for p, place in owner.places()}
        stacked = {id(p) for owner in _owners if owner.is_stacked for p, _ in owner.places()}
        shared = {id(p): owner.comm for owner in _owners for p, _ in owner.places()}
    _check_shards(optimizer, shared)
    _check_kind(optimizer, places, stacked)
    _warn_of_decay(optimizer, stacked)
    for group in groups:
        have = sorted({tuple(places[id(p)]) for p in group["params"] if id(p) in places})
        own, said = [list(each) for each in have], group.pop(OWNED, None)
        if said is not None and said != own:
            raise RuntimeError(
                f"optimizer: its state is that of {_words(said)}, but it has {_words(own)} here; a state_dict() of an "
                f"optimizer is that of one rank: use xbraid_py.save_checkpoint and load_checkpoint"
            )
        if own:
            group[OWNED] = own
    _known[optimizer] = [group.get(OWNED) for group in groups]


def _check_shards(optimizer: torch.optim.Optimizer, shared: dict[int, Communicator]) -> None:
    """Raise `RuntimeError` if weights of layers are cut into shards over ranks that have other layers each."""
    tensors = sys.modules.get("torch.distributed.tensor")  # takes its time to load; without it there are no shards
    if tensors is None:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) in shared and isinstance(parameter, tensors.DTensor):
            both = shared[id(parameter)].common_ranks(parameter.device_mesh.mesh.flatten().tolist())
            if len(both) > 1:
                raise RuntimeError(
                    f"fully_shard takes ranks {', '.join(map(str, both))} for owners of the same weights, but they "
                    f"share the layers out; shard what lies around the stack alone: fully_shard(head, "
                    f"mesh=mesh['replicas']), with mesh = xbraid_py.ProcessGrid(comm, replicas).device_mesh()"
                )


def _check_kind(optimizer: torch.optim.Optimizer, places: dict[int, list[int]], stacked: set[int]) -> None:
    """Raise `RuntimeError` if the steps of an optimizer are not made for each number by itself, and it has layers."""
    have = [id(p) for group in optimizer.param_groups for p in group["params"] if id(p) in places]
    own = [places[each] for each in have]
    kind = next((kind.__name__ for kind in type(optimizer).mro() if kind.__name__ in WHOLE), None)
    if kind is not None and not stacked.isdisjoint(have):
        raise RuntimeError(
            f"optimizer={kind} looks at whole parameters, and those of a stack hold all its layers, (N, *shape): use "
            f"{kind}(xbraid_py.layer_views(model)), which has them layer by layer"
        )
    if isinstance(optimizer, torch.optim.LBFGS) and any(count < total for _, count, total in own):
        raise RuntimeError(
            "optimizer=LBFGS makes dot products of all weights, and this rank has those of its layers alone; use an "
            "optimizer that works number by number, as AdamW, or xbraid_py.NestedIteration, whose L-BFGS knows of ranks"
        )


def _warn_of_decay(optimizer: torch.optim.Optimizer, stacked: set[int]) -> None:
    """A warning if some parameters are spared weight decay, and stacked biases or norms, (N, size), are not."""
    decayed = [group for group in optimizer.param_groups if group.get("weight_decay")]
    if not 0 < len(decayed) < len(optimizer.param_groups):
        return
    count = sum(p.dim() == 2 and id(p) in stacked for group in decayed for p in group["params"])
    if count:
        warnings.warn(
            f"weight decay of {count} stacked biases or norms, which have two axes, (N, size), as a matrix has; for "
            f"groups by what each is in its layer use xbraid_py.param_groups(model, weight_decay=...)",
            stacklevel=5,
        )


def _words(places: list[list[int]]) -> str:
    found = [f"{first} to {first + count - 1} of {total}" for first, count, total in places if count]
    return f"layers {', '.join(found)}" if found else "no layers"
