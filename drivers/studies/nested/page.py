"""Tables and pictures of the study of nested iteration (paper 001, figures 3 and 4), from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from studies.nested import convergence, tuning
from studies.rows import Row, accuracies, accuracy_at, paired, table, where, work_unit
from studies.statistics import Summary, deviation_ratio
from studies.study import PAGE
from xbraid_py.recipes.pictures.curves import accuracy_over_work
from xbraid_py.recipes.pictures.style import RED, STATE, clean, legend, save

# The paper's figure 3: mean, median, largest, least, standard deviation, in per cent.
PAPER = {
    (5, "nested"): (86.7, 88.0, 97.0, 66.0, 7.69),
    (5, "non-nested"): (85.0, 88.5, 95.0, 20.0, 11.7),
    (8, "nested"): (92.3, 94.0, 99.0, 72.5, 5.18),
    (8, "non-nested"): (90.7, 91.8, 96.5, 57.0, 6.08),
}
_RUNS = ("nested", "non-nested")
_DEFAULT = 0.1  # initial magnitude of the layers
_UNITS = (25, 50, 75, 100, 125, 150, 175)
_GOALS = (0.8, 0.9, 0.95)
_CURVE = ("level", "num_layers", "update", "work", "seconds", "val_accuracy")


def write(rows: Sequence[Row], out: Path) -> None:
    """Write `study.md` and the pictures in `figures` of what there is among the runs.

    Parameters
    ----------
    rows : sequence of dict
        Of `studies.study.Study.run`; failed runs are counted and left out.
    out : Path
    """
    good = [row for row in rows if "result" in row]
    parts = [f"{len(good)} runs, {len(rows) - len(good)} failed."]
    measured = [row for row in good if "refinements" in row["result"]]
    alike = [row for row in rows if _is_tuned(row)]
    good = [row for row in good if "refinements" not in row["result"] and not _is_tuned(row)]
    basic = [grouped(row) for row in good if "change" not in row["settings"] and row["settings"]["layers"] <= _DEFAULT]
    figures = out / "figures"
    found = {(row["settings"]["regime"], row["settings"]["width"]) for row in basic}
    groups = [
        (regime, width) for regime in ("paper", "ours", "defaults") for width in (8, 5) if (regime, width) in found
    ]
    for regime, width in groups:
        chosen = where(basic, regime=regime, width=width)
        parts += [f"## Width {width}, {_regime(regime)}", _figure3(chosen, width), _over_work(chosen)]
        accuracy_over_work(_best(chosen), figures / f"best_{regime}_{width}.png", work_unit(chosen) or None)
    if groups:
        _boxes(basic, groups, figures / "accuracies.png")
        _means(basic, groups, figures / "mean_over_work.png")
    parts += _changes(good) + (convergence.section(measured) if measured else [])
    parts += tuning.section(alike) if alike else []
    if flown := [row for row in good if row["settings"].get("change") in ("every", "no boost")]:
        _refinements(flown, figures / "after_refinement.png")
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _is_tuned(row: Row) -> bool:
    return row["settings"].get("change") == "tuned alike"


def grouped(row: Row) -> Row:
    """Runs from the project's own initial weights are a regime of their own."""
    own = row["settings"]["regime"] == "ours" and row["settings"]["layers"] == _DEFAULT
    return {**row, "settings": {**row["settings"], "regime": "defaults"}} if own else row


def _regime(name: str) -> str:
    names = {"paper": "the paper's regime", "ours": "our regime, the paper's magnitudes", "defaults": "our defaults"}
    return names[name]


