"""Lesions of trained residual networks (paper 003, section 3.3), and the norms of their states and residual modules.

A lesion leaves blocks of a trained network out, or changes their order, and looks at the test images again. The first
block of a stage that has another shape than the others, a transition, keeps its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies.lesion.options import Lesions
from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.image_resnet import ImageResNet, residual_norms, with_blocks
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.recipes.images import training_of
from xbraid_py.recipes.options.images import KIND, ImageRunOptions
from xbraid_py.run.engine import state_of
from xbraid_py.run.folder import CHECKPOINTS
from xbraid_py.run.options import from_dict
from xbraid_py.run.signals import Stopped, stop_agreed
from xbraid_py.run.store.read import CheckpointError, load, newest_good, no_state, restoring, verify

ROWS, PAGE = "lesion.jsonl", "lesion.md"
# Images whose norms are taken together: the same on any number of ranks.
_PORTION = 500
Order = list[list[int]]


@dataclass(frozen=True)
class Trained:
    """A trained network in its checkpoint.

    Attributes
    ----------
    path : Path
        The checkpoint.
    options : ImageRunOptions
        How it was trained: a run of one model and one seed.
    epoch : int
        To which its training had come.
    """

    path: Path
    options: ImageRunOptions
    epoch: int


def read_trained(path: str | os.PathLike, **here: Any) -> Trained:
    """Read what a checkpoint of a run on images is of, at any of its epochs; no message.

    Parameters
    ----------
    path : path-like
    **here
        Options that are not those of the training when it is looked at: device, test_images, data_dir.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or no checkpoint of such a run.
    """
    path = Path(path)
    verify(path)
    with load(path) as checkpoint, restoring(path):
        meta = state_of(checkpoint)
        if meta["run"] != KIND:
            raise no_state(path, f"its run is {meta['run']!r}, not {KIND}")
        return Trained(path, replace(from_dict(ImageRunOptions, meta["configuration"]), **here), meta["update"])


def read_newest(trainings: Sequence[ImageRunOptions], **here: Any) -> list[Trained]:
    """The same of the newest good checkpoint of each of some trainings."""
    return [read_trained(newest_good(one.out / CHECKPOINTS), **here) for one in trainings]


def transitions(network: ImageResNet) -> list[bool]:
    """Of each block, in their order, whether it is a transition."""
    return [block.is_transition for stage in network.stages for block in stage]


def places(network: ImageResNet) -> list[tuple[int, int]]:
    """Stage and number in the stage of each block, in their order, from 0."""
    return [(s, j) for s, count in enumerate(network.blocks) for j in range(count)]


def without(network: ImageResNet, gone: Sequence[tuple[int, int]]) -> Order:
    """The order of all blocks but those at `gone`, see `with_blocks`."""
    return [[j for j in range(count) if (s, j) not in gone] for s, count in enumerate(network.blocks)]


def random_removals(network: ImageResNet, random: torch.Generator) -> Iterator[tuple[int, Order]]:
    """Yield 1, 2, 4, ... and an order with so many blocks left out at random, transitions never.

    What is left out once stays out, so that the orders of one draw differ in the number alone.
    """
    chosen = [place for place, is_fixed in zip(places(network), transitions(network), strict=True) if not is_fixed]
    chosen = [chosen[k] for k in torch.randperm(len(chosen), generator=random)]
    count = 1
    while count <= len(chosen):
        yield count, without(network, chosen[:count])
        count *= 2


def shuffled(network: ImageResNet, random: torch.Generator) -> Order:
    """All blocks in a random order within their stages, transitions first; not the usual one if there is another."""
    usual = without(network, ())
    fixed = [int(stage[0].is_transition) for stage in network.stages]
    while True:
        found = []
        for order, first in zip(usual, fixed, strict=True):
            moved = torch.randperm(len(order) - first, generator=random).tolist()
            found.append(order[:first] + [first + k for k in moved])
        if found != usual or all(len(order) - first < 2 for order, first in zip(usual, fixed, strict=True)):
            return found


def mean_norms(training: ResNetTraining) -> Tensor:
    """Norms of states and residual modules over the test images, those shared by the ranks; collective.

    Returns
    -------
    (blocks, 2) tensor, float64
        Means over the images of the L2 norms of Y_j and of h F(Y_j), see `residual_norms`.
    """
    pixels, labels = training.test
    ranks, rank = (training.grid.replicas, training.grid.replica) if training.grid else (1, 0)
    portions = Partition.balanced(-(-len(labels) // _PORTION), ranks)
    rows = torch.zeros(portions.count(rank), 2 * sum(training.network.blocks), dtype=torch.float64)
    for row in range(len(rows)):
        first = (portions.first(rank) + row) * _PORTION
        some = pixels[first : first + _PORTION]
        found = residual_norms(training.network, training.pipeline.standardize(some, training.dtype))
        pairs = [(each.input, each.residual) for each in found]
        rows[row] = len(some) * torch.tensor(pairs, dtype=torch.float64).flatten()
    if training.grid:
        total = training.grid.data.ordered_sum(rows, [portions.count(each) for each in range(ranks)])
    else:
        total = rows.cumsum(0)[-1]
    return (total / len(labels)).view(-1, 2)


def measure(training: ResNetTraining, lesions: Lesions) -> dict[str, Any]:
    """Look at the network of a training, and at lesions of it, on its test images in evaluation mode; collective.

    Returns
    -------
    dict
        "accuracy" of the whole network; "norms", [stage, block, norm of Y_j, norm of h F(Y_j)] of each block; and
        accuracies "left_out", without each of the blocks; "random", by the number (a word) of blocks left out, one for
        each draw; and "shuffled", one for each draw. All the same on all ranks.
    """
    network = training.network

    def accuracy(order: Order) -> float:
        training.network = with_blocks(network, order)
        try:
            return _rounded(1.0 - training.evaluate()[1])
        finally:
            training.network = network

    random: dict[str, list[float]] = {}
    for draw in range(lesions.draws):
        for count, order in random_removals(network, lesions.random(draw)):
            random.setdefault(str(count), []).append(accuracy(order))
    norms = [[_rounded(value) for value in pair] for pair in mean_norms(training).tolist()]
    return {
        "accuracy": accuracy(without(network, ())),
        "norms": [[*place, *pair] for place, pair in zip(places(network), norms, strict=True)],
        "left_out": [accuracy(without(network, [place])) for place in places(network)],
        "random": random,
        "shuffled": [accuracy(shuffled(network, lesions.random(draw))) for draw in range(lesions.draws)],
    }


def measured(trained: Trained, lesions: Lesions, comm: Communicator) -> dict[str, Any]:
    """The row of a network for tables and pictures, "settings" and "result" (see `measure`); collective.

    Raises
    ------
    RunError
        On all ranks, if the checkpoint holds another network than it says.
    """
    options = trained.options
    (model,), (seed,) = options.models, options.seeds
    samples = options.samples()
    training = training_of(options, model, seed, samples, ProcessGrid(comm, comm.size)).method
    try:
        with load(trained.path) as checkpoint, restoring(trained.path):
            training.load(checkpoint)
    except CheckpointError as error:  # on all ranks alike
        raise RunError(str(error)) from error
    settings = {
        "data": options.data,
        "model": model,
        "blocks": list(training.network.blocks),
        "filters": list(options.channels),
        "step_size": training.network.step_size,
        "norm": options.norm,
        "seed": seed,
        "epoch": trained.epoch,
        "checkpoint": str(trained.path),
        "test_images": samples.test.num_samples,
    }
    return {"settings": settings, "result": measure(training, lesions)}


def measure_all(networks: Sequence[Trained], lesions: Lesions, comm: Communicator) -> list[dict[str, Any]]:
    """The rows of all networks, see `measured`; collective.

    Raises
    ------
    RunError
        On all ranks, if a checkpoint holds another network than it says.
    Stopped
        On all ranks, if a signal has asked for it.
    """
    rows = []
    for trained in networks:
        if stop_agreed(comm):
            raise Stopped(f"stopped after {len(rows)} measured networks; start again to go on")
        if comm.rank == 0:
            print(f"lesions of {trained.path}", flush=True)
        rows.append(measured(trained, lesions, comm))
    return rows


def write_lesions(rows: Sequence[dict[str, Any]], out: Path, comm: Communicator) -> None:
    """Write `lesion.jsonl`, `lesion.md` and the pictures, and print the tables; collective.

    Raises
    ------
    RunError
        On all ranks, if a file cannot be written.
    """
    problem = None
    if comm.rank == 0:
        # matplotlib takes its time to load: on one rank only
        from studies.lesion import figures as lesion_figures
        from studies.lesion import tables as lesion_tables

        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            text = lesion_tables.page(rows)
            (out / PAGE).write_text(text, encoding="utf-8")
            lesion_figures.write(rows, out)
        except OSError as error:
            problem = f"the tables in {out} could not be written: {error}; make room, or give another --out"
        else:
            print(text, flush=True)
    problem = comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def _rounded(value: float) -> float:
    """Six digits are more than any table shows."""
    return float(f"{value:.6g}")
