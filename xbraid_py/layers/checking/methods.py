"""What a propagator must have, or its steps: the names, what each is to do, and what is wrong with those there."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from xbraid_py.mgrit.equations import Adjoint, Forward

# Each with the arguments that the solver calls it with; None for what is no method.
PROPAGATOR: dict[str, tuple[int | None, str]] = {
    "direction": (None, "+1 forwards, -1 for adjoints"),
    "cost": (None, "the work of one step, a positive number"),
    "transfer": (None, "how states come from the next finer level; None where they are the same"),
    "step": (1, "step(x) takes states x (n, *S), one before each row, one step on"),
    "relax": (5, "relax(points, cfactor, tau, record, inputs) takes states (n / c, *S) through intervals of c rows"),
    "correct": (3, "correct(before, after, coarse) makes what was recorded better, or does nothing"),
    "coarsen": (4, "coarsen(cfactor, weights, scheme, parts) gives a propagator with one row for each interval"),
    "redistribute": (3, "redistribute(comm, source, target) gives a propagator with the rows of `target`"),
    "empty": (1, "empty(num_rows) gives uninitialized states (num_rows, *S)"),
}
STEPS: dict[str, tuple[int | None, str]] = {
    "theta": (None, "the weights, a tensor with a row for each part of each step"),
    "h": (None, "the size of the parts, a number or a tensor with one for each"),
    "parts": (None, "how many smaller steps a step is, 1 as a rule"),
    "cost": PROPAGATOR["cost"],
    "relax": (5, "relax(points, cfactor, tau, inputs, record) takes states (n / c, *S) through intervals of c rows"),
    "relax_adjoint": (
        6,
        "relax_adjoint(states, points, cfactor, tau, inputs, gradient) takes adjoints back through them",
    ),
    "coarsen": (4, "coarsen(cfactor, weights, scheme, parts) gives steps with one row for each interval"),
    "redistribute": (3, "redistribute(comm, source, target) gives the steps of the rows of `target`"),
}
_PACKAGE, _CHECKING = (Path(__file__).resolve().parents[up] for up in (2, 0))


def are_steps(given: Any) -> bool:
    """Whether something is rather steps than a propagator."""
    lacks, own = _missing(given, STEPS), STEPS.keys() - PROPAGATOR.keys()
    return not own.issubset(lacks) and len(lacks) < len(_missing(given, PROPAGATOR))


def wrong_methods(given: Any) -> list[str]:
    """What a propagator, or steps, lack, and which methods cannot be called as the solver does, in words."""
    if isinstance(given, Forward | Adjoint):
        return wrong_methods(given.steps)
    table = STEPS if are_steps(given) else PROPAGATOR
    found = [f"{name} is missing: {table[name][1]}" for name in _missing(given, table)]
    for name, (count, purpose) in table.items():
        if count is None or name in _missing(given, table):
            continue
        if problem := _not_callable(getattr(given, name), count):
            found.append(f"{name} {problem}: {purpose}")
    if not found and table is STEPS:
        if not isinstance(given.theta, Tensor):
            found.append(f"theta is {type(given.theta).__name__}: {STEPS['theta'][1]}")
        if not isinstance(given.parts, int) or given.parts < 1:
            found.append(f"parts is {given.parts!r}: {STEPS['parts'][1]}")
    return found


def _missing(given: Any, table: dict) -> list[str]:
    # No property is asked for its value: it may raise.
    return [name for name in table if inspect.getattr_static(given, name, table) is table and not hasattr(given, name)]


def _not_callable(method: Any, count: int) -> str | None:
    """Why a method cannot be called with so many arguments; None if it can, or nothing tells."""
    if not isinstance(method, Callable):
        return f"is {type(method).__name__} and no method"
    try:
        signature = inspect.signature(method)
    except (ValueError, TypeError):
        return None
    try:
        signature.bind(*range(count))
    except TypeError as error:
        return f"cannot be called with {count} arguments ({error})"
    return None


def said(error: BaseException) -> str:
    """Which method has raised an error, what it is to do, and where that was."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [(code, line) for code, line in frames if not Path(code.co_filename).is_relative_to(_CHECKING)]
    own = [code for code, _ in frames if not Path(code.co_filename).is_relative_to(_PACKAGE)]
    known = STEPS | PROPAGATOR
    method = next((code.co_name for code in [*own, *(code for code, _ in frames)] if code.co_name in known), None)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if frames:
        code, line = frames[-1]
        text += f" ({Path(code.co_filename).name}, line {line})"
    return text if method is None else f"{method} has raised {text}; {known[method][1]}"
