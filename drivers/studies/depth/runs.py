"""How a run of the study of training loops over depth is made."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

from torch import Tensor, nn, optim

from studies.depth.options import BATCHES
from studies.study import Settings
from xbraid_py.comm import as_communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import text
from xbraid_py.layer_parallel.ends import clip_grad_norm_
from xbraid_py.layer_parallel.rates import param_groups
from xbraid_py.layer_parallel.refine import refine_depth
from xbraid_py.multilevel.depth.cycle import DepthCycle
from xbraid_py.recipes import digits as on_digits
from xbraid_py.recipes import text as on_text
from xbraid_py.recipes.digits import Digits, DigitTraining
from xbraid_py.recipes.minibatch import MinibatchTraining
from xbraid_py.recipes.options.digits import MnistOptions
from xbraid_py.recipes.options.transformers import TextOptions
from xbraid_py.recipes.text import TextTraining

REFINEMENTS = 2  # of nested iteration: a third of the work on each level
POINTS = 4  # validations of a run


def training_of(settings: Settings, num_layers: int) -> MinibatchTraining:
    """The recipe's training, with a network of so many layers and samples without end."""
    comm, seed, work = as_communicator(None), settings["seed"], settings["work"]
    updates = math.ceil(work * settings["num_layers"] / num_layers)
    batch_size = BATCHES[settings["problem"]]
    if settings["problem"] != "text":
        data_dir = settings["data_dir"]
        options = MnistOptions(
            num_layers=num_layers,
            width=settings["width"],
            num_train=settings["num_train"],
            num_test=2000,
            data_dir=data_dir and Path(data_dir),
            batch_size=batch_size,
            epochs=updates,
            max_updates=updates,
            seed=seed,
            exact=True,
        )
        images = Digits.load(options)
        return DigitTraining(options, images, on_digits.build(options, comm), ProcessGrid(comm), comm)
    options = TextOptions(
        num_layers=num_layers,
        width=4 * settings["width"],
        heads=2,
        num_characters=20 * settings["num_train"],
        batch_size=batch_size,
        updates=updates,
        validation_batches=4,
        seed=seed,
        exact=True,
    )
    corpus = text.load(options.source, options.num_characters, seed)
    network = on_text.build(options, comm, len(corpus.characters))
    return TextTraining(options, corpus, network, ProcessGrid(comm), comm)


def train(settings: Settings) -> dict:
    """One run in memory: the value at its end, and the curve of its validations; seconds are those of the processor."""
    depth, loop, budget = settings["num_layers"], settings["loop"], settings["work"]
    levels = REFINEMENTS if loop == "nested" else 0
    training = training_of(settings, depth >> levels)
    model, clip = training.trained.model, training.options.clip
    cycle = None
    if loop not in ("plain", "nested"):
        cycle = DepthCycle(model, schedule=loop, line_search=settings["line_search"], clip=clip)
    optimizer = _optimizer(settings, cycle or model, getattr(training.options, "weight_decay", 0.0))
    rates = [group["lr"] for group in optimizer.param_groups]
    work, seconds, updates, curve = 0.0, 0.0, 0, []
    model.train()
    for inputs, targets in training.batches(0):
        start = time.process_time()
        if loop == "nested" and levels and work >= budget * (1 - levels / (REFINEMENTS + 1)):
            refine_depth(model, optimizer)
            levels -= 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share(work / budget)
        if cycle is None:
            optimizer.zero_grad()
            loss = training.loss(model(inputs), targets)
            loss.backward()
            if clip is not None:
                clip_grad_norm_(model, clip)
            optimizer.step()
            loss, work = float(loss.detach()), work + 0.5**levels
        else:
            loss = cycle.step(optimizer, partial(_loss, training, inputs, targets))
            work = cycle.work
        updates, seconds = updates + 1, seconds + time.process_time() - start
        if not math.isfinite(loss):
            raise RunError(f"update {updates}: the loss is {loss}")
        if work >= budget * (len(curve) + 1) / POINTS:
            row = training.validate()
            model.train()
            curve.append([round(work, 3), updates, round(seconds, 3), *row.values()])
        if work >= budget:
            break
    return {**row, "loss": loss, "work": work, "updates": updates, "seconds": seconds, "curve": curve}


def _loss(training: MinibatchTraining, inputs: Tensor, targets: Tensor, network: nn.Module) -> Tensor:
    return training.loss(network(inputs), targets)


def _optimizer(settings: Settings, model: nn.Module, decay: float) -> optim.Optimizer:
    rate = settings["learning_rate"]
    if settings["optimizer"] == "sgd":
        return optim.SGD(model.parameters(), rate)
    return optim.AdamW(param_groups(model, decay), rate)


def share(done: float) -> float:
    """Of the learning rate: rising over a twentieth of the work, then falling to a tenth along a cosine."""
    return min(1.0, 0.05 + 19 * done, 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