def _figure3(rows: Sequence[Row], width: int) -> str:
    samples = {run: accuracies(where(rows, run=run)) for run in _RUNS}
    if not all(samples.values()):
        return ""
    found = {run: Summary.of(values) for run, values in samples.items()}
    names = ("mean", "median", "largest", "least", "deviation")
    lines = []
    for index, name in enumerate(names):
        ours = [f"{getattr(found[run], name):.2f} %" for run in _RUNS]
        theirs = [f"{PAPER[width, run][index]:g} %" if (width, run) in PAPER else "" for run in _RUNS]
        lines.append([name, *ours, *theirs])
    said_by_both = table(["", "nested", "non-nested", "paper: nested", "paper: non-nested"], lines)
    pairs = paired(rows, lambda row: 100 * row["result"]["val_accuracy"])
    gain = Summary.of(pairs)
    ratio, low, high = deviation_ratio(samples["nested"], samples["non-nested"])
    wins = sum(pair > 0 for pair in pairs)
    said = (
        f"{len(pairs)} pairs. Nested less non-nested: {gain.mean:+.2f} points in the mean "
        f"(95 %: {gain.low:+.2f} to {gain.high:+.2f}), nested ahead in {wins}. "
        f"Ratio of the standard deviations: {ratio:.2f} (95 %: {low:.2f} to {high:.2f}). "
        f"A nested run makes {_ratio(rows, 'work'):.2f} times the layer steps of the non-nested one, "
        f"in {_ratio(rows, 'seconds'):.2f} times its seconds."
    )
    if all("square_accuracy" in row["result"] for row in rows):
        square = [100 * np.mean([row["result"]["square_accuracy"] for row in where(rows, run=run)]) for run in _RUNS]
        said += f" On points drawn uniformly from the square: nested {square[0]:.2f} %, non-nested {square[1]:.2f} %."
    return f"{said_by_both}\n\n{said}"


def _ratio(rows: Sequence[Row], field: str) -> float:
    sums = [sum(row["result"][field] for row in where(rows, run=run)) for run in _RUNS]
    return sums[0] / sums[1]


def _over_work(rows: Sequence[Row]) -> str:
    unit = work_unit(rows)
    if not unit or not all(where(rows, run=run) for run in _RUNS):
        return ""
    lines = []
    for units in _UNITS:
        cells = [Summary.of([accuracy_at(row, units, unit) for row in where(rows, run=run)]) for run in _RUNS]
        gain = Summary.of(paired(rows, lambda row, units=units: accuracy_at(row, units, unit)))
        means = [f"{cell.mean:.1f} %" for cell in cells]
        lines.append([f"after {units} work units", *means, f"{gain.mean:+.1f} ± {gain.half_width:.1f}"])
    for goal in _GOALS:
        cells = []
        for run in _RUNS:
            chosen = where(rows, run=run)
            times = [next((p[4] / unit for p in row["result"]["curve"] if p[5] >= goal), np.inf) for row in chosen]
            reached = sum(time < np.inf for time in times)
            median = np.median(times)
            said = f"{median:.0f} units" if median < np.inf else "-"
            cells.append(f"{said} ({reached} of {len(times)})")
        lines.append([f"{100 * goal:.0f} % reached after (median; runs that do)", *cells, ""])
    return table(["mean accuracy", "nested", "non-nested", "difference"], lines)


def _best(rows: Sequence[Row]) -> list[Row]:
    """The best run of either kind as records of updates."""
    found = []
    for run in _RUNS:
        chosen = where(rows, run=run)
        if chosen:
            best = max(chosen, key=lambda row: row["result"]["val_accuracy"])
            found += [
                {"kind": "update", "run": run, **dict(zip(_CURVE, p, strict=True))} for p in best["result"]["curve"]
            ]
    return found


