"""A module compiled by `torch.compile`, as a function of its weights and its state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


class Compiled:
    """What a module gives with weights from outside, compiled when it is first asked for; a copy compiles anew.

    Parameters
    ----------
    module : nn.Module
    names : sequence of str
        Of the weights.
    backend : str
        As of `torch.compile`.

    Attributes
    ----------
    calls : int
        How often it was evaluated.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], backend: str):
        self.module, self.names, self.backend = module, tuple(names), backend
        self._function: Callable | None = None
        self.calls = 0

    def __call__(self, tensors: Sequence[Tensor], u: Any, inputs: tuple, named: Mapping[str, Any]) -> Any:
        """What the module gives for a state and further inputs."""
        if self._function is None:
            module, names = self.module, self.names

            def given(tensors, u, inputs, named):
                weights = dict(zip(names, tensors, strict=True))
                return torch.func.functional_call(module, weights, (u, *inputs), named)

            # An adjoint solve comes through a graph more than once, so its memory is not for the backward pass to use.
            # For the whole process, as torch has it: it looks at this in the backward pass too.
            config: Any = import_module("torch._functorch.config")  # torch loads it when it compiles
            config.donated_buffer = False
            # Rows lie at other offsets in memory, and need gradients or not: each a form of its own to the compiler.
            has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters  # older torch has not
            limit: dict[str, Any] = {"recompile_limit": 64} if has_limit else {}
            self._function = torch.compile(given, backend=self.backend, **limit)
        self.calls += 1
        return self._function(tuple(tensors), u, inputs, dict(named))

    def __getstate__(self) -> dict:
        return vars(self) | {"_function": None}
