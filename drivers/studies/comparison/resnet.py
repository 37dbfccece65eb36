"""Paper 003, multi-level residual networks: its tables and figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import torch

from studies.comparison.line import Line, near, source
from studies.comparison.quoted import cells, kept
from studies.multi_level.page import figures
from studies.multi_level.tables import PAPER
from studies.rows import where
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
    yield Line("figure 9: learning rates", "0.5 to 0.001 are best")
    yield Line("figure 10: learning rate begun anew", "better than one cosine")
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
