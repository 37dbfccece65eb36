"""Papers 000 and 001, MG/OPT in depth and nested iteration: their tables and figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from studies.comparison.line import Line, ahead, near, source
from studies.comparison.quoted import CIRCLES, MNIST, kept, later, mgopt, nested, times
from studies.indian_pines.page import by_kind
from studies.mgopt.page import TABLE1, TABLE2
from studies.mgopt.rows import MINIBATCHES, Point, points, ratios, reached, speedup
from studies.mgopt.rows import best as highest
from studies.nested import convergence, tuning
from studies.nested.page import PAPER
from studies.rows import WORK, Row, accuracies, accuracy_at, paired, where, work_unit
from studies.statistics import Summary, deviation_ratio

_EPOCHS = "the paper's V-cycle read as an epoch of 60 minibatches of 1,000, each a V-cycle here"


def paper_000() -> Iterator[Line]:
    """MG/OPT in depth."""
    study = source("mgopt_study.py", "mgopt/runs.jsonl.gz")
    size = "2048 blocks of width 3, 2,000 points, as in the paper"
    drawn = "; of the ways to draw the points the one taken is that of which one level needs the paper's number"
    by_levels = {levels: mgopt(levels=levels, **CIRCLES) for levels in TABLE1["circles"]}
    found = {levels: reached(rows) for levels, rows in by_levels.items()}
    for levels, (cycles, work) in TABLE1["circles"].items():
        ours = [Summary.of([point[name] for point in found[levels].values()]) for name in ("cycle", "work")]
        yield Line(
            f"table 1, circles, L = {levels}",
            f"{cycles} V-cycles, {work} units",
            f"{ours[0].mean:.1f} ± {ours[0].deviation:.1f}, {ours[1].mean:.1f} ± {ours[1].deviation:.1f}",
            size + drawn * (levels == 1),
            f"{len(found[levels])}",
            study,
            len(found[levels]) == len(by_levels[levels]) and near(ours[0].mean, cycles) and near(ours[1].mean, work),
            levels > 1,
        )
    digits = "2048 blocks of width 10, rate 0.01; a V-cycle a minibatch of 1,000 (the paper's: very probably an epoch)"
    images = {levels: mgopt(levels=levels, **MNIST) for levels in TABLE1["mnist"]}
    epochs = mgopt(later("mgopt/epochs.jsonl.gz"), **MNIST | {"goal": 0.93})
    to_93 = {levels: reached(where(epochs, levels=levels)) for levels in TABLE1["mnist"]}
    for levels, (cycles, work) in TABLE1["mnist"].items():
        rows = images[levels]
        if long := where(epochs, levels=levels):
            yield _epochs(levels, long, to_93[levels])
            continue
        yield Line(
            f"table 1, MNIST, L = {levels}",
            f"93 % after {cycles} V-cycles, {work} units",
            f"{100 * fmean(map(highest, rows)):.1f} % after {points(rows[0])[-1]['cycle']:g} V-cycles, "
            f"{points(rows[0])[-1]['work']:g} units",
            digits,
            f"{len(rows)}",
            study,
            any(reached(rows, 0.93)),
            True,
        )
    yield Line(
        "table 1, circles: work of L = 1 over L = 8",
        f"{95 / 26:.2f}",
        speedup(found[1], found[8], "work"),
        size,
        "10",
        study,
        fmean(ratios(found[1], found[8], "work")) >= 0.9 * 95 / 26,
        True,
    )
    goals = {row["settings"]["seed"]: highest(row) for row in images[1]}
    single, eight = ({}, {})
    for seed, goal in goals.items():
        single |= reached(where(images[1], seed=seed), goal)
        eight |= reached(where(images[8], seed=seed), goal)
    to, full = f"to the highest accuracy of L = 1, {100 * fmean(goals.values()):.1f} %, not to 93 %", False
    if each := ratios(to_93[1], to_93[8], "work"):
        single, eight, to, full = to_93[1], to_93[8], f"to 93 %; {_EPOCHS}", True
    each = each or ratios(single, eight, "work")
    yield Line(
        "table 1, MNIST: work of L = 1 over L = 8",
        f"{460 / 145:.2f}, to 93 %",
        speedup(single, eight, "work"),
        to,
        f"{len(each)}",
        study,
        fmean(each) >= 0.9 * 460 / 145,
        full,
    )
    factors = [fmean(ratios(found[1], found[levels], "cycle")) for levels in (2, 4, 8)]
    yield Line(
        "figure 4, circles: fewer V-cycles by 2, 4, 8 levels",
        "3, 8, 15 times",
        ", ".join(f"{factor:.1f}" for factor in factors),
        size,
        "10",
        study + "; mgopt/figures/figure4.png",
        all(1.1 * ours >= paper for ours, paper in zip(factors, (3, 8, 15), strict=True)),
        True,
    )
    to = {levels: reached(rows, 0.8) for levels, rows in images.items()}
    factors = [fmean(ratios(to[1], to[levels], "cycle")) for levels in (2, 4, 8)]
    yield Line(
        "figure 4, MNIST: fewer V-cycles by 2, 4, 8 levels",
        "3, 8, 15 times",
        ", ".join(f"{factor:.1f}" for factor in factors),
        "to 80 %, a V-cycle for each minibatch",
        "5",
        study + "; mgopt/figures/figure4_mnist.png",
        all(1.1 * ours >= paper for ours, paper in zip(factors, (3, 8, 15), strict=True)),
    )
    yield _depths(CIRCLES | {"levels": 6}, "figure 5, circles, 6 levels", study, True)
    yield _depths(MNIST | {"levels": 8, "goal": 0.7}, "figure 5, MNIST, 8 levels", study, False)
    for schedule, (cycles, work) in TABLE2.items():
        rows = mgopt(**CIRCLES | {"schedule": schedule})
        there = reached(rows)
        ours = [Summary.of([point[name] for point in there.values()]) for name in ("cycle", "work")]
        yield Line(
            f"table 2, `{schedule}`",
            f"{cycles} V-cycles, {work} units",
            f"{ours[0].mean:.1f} ± {ours[0].deviation:.1f}, {ours[1].mean:.1f} ± {ours[1].deviation:.1f}",
            size,
            f"{len(there)}",
            study,
            len(there) == len(rows) and near(ours[0].mean, cycles) and near(ours[1].mean, work),
            True,
        )
    base = {name: value for name, value in CIRCLES.items() if name not in ("learning_rate", "beta")}
    means = []
    for rate in (0.05, 0.1, 0.5):
        for beta in (1e-3, 1e-4, 1e-5):
            one, many = (reached(mgopt(levels=n, learning_rate=rate, beta=beta, **base)) for n in (1, 8))
            means.append(fmean(ratios(one, many, "work")))
    over = Summary.of(means)
    yield Line(
        "section 4.1: speed-up over nine settings",
        "3.54 ± 8.02 %",
        f"{over.mean:.2f} ± {100 * over.deviation / over.mean:.1f} %",
        size,
        "10",
        study,
        over.mean >= 0.9 * 3.54,
        True,
    )


def _epochs(levels: int, rows: Sequence[Row], there: dict[int, Point]) -> Line:
    """Table 1 on MNIST to 93 %; a V-cycle of the paper is an epoch, and so is its work unit."""
    cycles, work = TABLE1["mnist"][levels]
    ours = [[point[name] / MINIBATCHES for point in there.values()] for name in ("cycle", "work")]
    least = min(100 * highest(row) for row in rows)
    means = [fmean(each) for each in ours if each]
    return Line(
        f"table 1, MNIST, L = {levels}",
        f"93 % after {cycles} V-cycles, {work} units",
        "{:.1f} epochs, {:.1f} units of as many".format(*means) if means else f"{least:.1f} % at the end",
        f"2048 blocks of width 10, rate 0.01; {_EPOCHS}",
        f"{len(there)} of {len(rows)} arrive",
        source('mgopt_study.py --parts="[mnist_epochs]"', "mgopt/epochs.jsonl.gz"),
        len(there) == len(rows) and near(means[0], cycles) and near(means[1], work),
        True,
    )


def _depths(wanted: dict, item: str, study: str, full: bool) -> Line:
    """Figure 5: the number of V-cycles does not depend on the depth."""
    rows = mgopt(**{name: value for name, value in wanted.items() if name != "num_layers"})
    depths = sorted({row["settings"]["num_layers"] for row in rows})
    there = {depth: reached(where(rows, num_layers=depth)) for depth in depths}
    means = [fmean(point["cycle"] for point in found.values()) for found in there.values()]
    count, over = sum(map(len, there.values())), max(means) / min(means)
    return Line(
        item,
        "the same convergence for all numbers of blocks",
        f"{min(means):.1f} to {max(means):.1f} V-cycles, most over fewest {over:.2f}; {count} of {len(rows)} arrive",
        f"{depths[0]} to {depths[-1]} blocks" + ", to 70 %, cut off at 100 units" * (not full),
        f"{len({row['settings']['seed'] for row in rows})}",
        study,
        count == len(rows) and near(over, 1.0),
        full,
    )


def paper_001() -> Iterator[Line]:
    """Nested iteration."""
    study = source("nested_study.py", "nested/peaks_runs.jsonl.gz")
    size = "64 layers, T = 5, one rank, 4 settings"
    own = "other opening and classification layers, initial weights and solver than the paper's: our defaults"
    for size_of in (5, 8):
        rows = nested("paper", size_of)
        for run in ("nested", "non-nested"):
            ours, theirs = Summary.of(accuracies(where(rows, run=run))), PAPER[size_of, run]
            yield Line(
                f"figure 3, width {size_of}, {run}",
                "mean {} %, median {}, largest {}, least {}, deviation {}".format(*theirs),
                f"{ours.mean:.1f} %, {ours.median:.1f}, {ours.largest:.1f}, {ours.least:.1f}, {ours.deviation:.2f}",
                size,
                "12, 48 runs",
                study,
                ours.mean >= theirs[0] - 1,
                True,
            )
    for size_of in (5, 8):
        a, b = (PAPER[size_of, run] for run in ("nested", "non-nested"))
        for regime, where_from, full in (("paper", size, True), ("defaults", own, False)):
            rows = nested(regime, size_of)
            gain = Summary.of(paired(rows, lambda row: 100 * row["result"]["val_accuracy"]))
            spreads = deviation_ratio(*(accuracies(where(rows, run=run)) for run in ("nested", "non-nested")))
            seconds = f"; {times(rows, 'seconds'):.2f} times the seconds"
            seeds = f"12, {gain.count} pairs"
            yield Line(
                f"figure 3, width {size_of}: nested less non-nested",
                f"+{a[0] - b[0]:.1f} points, in nearly the same time",
                f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})" + seconds,
                where_from,
                seeds,
                study,
                ahead(gain),
                full,
            )
            yield Line(
                f"figure 3, width {size_of}: ratio of the deviations",
                f"{a[4] / b[4]:.2f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*spreads),
                where_from,
                seeds,
                study,
                spreads[2] < 1,
                full,
            )
    for size_of in (5, 8):
        rows = nested("paper", size_of)
        unit = work_unit(rows)
        top = [
            max(where(rows, run=run), key=lambda row: row["result"]["val_accuracy"]) for run in ("nested", "non-nested")
        ]
        apart = [accuracy_at(top[0], n, unit) - accuracy_at(top[1], n, unit) for n in range(1, 189)]
        yield Line(
            f"figure 4, width {size_of}: best runs over work units",
            "nested ahead after any number of units",
            f"behind after {sum(each < 0 for each in apart)} of 188 units, by {-min(apart):.1f} points at most",
            size,
            "best of 48 runs each",
            study + f"; nested/figures/best_paper_{size_of}.png",
            min(apart) >= 0,
            True,
        )
    scene = source(
        "indian_pines_study.py", "nested/indian_pines_runs.jsonl.gz; nested/figures/indian_pines_over_work.png"
    )
    other = "128 layers of width 220; exact propagation on one rank, float32; settings tuned on two of the seeds"
    yield from _figure5(kept("nested/indian_pines_runs.jsonl.gz"), "", other, scene)
    parallel = source('indian_pines_study.py --propagations="[V, lagged]" ...', "nested/indian_pines_parallel.jsonl.gz")
    good = [row for row in later("nested/indian_pines_parallel.jsonl.gz") if "result" in row]
    for (split, propagation), rows in by_kind(good).items():
        how = "V-cycles, 2 iterations and 10 after a refinement" if propagation == "V" else f"{propagation} propagation"
        pixels = {"random": "1,000 random training pixels", "published": "the published sets"}[split]
        ranks = " or ".join(map(str, sorted({row["result"]["ranks"] for row in rows})))
        size = f"128 layers of width 220, 200 bands, float32; {how} on {ranks} ranks; {pixels}; settings of other seeds"
        yield from _figure5(rows, f", {propagation}, {split} pixels", size, parallel)
    yield from _tuned_alike(later("nested/tuned_alike.jsonl.gz"))
    yield from _convergence(later("nested/convergence.jsonl.gz"))
    changed = [row for row in kept("nested/peaks_runs.jsonl.gz") if row["settings"].get("change") == "linear"]
    linear = [accuracies(where(changed, regime=regime)) for regime in ("paper", "ours")]
    alike = [
        accuracies(where(nested(regime, 8), run="nested", layers=1e-6, tikhonov=1e-5)) for regime in ("paper", "ours")
    ]
    apart = [fmean(a) - fmean(b) for a, b in zip(linear, alike, strict=True)]
    yield Line(
        "section 2.2: linear instead of constant interpolation",
        "little influence",
        f"{apart[0]:+.2f} points of accuracy, with our defaults of the solver {apart[1]:+.2f}",
        "width 8; accuracies alone",
        "4 linear, 12 constant",
        study,
        max(map(abs, apart)) <= 1,
    )


def _figure5(rows: Sequence[Row], kind: str, size: str, command: str) -> Iterator[Line]:
    """The accuracy on a scene over counted work units, of both schedules that the rows have."""
    for place, updates in (("top", [200, 100, 50]), ("bottom", [200, 200, 200])):
        pairs = [*where(rows, run="nested", updates=updates), *where(rows, run="non-nested")]
        if not _scene(pairs, 0):
            continue
        last = int(min(row["result"]["work"] for row in where(pairs, run="nested")))
        apart = {n: _scene(pairs, n) for n in range(25, last + 1)}
        lost = [n for n, each in apart.items() if min(each) < 0]
        yield Line(
            f"figure 5, {place}: {'/'.join(map(str, updates))}{kind}",
            "nested ahead after every number of units from 25 on",
            f"ahead by {fmean(apart[25]):.1f} points after 25 counted units, by {fmean(apart[100]):.1f} after 100; "
            f"behind on a seed or more after {len(lost)} of units 25 to {last}, from {min(lost, default=last)} on",
            size,
            f"{len(apart[25])}",
            command,
            not lost,
        )


def _tuned_alike(rows: Sequence[Row]) -> Iterator[Line]:
    """Figure 3 with the best settings of each method."""
    for width in (8, 5) if rows else ():
        pairs = tuning.pairs_of(rows, width, {run: tuning.best_of(rows, run) for run in tuning.RUNS})
        a, b = (PAPER[width, run] for run in tuning.RUNS)
        if not pairs:
            continue
        gain = tuning.advantage(*zip(*pairs, strict=True))
        yield Line(
            f"figure 3, width {width}: nested less non-nested, each tuned",
            f"+{a[0] - b[0]:.1f} points",
            f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})",
            f"our regime; each with the best of {len(tuning.CANDIDATES)} settings on other seeds, at width 8",
            f"{gain.count}",
            source('nested_study.py --parts="[tuned_alike]"', "nested/tuned_alike.jsonl.gz"),
            ahead(gain),
        )


def _convergence(rows: Sequence[Row]) -> Iterator[Line]:
    """Section 2.2, of the solver."""
    found = convergence.pairs_of([row for row in rows if row["settings"]["regime"] == "paper"])
    pairs = [pair for each in found.values() for pair in each]
    if pairs:
        counts = [
            [convergence.iterations(each[solve]) for each in pair] for pair in pairs for solve in convergence.SOLVES
        ]
        constant, linear = (fmean(each) for each in zip(*counts, strict=True))
        depths = sorted({depth for _, _, depth in found})
        yield Line(
            "section 2.2: MGRIT's convergence by linear and by constant interpolation",
            "similar",
            f"{linear:.2f} and {constant:.2f} V-cycles until the residual has fallen by four orders",
            f"the paper's regime, width 8, right after refinements to {', '.join(map(str, depths))} layers",
            f"{len({row['settings']['seed'] for row in rows})}",
            source('nested_study.py --parts="[convergence]"', "nested/convergence.jsonl.gz"),
            near(linear, constant) and near(constant, linear),
            True,
        )


def _scene(rows: Sequence[Row], units: float) -> list[float]:
    """Nested less non-nested accuracy of each seed after so many counted work units."""
    at = {(row["settings"]["run"], row["settings"]["seed"]): accuracy_at(row, units, 1.0, WORK) for row in rows}
    seeds = [seed for run, seed in at if run == "nested" and ("non-nested", seed) in at]
    return [at["nested", seed] - at["non-nested", seed] for seed in seeds]
