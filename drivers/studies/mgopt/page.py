"""The page of the study of MG/OPT in depth: tables with the numbers of paper 000 beside ours, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from studies.mgopt.rows import MINIBATCHES, Point, best, groups, points, ratios, reached, speedup, spread, words
from studies.rows import Row, table, where
from studies.study import PAGE
from xbraid_py.recipes.pictures.curves import over_cycles

# V-cycles and work units of table 1 by the number of levels, and of table 2 by the schedule. There the work of a cycle
# of the first two rows is swapped in print.
TABLE1 = {
    "circles": {1: (95, 95), 2: (32, 96), 4: (12, 60), 6: (7, 37), 8: (5, 26)},
    "mnist": {1: (460, 460), 2: (152, 456), 4: (55, 275), 6: (33, 173), 8: (28, 145)},
}
TABLE2 = {
    "[1, 1, 1, 1, 1, 1, 1, {1}]": (7, 42),
    "[1, 1, 1, 1, 1, 1, 1, {2}]": (7, 42),
    "[1, 1, 1, 1, 1, 1, 1, {5}]": (6, 36),
    "[1, 1, 1, 1, 1, 1, 1, {10}]": (5, 30),
    "[1, 1, 1, 1, 2, 2, 2, {2}]": (5, 31),
    "[(1), 1, 1, 1, 2, 2, 2, {2}]": (5, 26),
}
_COLUMNS = ("reached", "V-cycles", "work units", "speed-up in work", "seconds", "speed-up in seconds")
_GOALS = {
    "circles": (0.7, 0.8, 0.9, 0.95, 0.98),
    "peaks": (0.6, 0.7, 0.8, 0.9),
    "mnist": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93),
}
_MOVES = {
    ("all", "all"): "all weights on all levels",
    ("ends", "ends"): "residual weights frozen on all levels",
    ("all", "layers"): "coarse levels move only the residual weights",
    ("all", "ends"): "coarse levels move only Q and the head",
    ("layers", "layers"): "Q and the head frozen on all levels",
}


def write(parts: Mapping[str, Sequence[Row]], out: Path) -> None:
    """Write `study.md` and the pictures in `figures`.

    Parameters
    ----------
    parts : mapping of str to sequence of dict
        Rows of the runs of each part, as `studies.study.Study.run` yields them.
    out : Path
    """
    parts = {name: [{**row, "settings": words(row["settings"])} for row in rows] for name, rows in parts.items()}
    failed = sum("failure" in row for rows in parts.values() for row in rows)
    said = [f"{sum(map(len, parts.values()))} runs in {len(parts)} parts, {failed} failed. ± is a standard deviation."]
    for name, rows in parts.items():
        if rows:
            title, section = SECTIONS[name]
            said += [f"## {title}", *section(rows, out / "figures")]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(part for part in said if part) + "\n", encoding="utf-8")


def _cells(rows: Sequence[Row], base: Sequence[Row], goal: float | None = None) -> list[str]:
    """The `_COLUMNS` of one method beside a base."""
    found, others = reached(rows, goal), reached(base, goal)
    return [
        f"{len(found)} of {len(rows)}",
        spread(found, "cycle"),
        spread(found, "work"),
        speedup(others, found, "work"),
        spread(found, "seconds", 2),
        speedup(others, found, "seconds"),
    ]


def _by_levels(rows: Sequence[Row], paper: Mapping[int, tuple[int, int]] | None = None) -> str:
    """A line for each number of levels, the single level being the base."""
    base, lines = where(rows, levels=1), []
    for (levels,), chosen in groups(rows, "levels").items():
        theirs = [f"{number}" for number in paper[levels]] if paper and levels in paper else [""] * 2
        lines.append([f"{levels}", *_cells(chosen, base), *(theirs if paper else [])])
    return table(["levels", *_COLUMNS, *(["paper: V-cycles", "paper: work units"] if paper else [])], lines)


def _table1(rows: Sequence[Row], figures: Path) -> list[str]:
    _figure(rows, lambda settings: f"L = {settings['levels']}", figures / "figure4.png")
    _figure(rows, lambda settings: f"L = {settings['levels']}", figures / "figure4_seconds.png", "seconds")
    return [_by_levels(rows, TABLE1["circles"]), "Pictures of seed 0: `figures/figure4.png`."]


def _figure5(rows: Sequence[Row], figures: Path) -> list[str]:
    said = []
    for (levels,), chosen in groups(rows, "levels").items():
        problem = chosen[0]["settings"]["problem"]
        path = figures / f"figure5_{problem}_{levels}.png"
        _figure(chosen, lambda settings: f"{settings['num_layers']} blocks", path)
        lines, counts = [], []
        for (blocks,), same in groups(chosen, "num_layers").items():
            found = reached(same)
            counts += [mean(point["cycle"] for point in found.values())] if len(found) == len(same) else []
            cells = [f"{len(found)} of {len(same)}", spread(found, "cycle"), spread(found, "work")]
            lines.append([f"{blocks}", *cells, spread(found, "seconds", 2)])
        said.append(f"{levels} levels:")
        said.append(table(["blocks", "reached", "V-cycles", "work units", "seconds"], lines))
        if len(counts) == len(lines):
            said.append(
                f"Most V-cycles over fewest: {max(counts) / min(counts):.2f}. Picture of seed 0: `figures/{path.name}`."
            )
    return said


def _table2(rows: Sequence[Row], figures: Path) -> list[str]:
    lines = []
    for (schedule,), chosen in groups(rows, "schedule").items():
        found = reached(chosen)
        per_cycle = mean(p["work"] / p["cycle"] for p in found.values()) if found else 0.0
        theirs = [f"{number}" for number in TABLE2.get(schedule, ("", ""))]
        cells = [f"{len(found)} of {len(chosen)}", spread(found, "cycle"), f"{per_cycle:.2f}", spread(found, "work")]
        lines.append([f"`{schedule}`", *cells, *theirs])
    head = ["steps", "reached", "V-cycles", "units a cycle", "work units", "paper: V-cycles", "paper: work units"]
    return [table(head, lines)]


def _hyper(rows: Sequence[Row], figures: Path) -> list[str]:
    lines, means = [], []
    for (rate, beta), chosen in groups(rows, "learning_rate", "beta").items():
        single, eight = (reached(where(chosen, levels=levels)) for levels in (1, 8))
        means += [mean(each)] if (each := ratios(single, eight, "work")) else []
        cells = [spread(single, "work"), spread(eight, "work"), spread(eight, "cycle")]
        lines.append([f"{rate:g}, {beta:g}", f"{len(single)}, {len(eight)}", *cells, speedup(single, eight, "work")])
    head = ["rate, beta", "reached (1, 8 levels)", "work, 1 level", "work, 8 levels", "V-cycles, 8 levels", "speed-up"]
    said = [table(head, lines)]
    if len(means) > 1:
        relative = 100 * stdev(means) / mean(means)
        said.append(f"Over the settings: {mean(means):.2f} ± {relative:.1f} %; the paper has 3.54 ± 8.02 %.")
    return said


def _at_goals(rows: Sequence[Row]) -> str:
    """Work units to several accuracies, one column for each number of levels; speed-ups over the single level."""
    kinds, base = groups(rows, "levels"), where(rows, levels=1)
    goals = _GOALS[rows[0]["settings"]["problem"]]
    lines = [[f"{100 * goal:g} %", *(_work_to(chosen, base, goal) for chosen in kinds.values())] for goal in goals]
    return table(["accuracy", *(f"L = {levels}" for (levels,) in kinds)], lines)


def _sampling(rows: Sequence[Row], figures: Path) -> list[str]:
    _figure(rows, lambda settings: f"L = {settings['levels']}", figures / "figure4_square.png")
    return ["Work units to an accuracy [seeds]; speed-up.", _at_goals(rows)]


def _mnist(rows: Sequence[Row], figures: Path) -> list[str]:
    _figure(rows, lambda settings: f"L = {settings['levels']}", figures / "figure4_mnist.png")
    said = ["Work units to an accuracy [seeds]; speed-up.", _at_goals(rows), _at_best(rows)]
    paper = [[f"{levels}", *map(str, numbers)] for levels, numbers in TABLE1["mnist"].items()]
    return [*said, table(["levels", "paper, to 93 %: V-cycles", "paper: work units"], paper)]


def _epochs(rows: Sequence[Row], figures: Path) -> list[str]:
    base, lines = where(rows, levels=1), []
    for (levels,), chosen in groups(rows, "levels").items():
        # A cycle for every minibatch of 1000 images.
        few = chosen[0]["settings"]["num_train"]
        minibatches = max(1, few // 1000) if few else MINIBATCHES
        found = {seed: point | {"epochs": point["cycle"] / minibatches} for seed, point in reached(chosen).items()}
        theirs = TABLE1["mnist"].get(levels, ("", ""))[0]
        cells = [f"{len(found)} of {len(chosen)}", spread(found, "epochs"), f"{theirs}"]
        lines.append([f"{levels}", *cells, *(speedup(reached(base), found, field) for field in ("work", "seconds"))])
    head = ["levels", "reached", "epochs", "paper: V-cycles", "speed-up in work", "speed-up in seconds"]
    return [f"{rows[0]['settings']['num_layers']} blocks.", table(head, lines)]


def _at_best(rows: Sequence[Row]) -> str:
    """Speed-ups at the highest accuracy that the single level reaches, seed by seed."""
    singles = {row["settings"]["seed"]: row for row in where(rows, levels=1) if best(row) > 0}
    if not singles:
        return ""
    lines = []
    for (levels,), chosen in groups(rows, "levels").items():
        base: dict[int, Point] = {}
        found: dict[int, Point] = {}
        for row in chosen:
            seed = row["settings"]["seed"]
            if seed in singles:
                base |= reached([singles[seed]], best(singles[seed]))
                found |= reached([row], best(singles[seed]))
        cells = [spread(found, "work"), speedup(base, found, "work"), speedup(base, found, "seconds")]
        lines.append([f"{levels}", f"{len(found)} of {len(chosen)}", *cells])
    average = 100 * mean(map(best, singles.values()))
    head = ["levels", "reached", "work units", "speed-up in work", "speed-up in seconds"]
    return f"To the highest accuracy of the single level, {average:.2f} % in the mean:\n\n" + table(head, lines)


def _transfers(rows: Sequence[Row], figures: Path) -> list[str]:
    names = ("levels", "restriction", "interpolation", "search")
    lines = []
    for key, chosen in groups(rows, *names).items():
        found = reached(chosen)
        failed = sum("failure" in row for row in chosen)
        cells = [f"{len(found)} of {len(chosen)}", f"{failed}", spread(found, "cycle"), spread(found, "counted_work")]
        lines.append([f"{key[0]}", key[1], key[2], "yes" if key[3] else "no", *cells])
    head = ["levels", "restriction", "interpolation", "line search", "reached", "diverged", "V-cycles", "counted work"]
    return [table(head, lines)]


def _initialization(rows: Sequence[Row], figures: Path) -> list[str]:
    lines = []
    for (levels, cycles), chosen in groups(rows, "levels", "full_multigrid").items():
        without = where(rows, levels=levels, full_multigrid=0)
        cells = [f"{levels}", f"{cycles}"]
        for goal in (0.9, chosen[0]["settings"]["goal"]):
            found, base = reached(chosen, goal), reached(without, goal)
            less = sum(found[seed]["work"] < base[seed]["work"] for seed in found.keys() & base.keys())
            cells += [f"{len(found)} of {len(chosen)}", spread(found, "work"), f"{less}" if cycles else ""]
        lines.append(cells)
    reach = ["{0}: reached", "{0}: work units", "{0}: seeds with less than without"]
    columns = [each.format(goal) for goal in ("90 %", "goal") for each in reach]
    return [table(["levels", "cycles on each level", *columns], lines)]


def _ablation(rows: Sequence[Row], figures: Path) -> list[str]:
    said, free = [], where(rows, fine_moves="all", coarse_moves="all")
    for moves, chosen in groups(rows, "fine_moves", "coarse_moves").items():
        same, pairs = 0, 0
        for (levels,), those in groups(chosen, "levels").items():
            ours, theirs = reached(those), reached(where(free, levels=levels))
            pairs += sum(seed in theirs for seed in ours)
            same += sum(seed in theirs and point["cycle"] == theirs[seed]["cycle"] for seed, point in ours.items())
        said += [f"**{_MOVES.get(moves, moves)}**", _by_levels(chosen)]
        if moves != ("all", "all") and pairs:
            said.append(f"As many V-cycles as with all weights free: in {same} of {pairs} runs.")
    return said


def _methods(rows: Sequence[Row], figures: Path) -> list[str]:
    problem = rows[0]["settings"]["problem"]
    goals, lines = (() if problem == "circles" else _GOALS[problem]), []
    for how, chosen in groups(rows, "method", "metric", "keep", "carry_momentum").items():
        base = where(chosen, levels=1) or where(rows, method=how[0], metric=how[1], levels=1)
        for (levels, rate), those in groups(chosen, "levels", "learning_rate").items():
            name = how[0] + ", L2" * (how[1] == "L2") + ", anew at every visit" * (not how[2])
            name += ", carried between levels" * (how[3] > 0)
            cells = [_work_to(those, base, goal) for goal in goals] if goals else _cells(those, base)
            lines.append([name, f"{levels}", f"{rate:g}", *cells])
    columns = [f"work to {100 * goal:g} %" for goal in goals] if goals else _COLUMNS
    return [
        "Learning rates were tuned on other seeds. Speed-ups are over the single level of the method."
        + " Work units to an accuracy [seeds]; speed-up." * bool(goals),
        table(["method", "levels", "learning rate", *columns], lines),
    ]


def _work_to(rows: Sequence[Row], base: Sequence[Row], goal: float) -> str:
    """Work units to an accuracy [seeds that reach it]; speed-up over a base."""
    found = reached(rows, goal)
    if not found:
        return "-"
    ratio = speedup(reached(base, goal), found, "work")
    times = f"; {ratio}" if ratio and rows[0]["settings"]["levels"] > 1 else ""
    return f"{spread(found, 'work', 0)} [{len(found)} of {len(rows)}]{times}"


def _figure(rows: Sequence[Row], name_of: Callable[[dict], str], path: Path, over: str = "cycle") -> None:
    """Curves of the runs of the first seed."""
    first = min(row["settings"]["seed"] for row in rows)
    curves = {name_of(row["settings"]): points(row) for row in where(rows, seed=first) if points(row)}
    if curves:
        over_cycles(curves, path, over)


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row], Path], list[str]]]] = {
    "table1": ("Circles: numbers of levels (table 1, figure 4)", _table1),
    "figure5": ("Circles: depths (figure 5)", _figure5),
    "table2": ("Circles: steps on the levels (table 2)", _table2),
    "hyper": ("Circles: learning rate and regularization", _hyper),
    "sampling": ("Circles, points uniform in the square", _sampling),
    "transfers": ("Circles: transfers", _transfers),
    "initialization": ("Circles: a start on the coarsest network", _initialization),
    "ablation": ("Circles: which weights may move", _ablation),
    "methods_circles": ("Circles: optimizers of the levels", _methods),
    "methods_peaks": ("Peaks: optimizers of the levels", _methods),
    "mnist": ("MNIST: numbers of levels (table 1, figure 4)", _mnist),
    "mnist_blocks": ("MNIST: depths (figure 5)", _figure5),
    "mnist_epochs": ("MNIST: table 1 to 93 %, a V-cycle of the paper read as an epoch", _epochs),
    "methods_mnist": ("MNIST: optimizers of the levels", _methods),
}
