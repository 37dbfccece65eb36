"""Newton over the steps as a rival: iterations it needs, and the critical path of a solve with it on ranks and a GPU.

    python benchmarks/newton.py [--quick] [--parts counts,ranks,gpu] [--depths 1024,4096] [--widths 4,8,16,32]

All states of u_{n+1} = f_n(u_n) are solved for at once: an iteration linearizes every step at the last states v, and
solves u_{n+1} = f_n(v_n) + J_n (u_n - v_n) by a scan over the steps (DEER). Quasi-Newton keeps the diagonals of the
J_n only. Newton over blocks takes the states at the ends of 64 blocks of steps as unknowns: its f_n are blocks.

1. Iterations until the relative error of all states is below 1e-2, 1e-4 and 1e-8, beside fine sweeps of MGRIT (64
   intervals, lagged): dense layers on points of peaks, gated recurrent units on sequences; random and trained weights;
   cold, and (warm) from the states before the last update of the weights. A dash: not within --most iterations.
2. Milliseconds of a forward solve and of an update (forward and adjoint) over ranks: layers, tangents and compositions
   measured here, messages and nodes assumed as in the planner. Every method may be mixed with replicas.
3. Milliseconds of a forward solve on a GPU by its data sheet.

Last line: the greatest advantage of Newton over the best of the others, `gain_ranks` and `gain_gpu`, at an error of
1e-2; `gain_ranks_exact` and `gain_gpu_exact` against what is exact, at 1e-8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf

import common
import newton_paths
import torch
from torch import Tensor, nn

from xbraid_py.comm import SerialCommunicator
from xbraid_py.kernels.activation import ACTIVATIONS
from xbraid_py.layers.dense import ResidualSteps
from xbraid_py.layers.gated import GatedSteps, affine
from xbraid_py.layers.gru import GruCell
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.equations import Forward
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.problem.options import InitialScales

TOLERANCES = (1e-2, 1e-4, 1e-8)
BLOCKS = 64
FEATURES, CLASSES = 28, 10


# ---------------------------------------------------------------------------------------------------------------------
# Newton, literally. Shape letters: `N` steps, `B` samples, `C` numbers of a state.


@dataclass(frozen=True)
class Dense:
    """Steps u + h sigma(W_n u + b_n): weights (N, C, C), biases (N, C), h."""

    weight: Tensor
    bias: Tensor
    h: float
    activation: str = "smooth_relu"

    @classmethod
    def of(cls, steps: ResidualSteps) -> Dense:
        """The layers of a network."""
        weight, bias = steps.block.unpack(steps.theta)
        return cls(weight, bias[..., 0], steps.h, steps.block.activation)

    def __len__(self):
        return len(self.weight)

    def _inner(self, u: Tensor, rows: slice) -> Tensor:
        return torch.baddbmm(self.bias[rows, None], u, self.weight[rows].mT)

    def value(self, u: Tensor, rows: slice) -> Tensor:
        """Some steps (m, B, C), each from its own state."""
        return u + self.h * ACTIVATIONS[self.activation].value(self._inner(u, rows))

    def slopes(self, u: Tensor, rows: slice) -> Tensor:
        """h sigma' (m, B, C): what the products need."""
        return self.h * ACTIVATIONS[self.activation].slope(self._inner(u, rows))

    def product(self, slopes: Tensor, n: int, d: Tensor) -> Tensor:
        """J_n d (B, C)."""
        return d + slopes[n] * (d @ self.weight[n].T)

    def diagonals(self, slopes: Tensor) -> Tensor:
        """Diagonals of all J_n (N, B, C)."""
        return 1 + slopes * self.weight.diagonal(dim1=1, dim2=2)[:, None]

    def jacobians(self, slopes: Tensor) -> Tensor:
        """All J_n (N, B, C, C)."""
        return torch.eye(self.weight.shape[-1], dtype=slopes.dtype) + slopes[..., None] * self.weight[:, None]

    def gradient(self, slopes: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Gradient of the weights (N, C, C) from the states and the adjoints behind the steps, (N, B, C) each."""
        return (slopes * v).mT @ u


@dataclass(frozen=True)
class Gru:
    """Steps of a gated recurrent unit: W_hh (3 C, C), b_hh, and the input's part of the gates (N, B, 3 C)."""

    weight: Tensor
    bias: Tensor
    inputs: Tensor

    @cached_property
    def steps(self) -> GatedSteps:
        """The same for MGRIT."""
        cell = GruCell(self.weight.shape[1])
        return GatedSteps(cell, self.inputs, self.weight, self.bias, self.inputs.new_ones(len(self.inputs)))

    def __len__(self):
        return len(self.inputs)

    def value(self, u: Tensor, rows: slice) -> Tensor:
        """See `Dense`."""
        steps = self.steps
        return steps.cell.step(u, self.inputs[rows], self.weight, self.bias, steps._sizes[rows])

    def slopes(self, u: Tensor, rows: slice) -> Tensor:
        """Derivatives by g_r, g_z, g_n and the decay, (m, B, 4, C)."""
        steps = self.steps
        found = steps.cell.linearize(u, self.inputs[rows], self.weight, self.bias, steps._sizes[rows])
        return torch.cat([found.state, found.decay[..., None, :]], -2)

    def product(self, slopes: Tensor, n: int, d: Tensor) -> Tensor:
        """J_n d (B, C)."""
        gates = (d @ self.weight.T).unflatten(-1, (3, -1))
        return (slopes[n, :, :3] * gates).sum(-2) + slopes[n, :, 3] * d

    def diagonals(self, slopes: Tensor) -> Tensor:
        """Diagonals of all J_n (N, B, C)."""
        width = self.weight.shape[1]
        return slopes[..., 3, :] + (slopes[..., :3, :] * self.weight.view(3, width, width).diagonal(0, 1, 2)).sum(-2)

    def jacobians(self, slopes: Tensor) -> Tensor:
        """All J_n (N, B, C, C)."""
        width = self.weight.shape[1]
        gates = torch.einsum("nbgc,gcd->nbcd", slopes[..., :3, :], self.weight.view(3, width, width))
        return gates + torch.diag_embed(slopes[..., 3, :])

    def gradient(self, slopes: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Gradient of W_hh x: the slopes of the gates of the state (N, B, 3, C)."""
        return slopes[..., :3, :] * v[..., None, :]


Chain = Dense | Gru
ALL = slice(None)


def sequential(chain: Chain, start: Tensor) -> Tensor:
    """The states (N + 1, B, C), one step after the other."""
    states = [start]
    for n in range(len(chain)):
        states.append(chain.value(states[-1][None], slice(n, n + 1))[0])
    return torch.stack(states)


def scan(a: Tensor, b: Tensor) -> Tensor:
    """All d_{n+1} = A_n d_n + b_n from d_0 = 0: A (N, B, C, C), b (N, B, C); log2(N) stages, each of all steps."""
    a, b, shift = a.clone(), b.clone(), 1
    while shift < len(b):
        # The pair (A, b) of the steps up to n, after that of the steps up to n - shift.
        b[shift:] += (a[shift:] @ b[:-shift, ..., None])[..., 0].clone()
        a[shift:] = a[shift:] @ a[:-shift]
        shift *= 2
    return b


def iteration(chain: Chain, guess: Tensor, how: str) -> Tensor:
    """Newton's next states (N + 1, B, C).

    `how` is full or diagonal, both by the recurrence, which is what the scan solves; or scan, which is full.
    """
    values, slopes = chain.value(guess[:-1], ALL), chain.slopes(guess[:-1], ALL)
    if how == "scan":
        return torch.cat([guess[:1], guess[1:] + scan(chain.jacobians(slopes), values - guess[1:])])
    diagonals = chain.diagonals(slopes) if how == "diagonal" else None
    out = torch.empty_like(guess)
    out[0], d = guess[0], torch.zeros_like(guess[0])
    for n in range(len(chain)):
        step = chain.product(slopes, n, d) if diagonals is None else diagonals[n] * d
        out[n + 1] = values[n] + step
        d = out[n + 1] - guess[n + 1]
    return out


def block_iteration(chain: Chain, guess: Tensor, blocks: int) -> Tensor:
    """Newton over blocks: the next states at their ends (blocks + 1, B, C)."""
    length, ends, states = len(chain) // blocks, guess[:-1], []
    for j in range(length):
        states.append(ends)
        ends = chain.value(ends, slice(j, None, length))
    slopes = chain.slopes(torch.stack(states, 1).flatten(0, 1), ALL)
    out = torch.empty_like(guess)
    out[0], d = guess[0], torch.zeros_like(guess[0])
    for k in range(blocks):
        for n in range(k * length, (k + 1) * length):
            d = chain.product(slopes, n, d)
        out[k + 1] = ends[k] + d
        d = out[k + 1] - guess[k + 1]
    return out


def adjoint(chain: Chain, states: Tensor, sources: Tensor) -> Tensor:
    """Adjoints behind the steps (N, B, C), of states (N, B, C), by one scan: linear, hence exact.

    `sources` (N, B, C) are the gradient of a loss by the states behind the steps.
    """
    back = chain.jacobians(chain.slopes(states, ALL)).mT.flip(0)
    # v_n = J_{n+1}^T v_{n+1} + s_n, the last v being its source.
    shifted = torch.cat([torch.zeros_like(back[:1]), back[:-1]])
    return scan(shifted, sources.flip(0)).flip(0)


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm."""
    error = float((found - exact).norm() / exact.norm())
    return error if error < inf else inf  # NaN


def count(step: Callable[[Tensor], Tensor], guess: Tensor, exact: Tensor, most: int) -> list[int | None]:
    """Iterations until the error is below each of the tolerances; None where they do not suffice."""
    found: list[int | None] = []
    for number in range(most + 1):
        error = relative(guess, exact)
        while len(found) < len(TOLERANCES) and error < TOLERANCES[len(found)]:
            found.append(number)
        if len(found) == len(TOLERANCES) or error == inf:
            break
        if number < most:
            guess = step(guess)
    return found + [None] * (len(TOLERANCES) - len(found))


def count_sweeps(
    problems: list[tuple[ResidualSteps | GatedSteps, Tensor]], exact: Tensor, most: int, columns: bool
) -> list[int | None]:
    """The same for fine sweeps of MGRIT, warm-started by the problems before the last one."""
    found: list[int | None] = []
    number = len(exact) - 1
    for sweeps in range(1, most + 1):
        options = MGRIT(intervals=BLOCKS, tol=0.0, max_iter=sweeps)
        solver = Solver(options, Hierarchy.plan(options, LayerGrid(number, float(number)), 1), SerialCommunicator())
        warm = None
        for steps, start in problems:
            states = start.new_empty((number, *start.shape))
            last = steps is problems[-1][0]
            solution = solver.solve(Forward(steps, states, start), start, warm, max_iter=sweeps if last else 10)
            warm = solution.warm
        error = relative(states.mT if columns else states, exact[:-1])
        while len(found) < len(TOLERANCES) and error < TOLERANCES[len(found)]:
            found.append(sweeps)
        if len(found) == len(TOLERANCES):
            break
    return found + [None] * (len(TOLERANCES) - len(found))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Iterations.


@dataclass(frozen=True)
class Case:
    """A network before and after an update of its weights, and its first state."""

    name: str
    before: Chain
    after: Chain
    start: Tensor
    steps: tuple[ResidualSteps | GatedSteps, ResidualSteps | GatedSteps]
    change: float  # relative change of the weights by the update


def dense_cases(num_layers: int, width: int, updates: int, scale: float = 0.1) -> list[Case]:
    """Random weights, and after some updates of the peaks job; with the last update in both."""
    problem = common.problem(SerialCommunicator(), common.SERIAL, 50, width=width)
    objective = problem.objective(num_layers)
    run = OneShot(objective, OneShotOptions(), objective.network.initial(InitialScales(layers=scale), 0))
    weights = [run.x.clone()]
    for _ in run.run(updates):
        weights.append(run.x.clone())
    weights = [x for x, y in pairwise(weights) if not torch.equal(x, y)] + weights[-1:]
    found = []
    for name, (x, y) in (("random", weights[:2]), ("trained", weights[-2:])):
        steps = tuple(objective.network.steps(each) for each in (x, y))
        start = objective.network.open(y, objective.features).T.contiguous()
        found.append(Case(name, *map(Dense.of, steps), start, steps, relative(y, x)))
    return found


def sequences(length: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth patterns of `FEATURES` numbers a step, one for each class, with noise: (batch, length, F), and classes."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, FEATURES, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    x = nn.functional.interpolate(patterns[labels], length, mode="linear").mT
    return x + 0.3 * torch.randn(x.shape, generator=generator), labels


def gru_cases(length: int, hidden: int, updates: int, batch: int = 16, diagonal: bool = False) -> list[Case]:
    """Initial weights of `torch.nn.GRU`, and after some updates with Adam; with the last update in both.

    With `diagonal` only the diagonals of the three matrices of W_hh are kept, as in ParaRNN's cells.
    """
    torch.manual_seed(0)
    gru, head = nn.GRU(FEATURES, hidden, batch_first=True), nn.Linear(hidden, CLASSES)
    optimizer = torch.optim.Adam([*gru.parameters(), *head.parameters()], 3e-3)
    kept = [{name: p.detach().clone() for name, p in gru.named_parameters()}]
    for number in range(updates):
        x, labels = sequences(length, batch, number + 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(gru(x)[1][0]), labels).backward()
        optimizer.step()
        kept.append({name: p.detach().clone() for name, p in gru.named_parameters()})
    x = sequences(length, batch, 0)[0].double().transpose(0, 1).contiguous()

    def chain(weights: dict[str, Tensor]) -> Gru:
        w_ih, w_hh, b_ih, b_hh = (p.double() for p in weights.values())
        if diagonal:
            w_hh = w_hh * torch.eye(hidden).repeat(3, 1)
        return Gru(w_hh, b_hh, affine(x, w_ih, b_ih))

    found = []
    for name, pair in (("random", kept[:2]), ("trained", kept[-2:])):
        before, after = map(chain, pair)
        change = relative(after.weight, before.weight)
        start = x.new_zeros(batch, hidden)
        found.append(Case(name, before, after, start, (before.steps, after.steps), change))
    return found


def counts_of(case: Case, most: int) -> dict[tuple[str, str], list[int | None]]:
    """Iterations of each method, by method and start: cold, the first state everywhere, or warm."""
    exact, old = sequential(case.after, case.start), sequential(case.before, case.start)
    old[0] = case.start
    cold = case.start.expand_as(exact)
    every = len(case.after) // BLOCKS
    found = {}
    for begin, guess in (("cold", cold), ("warm", old)):
        for how in ("full", "diagonal"):
            found[how, begin] = count(lambda v, how=how: iteration(case.after, v, how), guess, exact, most)
        if every > 1:
            found["blocks", begin] = count(
                lambda v: block_iteration(case.after, v, BLOCKS), guess[::every], exact[::every], most
            )
            dense = isinstance(case.after, Dense)
            start = case.start.T.contiguous() if dense else case.start
            problems = [(steps, start) for steps in (case.steps if begin == "warm" else case.steps[1:])]
            found["MGRIT", begin] = count_sweeps(problems, exact, min(most, 12), dense)
    return found


def text_of(found: list[int | None] | None) -> str:
    """As in "1 / 2 / 3"."""
    return "" if found is None else " / ".join("-" if each is None else str(each) for each in found)


def print_counts(arguments: argparse.Namespace) -> None:
    """Part 1."""
    columns = [(how, begin) for begin in ("cold", "warm") for how in ("full", "diagonal", "blocks", "MGRIT")]
    heads = "".join(f"  {f'{how}, {begin}':>14s}" for how, begin in columns)
    print(f"iterations to 1e-2 / 1e-4 / 1e-8\n{'network':22s} {'weights':8s} {'change':>7s}{heads}")
    makers = [
        (f"dense {width}, {n} layers", lambda n=n, c=width: dense_cases(n, c, arguments.updates))
        for width in arguments.widths
        for n in arguments.counted
    ]
    makers += [
        (f"GRU {hidden}, {n} steps", lambda n=n, h=hidden: gru_cases(n, h, arguments.updates))
        for hidden in arguments.hidden
        for n in arguments.lengths
    ]
    if not arguments.quick:
        makers += [
            (f"dense 8, 1024, x {10 * scale:g}", lambda scale=scale: dense_cases(1024, 8, arguments.updates, scale))
            for scale in (0.3, 1.0)
        ]
        makers.append(("diagonal GRU 64, 1024", lambda: gru_cases(1024, 64, arguments.updates, diagonal=True)))
    for name, maker in makers:
        for case in maker():
            found = counts_of(case, arguments.most)
            cells = "".join(f"  {text_of(found.get(column)):>14s}" for column in columns)
            print(f"{name:22s} {case.name:8s} {case.change:7.4f}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two widths, one hidden size, short networks")
    parser.add_argument("--parts", default="counts,ranks,gpu")
    parser.add_argument("--widths", type=common.integers, help="of dense layers; 0 for none")
    parser.add_argument("--counted", type=common.integers, help="depths of part 1")
    parser.add_argument("--depths", type=common.integers, help="of parts 2 and 3")
    parser.add_argument("--hidden", type=common.integers, help="numbers of recurrent units; 0 for none")
    parser.add_argument("--lengths", type=common.integers, help="of sequences")
    parser.add_argument("--batches", type=common.integers, default=[1, 16, 256, 5000])
    parser.add_argument("--ranks", type=common.integers, default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--kinds", type=lambda text: text.split(";"), help='of part 2, as in "1e-2, warm;exact, cold"')
    parser.add_argument("--updates", type=int, help="before weights count as trained")
    parser.add_argument("--most", type=int, default=40, help="iterations at most")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.widths = arguments.widths or ([4, 8] if quick else [4, 8, 16, 32])
    arguments.counted = arguments.counted or ([64] if quick else [64, 256, 1024, 4096])
    arguments.depths = arguments.depths or ([1024] if quick else [4096])
    arguments.hidden = arguments.hidden or ([32] if quick else [32, 64])
    arguments.lengths = arguments.lengths or ([256] if quick else [1024, 4096])
    arguments.updates = arguments.updates or (5 if quick else 40)
    arguments.seconds = arguments.seconds or (0.02 if quick else 0.2)
    arguments.widths, arguments.hidden = ([c for c in sizes if c] for sizes in (arguments.widths, arguments.hidden))
    parts, figures = arguments.parts.split(","), {}
    if "counts" in parts:
        print_counts(arguments)
    if "ranks" in parts:
        figures |= newton_paths.print_ranks(arguments)
    if "gpu" in parts:
        figures |= newton_paths.print_gpu(arguments)
    common.finish("newton", figures)


if __name__ == "__main__":
    main()
