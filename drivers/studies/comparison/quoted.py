"""Figures that sentences of the pages stand on, computed from the rows that are kept in `benchmarks/results`."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from studies.mgopt.rows import groups as by_settings
from studies.mgopt.rows import points, ratios, reached, speedup, words
from studies.nested.page import grouped
from studies.rows import SECONDS, WORK, Row, accuracy_at, paired, where, work_unit
from studies.width.rows import merit
from studies.width.rows import words as width_words
from xbraid_py.multilevel import Schedule

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
GROUPS = [(regime, width) for regime in ("paper", "ours", "defaults") for width in (8, 5)]
FROM, TO = 20, 188  # work units: of the first network, and of a whole non-nested run
# The method of paper 000 on circles and MNIST, as settings of its rows.
_MGOPT = {"schedule": None, "metric": "euclidean", "method": "gd", "keep": True, "carry_momentum": 0.0}
_MGOPT |= {"restriction": "inject", "interpolation": "constant", "search": False}
_MGOPT |= {"fine_moves": "all", "coarse_moves": "all", "full_multigrid": 0, "num_layers": 2048}
CIRCLES = {"problem": "circles", "learning_rate": 0.1, "beta": 1e-4, "sampling": "balanced", **_MGOPT}
MNIST = {"problem": "mnist", "learning_rate": 0.01, "goal": 1.0, **_MGOPT}
_PEAKS = {"problem": "peaks", "method": "momentum", "metric": "euclidean", "keep": True}


@cache
def kept(name: str) -> tuple[Row, ...]:
    """The rows of a file in `RESULTS`, for all to share."""
    with gzip.open(RESULTS / name, "rt") as file:
        return tuple(map(json.loads, file))


def later(name: str) -> tuple[Row, ...]:
    """The rows of a file that a long run will leave; none before it has."""
    return kept(name) if (RESULTS / name).exists() else ()


def mgopt(file: Sequence[Row] | None = None, **wanted: object) -> list[Row]:
    """Rows of MG/OPT with these settings, without those of the seeds that learning rates were tuned on."""
    found = kept("mgopt/runs.jsonl.gz") if file is None else file
    rows = [{**row, "settings": words(row["settings"])} for row in found]
    return [row for row in where(rows, **wanted) if row["settings"]["seed"] < 100]


def nested(regime: str, width: int) -> list[Row]:
    """Rows of figure 3 of paper 001."""
    rows = [row for row in kept("nested/peaks_runs.jsonl.gz") if "change" not in row["settings"]]
    return where([grouped(row) for row in rows if row["settings"]["layers"] <= 0.1], regime=regime, width=width)


def width_rows(name: str) -> list[Row]:
    """Rows of multilevel training in width."""
    return [{**row, "settings": width_words(row["settings"])} for row in later(f"width/{name}.jsonl.gz")]


def cells(page: str, first: str) -> list[str]:
    """The cells of the first row of a table of a page in `RESULTS` that begins so."""
    lines = (RESULTS / page).read_text(encoding="utf-8").splitlines()
    return [
        cell.strip() for cell in next(line for line in lines if line.startswith(f"| {first} |")).strip("| ").split("|")
    ]


def behind(rows: Sequence[Row], place: int) -> tuple[float, int]:
    """By how many points the mean of the nested runs is behind at most, and after how many of the units from 20 on."""
    unit = work_unit(rows) if place == SECONDS else 1.0
    apart = [
        fmean(paired(rows, lambda row, units=units: accuracy_at(row, units, unit, place)))
        for units in range(FROM, TO + 1)
    ]
    return -min(apart), sum(each < 0 for each in apart)


def times(rows: Sequence[Row], field: str) -> float:
    """What nested runs take over what the others do."""
    nested_sum, other = (sum(row["result"][field] for row in where(rows, run=run)) for run in ("nested", "non-nested"))
    return nested_sum / other


def losses() -> list[tuple[float, float]]:
    """Mean training losses of the last epoch before a refinement and of the first after it, over the seeds."""
    curves = [row["result"]["curve"] for row in where(kept("multi_level/runs.jsonl.gz"), model="multilevel")]
    firsts = [number for number in range(1, len(curves[0])) if curves[0][number][1] != curves[0][number - 1][1]]
    return [(fmean(c[n - 1][3] for c in curves), fmean(c[n][3] for c in curves)) for n in firsts]


def quoted() -> Iterator[tuple[str, str, str]]:
    """Page, what it says, and the figures."""
    for place, how in ((WORK, "counted layer steps"), (SECONDS, "wall-clock time, the paper's unit")):
        found = [(*group, *behind(nested(*group), place)) for group in GROUPS]
        said = ", ".join(f"{regime} {width}: {most:.1f} ({units})" for regime, width, most, units in found)
        yield (
            "nested",
            f"points that the mean of nested runs is behind at most (after how many of units {FROM} to {TO}), by {how}",
            said,
        )
    for field, how in (("work", "layer steps"), ("seconds", "seconds")):
        found = [times(nested(*group), field) for group in GROUPS]
        yield "nested", f"{how} of a nested run over those of a non-nested one", f"{min(found):.2f} to {max(found):.2f}"
    yield (
        "multi_level",
        "training loss before and after a refinement",
        "; ".join(f"{a:.2f} to {b:.2f}" for a, b in losses()),
    )
    first, last = (float(cells("multi_level/lesion.md", name)[5]) for name in ("2-2-2, h = 1", "8-8-8, h = 0.25"))
    yield (
        "multi_level",
        "mean norm of F, 6 blocks and 24 with h d = 6",
        f"{first:.1f} and {last:.1f}, {100 * (last / first - 1):+.0f} %",
    )
    tuned = [row for row in width_rows("runs") if row["settings"]["seed"] >= 100]
    for name, wanted in (("SGD, one level", {"levels": 1}), ("most steps on the coarse level", {"coarse_steps": 32})):
        rates = by_settings(where(tuned, method="sgd", **wanted), "learning_rate")
        merits = ", ".join(f"{rate:g}: {merit(rows, 1000.0):.2e}" for (rate,), rows in rates.items())
        yield "width", f"{name}: L2 of the learning rates tried, 1,000 units, 2 seeds", merits
    steps = 4  # minibatches of a smoothing: on the fine network there are two of them, and as many for tau as one has
    units = f"{6 * steps - 10 * steps / 4:g}, {3 * steps}"
    yield "width", "work units of a cycle of two levels (eq. 40), those on the fine network", units
    single = mgopt(levels=1, **MNIST)
    at = [max(p["val_accuracy"] for p in points(row) if p["cycle"] <= 460) for row in single]
    best = [max(p["val_accuracy"] for p in points(row)) for row in single]
    yield (
        "mgopt",
        f"MNIST, one level, rate 0.01, {len(single)} seeds: highest accuracy within 460 and 1,000 minibatches of 1,000",
        f"{100 * fmean(at):.1f} %, {100 * fmean(best):.1f} %",
    )
    momentum, carried = (
        reached(mgopt(levels=levels, carry_momentum=share, learning_rate=0.2, **_PEAKS), 0.8)
        for levels, share in ((1, 0.0), (4, 1.0))
    )
    each = ratios(momentum, carried, "work")
    said = f"{speedup(momentum, carried, 'work')}, {sum(ratio > 1 for ratio in each)} of {len(each)}"
    yield "mgopt", "peaks, momentum carried between levels: speed-up to 80 % over one level, seeds ahead", said
    yield (
        "README",
        "layers of the coarsest network of circles: 2048 blocks, 8 levels",
        str(2048 // 2 ** (Schedule.of_paper(8).levels - 1)),
    )
    text = (RESULTS / "sweeps.md").read_text(encoding="utf-8")
    found = json.loads(re.search(r'^{"benchmark": "sweeps".*', text, re.M)[0])["figures"]
    said = [f"{found[name]:.2f} ({found[f'{name}_worst']:.2f})" for name in ("forward", "adjoint")]
    yield "README", "fine sweeps a solve, forward and adjoint: median over 5 seeds (worst)", ", ".join(said)
