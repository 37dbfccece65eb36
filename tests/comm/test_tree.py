"""Sums in one fixed tree: the same bits whoever holds which summands."""

from __future__ import annotations

import itertools

import pytest
import torch

from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum, nodes_between

TOTALS = range(1, 18)


def summands(total: int) -> list[torch.Tensor]:
    """Of very different sizes: another order of summation is another result."""
    generator = torch.Generator().manual_seed(total)
    size = 10.0 ** torch.randint(-4, 5, (total, 7), generator=generator)
    return list(torch.randn((total, 7), generator=generator) * size)


def literal(values: list) -> object:
    """Level by level; a node without a sibling goes up as it is."""
    while len(values) > 1:
        values = [values[k] + values[k + 1] if k + 1 < len(values) else values[k] for k in range(0, len(values), 2)]
    return values[0]


def splits(total: int, holders: int):
    """All ways of dealing out consecutive summands; a holder may have none."""
    for inner in itertools.combinations_with_replacement(range(total + 1), holders - 1):
        yield Partition((0, *inner, total))


@pytest.mark.parametrize("total", TOTALS)
def test_the_tree_is_the_literal_one(total):
    tree, values = TreeSum(total), summands(total)
    kept = [value.clone() for value in values]
    for index, value in enumerate(values):
        assert not tree.is_complete
        tree.add(index, value)
    assert tree.is_complete and tree.result().equal(literal(kept))
    assert all(value.equal(before) for value, before in zip(values, kept, strict=True))


@pytest.mark.parametrize("holders", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("total", TOTALS)
def test_any_split_gives_the_same_bits(total, holders):
    values = summands(total)
    expected = literal(values)
    # All of them where there are few; else some, by a stride that hits all parities.
    every = list(splits(total, holders))
    for partition in every[:: max(1, len(every) // 60)]:
        completed = TreeSum(total)
        for holder in range(holders):
            own = TreeSum(total)
            for index in range(partition.bounds[holder], partition.bounds[holder + 1]):
                own.add(index, values[index].clone(), take=index % 2 == 0)
            places = nodes_between(total, *partition.bounds[holder : holder + 2])
            assert places == [node[:2] for node in own.nodes()]
            assert len(places) <= 2 * total.bit_length()
            for level, index, value in own.nodes():
                completed.add(index, value, level)
        assert completed.result().equal(expected)


@pytest.mark.parametrize("total", TOTALS)
def test_summands_may_come_backwards(total):
    tree, values = TreeSum(total), summands(total)
    for index in reversed(range(total)):
        tree.add(index, values[index])
    assert tree.result().equal(literal(values))


def test_buffers_that_are_handed_over_are_used():
    tree, values = TreeSum(8), summands(8)
    places = {value.data_ptr() for value in values}
    for index, value in enumerate(values):
        tree.add(index, value, take=True)
    assert tree.result().data_ptr() in places


def test_few_sums_are_held():
    tree = TreeSum(17)
    for index, value in enumerate(summands(17)):
        tree.add(index, value)
        assert len(tree.nodes()) <= 5


def test_numbers_are_summed():
    tree = TreeSum(3)
    for index, value in enumerate((0.1, 0.2, 0.3)):
        tree.add(index, value)
    assert tree.result() == (0.1 + 0.2) + 0.3


def test_what_is_none_of_the_tree_is_refused():
    with pytest.raises(ValueError, match=r"^total=0 must be at least 1; use 1"):
        TreeSum(0)
    tree = TreeSum(3)
    with pytest.raises(ValueError, match=r"^index=3 is outside 0 \.\. 2 on level=0 of total=3"):
        tree.add(3, 1.0)
    with pytest.raises(ValueError, match=r"^index=2 is outside 0 \.\. 1 on level=1 of total=3"):
        tree.add(2, 1.0, 1)
    tree.add(0, 1.0)
    with pytest.raises(ValueError, match="index=0 on level=0 of total=3 has been added before"):
        tree.add(0, 1.0)
    with pytest.raises(ValueError, match=r"^total=3: the sum is not complete; nodes .* here: \[\(0, 0\)\]"):
        tree.result()
    with pytest.raises(ValueError, match="^first=2 and stop=4 must be"):
        nodes_between(3, 2, 4)
