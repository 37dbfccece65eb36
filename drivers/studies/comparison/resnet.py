"""Paper 003, multi-level residual networks: its tables and figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import torch

from studies.comparison.line import Line, near, source
from studies.comparison.quoted import cells, kept, later
from studies.multi_level.page import figures
from studies.multi_level.tables import PAPER
from studies.rows import Row, where
from studies.statistics import Summary
from xbraid_py.layers.image_resnet import ImageResNet


def paper_003() -> Iterator[Line]:
    """Multi-level residual networks."""
    study = source("multi_level_study.py", "multi_level/runs.jsonl.gz")
    size = "5,000 of 50,000 images, 8 x 8 pixels in the first stage, 112 epochs of 160"
    rows = list(kept("multi_level/runs.jsonl.gz"))
    ours = figures(rows)
    yield Line(
        "table 2, two interpolations: time saved in theory",
        "42 %",
        f"{100 * ours['work_saved']:.2f} % of the block evaluations",
        "cycles of 42/35/35 epochs, counted in runs",
        "5",
        study,
        ours["work_saved"] >= 0.9 * 0.42,
    )
    names = {"first": "ResNet-14", "last": "ResNet-50", "multilevel": "ResNet-50-i"}
    for model, name in names.items():
        error = Summary.of([100 * row["result"]["val_error"] for row in where(rows, model=model)])
        theirs = PAPER[name][0][0]
        yield Line(
            f"table 3, CIFAR-10, {name}: test error",
            f"{theirs:.2f} %",
            f"{error.mean:.2f} ± {error.deviation:.2f} %",
            size,
            f"{error.count}",
            study,
            near(error.mean, theirs),
        )
    last = {row["settings"]["seed"]: row["result"] for row in where(rows, model="last")}
    pairs = [(row["result"], last[row["settings"]["seed"]]) for row in where(rows, model="multilevel")]
    apart = Summary.of([100 * (a["val_error"] - b["val_error"]) for a, b in pairs])
    saved = Summary.of([100 * (1 - a["seconds"] / b["seconds"]) for a, b in pairs])
    yield Line(
        "table 3, CIFAR-10: ResNet-50-i less ResNet-50",
        f"{7.10 - 7.58:+.2f} points: superior or on par",
        f"{apart.mean:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})",
        size,
        "5",
        study,
        apart.low <= 0,
    )
    yield Line(
        "table 3, CIFAR-10: time saved by ResNet-50-i",
        f"{100 * (1 - 67 / 114):.0f} %",
        f"{saved.mean:.1f} ± {saved.deviation:.1f} %",
        size + "; two cores",
        "5",
        study,
        saved.mean >= 0.9 * 100 * (1 - 67 / 114),
    )
    yield from _protocol([row for row in later("multi_level/paper.jsonl.gz") if "result" in row], names)
    yield Line("table 3, CIFAR-10, ResNet-32, -122, -122-i", "7.74, 6.47, 6.56 %")
    yield Line("table 3, CIFAR-100 and STL-10, all six models", "24.36 to 33.34 %")
    yield Line("table 4, all 18 cells", "5.38 to 27.92 %")
    yield _parameters()
    lesion = source("lesion.py (options in multi_level/README.md)", "multi_level/lesion.md")
    few = "CIFAR-10, 5,000 images, 8 x 8 pixels in the first stage, 20 epochs, 6 to 24 blocks"
    norms = [float(cells("multi_level/lesion.md", name)[4]) for name in ("2-2-2, h = 1", "8-8-8, h = 1")]
    yield Line(
        "figure 3: norm of the residual modules over blocks",
        "as the reciprocal: a quarter from 6 blocks to 24",
        f"{norms[1] / norms[0]:.2f} of it",
        few,
        "1",
        lesion,
        near(norms[1] / norms[0], 0.25),
    )
    long = list(later("multi_level/lesion.jsonl.gz"))
    yield from _norms(long)
    if not where(long, blocks=[18] * 3):
        yield Line("figure 4: norms of input and output of ResNet-110", "the modules' are small beside the identity's")
    loss = [row["result"]["curve"] for row in where(rows, model="multilevel")]
    ends = [[100 * fmean(curve[epoch - 1][6] for curve in loss) for epoch in (42, 77, 112)]]
    yield Line(
        "figure 6, CIFAR-10, ResNet-50-i: test error at the ends of the cycles",
        "every cycle ends below the one before",
        ", ".join(f"{each:.1f} %" for each in ends[0]),
        size,
        "5",
        study + "; multi_level/figures/figure6.png",
        all(curve[41][6] > curve[76][6] > curve[111][6] for curve in loss),
    )
    yield Line("figure 6, CIFAR-100 and wide networks", "the same")
    equal = [float(cells("multi_level/lesion.md", name)[5]) for name in ("2-2-2, h = 1", "8-8-8, h = 0.25")]
    yield Line(
        "figure 7: F at three depths with h d the same",
        "the same trend",
        f"mean norm {equal[0]:.1f} and {equal[1]:.1f}: {100 * (equal[1] / equal[0] - 1):+.0f} %",
        few + "; means over the blocks",
        "1",
        lesion,
        0.9 <= equal[1] / equal[0] <= 1.1,
    )
    yield Line("figure 8: curves on STL-10", "every cycle ends below the one before")
    yield from _changes([row for row in later("multi_level/more.jsonl.gz") if "result" in row], size)
    train = [[row["result"]["train_error"] for row in where(rows, model=model)] for model in names]
    yield Line(
        "figure 11: training accuracy, shallow and deep",
        "curves alone; the deep network's is the higher",
        f"{100 * (1 - fmean(train[0])):.1f} and {100 * (1 - fmean(train[1])):.1f} % at the end",
        size,
        "5",
        study,
        max(train[1]) < min(train[0]),
    )


def _protocol(rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Line]:
    """Table 3 by the paper's protocol, on a part of the images."""
    command = source("multi_level_study.py --paper --train_images=10000 ...", "multi_level/paper.jsonl.gz")
    size = "10,000 of 50,000 images, 32 x 32 pixels, 160 epochs, bfloat16 products"
    errors = {}
    for model, name in names.items():
        errors[model] = {row["settings"]["seed"]: 100 * row["result"]["val_error"] for row in where(rows, model=model)}
        if errors[model]:
            found, theirs = Summary.of(list(errors[model].values())), PAPER[name][0][0]
            ours = f"{found.mean:.2f} ± {found.deviation:.2f} %"
            held = near(found.mean, theirs)
            yield Line(
                f"table 3, CIFAR-10, {name}: test error, 32 x 32 pixels",
                f"{theirs:.2f} %",
                ours,
                size,
                f"{found.count}",
                command,
                held,
            )
    apart = [errors["multilevel"][seed] - errors["last"][seed] for seed in errors["multilevel"].keys() & errors["last"]]
    if apart:
        found = Summary.of(apart)
        yield Line(
            "table 3, CIFAR-10: ResNet-50-i less ResNet-50, 32 x 32 pixels",
            f"{7.10 - 7.58:+.2f} points: superior or on par",
            f"{found.mean:+.2f}" + f" ({found.low:+.2f} to {found.high:+.2f})" * (found.count > 1),
            size,
            f"{found.count}",
            command,
            found.low <= 0,
        )


