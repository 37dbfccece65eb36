"""The plan by rule: the same simulation with constants that are written down, so that all machines find one plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xbraid_py.mgrit import MGRIT
from xbraid_py.planner.machine import Costs, Link, Machine, SolveCosts, StepCost
from xbraid_py.planner.plan import SERIAL, Plan, count, figure
from xbraid_py.planner.predict import MIN_COARSE, Planner, Prediction, rounded

# An exact plan is taken unless an inexact one is faster by more than this.
_EXACT_MARGIN = 0.10
# Portions of each replica, where there are more replicas than portions by rule.
_MORE_PORTIONS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer costs: so much for itself, and so much for each sample.

    Parameters
    ----------
    state, adjoint
        Seconds of a step with a sample; that of the adjoint gives the gradient of the weights as well.
    state_fixed, adjoint_fixed
        Seconds of a step, however many samples.
    state_bytes
        Of the state of a sample.
    num_weights
        Of a layer.
    itemsize
        Bytes of a number.
    at_once
        Samples that are computed together: of fewer none is cheaper.
    is_module
        Whether it is a torch module: a graph is kept from the forward pass, replicas average gradients.
    sweeps, adjoint_sweeps
        Fine sweeps that a solve by the lagged cycle takes; modules start cold with every batch.
    """

    state: float
    adjoint: float
    state_fixed: float
    adjoint_fixed: float
    state_bytes: int
    num_weights: int
    itemsize: int = 8
    at_once: int = 1
    is_module: bool = False
    sweeps: int = 1
    adjoint_sweeps: int = 1


