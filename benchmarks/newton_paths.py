"""Critical paths of Newton over the steps and of its rivals, on ranks and on a GPU; parts 2 and 3 of newton.py.

Layers, tangents and compositions are measured here; messages and nodes are assumed as in the planner, a GPU is known by
its data sheet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil, inf, log2

import torch
from torch import Tensor, nn

from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.layers.gated import GatedSteps
from xbraid_py.layers.gru import GruCell
from xbraid_py.planner import CLUSTER, SHARED_MEMORY, Costs, Machine, Planner, SolveCosts, StepCost, candidates

NODE = Machine(32, 32, SHARED_MEMORY, CLUSTER)  # the nodes that are simulated, as in benchmarks/scaling.py


@dataclass(frozen=True)
class Needed:
    """Iterations of Newton over all steps, over blocks, of quasi-Newton and of MGRIT, if it gets there."""

    full: int
    blocks: int
    diagonal: int
    mgrit: int | None
    mgrit_adjoint: int


# The iterations of part 1, trained weights and the greatest depth or length, for 1e-2 and for 1e-8.
DENSE = {
    "1e-2, warm": Needed(1, 1, 1, 1, 1),
    "1e-2, cold": Needed(1, 1, 2, 2, 2),
    "exact, cold": Needed(3, 3, 6, 5, 5),
}
RECURRENT = {
    "1e-2, cold": Needed(3, 1, 5, 3, 2),
    "exact, cold": Needed(5, 3, 25, None, 1),
}


@dataclass(frozen=True)
class Rates:
    """Seconds of one step of a network, B samples of C numbers.

    Attributes
    ----------
    step, relaxed, back : float
        A step on its own, in a relaxation, and its adjoint with the gradient of its weights.
    evaluate : float
        A step and what its Jacobian needs, at states that are given for all steps.
    tangent, tangents : float
        J_n applied to one column of each sample; to C + 1, which make up the product of the Jacobians.
    compose, apply : float
        Two products of Jacobians (B, C, C) made one; such a product applied to a column.
    vector : float
        A pass of a vector operation over a state.
    call : float
        What a call costs, whatever is in it.
    state_bytes, row_bytes, width : int
        Of a state, of the weights or inputs of a step, and C.
    """

    step: float
    relaxed: float
    back: float
    evaluate: float
    tangent: float
    tangents: float
    compose: float
    apply: float
    vector: float
    call: float
    state_bytes: int
    row_bytes: int
    width: int

    @property
    def costs(self) -> Costs:
        """What the planner needs: two evaluations in a coarse step; the same for all methods is left out."""

        def solve(sweep: float, each: float, correct: StepCost) -> SolveCosts:
            one, two = StepCost(self.call, each), StepCost(self.call, 2 * each)
            return SolveCosts(
                StepCost(self.call, sweep), one, one, StepCost(self.call, 2 * sweep), two, correct, 0, 0, 0
            )

        return Costs(
            state_bytes=self.state_bytes,
            row_bytes=self.row_bytes,
            states=solve(self.step, self.relaxed, StepCost(0, 0)),
            adjoints=solve(self.back, self.back, StepCost(self.call, self.back)),
            vector=self.vector,
            coarsen=self.row_bytes / BYTES,
            optimizer=0,
            optimizer_layer=0,
        )


BYTES = 1e10  # that a core reads and writes in a second
# Numbers in a call that is timed: calls that are short, since others use the machine. Longer ones are a multiple.
SHORT = 1 << 15


def least(body: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of many short calls: others use the machine."""
    best, end = inf, time.perf_counter() + seconds
    body()
    repeats = 0
    while repeats < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        body()
        best, repeats = min(best, time.perf_counter() - start), repeats + 1
    return best


