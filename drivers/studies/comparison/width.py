"""Paper 002, multilevel training in width: its tables and figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from studies.comparison.line import Line, near, source
from studies.comparison.quoted import width_rows
from studies.rows import where
from studies.width import page as width
from studies.width.rows import best, ratio


def paper_002() -> Iterator[Line]:
    """Multilevel training in width."""
    study = source("width_study.py", "width/runs.jsonl.gz")
    small = "2,000 samples, 3,000 units; the rate tuned, not 0.01 (9,000 samples, 10,000 units)"
    rows = [row for row in width_rows("runs") if row["settings"]["seed"] < 100 and row["settings"]["method"] == "sgd"]
    kinds = {1: where(rows, levels=1), 2: where(rows, levels=2, steps=4, gamma=0.125)}
    for levels, name in ((1, "SGD"), (2, "two levels")):
        ours = [median(best(row, error, 3000.0) for row in kinds[levels]) for error in ("val_l2", "val_linf")]
        theirs = width.TABLE1[levels][:2]
        yield Line(
            f"table 1, fully connected, {name}: L2, L∞",
            ", ".join(theirs),
            f"{ours[0]:.2e}, {ours[1]:.3f}",
            small,
            f"{len(kinds[levels])}",
            study,
            all(near(a, float(b)) for a, b in zip(ours, theirs, strict=True)),
        )
    found = [ratio(kinds[1], kinds[2], name, 3000.0) for name in ("val_l2", "val_linf")]
    theirs = [float(b) / float(a) for a, b in zip(width.TABLE1[1][:2], width.TABLE1[2][:2], strict=True)]
    yield Line(
        "table 1, figure 3, fully connected: two levels over SGD",
        f"{theirs[0]:.2f}, {theirs[1]:.2f}",
        ", ".join(f"{each.mean:.2f} ({each.low:.2f} to {each.high:.2f})" for each in found),
        small,
        f"{found[0].count}",
        study,
        all(each.verdict == "wins" for each in found),
    )
    yield Line("figure 3: 3 and 4 levels", "slightly faster than 2")
    yield Line(
        "table 1, figure 4, convolutional", f"L2 {width.TABLE1_CONV[1][0]}, two levels {width.TABLE1_CONV[2][0]}"
    )
    yield Line(
        "table 2, figure 6, fully connected",
        f"L2 {width.TABLE2[1][0]}, two levels {width.TABLE2[2][0]}; L∞ {width.TABLE2[1][1]}, {width.TABLE2[2][1]}",
    )
    yield Line(
        "table 2, figure 7, convolutional",
        f"L2 {width.TABLE2_CONV[1][0]}, two levels {width.TABLE2_CONV[2][0]}",
    )
    darcy = width_rows("darcy")
    short = "**the pressure, not Q**; from k, not log k; 2,000 samples, 200 units (40,000 samples)"
    for levels in width.TABLE3:
        for prefix, paper, name in (("", width.TABLE3, ""), ("aux_", width.TABLE3_AUX, " aux")):
            if levels in paper:
                chosen, theirs = where(darcy, levels=levels), paper[levels][:2]
                ours = [median(best(row, f"{prefix}val_{error}", 200.0) for row in chosen) for error in ("l2", "linf")]
                yield Line(
                    f"table 3, figure 8, fully connected, {levels}{name}: L2, L∞",
                    ", ".join(theirs),
                    f"{ours[0]:.2e}, {ours[1]:.3f}",
                    short,
                    f"{len(chosen)}",
                    source('width_study.py --parts="[table3]"', "width/darcy.jsonl.gz"),
                    all(near(a, float(b)) for a, b in zip(ours, theirs, strict=True)),
                )
    yield Line(
        "table 3, convolutional",
        f"L2 {', '.join(errors[0] for errors in width.TABLE3_CONV.values())} by 1 to 5 levels",
    )
    yield Line("table 4, figure 9", f"L2 {', '.join(errors[0] for errors in width.TABLE4.values())} by five η")