# A convolution of 8 channels on 28x28 pixels, and a decoder layer of width 64 with 64 tokens, in float32.
CONVOLUTION = Layer(
    state=25e-6,
    adjoint=75e-6,
    state_fixed=50e-6,
    adjoint_fixed=100e-6,
    state_bytes=8 * 28 * 28 * 4,
    num_weights=584,
    itemsize=4,
    is_module=True,
    sweeps=4,
    adjoint_sweeps=3,
)
TRANSFORMER = Layer(
    state=150e-6,
    adjoint=350e-6,
    state_fixed=150e-6,
    adjoint_fixed=400e-6,
    state_bytes=64 * 64 * 4,
    num_weights=49984,
    itemsize=4,
    is_module=True,
    sweeps=7,
    adjoint_sweeps=5,
)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """A core of a current workstation and a current cluster, in round numbers of seconds.

    Dense layers of width C take `state` of the sums below with a sample, their adjoints `adjoint` times that.

    Parameters
    ----------
    product
        For each weight of a layer's matrix: C * C of them.
    channel
        For each channel.
    adjoint
        Adjoint step with gradient, over the state step.
    state_fixed, adjoint_fixed
        A layer, however many samples.
    call
        A call of the solver, however many layers.
    coarse, correct
        A coarse step of two parts, over a fine step; the same with the gradient, by which the lagged cycle corrects.
    opening, closing
        The first and the last layer, with the loss, or their adjoints: for a portion.
    ends_sample
        The same for each sample and channel.
    states_once, adjoints_once
        An evaluation, or a gradient, besides.
    memory
        Bytes/s at which states are added to each other.
    layer, coarsen
        For each layer: regularization; weights of the next coarser level.
    optimizer, weight
        A direction of the optimizer, and what each weight adds to it.
    latency, bandwidth, stage, overhead
        Messages: seconds of an empty one, bytes/s, seconds of a stage of a collective, seconds that a rank is busy with
        each of many messages.
    cores
        Of a node.
    """

    product: float = 5e-11
    channel: float = 1e-10
    adjoint: float = 2.5
    state_fixed: float = 1e-7
    adjoint_fixed: float = 4e-7
    call: float = 15e-6
    coarse: float = 2.2
    correct: float = 2.6
    opening: float = 2e-5
    closing: float = 5e-5
    ends_sample: float = 4e-9
    states_once: float = 2e-4
    adjoints_once: float = 1e-4
    memory: float = 1.2e10
    layer: float = 1e-7
    coarsen: float = 1.5e-6
    optimizer: float = 2e-4
    weight: float = 3e-8
    latency: float = 5e-6
    bandwidth: float = 1e10
    stage: float = 5e-6
    overhead: float = 1e-5
    cores: int = 32

    def dense(self, width: int, itemsize: int = 8) -> Layer:
        """A dense layer with native kernels, which take eight samples at once."""
        state = self.product * width * width + self.channel * width
        fixed = (self.state_fixed, self.adjoint_fixed)
        sizes = (width * itemsize, width * (width + 1), itemsize)
        return Layer(
            state=state,
            adjoint=self.adjoint * state,
            state_fixed=fixed[0],
            adjoint_fixed=fixed[1],
            state_bytes=sizes[0],
            num_weights=sizes[1],
            itemsize=sizes[2],
            at_once=8,
        )

    def machine(self, cores: int | None = None) -> Machine:
        """Nodes of so many cores, with a rank on each; messages within and between them cost the same."""
        link = Link(self.latency, self.bandwidth, self.stage, "by rule", self.overhead)
        return Machine(cores or self.cores, cores or self.cores, link, link)

    def costs(self, layer: Layer, samples: int) -> Costs:
        """What layers cost for so many samples, and for any smaller number."""
        few = min(layer.at_once, samples)
        other = () if few == samples else (self._costs(layer, few, few),)
        return self._costs(layer, samples, max(few, samples), other)

    def planner(self, layer: Layer, samples: int, pairs: int = 10, cores: int | None = None) -> Planner:
        """Predictions from these constants; without looking at the machine."""
        own = {"sweeps": layer.sweeps, "adjoint_sweeps": layer.adjoint_sweeps, "events_up_to": 0}
        if layer.is_module:
            own |= {"collectives": 0, "pairs": 0}
        else:
            own["pairs"] = pairs
        return Planner(self.machine(cores), self.costs(layer, samples), **own)

    def _costs(self, layer: Layer, samples: int, worked: int, others: tuple[Costs, ...] = ()) -> Costs:
        state = layer.state_fixed + layer.state * worked
        adjoint = layer.adjoint_fixed + layer.adjoint * worked
        state_bytes, row_bytes = layer.state_bytes * samples, layer.num_weights * layer.itemsize
        # The adjoint of a module goes back through a graph; on a coarse level that has to be made first.
        coarse_adjoint = self.coarse * (adjoint + state if layer.is_module else adjoint)
        corrected = self.correct * (adjoint + state if layer.is_module else adjoint)
        ends = self.ends_sample * samples * layer.state_bytes / layer.itemsize if not layer.is_module else 0.0
        states, adjoints = (
            SolveCosts(
                sweep=StepCost(self.call, fine),
                record=StepCost(self.call, fine),
                relax=StepCost(self.call, fine),
                coarse_sweep=StepCost(self.call, coarse),
                coarse=StepCost(self.call, coarse),
                correct=StepCost(self.call * (correct > 0.0), correct),
                layer=self.layer,
                ends=once + self.opening + self.closing + ends,
                check=check,
                opening=self.opening,
                closing=self.closing + ends,
                once=once,
            )
            for fine, coarse, correct, once, check in (
                (state, self.coarse * state, 0.0, self.states_once, self.closing + ends),
                (adjoint, coarse_adjoint, corrected, self.adjoints_once, 0.0),
            )
        )
        return Costs(
            state_bytes=state_bytes,
            row_bytes=row_bytes,
            states=states,
            adjoints=adjoints,
            vector=state_bytes / self.memory,
            coarsen=self.coarsen,
            optimizer=self.optimizer,
            optimizer_layer=self.weight * layer.num_weights if not layer.is_module else row_bytes * 5 / self.memory,
            add=2 * row_bytes / self.memory,
            samples=samples,
            others=others,
            at_once=layer.at_once,
            is_module=layer.is_module,
        )