def _changes(rows: Sequence[Row], size: str) -> Iterator[Line]:
    """Figures 9 and 10, and what the paper does not have, beside the multi-level runs that are kept."""
    usual = where(kept("multi_level/runs.jsonl.gz"), model="multilevel")
    base = {row["settings"]["seed"]: row for row in usual}
    kinds: dict[str, list[float]] = {}
    for row in rows:
        seed, settings = row["settings"]["seed"], row["settings"]
        unlike = {n: v for n, v in settings.items() if n in base[seed]["settings"] and v != base[seed]["settings"][n]}
        unlike |= {n: v for n, v in settings.items() if n == "noise"}
        name = ", ".join(f"{each}={value}" for each, value in sorted(unlike.items()))
        if name and settings["model"] == "multilevel":
            error = row["result"]["val_error"] - base[seed]["result"]["val_error"]
            kinds.setdefault(name, []).append(100 * error)
    found = {name: Summary.of(each) for name, each in kinds.items()}
    words = {name: f"{each.mean:+.2f} ({each.low:+.2f} to {each.high:+.2f})" for name, each in found.items()}
    rates = [name for name in found if name.startswith("eta_")]
    for item, paper, chosen in (
        ("figure 9: learning rates", "0.5 to 0.001 are best", rates),
        ("figure 10: learning rate begun anew", "better than one cosine", [n for n in found if n == "reset=False"]),
    ):
        if not chosen:
            yield Line(item, paper)
            continue
        yield Line(
            item,
            paper,
            "points of error more than so: " + "; ".join(f"{name} {words[name]}" for name in chosen),
            size,
            f"{min(found[name].count for name in chosen)}",
            source('multi_level_study.py --parts="[rates, reset]"', "multi_level/more.jsonl.gz"),
            all(found[name].low > 0 for name in chosen),
        )


