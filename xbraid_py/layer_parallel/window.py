"""Where a stack is in a deeper one that is propagated window by window."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    """The place of a stack among the windows of a deeper one; `in_windows` makes them.

    Parameters
    ----------
    first_layer : int
        Its first layer in the deeper stack, whose numbers initial weights and masks of dropout depend on.
    h : float, optional
        Step size, where T / N of the window would be another number in the last bit.
    keeper : int, optional
        The rank that keeps the input between forward and backward pass with `recompute="states"`; by default the owner
        of the first layer.
    is_first, is_last : bool
        Whether the input and the output are those of the deeper stack; others are on all ranks.
    """

    first_layer: int = 0
    h: float | None = None
    keeper: int | None = None
    is_first: bool = True
    is_last: bool = True