def _boxes(rows: Sequence[Row], groups: Sequence[tuple[str, int]], path: Path) -> None:
    figure = Figure(figsize=(1.9 * len(groups) + 1.6, 4.0), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for place, (regime, width) in enumerate(groups):
        for shift, run, color in ((-0.18, "nested", STATE), (0.18, "non-nested", RED)):
            values = accuracies(where(rows, regime=regime, width=width, run=run))
            if not values:
                continue
            look = {"color": color, "linewidth": 1.2}
            axes.boxplot(
                values,
                positions=[place + shift],
                widths=0.28,
                showfliers=False,
                boxprops=look,
                whiskerprops=look,
                capprops=look,
                medianprops=look,
            )
            jitter = rng.uniform(-0.07, 0.07, len(values))
            label = run if place == 0 else None
            axes.plot(place + shift + jitter, values, ".", color=color, alpha=0.45, markersize=4, label=label)
    clean(axes, "")
    labels = [f"{_regime(regime).replace(', ', chr(10))},\nwidth {width}" for regime, width in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize="small")
    axes.set_ylabel("validation accuracy (%)")
    legend(axes)
    save(figure, path)


def _means(rows: Sequence[Row], groups: Sequence[tuple[str, int]], path: Path) -> None:
    """Mean accuracy over work units, with the middle half of the runs shaded."""
    regimes, widths = list(dict.fromkeys(regime for regime, _ in groups)), sorted({width for _, width in groups})
    figure = Figure(figsize=(3.4 * len(regimes) + 0.4, 3.0 * len(widths)), layout="constrained")
    panels = figure.subplots(len(widths), len(regimes), sharex=True, sharey=True, squeeze=False)
    units = np.arange(1.0, 201.0, 2.0)
    for regime, width in groups:
        axes = panels[widths.index(width), regimes.index(regime)]
        chosen = where(rows, regime=regime, width=width)
        unit = work_unit(chosen)
        for run, color in (("nested", STATE), ("non-nested", RED)) if unit else ():
            curves = np.array([[accuracy_at(row, u, unit) for u in units] for row in where(chosen, run=run)])
            if not len(curves):
                continue
            low, high = np.quantile(curves, (0.25, 0.75), axis=0)
            axes.fill_between(units, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(units, curves.mean(0), color=color, linewidth=1.6, label=f"{run}, mean; shaded: middle half")
        clean(axes, "work units, wall-clock time" if width == widths[-1] else "")
        axes.set_title(f"{_regime(regime)},\nwidth {width}", fontsize="medium")
    for axes in panels[:, 0]:
        axes.set(ylabel="validation accuracy (%)", ylim=(None, 100))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    save(figure, path)


def _changes(rows: Sequence[Row]) -> list[str]:
    """Tables of the runs with one choice made in another way, beside those without."""
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        if settings["width"] == 8 and settings["layers"] > 0 and settings["tikhonov"] == 1e-5:
            name = (settings["regime"], settings.get("change", ""), settings["layers"])
            kinds.setdefault(name, []).append(row)
    if len(kinds) < 2:
        return []
    lines = []
    for (regime, change, layers), chosen in sorted(
        kinds.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])
    ):
        cells = []
        for run in _RUNS:
            values = accuracies(where(chosen, run=run))
            found = Summary.of(values) if values else None
            cells.append(f"{found.mean:.2f} ± {found.deviation:.2f} % ({found.count})" if found else "")
        pairs = paired(chosen, lambda row: 100 * row["result"]["val_accuracy"])
        gain = Summary.of(pairs) if pairs else None
        cells.append(f"{gain.mean:+.2f} ± {gain.half_width:.2f}" if gain else "")
        lines.append([_regime(regime).split(",")[0], change or "as above", f"{layers:g}", *cells])
    head = [
        "regime",
        "choice",
        "initial magnitude",
        "nested: mean ± deviation (runs)",
        "non-nested",
        "difference ± 95 %",
    ]
    return ["## One choice made in another way", "Width 8, Tikhonov 1e-5.", table(head, lines)]


def _refinements(rows: Sequence[Row], path: Path) -> None:
    """Mean accuracy in the first updates after every refinement."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for change, color, label in (
        ("every", STATE, "10 iterations for 3 updates"),
        ("no boost", RED, "always 2 iterations"),
    ):
        curves = []
        for row in where(rows, change=change):
            accuracy = {point[2]: 100 * point[5] for point in row["result"]["curve"]}
            first = row["settings"]["updates"][0]
            second = first + row["settings"]["updates"][1]
            for at in (first, second):
                if at + 12 in accuracy and at - 3 in accuracy:
                    curves.append([accuracy[at + k] - accuracy[at - 1] for k in range(-3, 13)])
        if curves:
            low, high = np.quantile(curves, (0.1, 0.9), axis=0)
            axes.fill_between(range(-3, 13), low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(range(-3, 13), np.mean(curves, 0), color=color, marker=".", label=label)
    clean(axes, "updates after a refinement")
    axes.set_ylabel("change of the accuracy (points)")
    if axes.lines:
        axes.legend(loc="lower right", frameon=False)
    save(figure, path)
