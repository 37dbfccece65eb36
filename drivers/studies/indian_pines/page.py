"""Table and pictures of the study of nested iteration on a scene (paper 001, figure 5), from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from studies.rows import SECONDS, WORK, Row, accuracy_at, table, where, work_unit
from studies.statistics import Summary
from studies.study import PAGE
from xbraid_py.recipes.pictures.curves import depth_colors
from xbraid_py.recipes.pictures.style import RED, clean, save, scene_map

_UNITS = (10, 25, 50, 75, 100, 150, 200, 250, 300, 350)


def write(rows: Sequence[Row], out: Path, names: Sequence[str], truth: np.ndarray) -> None:
    """Write `study.md`, and the pictures in `figures`.

    Parameters
    ----------
    rows : sequence of dict
        Of `studies.study.Study.run`; failed runs are counted and left out.
    out : Path
    names : sequence of str
        Of the classes.
    truth : (rows, columns) int array
        Ground truth, -1 where there is none.
    """
    good = [row for row in rows if "result" in row]
    parts = [f"{len(good)} runs, {len(rows) - len(good)} failed."]
    pixels = {"random": "pixels drawn at random", "published": "the published pixels"}
    for (split, propagation), chosen in by_kind(good).items():
        suffix = ""
        if (split, propagation) != ("random", "exact"):
            seeds = ", ".join(map(str, sorted({row["settings"]["seed"] for row in chosen})))
            ranks = ", ".join(map(str, sorted({row["result"]["ranks"] for row in chosen})))
            parts.append(f"# {propagation}, {pixels[split]}: seeds {seeds}, {ranks} rank(s)")
            suffix = f"_{split}_{propagation}"
        parts += _sections(chosen, out / "figures", suffix, names, truth)
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def by_kind(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by their pixels and their propagation, which are only said where they are not the usual ones."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kind = row["settings"].get("split", "random"), row["settings"].get("propagation", "exact")
        found.setdefault(kind, []).append(row)
    return found


def _sections(good: Sequence[Row], figures: Path, suffix: str, names: Sequence[str], truth: np.ndarray) -> list[str]:
    """Tables of the runs of one split and one propagation; their pictures have names of their own."""
    parts = []
    single = where(good, run="non-nested")
    schedules = sorted({tuple(row["settings"]["updates"]) for row in where(good, run="nested")})
    kinds = {f"nested {_said(updates)}": where(good, run="nested", updates=list(updates)) for updates in schedules}
    kinds |= {"non-nested": single} if single else {}
    if kinds:
        parts += ["## At the end", _ends(kinds), "## By class", _classes(kinds, names)]
    if single and schedules:
        # A unit of a seed's own, as seeds may have run beside different other work.
        units = {row["settings"]["seed"]: work_unit([row]) for row in single}
        parts += ["## Over work units, counted layer steps", _over_work(kinds, WORK, dict.fromkeys(units, 1.0))]
        parts += ["## Over work units, wall-clock time", _over_work(kinds, SECONDS, units)]
        _curves(schedules, kinds, units, figures / f"accuracy_over_work{suffix}.png")
    for name, chosen in kinds.items():
        drawn = next((row for row in chosen if row["result"]["classes"]), None)
        if drawn:
            classes = np.array(drawn["result"]["classes"]).reshape(truth.shape)
            path = figures / f"classes_{name.replace(' ', '_').replace('/', '-')}{suffix}.png"
            scene_map(classes, truth, names, path)
    return parts


def _said(updates: Sequence[int]) -> str:
    return "/".join(map(str, updates))


def _mean(values: Sequence[float], factor: float = 100.0, digits: int = 2) -> str:
    found = Summary.of([factor * value for value in values])
    return f"{found.mean:.{digits}f} ± {found.deviation:.{digits}f}"


def _ends(kinds: dict[str, list[Row]]) -> str:
    lines = []
    for name, chosen in kinds.items():
        results = [row["result"] for row in chosen]
        scores = [result["scores"] for result in results]
        lines.append(
            [
                f"{name} ({len(chosen)})",
                _mean([score["overall_accuracy"] for score in scores]),
                _mean([score["average_accuracy"] for score in scores]),
                _mean([score["kappa"] for score in scores], 1.0, 4),
                _mean([result["train_accuracy"] for result in results]),
                _mean([result["work"] for result in results], 1.0, 1),
                _mean([result["seconds"] for result in results], 1.0, 0),
            ]
        )
    head = [
        "run (seeds)",
        "overall accuracy (%)",
        "average (%)",
        "kappa",
        "training (%)",
        "layer steps (units)",
        "seconds",
    ]
    return table(head, lines)


def _classes(kinds: dict[str, list[Row]], names: Sequence[str]) -> str:
    lines = []
    for number, name in enumerate(names):
        cells = [[row["result"]["scores"]["class_accuracy"][number] for row in chosen] for chosen in kinds.values()]
        lines.append([name, *(_mean(values, digits=1) if None not in values else "-" for values in cells)])
    return table(["accuracy (%)", *kinds], lines)


def _over_work(kinds: dict[str, list[Row]], place: int, seeds: dict[int, float]) -> str:
    """`seeds` has the unit of each seed."""
    lines = []
    for units in _UNITS:
        cells = []
        for chosen in kinds.values():
            own = [(row, seeds[row["settings"]["seed"]]) for row in chosen if row["settings"]["seed"] in seeds]
            running = [(row, unit) for row, unit in own if row["result"]["curve"][-1][place] >= (units - 1) * unit]
            found = [accuracy_at(row, units, unit, place) for row, unit in running]
            cells.append(_mean(found, 1.0, 1) if found else "over")
        lines.append([f"{units} work units", *cells])
    return table(["validation accuracy (%) after", *kinds], lines)


def _curves(
    schedules: Sequence[tuple[int, ...]], kinds: dict[str, list[Row]], seeds: dict[int, float], path: Path
) -> None:
    """A row of panels for every schedule: the nested runs colored by depth, the non-nested ones red."""
    figure = Figure(figsize=(10.5, 3.2 * len(schedules)), layout="constrained")
    panels = figure.subplots(len(schedules), 2, sharex="col", sharey=True, squeeze=False)
    for (updates, line), (column, place) in product(zip(schedules, panels, strict=True), enumerate((SECONDS, WORK))):
        axes = line[column]

        def curve(row: Row, place: int = place) -> list[tuple[float, float, int]]:
            unit = seeds.get(row["settings"]["seed"], 1.0) if place == SECONDS else 1.0
            return [(p[place] / unit, 100 * p[5], p[1]) for p in row["result"]["curve"]]

        for row in kinds["non-nested"]:
            points = [point[:2] for point in curve(row)]
            axes.plot(*zip(*points, strict=True), color=RED, linewidth=1.1, label="non-nested")
        for row in kinds[f"nested {_said(updates)}"]:
            depths = sorted({depth for *_, depth in curve(row)})
            for depth, color in zip(depths, depth_colors(len(depths)), strict=True):
                points = [point[:2] for point in curve(row) if point[2] == depth]
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.1, label=f"{depth} layers")
        how = "wall-clock time" if place == SECONDS else "counted"
        clean(axes, f"work units, {how}" if updates == schedules[-1] else "")
        axes.set(title=f"nested: {_said(updates)} updates", ylim=(40, 85))
        axes.set_xlim(left=0)
        if column == 0:
            axes.set_ylabel("validation accuracy (%)")
            handles, labels = axes.get_legend_handles_labels()
            chosen = dict(zip(labels, handles, strict=True))
            axes.legend(chosen.values(), chosen.keys(), loc="lower right", frameon=False)
    save(figure, path)
