"""Nested and non-nested training, each with the best of the same settings, and then both on seeds of their own.

This project's initial weights and regularization were searched for with nested runs alone (EXPERIMENTS.md), so that
non-nested runs with them are not at their best. Here either method has the same candidates and the same seeds to be
tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from studies.rows import Row, accuracies, table, where
from studies.statistics import Summary
from studies.study import Result, Settings
from xbraid_py.recipes.options.classification import ClassificationOptions

NAMES = ("opening", "layers", "classification", "tikhonov", "ddt", "memory")
DEFAULT = (1.0, 0.1, 0.05, 1e-5, 1e-5, 10)
# Magnitudes of the initial weights, regularization, pairs of L-BFGS: those of that search, and the last three in the
# place of trials that non-nested runs cannot make (an interpolation) or that there is no option for any more.
CANDIDATES = (
    (1.0, 0.01, 0.1, 1e-6, 0.0, 10),
    (1.0, 0.01, 0.1, 1e-5, 0.0, 10),
    (1.0, 0.01, 0.1, 1e-5, 1e-4, 10),
    (1.0, 0.0, 0.0, 1e-6, 0.0, 10),
    (1.0, 0.1, 1.0, 1e-6, 0.0, 10),
    (1.0, 0.3, 0.1, 1e-6, 0.0, 10),
    (1.0, 0.1, 0.1, 1e-6, 0.0, 10),
    (1.0, 0.1, 0.1, 1e-5, 0.0, 10),
    (1.0, 0.1, 0.1, 1e-5, 1e-5, 10),
    DEFAULT,
    (1.0, 0.1, 0.0, 1e-5, 1e-5, 10),
    (1.0, 0.05, 0.05, 1e-5, 1e-5, 10),
    (1.5, 0.1, 0.1, 1e-5, 1e-5, 10),
    (1.0, 0.1, 0.1, 1e-4, 1e-4, 10),
    (1.0, 0.1, 0.1, 1e-4, 0.0, 10),
    (1.0, 0.1, 0.1, 1e-5, 0.0, 20),
    (1.0, 0.2, 0.2, 1e-5, 0.0, 10),
    (1.0, 0.1, 0.3, 1e-5, 0.0, 10),
    (0.5, 0.1, 0.05, 1e-5, 1e-5, 10),
    (1.0, 0.1, 0.05, 1e-5, 1e-4, 10),
    (1.0, 0.3, 0.05, 1e-4, 1e-4, 10),
)
TUNING, FRESH = range(100, 104), 200  # seeds: of the tuning at width 8, and the first of those that are compared
RUNS = ("nested", "non-nested")
_CHANGE = {"regime": "ours", "change": "tuned alike"}


def trials(common: Settings) -> list[Settings]:
    """The runs that tune."""
    found = []
    for seed, candidate, run in product(TUNING, CANDIDATES, RUNS):
        found.append({**_CHANGE, **_named(candidate), "width": 8, "run": run, **common, "seed": seed})
    return found


def fresh(common: Settings, rows: Mapping[str, Result], seeds: int) -> list[Settings]:
    """The runs that are compared: either method with the best for it, and with the defaults."""
    best = {run: best_of(rows.values(), run) for run in RUNS}
    found = []
    for seed, width, run in product(range(FRESH, FRESH + seeds), (8, 5), RUNS):
        for candidate in dict.fromkeys((best[run], DEFAULT)):
            found.append({**_CHANGE, **_named(candidate), "width": width, "run": run, **common, "seed": seed})
    return found


def applied(options: ClassificationOptions, settings: Settings) -> ClassificationOptions:
    """The options with the candidate that the settings have."""
    return replace(
        options,
        initial=replace(options.initial, **{name: settings[name] for name in NAMES[:3]}),
        regularization=replace(options.regularization, **{name: settings[name] for name in NAMES[3:5]}),
        optim=replace(options.optim, memory=settings["memory"]),
    )


def best_of(rows: Sequence[Row], run: str) -> tuple:
    """The candidate with the highest mean accuracy on the seeds of the tuning; one that failed anywhere is none."""
    means = {}
    for candidate in CANDIDATES:
        chosen = where(rows, run=run, **_CHANGE, **_named(candidate))
        chosen = [row for row in chosen if row["settings"]["seed"] in TUNING]
        good = chosen and all("result" in row for row in chosen)
        means[candidate] = Summary.of(accuracies(chosen)).mean if good else float("-inf")
    return max(means, key=means.__getitem__)


def _named(candidate: tuple) -> dict[str, float]:
    return dict(zip(NAMES, candidate, strict=True))


def section(rows: Sequence[Row]) -> list[str]:
    """The part of the page."""
    tried = [row for row in rows if row["settings"]["seed"] in TUNING]
    parts = ["## Both methods tuned alike"]
    lines = []
    for candidate in CANDIDATES:
        both = [where(tried, run=run, **_named(candidate)) for run in RUNS]
        cells = [_spread(accuracies([row for row in chosen if "result" in row])) for chosen in both]
        lines.append([", ".join(f"{each:g}" for each in candidate), *cells])
    head = [", ".join(NAMES), *RUNS]
    parts.append(f"Trials: validation accuracy in per cent, width 8, seeds {TUNING[0]} to {TUNING[-1]}.")
    parts.append(table(head, lines))
    best = {run: best_of(tried, run) for run in RUNS}
    compared = [row for row in rows if row["settings"]["seed"] >= FRESH]
    lines = []
    for width in sorted({row["settings"]["width"] for row in compared}, reverse=True):
        for name, kinds in (("each tuned", best), ("defaults", dict.fromkeys(RUNS, DEFAULT))):
            pairs = pairs_of(compared, width, kinds)
            if pairs:
                both = list(zip(*pairs, strict=True))
                gain, cells = advantage(*both), [_spread(accuracies(each)) for each in both]
                interval = f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
                lines.append([f"{width}, {name}", *cells, interval, f"{len(pairs)}"])
    if lines:
        said = "; ".join(f"{run}: {', '.join(f'{each:g}' for each in best[run])}" for run in RUNS)
        parts.append(f"Best: {said}. On seeds {FRESH} and on:")
        parts.append(table(["width", *RUNS, "nested less non-nested (95 %)", "seeds"], lines))
    return parts


def pairs_of(rows: Sequence[Row], width: int, kinds: Mapping[str, tuple]) -> list[tuple[Row, Row]]:
    """Nested and non-nested runs of one seed that were not tuned on it, each method with its candidate."""
    rows = [row for row in rows if row["settings"]["seed"] >= FRESH and "result" in row]
    nested, other = (
        {row["settings"]["seed"]: row for row in where(rows, width=width, run=run, **_named(kinds[run]))}
        for run in RUNS
    )
    return [(nested[seed], other[seed]) for seed in sorted(nested.keys() & other.keys())]


def advantage(nested: Sequence[Row], other: Sequence[Row]) -> Summary:
    """Points of accuracy that nested runs are ahead, seed by seed."""
    return Summary.of([a - b for a, b in zip(accuracies(nested), accuracies(other), strict=True)])


def _spread(values: Sequence[float]) -> str:
    found = Summary.of(values) if values else None
    return f"{found.mean:.2f} ± {found.deviation:.2f} ({found.count})" if found else "-"
