"""Whether what a sound checkpoint holds is a state of the run that is to go on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from xbraid_py.io.checkpoint_read import CheckpointError
from xbraid_py.multilevel import NestedIteration
from xbraid_py.objective import Evaluation

# What a snapshot counts, and of which type; integers will do for floats.
_NUMBERS = {
    **dict.fromkeys(("index", "num_layers", "number", "backtracks", "evaluations"), int),
    **{"step": float, "scale": float, "work": float, "adjoint_residual": float | None, "is_final": bool},
}
_BEFORE = {"records": int, "work": float, "evaluations": int, "seconds": float}


def check_numbers(path: Path, numbers: dict, run: NestedIteration) -> None:
    """Raise an error unless these are the numbers of a snapshot of such a run."""
    for place, kinds in ((numbers, _NUMBERS), (numbers["before"], _BEFORE)):
        for name, kind in kinds.items():
            if not _is_a(place[name], kind):
                raise no_state(path, f"{name}={place[name]!r}")
    evaluation = Evaluation(**numbers["evaluation"])
    if not all(_is_a(getattr(evaluation, each.name), float | None) for each in fields(evaluation)):
        raise no_state(path, f"evaluation={numbers['evaluation']!r}")
    index = numbers["index"]
    if not 0 <= index < len(run.depths) or not _is_depth(numbers, run.depths, index, run.options.adaptive is not None):
        raise no_state(path, f"level {index} with {numbers['num_layers']} layers, where this run has {run.depths}")


def _is_depth(numbers: dict, depths: list[int], index: int, adaptive: bool) -> bool:
    """Whether a level may have that many layers, and these lengths, if it has any."""
    depth, lengths = numbers["num_layers"], numbers.get("lengths")
    if not adaptive:
        return depth == depths[index] and lengths is None
    listed = lengths is None or (all(_is_a(each, int) and each > 0 for each in lengths) and len(lengths) == depth)
    return listed and depths[0] <= depth <= depths[index]


def _is_a(value: object, kind) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def check_total(path: Path, found: int, expected: int) -> None:
    """Raise an error unless there are as many as expected."""
    if found != expected:
        raise no_state(path, f"{found} rows or vectors where this run has {expected}")


def no_state(path: Path, why: str = "") -> CheckpointError:
    """What to raise for a file that holds something else than the state of such a run."""
    why = why and f" ({why})"
    return CheckpointError(f"{path} holds no state of a training run{why}; give one of a run's checkpoints folder")


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Whatever a sound file of other content leads to becomes one error; damage has been found before."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise no_state(path, f"{type(error).__name__}: {error}") from error
