"""Plain values for the meta data of checkpoints: JSON and back to what they were, so that nothing is unpickled.

JSON has lists for tuples, words for all keys, and no tensors: such values go as a dict with one key, which begins with
a mark.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

_MARK = "!"
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


def to_plain(value: Any, where: str) -> Any:
    """What JSON has for a value; `TypeError`, which says `where` it was met, if it is not one of a few plain kinds."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and (name := str(value.dtype).removeprefix("torch.")) in _DTYPES:
        return {f"{_MARK}tensor": [value.tolist(), name]}
    if type(value) in (list, tuple):
        items = [to_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return items if type(value) is list else {f"{_MARK}tuple": items}
    if isinstance(value, dict) and type(value) in (dict, Counter):
        items = [[to_plain(key, where), to_plain(item, f"{where}[{key!r}]")] for key, item in value.items()]
        if type(value) is dict and all(type(key) is str and not key.startswith(_MARK) for key in value):
            return dict(items)
        return {f"{_MARK}{type(value).__name__}": items}
    raise TypeError(
        f"{where} is a {type(value).__name__}, and a checkpoint holds numbers, words, tensors, lists, tuples and dicts "
        f"alone; use one of them"
    )


def from_plain(value: Any) -> Any:
    """The opposite of `to_plain`; whatever is of no such form stays as it is."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    key = next(iter(value), "")
    if len(value) != 1 or not key.startswith(_MARK):
        return {key: from_plain(item) for key, item in value.items()}
    if key == f"{_MARK}tensor":
        numbers, name = value[key]
        return torch.tensor(numbers, dtype=_DTYPES[name])
    items = from_plain(value[key])
    return Counter(dict(items)) if key == f"{_MARK}Counter" else dict(items) if key == f"{_MARK}dict" else tuple(items)