@dataclass(frozen=True)
class Choice:
    """A plan, and why.

    Attributes
    ----------
    plan : Plan
    reason : str
        A sentence or two.
    prediction : Prediction
        Of the plan.
    runner_up : Prediction or None
        The best plan of another kind.
    num_layers : int
    samples : int
    """

    plan: Plan
    reason: str
    prediction: Prediction
    runner_up: Prediction | None
    num_layers: int
    samples: int

    @property
    def options(self) -> MGRIT:
        """Of the state solves; the number of replicas is `plan.replicas`."""
        return self.plan.options(self.num_layers)

    @property
    def text(self) -> str:
        """The plan for the header of a run, in a line."""
        words = in_words(self.prediction, self.num_layers)
        if self.prediction.num_ranks == 1:
            return f"plan: {words}"
        found = f"plan: {words}; predicted {figure(self.prediction.speedup)} times one rank"
        if self.runner_up is not None:
            found += (
                f"; next: {in_words(self.runner_up, self.num_layers, short=True)}, {figure(self.runner_up.speedup)}"
            )
        return found


def in_words(prediction: Prediction, num_layers: int, short: bool = False) -> str:
    """A plan, as in "2 replicas of 1 rank, 4 of 8 portions each (exact)"."""
    plan, ranks = prediction.plan, prediction.num_ranks
    stages, kind = plan.stages(ranks), prediction.kind
    if kind == "serial":
        text = "one layer after the other" + (f" on {count(ranks, 'rank')}" if ranks > 1 else "")
    elif plan.replicas > 1:
        text = f"{plan.replicas} replicas of {count(stages, 'rank')}"
    else:
        text = f"{'pipeline' if plan.is_exact else f'{plan.cycle} cycle'} of {count(stages, 'rank')}"
    if plan.is_exact:
        if short:
            return text
        if plan.portions > 1:
            of_each = f"{plan.portions_each} of " if plan.replicas > 1 else ""
            text += f", {of_each}{plan.portions} portions{' each' if plan.replicas > 1 else ''}"
        return f"{text} (exact)"
    steps, levels = num_layers, []
    for factor in plan.cfactors:
        steps //= factor
        levels.append(str(steps))
    cycle = f", {plan.cycle} cycle" if plan.replicas > 1 else ""
    return f"{text}{cycle}" + ("" if short else f", {'/'.join(levels)} intervals")


