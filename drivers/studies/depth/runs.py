"""The study of training loops over depth: its options, its runs, how learning rates are chosen, how a run is made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from torch import Tensor, nn, optim

from studies.study import Parts, Result, Settings, StudyOptions, key
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
from xbraid_py.recipes.digits import Digits, DigitTraining, MnistOptions
from xbraid_py.recipes.minibatch import MinibatchTraining
from xbraid_py.recipes.text import TextOptions, TextTraining

TUNING = 100  # the seed that learning rates are chosen on
PROBLEMS = ("digits", "batches", "text")
BATCHES = {"digits": 50, "batches": 250, "text": 8}
REFINEMENTS = 2  # of nested iteration: a third of the work on each level
POINTS = 4  # validations of a run
# What a minibatch is used for: an update of all layers, or of as many as there are so far, or a V-cycle with this
# schedule; and whether it has a line search.
LOOPS = (
    ("plain", False),
    ("nested", False),
    ("[(1), 1, {2}]", False),
    ("[(1), 1, {2}]", True),
)
RATES = {
    ("digits", "adam"): (3e-3, 1e-2, 3e-2),
    ("digits", "sgd"): (0.1, 0.3, 1.0),
    ("batches", "sgd"): (0.1, 0.3, 1.0),
    ("text", "adam"): (3e-3, 1e-2, 3e-2),
    ("text", "sgd"): (0.3, 1.0, 3.0),
}
# The value of a validation, and whether more of it is better.
VALUES = {"digits": ("val_accuracy", True), "batches": ("val_accuracy", True), "text": ("val_loss", False)}


@dataclass(frozen=True, kw_only=True)
class DepthStudyOptions(StudyOptions):
    """The study.

    Parameters
    ----------
    problems
        Digits of MNIST by convolutional layers, text of Python's manual by a transformer; batches are the digits on
        minibatches five times as large, by gradient descent alone.
    optimizers
        Of all loops: adam, which is AdamW, and sgd, plain gradient descent as in the paper.
    work
        Work units of a run, one being a gradient of all layers; for all loops alike.
    num_layers
        Of the deepest networks; a multiple of 4.
    width
        Channels of the convolutions; a quarter of the features of the transformer.
    num_train
        Images, and twenty times as many characters.
    data_dir
        Folder of the files of MNIST.
    """

    out: Path = Path("runs/depth_study")
    workers: int = 1
    problems: tuple[str, ...] = PROBLEMS
    optimizers: tuple[str, ...] = ("adam", "sgd")
    work: float = 240.0
    num_layers: int = 16
    width: int = 8
    num_train: int = 10_000
    data_dir: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        for problem in self.problems:
            if problem not in PROBLEMS:
                raise ValueError(f"problems={problem} is none of {', '.join(PROBLEMS)}; use digits")
        for name in self.optimizers:
            if name not in ("adam", "sgd"):
                raise ValueError(f"optimizers={name} is neither adam nor sgd; use adam")
        if not 10.0 <= self.work < float("inf"):
            raise ValueError(f"work={self.work} must be at least 10 and finite; use 240")
        if self.num_layers < 4 or self.num_layers % 4:
            raise ValueError(f"num_layers={self.num_layers} must be a multiple of 4, from 4 on; use 16")
        if self.width < 1 or self.num_train < 100:
            raise ValueError(
                f"width={self.width} and num_train={self.num_train} must be at least 1 and 100; use 8, 10000"
            )

    def cases(self) -> Iterator[Settings]:
        """What is compared, on each problem."""
        common = {name: getattr(self, name) for name in ("work", "num_layers", "width", "num_train")}
        common["data_dir"] = self.data_dir and str(self.data_dir)
        for problem, optimizer, (loop, search) in product(self.problems, self.optimizers, LOOPS):
            if (problem, optimizer) in RATES:
                yield {**common, "problem": problem, "optimizer": optimizer, "loop": loop, "line_search": search}

    def tuning(self, rows: Mapping[str, Result]) -> Parts:
        """Every case with every rate, on a seed of its own, for a third of the work."""
        return {"tuning": [each for case in self.cases() for each in _with_rates(case)]}

    def compared(self, rows: Mapping[str, Result]) -> Parts:
        """Every case with the best rate, on all seeds."""
        found = []
        for seed, case in product(range(self.seeds), self.cases()):
            best = max((rows[key(each)] for each in _with_rates(case)), key=merit)
            found.append({**case, "learning_rate": best["settings"]["learning_rate"], "seed": seed})
        return {"compared": found}


def _with_rates(case: Settings) -> list[Settings]:
    rates = RATES[case["problem"], case["optimizer"]]
    return [{**case, "work": case["work"] / 3, "learning_rate": rate, "seed": TUNING} for rate in rates]


def merit(row: Result) -> float:
    """How good a run ends: the greater the better; failed ones are worst."""
    name, is_more = VALUES[row["settings"]["problem"]]
    value = row["result"][name] if "result" in row else math.nan
    return -math.inf if math.isnan(value) else value if is_more else -value


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
