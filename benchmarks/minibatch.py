"""Minibatch training by the lagged cycle with fewer sweeps: other starts, coarse steps that learn, looser tolerances.

    python benchmarks/minibatch.py [--quick] [--jobs conv,text,usual] [--variants ...] [--updates 200] [--seeds 2]

On one rank: sweeps and errors are the same on any number. Jobs are the networks, data and optimizers of the recipes:
`conv` MNIST (32 convolutional layers, 50 images), `text` the small transformer (32 blocks, T=2, generated text) and
`usual` the same with T=32, whose blocks are those of a usual transformer. Every variant trains a network of its own
with the same batches. Columns: medians of the fine sweeps for states + adjoints; relative error (2-norm, weights of the
stack) of the gradient against the exact one at the same weights, every 10th update, median and worst; the noise of the
minibatch at the same updates: with g the exact gradient and g_i those of P portions (5; 4 of text), the square root
of sum |g_i - g|^2 / (P (P - 1)), over |g|, which is |g_1 - g_2| / (2 |g|) for P = 2; the median of error over noise;
and by how much the mean loss of the last quarter of the updates is above the one with exact propagation. Variants:

exact    layer after layer
nudged   the same from weights that are changed by 1e-4 of their size: what losses differ by anyhow
cold     as the library does by default: from tau = 0 until the change is below 1e-2 (states) and 5e-2 (adjoints)
mean     starts from the mean over the samples of the last update's tau; mean2 the adjoints, too
channel  the coarse step has a correction a x + b d + c, with one (a, b, c) for each interval and channel, where d is
         what the coarse step adds to x; fitted to what the first relaxation of each solve has found missing
full     the same with matrices between channels
noise    GradientControl(noise=0.25, check=20)
NAME:F+A always F sweeps for the states, A for the adjoints; with `NAME:F-A` the adjoints are solved at the states
         (and graphs) of the sweep before the last one
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import mean, median

import common
import torch
from torch import Tensor, nn

from xbraid_py import LayerParallel
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import text
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.ends import clip_grad_norm_
from xbraid_py.mgrit import MGRIT, Solution, Solver
from xbraid_py.recipes import digits as digit_recipe
from xbraid_py.recipes import text as text_recipe

PORTIONS = 5  # as many as give equal ones: 16 samples make 4
UNWATCHED = GradientControl(check=0, adapt=False)
EVERY = 10
BY_NOISE = GradientControl(noise=0.25, check=20)
DECAY = 0.9  # of what fits have met, with every update
RIDGE = 1e-4


# ---- Coarse steps with a correction that is learned


class Fit:
    """A linear map for each interval from features of a coarse step to what it lacks, by weighted least squares.

    Parameters
    ----------
    kind : {"channel", "full"}
        Features of a channel alone, or of all channels.
    axis : int
        Channels, in a state (*S).
    has_constant : bool
    """

    def __init__(self, kind: str, axis: int, has_constant: bool):
        self.kind, self.axis, self.has_constant = kind, axis, has_constant
        self.grams = self.targets = self.maps = None

    def _rows(self, states: Tensor) -> Tensor:
        """States (K, *S) as (K, samples and places, C)."""
        return states.movedim(self.axis + 1, -1).flatten(1, -2)

    def _features(self, x: Tensor, added: Tensor) -> Tensor:
        """(K, rows, p), or (K, C, rows, 3)."""
        parts = [self._rows(x), self._rows(added)]
        if self.kind == "full":
            ones = [torch.ones_like(parts[0][..., :1])] * self.has_constant
            return torch.cat([*parts, *ones], -1)
        ones = [torch.ones_like(parts[0])] * self.has_constant
        return torch.stack([*parts, *ones], -1).transpose(1, 2)

    def learn(self, x: Tensor, added: Tensor, missing: Tensor) -> None:
        """From inputs (K, *S) of coarse steps, what they add, and what they lack."""
        features, target = self._features(x, added), self._rows(missing)
        if self.kind == "channel":
            target = target.transpose(1, 2)[..., None]
        size = x.square().mean().clamp_min(1e-30)  # adjoints become smaller in the course of a training
        grams, targets = features.mT @ features / size, features.mT @ target / size
        if self.grams is None:
            self.grams, self.targets = grams, targets
        else:
            self.grams = DECAY * self.grams + grams
            self.targets = DECAY * self.targets + targets
        diagonal = self.grams.diagonal(dim1=-2, dim2=-1)
        ridge = torch.diag_embed(RIDGE * diagonal.clamp_min(1e-12))
        self.maps = torch.linalg.solve(self.grams + ridge, self.targets)

    def correction(self, row: int, x: Tensor, added: Tensor) -> Tensor | float:
        """What the coarse step of an interval lacks at x (1, *S)."""
        if self.maps is None:
            return 0.0
        found = self._features(x, added) @ self.maps[row : row + 1]
        if self.kind == "channel":
            found = found[..., 0].transpose(1, 2)
        shape = x.movedim(self.axis + 1, -1).shape
        return found.view(shape).movedim(-1, self.axis + 1)


class Coarse:
    """The coarse propagator with what a fit adds to each of its steps."""

    def __init__(self, inner, fit: Fit | None):
        self.inner, self.fit = inner, fit
        self.direction, self.cost, self.transfer, self.steps = inner.direction, inner.cost, None, inner.steps
        self.met: tuple[Tensor, Tensor] | None = None

    def empty(self, num_rows: int) -> Tensor:
        return self.inner.empty(num_rows)

    def _row(self, row: int):
        steps, parts = self.inner.steps, self.inner.steps.parts
        own = slice(row * parts, (row + 1) * parts)
        found = replace(self.inner, steps=replace(steps, theta=steps.theta[own], layers=steps.layers[own]))
        return found if self.direction > 0 else replace(found, states=found.states[own])

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        if self.fit is None:
            return self.inner.relax(points, cfactor, tau, record, inputs)
        assert len(points) == 1, "two levels, one rank"
        x = points
        xs, added = self.empty(cfactor), self.empty(cfactor)
        for row in range(cfactor)[:: self.direction]:
            xs[row] = x[0]
            added[row] = (self._row(row).relax(x, 1) - x)[0]
            lacking = self.fit.correction(row, x, added[row : row + 1])
            x = x + added[row] + lacking + (0.0 if tau is None else tau[row])
        if inputs is not None:
            inputs.copy_(xs)
        self.met = xs, added
        return x


class Fine:
    """The fine propagator, which lets fits learn and records the sweep that is asked for."""

    def __init__(self, inner, fit: Fit | None, recorded: int | None):
        self.inner, self.fit, self.recorded = inner, fit, recorded
        self.direction, self.cost, self.transfer = inner.direction, inner.cost, inner.transfer
        self.sweeps = 0

    def empty(self, num_rows: int) -> Tensor:
        return self.inner.empty(num_rows)

    def coarsen(self, *how) -> Coarse:
        self.coarse = Coarse(self.inner.coarsen(*how), self.fit)
        return self.coarse

    def correct(self, before: Tensor, after: Tensor, coarse: Coarse) -> None:
        self.inner.correct(before, after, coarse.inner)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        self.sweeps += 1
        if self.recorded is not None:
            record = self.sweeps == self.recorded
        ends = self.inner.relax(points, cfactor, tau, record, inputs)
        if self.fit is not None and self.sweeps == 1:
            x, added = self.coarse.met
            self.fit.learn(x, added, ends - x - added)
        return ends


# ---- Variants


@dataclass(frozen=True)
class Variant:
    """A start, and when a solve ends: by tolerances, or after so many sweeps."""

    name: str

    @property
    def start(self) -> str:
        return self.name.split(":")[0]

    @property
    def is_exact(self) -> bool:
        return self.start in ("exact", "nudged")

    @property
    def sweeps(self) -> tuple[int, int] | None:
        _, _, given = self.name.partition(":")
        return tuple(int(each) for each in given.replace("-", "+").split("+")) if given else None

    @property
    def is_behind(self) -> bool:
        """Whether adjoints are solved at the states of the sweep before the last one."""
        return "-" in self.name


class Start:
    """Solves as a variant does; takes the place of the solvers of one direction."""

    def __init__(self, solver: Solver, variant: Variant, direction: str, axis: int):
        self.solver, self.variant, self.direction = solver, variant, direction
        forward = direction == "forward"
        learns = variant.start in ("channel", "full")
        self.fit = Fit(variant.start, axis, forward) if learns else None
        self.means: tuple[Tensor, ...] | None = None
        self.keeps_mean = variant.start == "mean2" or (variant.start == "mean" and forward)
        options = solver.options
        if variant.sweeps:
            options = replace(options, max_iter=variant.sweeps[not forward], tol=0.0)
        self.options = options

    def solve(self, propagator, start) -> Solution:
        options = self.options
        behind = self.variant.is_behind and self.direction == "forward"
        propagator = Fine(propagator, self.fit, options.iterations - 1 if behind else None)
        warm = None
        if self.means is not None:
            warm = tuple(each.expand(-1, *propagator.empty(0).shape[1:]).clone() for each in self.means)
        solution = Solver(options, self.solver.hierarchy, self.solver.comm).solve(propagator, start, warm)
        if self.keeps_mean:
            self.means = tuple(tau.mean(1, keepdim=True) for tau in solution.warm)
        return solution


# ---- Jobs


class Job:
    """One of the recipes: its network, its batches and its optimizer."""

    axis, clip = 1, None  # of the channels, in a state

    def __init__(self, seed: int, updates: int):
        self.seed, self.updates = seed, updates

    def model(self, exact: bool, accuracy: GradientControl = UNWATCHED) -> nn.Sequential:
        """The network; exact, or by MGRIT."""
        options = replace(self.options, exact=exact, accuracy=accuracy)
        return self.build(options).train()


class Conv(Job):
    """MNIST with convolutions, 7 x 7 pixels of 16 channels."""

    def __init__(self, seed: int, updates: int):
        super().__init__(seed, updates)
        self.options = digit_recipe.MnistOptions(seed=seed, mgrit=MGRIT(), max_updates=updates, num_test=10)
        self.digits = digit_recipe.Digits.load(self.options)

    def build(self, options):
        return digit_recipe.build(options, SerialCommunicator())

    def training(self, model):
        comm = SerialCommunicator()
        return digit_recipe.DigitTraining(self.options, self.digits, model, None, comm)


class Text(Job):
    """Characters of a generated text, 32 features."""

    axis, T = 2, 2.0

    def __init__(self, seed: int, updates: int):
        super().__init__(seed, updates)
        self.options = text_recipe.TextOptions(
            source="generated", seed=seed, T=self.T, updates=updates, mgrit=MGRIT(), num_characters=100_000
        )
        self.clip = self.options.clip
        self.corpus = text.load("generated", 100_000, seed)

    def build(self, options):
        return text_recipe.build(options, SerialCommunicator(), len(self.corpus.characters))

    def training(self, model):
        return text_recipe.TextTraining(self.options, self.corpus, model, None, SerialCommunicator())


class Usual(Text):
    """The same with steps of size 1."""

    T = 32.0


JOBS = {"conv": Conv, "text": Text, "usual": Usual}


# ---- What is measured


def stack_of(model: nn.Module) -> LayerParallel:
    """The stack of a network."""
    return next(each for each in model if isinstance(each, LayerParallel))


def stack_gradient(model: nn.Module) -> Tensor:
    """Of all weights of the stack, as one vector."""
    return torch.cat([weight.grad.flatten() for weight in stack_of(model).parameters()])


def exact_gradients(twin: nn.Module, loss, batch) -> tuple[Tensor, float]:
    """The gradient of a batch, and its relative noise."""
    found = []
    for inputs, targets in zip(*(each.chunk(PORTIONS) for each in batch), strict=True):
        twin.zero_grad()
        (loss(twin(inputs), targets) * (len(inputs) / len(batch[0]))).backward()
        found.append(stack_gradient(twin))
    gradient, count = sum(found), len(found)
    squares = sum(float((count * each - gradient).square().sum()) for each in found)
    return gradient, (squares / (count * (count - 1))) ** 0.5 / float(gradient.norm())


@dataclass
class Outcome:
    """What a training did: losses, sweeps of all updates; errors and noises of some."""

    losses: list[float] = field(default_factory=list)
    sweeps: list[tuple[int, int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)

    @property
    def last_quarter(self) -> float:
        return mean(self.losses[-len(self.losses) // 4 :])


def train(job: Job, variant: Variant) -> Outcome:
    """All updates."""
    torch.manual_seed(job.seed)
    by_noise = variant.start == "noise"
    model = job.model(variant.is_exact, BY_NOISE if by_noise else UNWATCHED)
    twin, solvers = job.model(True), stack_of(model).windows[0].solvers
    if variant.start == "nudged":
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.0 + 1e-4 * torch.randn_like(weight))
    if not (variant.is_exact or by_noise):
        forward, adjoint = (
            Start(made(0), variant, direction, job.axis)
            for made, direction in ((solvers.forward_at, "forward"), (solvers.adjoint_at, "adjoint"))
        )
        solvers.forward_at, solvers.adjoint_at = lambda level: forward, lambda level: adjoint
    training = job.training(model)
    optimizer, scheduler = training.trained.optimizer, training.trained.scheduler
    outcome = Outcome()
    batches: Iterator = itertools.islice(training.batches(0), job.updates)
    for number, (inputs, targets) in enumerate(batches):
        optimizer.zero_grad()
        value = training.loss(model(inputs), targets)
        value.backward()
        outcome.losses.append(float(value.detach()))
        record = stack_of(model).record
        outcome.sweeps.append((record.iterations, record.adjoint_iterations))
        # Not an update in which the library uses the exact gradient.
        if number % EVERY == EVERY - 1:
            twin.load_state_dict(model.state_dict())
            exact, noise = exact_gradients(twin, training.loss, (inputs, targets))
            outcome.errors.append(float((stack_gradient(model) - exact).norm() / exact.norm()))
            outcome.noises.append(noise)
        if job.clip is not None:
            clip_grad_norm_(model, job.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return outcome


def table(name: str, variants: list[Variant], seeds: int, updates: int) -> dict[str, float]:
    """Print a row for each variant; the figures."""
    print(f"\n{name}, {updates} updates, seeds 0 to {seeds - 1}")
    print(f"{'':14s}{'sweeps':>9s}{'error':>9s}{'worst':>9s}{'noise':>8s}{'error/noise':>13s}  loss against exact, %")
    exact: list[Outcome] = []
    figures = {}
    for variant in variants:
        runs = [train(JOBS[name](seed, updates), variant) for seed in range(seeds)]
        exact = exact or runs
        sweeps = [median(each[k] for run in runs for each in run.sweeps) for k in (0, 1)]
        errors = [each for run in runs for each in run.errors]
        noise = median(each for run in runs for each in run.noises)
        above = [100 * (run.last_quarter / other.last_quarter - 1) for run, other in zip(runs, exact, strict=True)]
        words = " ".join(f"{each:+.2f}" for each in above)
        how = "{:g} + {:g}".format(*sweeps) if not variant.is_exact else ""
        share = median(e / n for run in runs for e, n in zip(run.errors, run.noises, strict=True))
        print(
            f"{variant.name:14s}{how:>9s}{median(errors):9.1e}{max(errors):9.1e}{noise:8.2f}{share:13.4f}  {words}",
            flush=True,
        )
        key = f"{name}_{variant.name}".replace(":", "_").replace("+", "_").replace("-", "_behind_")
        figures |= {f"{key}_error": median(errors), f"{key}_sweeps": sum(sweeps), f"{key}_loss": max(above, key=abs)}
    return figures


DEFAULT = "exact,nudged,noise,cold,mean,mean2,channel,full,cold:2+2,full:2+2,cold:1+1,mean:1+1,full:1+1,cold:2-2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 updates")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--variants", default=DEFAULT, help="the first one is what losses are compared with")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    updates = arguments.updates or (40 if arguments.quick else 200)
    seeds = arguments.seeds or (1 if arguments.quick else 2)
    variants = [Variant(each) for each in arguments.variants.split(",")]
    figures: dict[str, float] = {}
    for name in arguments.jobs.split(","):
        figures |= table(name, variants, seeds, updates)
    print()
    common.finish("minibatch", figures)


if __name__ == "__main__":
    main()