def choose(
    num_layers: int,
    batch: int,
    ranks: int,
    *,
    width: int = 8,
    itemsize: int = 8,
    layer: Layer | None = None,
    pairs: int = 10,
    cycles: Sequence[str] = ("lagged",),
    cores: int | None = None,
    constants: Constants | None = None,
) -> Choice:
    """The plan by rule for so many layers, samples and ranks: the same on any machine, in any run, at any load.

    All exact plans that are chosen for a batch have the same portions, and so the same bits, unless there are more
    replicas than these. An inexact one is taken where it is faster by more than a tenth.

    Parameters
    ----------
    num_layers, batch, ranks : int
    width, itemsize : int
        Of dense layers: channels, and bytes of a number.
    layer : Layer, optional
        Other layers than dense ones.
    pairs : int
        Of L-BFGS.
    cycles : sequence of str
        Inexact ones to choose from; only lagged is known to the rule.
    cores : int, optional
        Of a node; those of the constants if not given. They are not looked up.
    constants : Constants, optional

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        If there is not at least one layer, sample and rank.
    """
    for name, value in (("num_layers", num_layers), ("batch", batch), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; use 64")
    constants = constants or Constants()
    layer = layer or constants.dense(width, itemsize)
    planner = constants.planner(layer, batch, pairs, cores)
    return search(planner, num_layers, ranks, cycles)


def search(planner: Planner, num_layers: int, ranks: int, cycles: Sequence[str] = ("lagged",)) -> Choice:
    """The choice by the rule's own search, which looks at fewer plans than `Planner.best`, with any constants."""
    return decide(few_of_each_kind(planner, num_layers, ranks, cycles), num_layers, planner.costs.samples)


def few_of_each_kind(
    planner: Planner, num_layers: int, ranks: int, cycles: Sequence[str] = ("lagged",)
) -> list[Prediction]:
    """The best plans of all kinds that the rule looks at."""
    batch = planner.costs.samples
    portions = _portions(batch)
    found = planner.of_each_kind(num_layers, ranks, plans=list(_exact(num_layers, batch, ranks, portions)))
    if "lagged" in cycles and ranks > 1:
        # What is slower by far is no runner-up either.
        limit = 2.0 * found[0].seconds
        plans = list(_lagged(planner, num_layers, batch, ranks))
        found = found + planner.of_each_kind(num_layers, ranks, plans=plans, limit=limit)
    return found


def decide(found: Sequence[Prediction], num_layers: int, samples: int) -> Choice:
    """The choice among the best plans of all kinds.

    Parameters
    ----------
    found : sequence of Prediction
        At least one of them exact.
    num_layers, samples : int
    """
    portions = _portions(samples)
    found = sorted(found, key=lambda each: (rounded(each.seconds), each.plan.simplicity(each.num_ranks)))
    exact = next(each for each in found if each.plan.is_exact)
    best, notes = found[0], []
    if not best.plan.is_exact:
        limit = rounded(best.seconds) * (1.0 + _EXACT_MARGIN)
        if rounded(exact.seconds) <= limit or rounded(best.serial) <= limit:
            gain = f"faster by {exact.seconds / best.seconds - 1.0:.0%}"
            notes.append(f"a {best.plan.cycle} cycle would be {gain} only, or no faster than one rank")
            best = exact
    good = [each for each in found if each.plan.is_exact and rounded(each.seconds) <= 1.03 * rounded(best.seconds)]
    if best.plan.is_exact:
        best = min(good, key=lambda each: each.plan.simplicity(each.num_ranks))
    ranks, plan = best.num_ranks, best.plan
    stages = plan.stages(ranks)
    if ranks == 1:
        reason = "one rank"
    elif best.kind == "serial":
        reason = "messages would cost more than they save"
    elif best.kind == "replicas":
        reason = f"{ranks} ranks share {samples} samples, and need no messages between layers"
    elif plan.replicas == 1:
        reason = f"{num_layers} layers are shared better than {count(samples, 'sample')}"
    else:
        reason = f"{plan.replicas} replicas share {samples} samples, and {stages} ranks of each the {num_layers} layers"
    if plan.portions > portions and plan.replicas > portions:
        notes.append(
            f"portions={plan.portions} instead of {portions}, at least one for each replica: sums differ in rounding "
            f"from those on fewer ranks"
        )
    others = [each for each in found if each.kind != best.kind]
    return Choice(plan, "; ".join((reason, *notes)), best, others[0] if others else None, num_layers, samples)


def _portions(samples: int) -> int:
    """By the rule of a pipeline."""
    return MGRIT(cycle="pipeline").portions_of(samples)


def _exact(num_layers: int, batch: int, ranks: int, portions: int) -> Iterator[Plan]:
    """Exact plans, with as many portions as the rule says wherever that is enough for the replicas."""
    if portions == 1:
        yield SERIAL
    for replicas in _wide_enough(_divisors(ranks, batch), ranks, num_layers):
        if replicas <= portions > 1:
            yield Plan(cycle="pipeline", replicas=replicas, portions=portions)
        elif replicas > portions:
            for each in _MORE_PORTIONS if replicas < ranks else (1,):
                if replicas * each <= batch:
                    yield Plan(cycle="pipeline", replicas=replicas, portions=replicas * each)


def _lagged(planner: Planner, num_layers: int, batch: int, ranks: int) -> Iterator[Plan]:
    """Plans by the lagged cycle that are worth a look: about one, two or four intervals for each rank."""
    counts = [number for number in range(MIN_COARSE, num_layers // 2 + 1) if num_layers % number == 0]
    common: dict[str, Any] = {"iterations": planner.sweeps, "adjoint_iterations": planner.adjoint_sweeps}
    for replicas in _wide_enough(_divisors(ranks, batch), ranks, num_layers // 2):
        stages = ranks // replicas
        if stages == 1 or not counts:
            continue
        wanted = {min(counts, key=lambda number: (abs(number - times * stages), number)) for times in (1, 2, 4)}
        for intervals in sorted({*wanted, counts[0]}):
            own: dict[str, Any] = common | {"replicas": replicas, "portions": replicas}
            yield Plan(cfactors=(num_layers // intervals,), **own)
            for factor in (4, 8):
                if intervals > 32 and intervals % factor == 0 and intervals // factor >= MIN_COARSE:
                    yield Plan(cfactors=(num_layers // intervals, factor), **own)


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _wide_enough(replicas: list[int], ranks: int, most: int) -> list[int]:
    """Those with at most so many ranks each, or the largest number of replicas alone."""
    return [each for each in replicas if ranks // each <= most] or replicas[-1:]
