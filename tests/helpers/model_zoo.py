"""The packages of the extra `test-models`, for tests: imported, or a skip that says what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

_kept: list[torch.library.Library] = []


@cache
def _declare_operators() -> None:
    """Declare the compiled operators of a torchvision whose build does not fit that of torch, as one for GPUs beside a
    torch without: importing it asks for them, the models here do not. They cannot be called.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return
    folder = Path(found.origin).parent
    for compiled in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
            return
        except OSError:
            pass
    text = (folder / "_meta_registrations.py").read_text()
    names = re.findall(r'register_meta\("(\w+)"\)', text) + re.findall(r'register_fake\("torchvision::(\w+)"\)', text)
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor x) -> Tensor")
    _kept.append(library)


def package(name: str) -> ModuleType:
    """A package by its name; skips the test, saying so, where it is not installed. What is broken is an error."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make env EXTRAS=mpi,test,test-models,lint")
    _declare_operators()
    return importlib.import_module(name)
