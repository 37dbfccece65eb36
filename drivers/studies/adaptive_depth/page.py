"""Table and pictures of the study of adaptive depth, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from studies.rows import Row, accuracies, table, where
from studies.statistics import Summary
from studies.study import PAGE
from xbraid_py.recipes.pictures.curves import depth_colors
from xbraid_py.recipes.pictures.style import ADJOINT, GRAY, RED, STATE, clean, save

KINDS = {"uniform": RED, "adaptive": STATE, "even": ADJOINT, "fewer": GRAY, "coarsest": "0.8"}
_WORK, _LAYERS, _ACCURACY = 1, 2, 3  # places in a point of a curve


def write(rows: Sequence[Row], out: Path) -> None:
    """Write `study.md`, and the pictures in `figures`.

    Parameters
    ----------
    rows : sequence of dict
        Of `studies.study.together`; failed runs are counted and left out.
    out : Path
    """
    good = [row for row in rows if "result" in row]
    parts = [f"{len(good)} runs, {len(rows) - len(good)} failed."]
    kinds = {kind: found for kind in KINDS if (found := where(good, run=kind))}
    if "uniform" in kinds:
        parts += ["## At the end", _ends(kinds), "## Seed by seed", _seeds(kinds)]
    if kinds:
        figures = out / "figures"
        _over_work(kinds, figures / "accuracy_over_work.png")
        _over_size(kinds, figures / "accuracy_over_parameters.png")
        _grids(kinds, figures / "grids.png")
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def layers_at(row: Row, goal: float) -> int | None:
    """Layers with which a run has first had that validation accuracy; None if it never had."""
    return next((point[_LAYERS] for point in row["result"]["curve"] if point[_ACCURACY] >= goal), None)


def _by_seed(rows: Sequence[Row]) -> dict[int, Row]:
    return {row["settings"]["seed"]: row for row in rows}


def _ends(kinds: dict[str, list[Row]]) -> str:
    uniform, lines = _by_seed(kinds["uniform"]), []
    for kind, rows in kinds.items():
        own = [row for row in rows if row["settings"]["seed"] in uniform]
        goals = [uniform[row["settings"]["seed"]]["result"] for row in own]
        gains = [a - 100 * goal["val_accuracy"] for a, goal in zip(accuracies(own), goals, strict=True)]
        saved = [
            100 * (1 - row["result"]["num_layers"] / goal["num_layers"]) for row, goal in zip(own, goals, strict=True)
        ]
        reached = [layers_at(row, goal["val_accuracy"]) for row, goal in zip(own, goals, strict=True)]
        found = [layers for layers in reached if layers is not None]
        lines.append(
            [
                f"{kind} ({len(own)})",
                _mean([row["result"]["num_layers"] for row in own], 1),
                f"{np.mean(saved):.0f} %",
                _mean([row["result"]["num_parameters"] for row in own], 0),
                _mean([row["result"]["work"] for row in own], 0),
                _mean(accuracies(own), 2),
                f"{Summary.of(gains).mean:+.2f} ± {Summary.of(gains).half_width:.2f}",
                f"{sum(gain >= 0 for gain in gains)} of {len(gains)}",
                f"{np.mean(found):.0f} ({len(found)} of {len(reached)})" if found else "never",
            ]
        )
    head = ["run (seeds)", "layers", "fewer by", "parameters", "work units", "validation accuracy (%)"]
    head += ["less uniform, 95 %", "at least as good", "layers when first as good as uniform's end"]
    return table(head, lines)


def _mean(values: Sequence[float], digits: int) -> str:
    found = Summary.of(values)
    return f"{found.mean:.{digits}f} ± {found.deviation:.{digits}f}"


def _seeds(kinds: dict[str, list[Row]]) -> str:
    own = {kind: _by_seed(rows) for kind, rows in kinds.items()}
    lines = []
    for seed in own["uniform"]:
        cells = [each[seed]["result"] if seed in each else None for each in own.values()]
        lines.append(
            [str(seed)]
            + [f"{100 * cell['val_accuracy']:.2f} % ({cell['num_layers']})" if cell else "-" for cell in cells]
        )
    return table(["seed: accuracy (layers)", *own], lines)


def _over_work(kinds: dict[str, list[Row]], path: Path) -> None:
    """Mean validation accuracy of the runs of each kind over the work, counted in updates of the uniform network."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for kind, rows in kinds.items():
        # Work of a run is counted in units of its own finest network.
        scales = [row["result"]["work"] / max(row["result"]["curve"][-1][_WORK], 1e-12) for row in rows]
        last = min(row["result"]["work"] for row in rows)
        units = np.linspace(0.0, last, 200)
        curves = []
        for row, scale in zip(rows, scales, strict=True):
            work = [scale * point[_WORK] for point in row["result"]["curve"]]
            curves.append(np.interp(units, work, [100 * point[_ACCURACY] for point in row["result"]["curve"]]))
        axes.plot(units, np.mean(curves, 0), color=KINDS[kind], linewidth=1.6, label=kind)
    clean(axes, "work units, counted")
    axes.set_ylabel("validation accuracy (%)")
    axes.set(xlim=(0, None), ylim=(max(0.0, min(np.mean(accuracies(rows)) for rows in kinds.values()) - 10), 100))
    axes.legend(loc="lower right", frameon=False)
    save(figure, path)


def _over_size(kinds: dict[str, list[Row]], path: Path) -> None:
    """Validation accuracy at the end over the number of parameters: a dot for each run, the mean larger."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for kind, rows in kinds.items():
        sizes, values = [row["result"]["num_parameters"] for row in rows], accuracies(rows)
        axes.plot(sizes, values, ".", color=KINDS[kind], alpha=0.6)
        # As many layers as the adaptive run: one mean must not hide the other.
        face = "none" if kind == "even" else KINDS[kind]
        style = {"markersize": 11 if kind == "even" else 8, "markerfacecolor": face, "markeredgewidth": 2}
        axes.plot(np.mean(sizes), np.mean(values), "o", color=KINDS[kind], label=kind, **style)
    clean(axes, "parameters")
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(loc="lower right", frameon=False)
    save(figure, path)


def _grids(kinds: dict[str, list[Row]], path: Path) -> None:
    """Where the adaptive runs have put their layers: a row for each seed, the darker the shorter the step."""
    rows = kinds.get("adaptive", [])
    figure = Figure(figsize=(6.4, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    finest = [row["result"]["grids"][-1] for row in rows]
    sizes = sorted({round(size, 9) for grid in finest for size in grid}, reverse=True)
    colors = dict(zip(sizes, depth_colors(len(sizes)), strict=True)) if sizes else {}
    for place, grid in enumerate(finest):
        starts = np.concatenate([[0.0], np.cumsum(grid)[:-1]])
        shades = [colors[round(size, 9)] for size in grid]
        axes.barh([place] * len(grid), grid, left=starts, height=0.7, color=shades, edgecolor="white", linewidth=0.6)
    clean(axes, "depth t")
    axes.set_yticks(
        range(len(rows)), [f"seed {row['settings']['seed']}, {row['result']['num_layers']} layers" for row in rows]
    )
    save(figure, path)
