"""What is asked of a forward pass by those who take a stack for any torch module: layouts, and graphs within graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from xbraid_py.layer_parallel.alike import compare_bits

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def as_any_module(forward: Callable) -> Callable:
    """A `forward(self, u, ...)` whose graphs are its own, and whose output lies in memory as the input does.

    Blocks are evaluated within, with graphs that the backward pass comes through by itself. Hooks for saved tensors
    around the call, as `torch.utils.checkpoint` sets them, are for graphs of the caller, and would evaluate the caller
    again for each tensor within.

    The inputs of all ranks are compared, by `compare_bits`, where that is asked for.
    """

    @wraps(forward)
    def wrapped(self, u, *inputs, **named):
        compare_bits(self.comm, u, inputs, named)
        with _own_graphs():
            return _laid_out(forward(self, u, *inputs, **named), u)

    return wrapped


def _own_graphs() -> AbstractContextManager:
    own = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]: not among torch's types
    top = getattr(own, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(False) is None:
        return nullcontext()
    # Detached: a node that holds its own output by a function of Python would never be freed.
    return torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda kept: kept)


def _laid_out(output: Tensor, u: Tensor) -> Tensor:
    if not (isinstance(output, Tensor) and isinstance(u, Tensor)):
        return output
    layout = _LAYOUTS.get(u.dim()) if output.dim() == u.dim() else None
    if layout is None or u.is_contiguous() or not u.is_contiguous(memory_format=layout):
        return output
    return output.contiguous(memory_format=layout)


def check_not_again(kind: str, what: str, instead: str = "recompute=True") -> None:
    """Raise `RuntimeError` if this is the evaluation of a forward pass again, within a backward pass.

    Parameters
    ----------
    kind : str
        Of the module.
    what : str
        What it has that changes from one forward pass to the next.
    instead : str
        What saves memory, too.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is not None and task() != -1:
        raise RuntimeError(
            f"a {kind} with {what} is evaluated again in a backward pass, as by torch.utils.checkpoint around it, and "
            f"would be another network than before: leave it out of the checkpoint, and use {instead} in its place"
        )


class Unwritten:
    """Tensors of the caller that a backward pass reads again, and what tells whether they were written to by then.

    They are not held here: what nobody has any more cannot have been written to.
    """

    def __init__(self, tensors: Iterable[Any]):
        plain = (each for each in tensors if isinstance(each, Tensor) and not each.is_inference())
        self._seen = [(weakref.ref(each), each._version) for each in plain]

    def check(self) -> None:
        """Raise `RuntimeError` if one of them was written to."""
        for reference, version in self._seen:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    f"an input {tuple(tensor.shape)} of the stack was overwritten by an operation in place, and the "
                    f"backward pass evaluates layers with it again; use a form not in place, as u = u + 1"
                )