def _norms(rows: Sequence[Row]) -> Iterator[Line]:
    """Figures 3, 4 and 7 of longer trainings, from what lesions found: [stage, block, norm of Y, norm of h F]."""
    command = source("lesion.py --epochs=160 ...", "multi_level/lesion.jsonl.gz")
    size = "CIFAR-10, 5,000 images, 8 x 8 pixels in the first stage, 160 epochs"
    same = {row["settings"]["blocks"][0]: row for row in where(rows, step_size=1.0)}
    alike = [r for r in rows if abs(r["settings"]["step_size"] * r["settings"]["blocks"][0] - min(same)) < 1e-9]
    means = {depth: fmean(each[3] for each in row["result"]["norms"]) for depth, row in same.items()}
    if len(means) > 1:
        first, last = min(means), max(means)
        yield Line(
            "figure 3, longer, h = 1: norm of the residual modules",
            f"as the reciprocal: {first / last:.2f} of it from {3 * first} blocks to {3 * last}",
            f"{means[last] / means[first]:.2f} of it",
            size,
            "1",
            command,
            near(means[last] / means[first], first / last),
        )
    if 18 in same:
        ratios = [each[3] / each[2] for each in same[18]["result"]["norms"] if each[1] > 0]
        yield Line(
            "figure 4: norms of input and output of ResNet-110",
            "the modules' are small beside the identity's, but for the first block of a stage",
            f"of the others G/Y is {fmean(ratios):.3f} in the mean, {max(ratios):.3f} at most",
            size,
            "1",
            command,
            max(ratios) < 0.5,
        )
    if len(alike) > 1:
        sizes = [
            fmean(each[3] for each in row["result"]["norms"]) / row["settings"]["step_size"]
            for row in sorted(alike, key=lambda row: -row["settings"]["step_size"])
        ]
        yield Line(
            "figure 7, longer: F at several depths with h d the same",
            "the same trend",
            "mean norms " + ", ".join(f"{each:.1f}" for each in sizes),
            size,
            "1",
            command,
            max(sizes) <= 1.1 * min(sizes),
        )


def _parameters() -> Line:
    """Table 5, of the networks themselves."""
    # In print one million has its comma in another place, and the last wide network has no W.
    theirs = {
        1: {2: (172_506, 178_356), 8: (755_802, 761_652), 5: (464_154, 470_004), 20: (1_922_394, 1_928_244)},
        2: {2: (685_994, 697_604), 8: (3_013_802, 3_025_412), 5: (1_849_898, 1_861_508), 20: (7_669_418, 7_681_028)},
    }
    same, count = 0, 0
    for wide, sizes in theirs.items():
        for blocks, numbers in sizes.items():
            for number, classes in zip((*numbers, numbers[0]), (10, 100, 10), strict=True):
                with torch.device("meta"):
                    network = ImageResNet((blocks,) * 3, tuple(wide * each for each in (16, 32, 64)), classes)
                same, count = same + (sum(each.numel() for each in network.parameters()) == number), count + 1
    return Line(
        "table 5: numbers of parameters",
        "172,506 to 7,681,028",
        f"the same in {same} of {count}",
        "the networks of the paper",
        "",
        "counted here; `tests/layers/test_image_resnet.py`",
        same == count,
        True,
    )