def products(batch: int, width: int, dtype: torch.dtype, seconds: float) -> tuple[float, ...]:
    """Seconds of `compose` and `apply`."""
    some = max(1, min(batch, SHORT // width**2))
    a = torch.randn(some, width, width, dtype=dtype)
    others = (torch.randn(some, width, n, dtype=dtype) for n in (width + 1, 1))
    return tuple(batch / some * least(lambda other=other: torch.bmm(a, other), seconds) for other in others)


def columns_of(weight: Tensor, batch: int, seconds: float) -> float:
    """Seconds of W (G, C) times C + 1 columns of each sample, scaled and added: three passes."""
    rows, width = weight.shape
    some = max(1, min(batch, SHORT // (rows * (width + 1))))
    d = torch.randn(width, (width + 1) * some, dtype=weight.dtype)
    slopes, out = (
        torch.rand(rows, 1, some, dtype=weight.dtype),
        torch.empty(rows, (width + 1) * some, dtype=weight.dtype),
    )

    def body() -> None:
        torch.mm(weight, d, out=out)
        out.view(rows, width + 1, some).mul_(slopes)
        d.mul_(0.5)
        for part in out.split(width):
            d.add_(part, alpha=1e-3)

    return batch / some * least(body, seconds)


def dense_rates(width: int, batch: int, seconds: float) -> Rates:
    """Dense layers in double precision by the kernels of the library."""
    layer, times = DenseLayer(width, width), max(1.0, width * batch / SHORT)
    many, samples = 64 if times == 1 else 8, ceil(batch / times)
    theta = 0.1 * torch.randn(many, layer.num_parameters, dtype=torch.float64)
    steps = ResidualSteps(layer, theta, 1e-3)
    states = torch.randn(many, width, samples, dtype=torch.float64)
    gradient = torch.empty_like(theta)

    def line(body: Callable[[ResidualSteps, int], object]) -> tuple[float, float]:
        """Seconds of each step, and of the call."""
        one, all_of_them = (least(lambda n=n: body(replace(steps, theta=theta[:n]), n), seconds) for n in (1, many))
        each = max(all_of_them - one, 0.5 * all_of_them) / (many - 1)
        return times * each, max(0.0, one - each)

    start = states[:1].clone()
    step, call = line(lambda s, n: s.relax(start, n, None, states[:n]))
    back, _ = line(lambda s, n: s.relax_adjoint(states[:n], start, n, None, None, gradient[:n]))
    # A column may be one more sample of the same layer.
    some = max(1, min(batch, SHORT // (width * (width + 1))))
    wide = torch.randn(1, width, some * (width + 1), dtype=torch.float64)
    as_samples = batch / some * least(lambda: steps.relax(wide, many, None, None), seconds) / many
    # In a kernel of its own, or by torch.
    vector = min(times * least(lambda: states[0].add_(states[1], alpha=1e-9), seconds), 0.25 * step)
    compose, apply = products(batch, width, torch.float64, seconds)
    return Rates(
        step=step,
        relaxed=step,
        back=back,
        evaluate=step,
        tangent=step,
        tangents=min(as_samples, columns_of(theta[0, : width**2].view(width, width), batch, seconds)),
        compose=compose,
        apply=apply,
        vector=vector,
        call=call,
        state_bytes=8 * width * batch,
        row_bytes=8 * layer.num_parameters,
        width=width,
    )


def gru_rates(hidden: int, batch: int, seconds: float) -> Rates:
    """Gated recurrent units in single precision: `torch.nn.GRU` step by step, relaxations of 8 intervals by ours."""
    gru, length, times = nn.GRU(1, hidden), 32, max(1.0, batch / 16)
    samples = ceil(batch / times)
    x = torch.randn(length, samples, 1)
    with torch.no_grad():
        step = least(lambda: gru(x), seconds) / length
    weight, bias = gru.weight_hh_l0.detach(), gru.bias_hh_l0.detach()
    inputs, ones = torch.randn(length, samples, 3 * hidden), torch.ones(length)
    steps = GatedSteps(GruCell(hidden), inputs, weight, bias, ones)
    states, gradient = torch.randn(length, samples, hidden), torch.empty(length, samples, 3 * hidden)
    relaxed = least(lambda: steps.relax(states[:8], length // 8), seconds) / length
    ours = least(lambda: steps.relax(states[:1], length), seconds) / length

    def linearize() -> None:
        steps.forget()
        steps.linearized(states)

    evaluate = least(linearize, seconds)

    def backward() -> None:
        steps.forget()
        steps.relax_adjoint(states, states[:1], length, gradient=gradient)

    vector = min(least(lambda: states[0].add_(states[1], alpha=1e-9), seconds), 0.25 * step)
    compose, apply = products(batch, hidden, torch.float32, seconds)
    return Rates(
        step=times * min(step, ours),
        relaxed=times * min(relaxed, step, ours),
        back=times * least(backward, seconds) / length,
        evaluate=times * evaluate / length,
        tangent=times * min(step, ours),
        tangents=columns_of(weight, batch, seconds),
        compose=compose,
        apply=apply,
        vector=times * vector,
        call=ours,
        state_bytes=4 * hidden * batch,
        row_bytes=12 * hidden * batch,
        width=hidden,
    )


@dataclass(frozen=True)
class Race:
    """Seconds of the rivals for a network: forward solve and adjoint, on ranks of `NODE`.

    Parameters
    ----------
    number : int
        N.
    rates : dict
        By batch.
    needed : Needed
    """

    number: int
    rates: dict[int, Rates]
    needed: Needed
    _known: dict = field(default_factory=dict, compare=False, repr=False)

    def link(self, rates: Rates, ranks: int, matrices: bool) -> float:
        """The scan over ranks: a tree of products, or columns from rank to rank, in portions of the samples.

        A stage has the call that a hop of a sweep from rank to rank has.
        """
        way = CLUSTER if ranks > NODE.ranks_per_node else SHARED_MEMORY
        stages = ceil(log2(ranks))
        if not matrices:
            return stages * (rates.call + way.latency + 2 * rates.state_bytes / way.bandwidth + 3 * rates.vector)
        size = (rates.width + 1) * rates.state_bytes
        tree = stages * (rates.call + way.latency + size / way.bandwidth + rates.compose)
        hop = rates.state_bytes / way.bandwidth + rates.apply
        samples = max(1, rates.state_bytes // (4 * rates.width))
        portions = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
        chain = min((ranks - 2 + k) * (rates.call + way.latency + hop / k) for k in portions)
        return min(tree, chain)

    @property
    def weight_bytes(self) -> int:
        """Of a step: none of a sequence, whose weights are few."""
        first = self.rates[1]
        return first.row_bytes if first.row_bytes == 8 * first.width * (first.width + 1) else 0

    def serial(self, batch: int, ranks: int) -> tuple[float, float]:
        """One rank; the others wait."""
        rates = self.at(batch)
        return self.number * rates.step + rates.call, self.number * rates.back + rates.call

    def rows(self, batch: int) -> int:
        """Bytes of a row: the weights of a layer, or the inputs of a step of all samples."""
        return self.weight_bytes or self.rates[1].row_bytes * batch

    def at(self, batch: int) -> Rates:
        """Rates for any batch, between those measured."""
        if batch in self.rates:
            return self.rates[batch]
        below, above = max(b for b in self.rates if b < batch), min(b for b in self.rates if b > batch)
        share = log2(batch / below) / log2(above / below)
        low, high = self.rates[below], self.rates[above]
        between = {
            name: getattr(low, name) ** (1 - share) * max(getattr(high, name), 1e-12) ** share
            for name in ("step", "relaxed", "back", "evaluate", "tangent", "tangents", "compose", "apply", "vector")
        }
        return replace(low, **between, state_bytes=low.state_bytes * batch // below, row_bytes=self.rows(batch))

    def pipeline(self, batch: int, ranks: int) -> tuple[float, float]:
        """Portions follow each other through the layers of the ranks."""
        found = []
        for portions in (2**k for k in range(int(log2(batch)) + 1)):
            rates, steps = self.at(ceil(batch / portions)), self.number / ranks
            hop = rates.call + CLUSTER.latency + rates.state_bytes / CLUSTER.bandwidth if ranks > 1 else 0.0
            found.append(tuple((portions + ranks - 1) * (steps * each + hop) for each in (rates.step, rates.back)))
        return min(found, key=sum)

    def mgrit(self, batch: int, ranks: int) -> tuple[float, float]:
        """The best plan of the lagged cycle, with the sweeps that it needs; some intervals on each rank."""
        if self.needed.mgrit is None:
            return inf, inf
        planner, found = Planner(NODE, self.at(batch).costs), []
        fewest = min(max(8, ranks), self.number // 2)
        for plan in candidates(self.number):
            if plan.cycle == "serial" or not fewest <= self.number // plan.cfactors[0] <= 2 * fewest:
                continue
            sweeps = {"iterations": self.needed.mgrit, "adjoint_iterations": self.needed.mgrit_adjoint}
            prediction = planner.predict(replace(plan, **sweeps), self.number, ranks)
            found.append((prediction.states, prediction.adjoints))
        return min(found, key=sum, default=(inf, inf))

    def newton(self, batch: int, ranks: int) -> tuple[float, float]:
        """Full Jacobians: the better of Newton over all steps and over a block of steps on each rank."""
        rates, steps, times = self.at(batch), self.number / ranks, self.needed.full
        if ranks == 1:
            over_all = times * (steps * (rates.evaluate + rates.tangent) + 2 * rates.call)
            return over_all, self.serial(batch, 1)[1]
        link, check = self.link(rates, ranks, True), NODE.collective(ranks, 16)
        over_all = times * (steps * (rates.evaluate + rates.tangents + rates.tangent) + 3 * rates.call + link + check)
        blocks = self.needed.blocks * (steps * (rates.step + rates.tangents) + 2 * rates.call + link + check)
        blocks += steps * rates.step + rates.call
        return min(over_all, blocks), steps * (rates.tangents + rates.back) + 3 * rates.call + link

    def quasi(self, batch: int, ranks: int) -> tuple[float, float]:
        """Diagonals; the adjoint in as many iterations, each with the exact product."""
        rates, steps, times = self.at(batch), self.number / ranks, self.needed.diagonal
        link = self.link(rates, ranks, False) + NODE.collective(ranks, 16) if ranks > 1 else 0.0
        forward = times * (steps * (rates.evaluate + 5 * rates.vector) + 3 * rates.call + link)
        back = times * (steps * (rates.tangent + 5 * rates.vector) + 3 * rates.call + link)
        return forward, back + steps * rates.back

    def mixed(self, name: str, batch: int, ranks: int) -> tuple[float, float]:
        """The best mix with replicas, which share the samples and sum the gradients of the weights at the end."""
        found = []
        for replicas in {*(4**k for k in range(7)), ranks}:
            if replicas <= min(ranks, batch) and ranks // replicas <= self.number:
                key = name, ceil(batch / replicas), ranks // replicas
                if key not in self._known:
                    self._known[key] = getattr(self, name)(*key[1:])
                forward, back = self._known[key]
                # Each rank sums the rows of its own steps over the replicas; those of a sequence are no weights.
                rows = self.weight_bytes * self.number / (ranks // replicas)
                shared = NODE.collective(replicas, 2 * rows) if replicas > 1 else 0.0
                found.append((forward, back + shared))
        return min(found, key=sum)


METHODS = {
    "serial and replicas": "serial",
    "pipeline": "pipeline",
    "MGRIT": "mgrit",
    "Newton": "newton",
    "quasi-Newton": "quasi",
}
RIVALS = ("Newton", "quasi-Newton")


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return "-" if seconds == inf else f"{1e3 * seconds:#.3g}".rstrip(".")


def race_table(race: Race, batch: int, ranks: list[int], title: str) -> float:
    """Print milliseconds of forward solve and update over ranks; the greatest advantage of Newton in an update."""
    print(f"\n{title}, batch {batch}")
    print(f"  {'ranks':>6s}  " + "  ".join(f"{name:>21s}" for name in METHODS))
    gain, found = 0.0, {name: (inf, inf) for name in METHODS}
    for each in (r for r in ranks if r <= race.number):
        # Some of the ranks may be left idle.
        found = {name: min(found[name], race.mixed(method, batch, each), key=sum) for name, method in METHODS.items()}
        totals = {name: sum(pair) for name, pair in found.items()}
        fastest = min(totals, key=totals.get)
        others = min(total for name, total in totals.items() if name not in RIVALS)
        gain = max(gain, others / min(totals[name] for name in RIVALS))
        cells = (
            f"{milliseconds(pair[0])} {milliseconds(totals[name])}{'*' if name == fastest else ' '}"
            for name, pair in found.items()
        )
        print(f"  {each:6d}  " + "  ".join(f"{cell:>21s}" for cell in cells), flush=True)
    return gain


def print_ranks(arguments: argparse.Namespace) -> dict[str, float]:
    """Part 2."""
    print(
        "\nforward solve, update (both in milliseconds; * the fastest update), each with the best number of replicas;"
        f"\n{NODE.ranks_per_node} ranks a node; messages: {SHARED_MEMORY.source.split(': ')[1]} within a node, "
        f"{CLUSTER.source.split(': ')[1]} between"
    )
    gains: dict[str, float] = {"gain_ranks": 0.0, "gain_ranks_exact": 0.0}
    networks = [(f"dense {width}", dense_rates, width, DENSE, arguments.depths) for width in arguments.widths]
    networks += [(f"GRU {hidden}", gru_rates, hidden, RECURRENT, arguments.lengths) for hidden in arguments.hidden]
    for name, measure, width, needed, numbers in networks:
        batches = [each for each in arguments.batches if measure is dense_rates or each <= 256]
        parts = sorted({1, 4, 16, 64, 256, *batches})
        rates = {batch: measure(width, batch, arguments.seconds) for batch in parts if batch <= max(batches)}
        print(f"\n{name}: microseconds of a step, its adjoint, all tangents, a composition, by batch")
        for batch, each in rates.items():
            times = (each.step, each.back, each.tangents, each.compose)
            print(f"  {batch:6d}  " + "  ".join(f"{1e6 * seconds:10.3f}" for seconds in times), flush=True)
        for number in numbers:
            for kind in arguments.kinds or needed:
                if kind not in needed:
                    continue
                counts = needed[kind]
                race = Race(number, rates, counts)
                key = "gain_ranks_exact" if kind.startswith("exact") else "gain_ranks"
                for batch in batches:
                    title = f"{name}, {number} steps, {kind}"
                    gains[key] = max(gains[key], race_table(race, batch, arguments.ranks, title))
    return gains


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet (NVIDIA H100 SXM: 67 TFLOP/s in FP32, 3.35 TB/s), and what is assumed.

    Attributes
    ----------
    flops, bandwidth : float
        Half of the data sheet's.
    launch : float
        Seconds from one kernel of a CUDA graph to the next that depends on it.
    stage : float
        Seconds of a dependent step inside one kernel, states and weights on the chip.
    """

    flops: float = 0.5 * 67e12
    bandwidth: float = 0.5 * 3.35e12
    launch: float = 2e-6
    stage: float = 0.3e-6

    def roof(self, flops: float, numbers: float) -> float:
        """Seconds of so much work on FP32 numbers."""
        return max(flops / self.flops, 4 * numbers / self.bandwidth)


def gpu_seconds(gpu: Gpu, number: int, width: int, batch: int, gates: int, needed: Needed) -> dict[str, float]:
    """Seconds of a forward solve; `gates` products W u (C x C) in a step."""
    flops, size = 2 * gates * width**2 * batch, width * batch  # of a step, and of a state
    fused = gpu.stage * gates  # three gates in a row need more of a stage
    whole = gpu.roof(number * flops, number * (1 + gates) * size)
    found = {
        "kernel a step": number * max(gpu.launch, gpu.roof(flops, (2 + gates) * size)),
        "one kernel": max(number * fused, whole) + gpu.launch,
    }

    def cycle(relax: float, coarse: float) -> float:
        """Lagged cycle of two levels with the best intervals; two evaluations in a coarse step."""
        times = needed.mgrit
        lengths = [2**k for k in range(1, int(log2(number)))]
        sweeps = ((1 + times) * 2 * number / c * coarse + times * max(c * relax, whole) for c in lengths)
        return min(sweeps) + (1 + 2 * times) * gpu.launch

    if needed.mgrit is not None:
        found["MGRIT"] = cycle(max(gpu.launch, gpu.roof(flops, 2 * size)), gpu.launch)
        found["MGRIT fused"] = cycle(fused, fused)
    # A scan that passes once over its numbers, and composes twice as often as there are steps.
    depth = 3 * gpu.launch + 2 * log2(number) * gpu.stage
    matrix = width * size
    full = gpu.roof(number * (1.5 * flops + 4 * width * matrix), number * 4 * (matrix + size))
    found["Newton"] = needed.full * (depth + full)
    diagonal = gpu.roof(number * 1.5 * flops, number * (6 + gates) * size)
    found["quasi-Newton"] = needed.diagonal * (depth + diagonal)
    return found


def print_gpu(arguments: argparse.Namespace) -> dict[str, float]:
    """Part 3."""
    gpu, gains = Gpu(), {"gain_gpu": 0.0, "gain_gpu_exact": 0.0}
    names = ("kernel a step", "one kernel", "MGRIT", "MGRIT fused", "Newton", "quasi-Newton")
    print(f"\nforward solve on a GPU, milliseconds: {gpu}")
    print(f"{'network':34s} {'batch':>6s}  " + "  ".join(f"{name:>13s}" for name in names))
    networks = [("dense", width, 1, DENSE, arguments.depths) for width in arguments.widths]
    networks += [("GRU", hidden, 3, RECURRENT, arguments.lengths) for hidden in arguments.hidden]
    for name, width, gates, needed, numbers in networks:
        for number in numbers:
            for kind, counts in needed.items():
                for batch in arguments.batches:
                    found = gpu_seconds(gpu, number, width, batch, gates, counts)
                    cells = "  ".join(f"{milliseconds(found.get(each, inf)):>13s}" for each in names)
                    print(f"{f'{name} {width}, {number} steps, {kind}':34s} {batch:6d}  {cells}")
                    others = min(seconds for each, seconds in found.items() if each not in RIVALS)
                    key = "gain_gpu_exact" if kind.startswith("exact") else "gain_gpu"
                    gains[key] = max(gains[key], others / min(found[each] for each in RIVALS))
    return gains
