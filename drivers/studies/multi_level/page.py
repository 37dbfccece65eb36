"""The page of the study of multi-level residual networks: tables, what depth pays, what growing costs, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from studies.multi_level.curves import figure6
from studies.multi_level.tables import group, name_of, page, saved
from studies.rows import Row, table
from studies.statistics import Summary
from studies.study import PAGE

_TITLES = {
    "models": "First-cycle, last-cycle and multi-level models (tables 3 and 4, figure 6)",
    "reset": "One cosine over all cycles instead of one for each (figure 10)",
    "rates": "Learning rates of the cycles (figure 9)",
    "interpolation": "Linear interpolation in depth",
    "momentum": "Momentum of SGD interpolated as well",
    "noise": "Noise on the weights of inserted blocks",
    "step_size": "The last-cycle model with h=1",
}


def write(parts: Mapping[str, Sequence[Row]], out: Path) -> str:
    """Write `study.md` and the pictures in `figures`; returns the text.

    Parameters
    ----------
    parts : mapping of str to sequence of dict
        Rows of the runs of each part, as `studies.study.Study.run` yields them.
    out : Path
    """
    said = []
    for name, rows in parts.items():
        settings = rows[0]["settings"]
        said += [f"## {_TITLES[name]}", _setting(settings), page(rows).rstrip("\n"), differences(rows)]
        changed = [row for row in rows if "result" in row and _is_usual(row, rows)]
        if changed and name == "models":
            for log in (False, True):
                figure6(changed, out / "figures" / f"figure6{'_log' * log}.png", log=log)
            said.append("Picture: `figures/figure6.png`.")
    text = "\n\n".join(part for part in said if part) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(text, encoding="utf-8")
    return text


def differences(rows: Sequence[Row]) -> str:
    """Test errors of each model minus those of the usual last-cycle model, seed by seed, and what it saves."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "result" in row:
            groups.setdefault(group(row), []).append(row)
    base = next((runs for runs in groups.values() if runs[0]["settings"]["model"] == "last"), None)
    if base is None:
        return ""
    errors = {row["settings"]["seed"]: row["result"]["val_error"] for row in base}
    seconds = {row["settings"]["seed"]: row["result"]["seconds"] for row in base}
    usual, lines = rows[0]["settings"], []
    for runs in groups.values():
        pairs = [row for row in runs if row["settings"]["seed"] in errors]
        if runs is base or not pairs:
            continue
        apart = Summary.of([100 * (row["result"]["val_error"] - errors[row["settings"]["seed"]]) for row in pairs])
        time = [100 * (1 - row["result"]["seconds"] / seconds[row["settings"]["seed"]]) for row in pairs]
        own = runs[0]["settings"].items()
        unlike = [f"{k}={v}" for k, v in own if v != usual.get(k) and k not in ("model", "seed")]
        label = ", ".join([name_of(runs[0]["settings"]), *unlike])
        interval = (
            f"{apart.mean:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})" if len(pairs) > 1 else f"{apart.mean:+.2f}"
        )
        lines.append([label, interval, f"{median(time):.1f}", str(len(pairs))])
    head = ["against the last-cycle model", "test error, points (95 %)", "time saved, %, median", "seeds"]
    return table(head, lines) if lines else ""


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of the benchmark: shares saved, and test errors, as means over the seeds."""
    by_model = {
        model: [row["result"] for row in rows if "result" in row and row["settings"]["model"] == model]
        for model in ("first", "last", "multilevel")
    }
    error = {model: Summary.of([each["val_error"] for each in runs]) for model, runs in by_model.items() if runs}
    grown = next(row for row in rows if "result" in row and row["settings"]["model"] == "multilevel")
    return {
        "time_saved": median(saved(rows)[group(grown)]),
        "work_saved": median(saved(rows, "block_evaluations")[group(grown)]),
        "error_multi_level": error["multilevel"].mean,
        "error_last_cycle": error["last"].mean,
        "error_first_cycle": error["first"].mean,
        "deviation_last_cycle": error["last"].deviation,
    }


def _is_usual(row: Row, rows: Sequence[Row]) -> bool:
    """Whether its settings are those of the first row but for model and seed."""
    usual = rows[0]["settings"]
    return all(value == usual.get(name) for name, value in row["settings"].items() if name not in ("model", "seed"))


def _setting(settings: Mapping) -> str:
    filters = settings.get("filters") or ((32, 64, 128) if settings.get("wide") else (16, 32, 64))
    images = f"{settings['train_images']:,}" if settings["train_images"] else "all"
    return (
        f"{settings['data']}, {images} training images that were found, filters {'-'.join(map(str, filters))}, first "
        f"convolution with stride {settings['stem_stride']}, cycles of {'/'.join(map(str, settings['epochs']))} "
        f"epochs, learning rate {settings['eta_max']:g} to {settings['eta_min']:g}, {settings['precision']}. Test "
        f"errors are those at the end, never the best on the way."
    )
