"""Sums in one fixed binary tree: the same bits however the summands are spread over ranks."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from torch import Tensor

Value = TypeVar("Value", bound=Any)


class TreeSum(Generic[Value]):
    """The sum of `total` summands, or what is known of it from those that are here.

    Summand m is leaf m. Node k of a level is the sum of nodes 2k and 2k + 1 of the level below it; where there is no
    node 2k + 1, it is node 2k. So the order of summation depends on `total` alone. Whoever holds some of the summands
    adds them up as far as whole subtrees go, and hands these (`nodes`) to whoever completes the sum.

    Parameters
    ----------
    total : int
        Summands on all ranks together, at least 1.

    Examples
    --------
    >>> here, there = TreeSum(5), TreeSum(5)
    >>> for m in range(3):
    ...     here.add(m, float(m))
    >>> for m in range(3, 5):
    ...     there.add(m, float(m))
    >>> here.nodes(), there.nodes()
    ([(0, 2, 2.0), (1, 0, 1.0)], [(0, 3, 3.0), (2, 1, 4.0)])
    >>> for level, index, value in there.nodes():
    ...     here.add(index, value, level)
    >>> here.result()
    10.0
    """

    def __init__(self, total: int):
        if total < 1:
            raise ValueError(f"total={total} must be at least 1; use 1 for a sum of one summand")
        self.total = total
        # A value, and whether it is a buffer of ours, that may be added to.
        self._nodes: dict[tuple[int, int], tuple[Value, bool]] = {}

    def add(self, index: int, value: Value, level: int = 0, *, take: bool = False) -> None:
        """Add a summand, or a node of a higher level.

        Parameters
        ----------
        index : int
            Its number on its level.
        value : Tensor or float
            Kept as it is until its sibling comes, so it must not be overwritten before.
        level : int
            0 for a summand.
        take : bool
            Whether the memory of a tensor is handed over, and may be summed into; otherwise it is left as it is.

        Raises
        ------
        ValueError
            If there is no such node, or it is here already.
        """
        count = _count(self.total, level)
        if not 0 <= index < count:
            raise ValueError(f"index={index} is outside 0 .. {count - 1} on level={level} of total={self.total}")
        owned = take and isinstance(value, Tensor)
        level, index = _raised(self.total, level, index)
        while (level, index ^ 1) in self._nodes:
            other, is_own = self._nodes.pop((level, index ^ 1))
            # a + b and b + a have the same bits.
            if is_own:
                value = other.add_(value)
            elif owned:
                value = cast(Any, value).add_(other)
            else:
                value = other + value
            owned = isinstance(value, Tensor)
            level, index = _raised(self.total, level + 1, index // 2)
        if (level, index) in self._nodes:
            raise ValueError(f"index={index} on level={level} of total={self.total} has been added before")
        self._nodes[level, index] = cast(Value, value), owned

    def nodes(self) -> list[tuple[int, int, Value]]:
        """Level, index and value of the greatest whole subtrees that are here, the lowest level first."""
        return [(*place, value) for place, (value, _) in sorted(self._nodes.items(), key=lambda item: item[0])]

    @property
    def is_complete(self) -> bool:
        """Whether all summands are here."""
        return _top(self.total) in self._nodes

    def result(self) -> Value:
        """The sum.

        Raises
        ------
        ValueError
            If summands are missing.
        """
        if not self.is_complete:
            raise ValueError(
                f"total={self.total}: the sum is not complete; nodes (level, index) here: {sorted(self._nodes)}"
            )
        return self._nodes[_top(self.total)][0]


def nodes_between(total: int, first: int, stop: int) -> list[tuple[int, int]]:
    """Levels and indices of what `TreeSum(total).nodes()` gives whoever holds the summands `first .. stop - 1`.

    So a message with their values needs no description.

    Raises
    ------
    ValueError
        If there are no such summands.
    """
    if not 0 <= first <= stop <= total:
        raise ValueError(f"first={first} and stop={stop} must be 0 <= first <= stop <= total={total}")
    holder = TreeSum(total)
    for index in range(first, stop):
        holder.add(index, 0.0)
    return [place[:2] for place in holder.nodes()]


def _count(total: int, level: int) -> int:
    """Nodes of a level."""
    return -(-total >> level)


def _top(total: int) -> tuple[int, int]:
    """Level and index of the sum."""
    return (total - 1).bit_length(), 0


def _raised(total: int, level: int, index: int) -> tuple[int, int]:
    """Where a node is found: as high as it gets without a sibling."""
    while _count(total, level) > 1 and index ^ 1 >= _count(total, level):
        level, index = level + 1, index // 2
    return level, index
