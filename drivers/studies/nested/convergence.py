"""How fast MGRIT converges on a network that has just been refined by either interpolation (paper 001, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from studies.rows import Row, table
from studies.statistics import Summary
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import INTERPOLATIONS
from xbraid_py.multilevel.depth.transfer import prolong_depth
from xbraid_py.problem.problem import Problem
from xbraid_py.recipes.classification import NestedTraining
from xbraid_py.run.engine import rows_of

ITERATIONS = 10  # after a refinement, as in the paper
_ROUNDING = 1e-11  # what is smaller is no convergence any more
SOLVES = ("states", "adjoints")


def measure(training: NestedTraining, problem: Problem, mgrit: MGRIT) -> dict[str, Any]:
    """Train, and at each refinement solve the refined network by either interpolation of the same coarse weights.

    Returns
    -------
    dict
        "refinements": for each of them and each interpolation the "num_layers", the "interpolation", and the relative
        residuals of its "states" and "adjoints", before the first iteration and after each.
    """
    problem = replace(problem, forward=replace(mgrit, max_iter=ITERATIONS), adjoint=mgrit.for_adjoint(ITERATIONS))
    method, found = training.method, []
    before = method.network, method.one_shot
    for _ in rows_of(training):
        if method.network is not before[0]:
            (network, one_shot), both = before, []
            for interpolation in INTERPOLATIONS:
                objective = problem.objective(method.grid)
                x = prolong_depth(network, objective.network, one_shot.x, interpolation)
                objective.evaluate(x)
                objective.gradient(x)
                residuals = (objective.residuals, objective.adjoint_residuals)
                both.append({"num_layers": method.depth, "interpolation": interpolation})
                both[-1] |= {n: [float(f"{r:.4g}") for r in each] for n, each in zip(SOLVES, residuals, strict=True)}
            # A shallow network is solved layer by layer.
            found += both if all(len(each[solve]) > 2 for each in both for solve in SOLVES) else []
        before = method.network, method.one_shot
    return {"refinements": found}


def factors(pair: Sequence[Mapping[str, Any]], solve: str) -> list[float]:
    """Mean convergence factors of two solves, over as many iterations as both have before rounding, at least one."""
    histories = [each[solve] for each in pair]
    count = max(1, min(sum(r > _ROUNDING for r in history[1:]) for history in histories))
    return [(history[count] / history[0]) ** (1 / count) for history in histories]


def iterations(history: Sequence[float], drop: float = 1e-4) -> int:
    """Iterations until a residual has fallen by four orders, which the paper recommends; `ITERATIONS` at most."""
    return next((n for n, each in enumerate(history) if each <= drop * history[0]), ITERATIONS)


def pairs_of(rows: Sequence[Row]) -> dict[tuple[str, int, int], list[tuple[dict, dict]]]:
    """Solves by constant and by linear interpolation, by regime, layers of the finest network, and of the refined."""
    found: dict[tuple[str, int, int], list[tuple[dict, dict]]] = {}
    for row in rows:
        refinements = row["result"]["refinements"]
        for constant, linear in list(pairwise(refinements))[::2]:
            layers = row["settings"]["num_layers"] * (4 if "deep" in row["settings"]["change"] else 1)
            name = row["settings"]["regime"], layers, constant["num_layers"]
            found.setdefault(name, []).append((constant, linear))
    return found


def section(rows: Sequence[Row]) -> list[str]:
    """The part of the page."""
    lines = []
    for (regime, layers, depth), pairs in sorted(pairs_of(rows).items()):
        for solve in SOLVES:
            both = [factors(pair, solve) for pair in pairs]
            ratio = Summary.of([linear / constant for constant, linear in both])
            after = [Summary.of([iterations(pair[n][solve]) for pair in pairs]).mean for n in range(2)]
            means = [f"{Summary.of([each[n] for each in both]).mean:.1e}" for n in range(2)]
            interval = f"{ratio.mean:.2f}" + f" ({ratio.low:.2f} to {ratio.high:.2f})" * (ratio.count > 1)
            cells = [*means, interval, *(f"{each:.1f}" for each in after)]
            lines.append([f"{regime}, {layers} layers", f"{depth}", solve, *cells, f"{len(pairs)}"])
    head = ["regime, finest network", "refined to", "solve", "factor, constant", "factor, linear"]
    head += ["linear over constant (95 %)", "iterations to 1e-4, constant", "linear", "runs"]
    said = (
        f"V-cycles of the paper's regime on the refined network, {ITERATIONS} iterations from the coarsest level; both "
        "interpolations of the same coarse weights. A factor is the mean one over the iterations before rounding."
    )
    return ["## Convergence after a refinement", said, table(head, lines)]
