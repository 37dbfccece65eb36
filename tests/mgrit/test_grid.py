"""Grids and partitions: every integer against a literal count."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.comm.partition import Partition, require_multiple
from xbraid_py.mgrit.grid import LayerGrid

partitions = st.lists(st.integers(0, 9), min_size=1, max_size=8).map(
    lambda counts: Partition(tuple(sum(counts[:r]) for r in range(len(counts) + 1)))
)


def owners(partition: Partition) -> list[int]:
    """Owner of every row, written out."""
    return [rank for rank, count in enumerate(partition.counts) for _ in range(count)]


def test_step_and_refinement():
    grid = LayerGrid(num_layers=64, T=5.0)
    assert grid.h == 5.0 / 64
    assert grid.refine(2) == LayerGrid(128, 5.0)
    assert grid.coarsen(4) == LayerGrid(16, 5.0)
    assert grid.coarsen(4).h == 4 * grid.h


@given(st.integers(1, 500), st.integers(1, 20))
def test_coarsening_undoes_refinement(num_layers, factor):
    grid = LayerGrid(num_layers, 1.0)
    assert grid.refine(factor).coarsen(factor) == grid


@pytest.mark.parametrize(
    ("num_layers", "T", "message"),
    [
        (0, 5.0, "num_layers=0 must be at least 1; use 64"),
        (-4, 5.0, "num_layers=-4 must be at least 1; use 64"),
        (4, 0.0, "T=0.0 must be positive and finite; use 5.0"),
        (4, -1.0, "T=-1.0 must be positive"),
        (4, float("inf"), "T=inf must be positive and finite"),
        (4, float("nan"), "T=nan must be positive and finite"),
    ],
)
def test_bad_grids_name_what_works(num_layers, T, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerGrid(num_layers, T)


def test_what_does_not_divide_names_both_neighbors():
    with pytest.raises(ValueError, match=r"^num_layers=32 is not a multiple of cfactor=3; use 30 or 33$"):
        LayerGrid(32, 1.0).coarsen(3)
    with pytest.raises(ValueError, match=r"^num_layers=2 is not a multiple of cfactor=3; use 3$"):
        LayerGrid(2, 1.0).coarsen(3)
    with pytest.raises(ValueError, match=r"^num_rows=5 is not a multiple of factor=2; use 4 or 6$"):
        Partition((0, 2, 5)).coarsen(2)


@given(st.integers(1, 1000), st.integers(1, 50))
def test_named_values_work(value, factor):
    try:
        require_multiple("value", value, factor, "factor")
        assert value % factor == 0
    except ValueError as error:
        named = [int(number) for number in re.findall(r"\d+", str(error).split("use")[1])]
        assert named and value not in named
        assert all(number > 0 and number % factor == 0 and abs(number - value) < factor for number in named)


@given(st.integers(0, 300), st.integers(1, 40))
def test_balanced_blocks(num_rows, num_ranks):
    partition = Partition.balanced(num_rows, num_ranks)
    assert (partition.num_rows, partition.num_ranks) == (num_rows, num_ranks)
    assert sum(partition.counts) == num_rows
    assert max(partition.counts) - min(partition.counts) <= 1
    assert list(partition.counts) == sorted(partition.counts, reverse=True)
    assert partition.ranks_in_use == min(num_rows, num_ranks)


@given(partitions)
def test_owners_and_counts_agree(partition):
    expected = owners(partition)
    assert [partition.owner(row) for row in range(partition.num_rows)] == expected
    assert partition.counts == tuple(partition.count(rank) for rank in range(partition.num_ranks))
    assert partition.ranks_in_use == len(set(expected))
    for rank in set(expected):
        assert partition.first(rank) == expected.index(rank)


@given(partitions)
def test_rows_outside_have_no_owner(partition):
    for row in (-1, partition.num_rows):
        with pytest.raises(ValueError, match=f"row={row} is outside"):
            partition.owner(row)


@given(partitions)
def test_neighbors_skip_ranks_without_rows(partition):
    in_use = [rank for rank, count in enumerate(partition.counts) if count]
    for before, behind in zip(in_use, in_use[1:], strict=False):
        assert partition.neighbor(before, +1) == behind
        assert partition.neighbor(behind, -1) == before
    if in_use:
        assert partition.neighbor(in_use[0], -1) is None
        assert partition.neighbor(in_use[-1], +1) is None


@given(partitions, st.integers(1, 6))
def test_refined_rows_keep_their_owner(partition, factor):
    fine = partition.refine(factor)
    assert owners(fine) == [rank for rank in owners(partition) for _ in range(factor)]
    assert fine.coarsen(factor) == partition


@given(partitions, st.integers(1, 6))
def test_a_coarse_row_belongs_to_the_owner_of_its_first_row(partition, factor):
    if partition.num_rows % factor:
        with pytest.raises(ValueError, match="is not a multiple"):
            partition.coarsen(factor)
    else:
        assert owners(partition.coarsen(factor)) == owners(partition)[::factor]


@given(partitions, st.data())
def test_overlaps_are_runs_of_equal_owners(partition, data):
    rows = partition.num_rows
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=6).map(sorted))
    other = Partition((0, *cuts, rows))
    for rank in range(partition.num_ranks):
        local = owners(other)[partition.first(rank) : partition.first(rank) + partition.count(rank)]
        found = partition.overlaps(rank, other)
        assert [peer for peer, part in found for _ in range(part.start, part.stop)] == local
        assert [peer for peer, _ in found] == sorted({peer for peer, _ in found})
        assert all(part.start < part.stop for _, part in found)


@pytest.mark.parametrize("bounds", [(), (0,), (1, 2), (0, 3, 2), (0, -1)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match=r"^bounds=.* must rise from 0, .*use \(0, 4, 8\)$"):
        Partition(bounds)


def test_100000_ranks():
    ranks = 100_000
    partition = Partition.balanced(3 * ranks + 7, ranks)
    assert partition.counts[:7] == (4,) * 7 and set(partition.counts[7:]) == {3}
    assert partition.owner(partition.num_rows - 1) == ranks - 1
    assert partition.neighbor(ranks // 2, -1) == ranks // 2 - 1
    assert partition.neighbor(ranks - 1, +1) is None
    few = Partition.balanced(10, ranks)
    assert few.ranks_in_use == 10 and few.neighbor(9, +1) is None
    # A rank meets only the few ranks that hold its rows, and finds them without a walk over all.
    assert few.refine(4).overlaps(9, Partition.balanced(40, ranks)) == [(36 + i, slice(i, i + 1)) for i in range(4)]
    assert partition.refine(2).coarsen(2) == partition
