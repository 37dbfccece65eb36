"""The page of the study of multilevel training in width: tables with the numbers of paper 002 beside ours, pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import median

from studies.mgopt.rows import groups
from studies.rows import Row, table, where
from studies.study import PAGE
from studies.width.rows import COUNTINGS, best, points, ratio, words
from xbraid_py.recipes.pictures.curves import over_work

# Best validation L2 and Linf, training L2 and Linf, by the number of levels or by eta; AUX: of the auxiliary network.
_NONE = ("", "", "", "")
TABLE1 = {1: ("2.94e-3", "0.626", "2.84e-3", "0.814"), 2: ("1.61e-3", "0.496", "1.59e-3", "0.664")}
TABLE1_CONV = {1: ("5.79e-3", "0.772", "5.81e-3", "1.022"), 2: ("5.38e-3", "0.756", "5.37e-3", "0.991")}
TABLE2 = {1: ("1.49e-3", "0.707", "2.37e-5", "0.0546"), 2: ("1.39e-3", "0.472", "4.75e-5", "0.0540")}
TABLE2_CONV = {1: ("6.61e-4", "0.361", "2.92e-5", "0.0469"), 2: ("4.84e-4", "0.312", "7.47e-5", "0.0696")}
TABLE3 = {
    1: ("1.49e-3", "0.677", "2.20e-5", "0.0544"),
    2: ("1.21e-3", "0.434", "4.66e-6", "0.0165"),
    3: ("2.15e-3", "0.573", "1.31e-3", "0.747"),
    4: ("1.20e-3", "0.484", "6.71e-6", "0.0195"),
    5: ("1.42e-3", "0.456", "1.16e-5", "0.0303"),
}
TABLE3_AUX = {
    2: ("1.35e-3", "0.492", "4.25e-4", "0.107"),
    3: ("3.16e-3", "0.642", "2.28e-3", "0.656"),
    4: ("1.26e-3", "0.345", "4.24e-4", "0.110"),
    5: ("1.46e-3", "0.336", "5.05e-4", "0.124"),
}
TABLE3_CONV = {
    1: ("6.61e-4", "0.361", "2.92e-5", "0.0469"),
    2: ("6.06e-4", "0.371", "5.38e-5", "0.0867"),
    3: ("1.05e-3", "0.361", "6.84e-4", "0.686"),
    4: ("6.65e-4", "0.293", "6.69e-5", "0.0768"),
    5: ("7.28e-4", "0.378", "8.58e-5", "0.101"),
}
TABLE3_CONV_AUX = {
    2: ("6.32e-4", "0.392", "2.53e-4", "0.0954"),
    3: ("1.34e-3", "0.512", "1.03e-3", "0.395"),
    4: ("6.13e-4", "0.238", "2.56e-4", "0.0991"),
    5: ("6.03e-4", "0.398", "2.40e-4", "0.0818"),
}
TABLE4 = {
    1.0: ("1.21e-3", "0.412", "1.57e-5", "0.0328"),
    1.414: ("1.08e-3", "0.364", "9.01e-6", "0.0218"),
    2.0: ("1.09e-3", "0.602", "7.10e-6", "0.0196"),
    2.828: ("1.20e-3", "0.484", "6.71e-6", "0.0195"),
    4.0: ("1.29e-3", "0.396", "1.21e-5", "0.0260"),
}
TABLE4_AUX = {
    1.0: ("1.40e-3", "0.347", "3.00e-4", "0.0871"),
    1.414: ("1.26e-3", "0.297", "3.40e-4", "0.0921"),
    2.0: ("1.24e-3", "0.345", "3.83e-4", "0.106"),
    2.828: ("1.26e-3", "0.345", "4.24e-4", "0.110"),
    4.0: ("1.31e-3", "0.345", "4.45e-4", "0.116"),
}
_NAMES = ("val_l2", "val_linf", "train_l2", "train_linf")
_HEADS = ("val. L2", "val. L∞", "train. L2", "train. L∞")
_WAYS = {"work": "tau counted", "work_without_tau": "tau not counted", "counted_work": "multiply-adds counted"}
_SHARES = (1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0)  # of the work units, on the way
Paper = Mapping[Hashable, tuple[str, ...]]


def write(parts: Mapping[str, Sequence[Row]], out: Path) -> None:
    """Write `study.md` and the pictures in `figures`.

    Parameters
    ----------
    parts : mapping of str to sequence of dict
        Rows of the runs of each part, as `studies.study.Study.run` yields them.
    out : Path
    """
    parts = {name: [row | {"settings": words(row["settings"])} for row in rows] for name, rows in parts.items()}
    failed = sum("failure" in row for rows in parts.values() for row in rows)
    said = [
        f"{sum(map(len, parts.values()))} runs in {len(parts)} parts, {failed} failed.",
        "L2 is the mean square error of a number, L∞ the largest error, both the best of a run within the work units "
        "named: medians over the seeds. Ratios are over the single level, seed by seed: geometric mean (95 % "
        "interval), seeds below 1 of all. Work units are those of eq. 40; training errors are of as many samples as "
        "validation ones. Points of pictures are means of three.",
    ]
    for name, rows in parts.items():
        if rows:
            title, section = SECTIONS[name]
            said += [f"## {title}", _setting(rows), *section(rows, out / "figures")]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(part for part in said if part) + "\n", encoding="utf-8")


def _setting(rows: Sequence[Row]) -> str:
    settings, means = rows[0]["settings"], [row["result"]["mean_l2"] for row in rows if "result" in row]
    said = (
        f"{settings['num_train']} training and {settings['num_val']} validation samples on {settings['mesh']} x "
        f"{settings['mesh']} points, {settings['max_work']:g} work units, minibatches of {settings['batch_size']}, "
        f"{'standardized' if settings['standardize'] else 'raw'} inputs and targets."
    )
    if settings["problem"] == "darcy":
        # The first rows have no inputs among their settings.
        target, inputs = settings["target"], ", ".join(settings.get("inputs", ["k"]))
        said += f" Learned is the {target} from {inputs}"
        said += "." if (target, inputs) == ("flux", "log_k") else "; in the paper the flux from log_k."
    return said + (f" The mean training target has the validation L2 {median(means):.2e}." if means else "")


def _number(name: str, value: float) -> str:
    if math.isinf(value):
        return "-"
    return f"{value:.2e}" if name.endswith("l2") else f"{value:.3f}"


def _medians(rows: Sequence[Row], prefix: str = "") -> list[str]:
    """Medians over the runs that did not fail."""
    budget = rows[0]["settings"]["max_work"]
    found = []
    for name in _NAMES:
        values = [value for row in rows if (value := best(row, prefix + name, budget)) < math.inf]
        found.append(_number(name, median(values)) if values else "-")
    return found


def _ratios(base: Sequence[Row], rows: Sequence[Row], counting: str) -> list[str]:
    """Ratios of the validation errors."""
    found = [ratio(base, rows, name, rows[0]["settings"]["max_work"], counting) for name in _NAMES[:2]]
    return ["" if each is None else str(each) for each in found]


def _errors(rows: Sequence[Row], field: str, paper: Paper, auxiliary: Paper) -> str:
    """A line for each value of a setting, and one for its first auxiliary network."""
    lines = []
    for (value,), chosen in groups(rows, field).items():
        label, failed = f"{round(value, 3):g}", sum("failure" in row for row in chosen)
        theirs = paper.get(round(value, 3), _NONE)
        lines.append([label, f"{failed} of {len(chosen)}", *_medians(chosen), *theirs])
        if chosen[0]["settings"]["levels"] > 1:
            lines.append([f"{label} aux", "", *_medians(chosen, "aux_"), *auxiliary.get(round(value, 3), _NONE)])
    return table([field, "failed", *_HEADS, *(f"paper: {head}" for head in _HEADS)], lines)


def _compared(rows: Sequence[Row], label: Callable[[Row], list[str]], head: Sequence[str]) -> str:
    """A line of ratios for each method of more than one level, beside the single level of its optimizer."""
    lines = []
    for name, chosen in _methods(rows).items():
        base = _single(rows, dict(name)["method"])
        if dict(name)["levels"] > 1 and base:
            lines.append([*label(chosen[0]), *(cell for way in COUNTINGS for cell in _ratios(base, chosen, way))])
    columns = [f"{norm}, {way}" for way in _WAYS.values() for norm in ("L2", "L∞")]
    return table([*head, *columns], lines) if lines else ""


def _methods(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """The rows by all settings but the seed."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        name = tuple((key, str(v) if isinstance(v, list | tuple) else v) for key, v in row["settings"].items())
        found.setdefault(tuple(item for item in name if item[0] != "seed"), []).append(row)
    return found


def _levels(paper: Paper, auxiliary: Paper, picture: str) -> Callable[[Sequence[Row], Path], list[str]]:
    """The section of a table over the numbers of levels."""

    def section(rows: Sequence[Row], figures: Path) -> list[str]:
        _figure(rows, lambda settings: f"{settings['levels']} level(s)", figures / f"{picture}.png", bool(auxiliary))
        return [
            _errors(rows, "levels", paper, auxiliary),
            _compared(rows, lambda row: [f"{row['settings']['levels']}"], ["levels"]),
            f"Picture of seed 0: `figures/{picture}.png`.",
        ]

    return section


def _table4(rows: Sequence[Row], figures: Path) -> list[str]:
    _figure(rows, lambda settings: f"η = {settings['eta']:.2f}", figures / "figure9.png", True)
    return [_errors(rows, "eta", TABLE4, TABLE4_AUX), "Picture of seed 0: `figures/figure9.png`."]


def _tuned(rows: Sequence[Row], figures: Path) -> list[str]:
    """Methods, each with a learning rate of its own: where they win and where not."""
    usual = _usual(rows)
    lines, won = [], []
    for name, chosen in _methods(rows).items():
        settings, failed = chosen[0]["settings"], sum("failure" in row for row in chosen)
        label = _label(settings, usual)
        per_unit = [points(row)[-1]["seconds"] / points(row)[-1]["work"] for row in chosen if points(row)]
        time = f"{1e3 * median(per_unit):.1f}" if per_unit else "-"
        lines.append([label, f"{settings['learning_rate']:g}", f"{failed} of {len(chosen)}", *_medians(chosen), time])
        base = _single(rows, dict(name)["method"])
        if settings["levels"] > 1 and base:
            found = {
                f"{norm}, {_WAYS[way]}": ratio(base, chosen, key, settings["max_work"], way)
                for way in COUNTINGS
                for norm, key in (("L2", "val_l2"), ("L∞", "val_linf"))
            }
            for verdict in ("wins", "loses"):
                cases = [case for case, each in found.items() if each is not None and each.verdict == verdict]
                if cases:
                    won.append(f"* {label}: {verdict} in {'; '.join(cases)}.")
    problem = rows[0]["settings"]["problem"] + "_conv" * (rows[0]["settings"]["kind"] == "convolutional")
    picture = figures / f"tuned_{problem}_{len(lines)}.png"
    _figure(rows, lambda settings: _label(settings, usual), picture)
    return [
        "Learning rates were tuned on other seeds, by L2 with tau counted.",
        table(["method", "learning rate", "failed", *_HEADS, "ms a work unit"], lines),
        _compared(rows, lambda row: [_label(row["settings"], usual)], ["method"]),
        _on_the_way(rows, usual),
        "Against the single level of the same optimizer (elsewhere the interval has 1 in it):",
        "\n".join(won) or "* nowhere any difference.",
        f"Picture of seed 0: `figures/{picture.name}`.",
    ]


def _on_the_way(rows: Sequence[Row], usual: Mapping[str, Hashable]) -> str:
    """Ratios at parts of the work: who is ahead, and how long."""
    whole, lines = rows[0]["settings"]["max_work"], []
    budgets = [whole * share for share in _SHARES]
    for name, chosen in _methods(rows).items():
        base = _single(rows, dict(name)["method"])
        if dict(name)["levels"] > 1 and base:
            for way in ("work", "counted_work"):
                cells = []
                for budget in budgets:
                    both = [ratio(base, chosen, norm, budget, way) for norm in _NAMES[:2]]
                    cells.append(" / ".join("-" if each is None else f"{each.mean:.2f}" for each in both))
                lines.append([_label(chosen[0]["settings"], usual), _WAYS[way], *cells])
    head = ["L2 / L∞ over the single level", "", *(f"{budget:g} units" for budget in budgets)]
    return table(head, lines) if lines else ""


def _single(rows: Sequence[Row], method: str) -> list[Row]:
    """The single level of an optimizer; of any if it has none."""
    return where(rows, levels=1, method=method) or where(rows, levels=1)


def _usual(rows: Sequence[Row]) -> dict[str, Hashable]:
    """The most frequent value of each setting that differs, among the methods."""
    first = [chosen[0]["settings"] for chosen in _methods(rows).values()]
    values = {name: [str(each[name]) for each in first] for name in first[0] if name not in ("seed", "learning_rate")}
    return {name: Counter(each).most_common(1)[0][0] for name, each in values.items() if len(set(each)) > 1}


def _label(settings: Mapping, usual: Mapping[str, Hashable]) -> str:
    """What tells a method from the others."""
    if settings["levels"] == 1:
        return f"{settings['method']}, 1 level"
    unlike = [f"{name}={settings[name]}" for name, value in usual.items() if str(settings[name]) != value]
    others = [each for each in unlike if not each.startswith(("levels=", "method="))]
    return ", ".join([f"{settings['method']}, {settings['levels']} levels", *others])


def _figure(rows: Sequence[Row], name_of: Callable[[Mapping], str], path: Path, auxiliary: bool = False) -> None:
    """Curves of the runs of the first seed."""
    first = min(row["settings"]["seed"] for row in rows)
    curves = {name_of(row["settings"]): points(row) for row in where(rows, seed=first) if points(row)}
    lines = (
        [("val", "-", ""), ("aux_val", "--", "aux")] if auxiliary else [("val", "-", ""), ("train", ":", "training")]
    )
    if curves:
        over_work(curves, path, lines=lines, window=3)


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row], Path], list[str]]]] = {
    "table1": ("Poisson, fully connected (table 1, figure 3)", _levels(TABLE1, {}, "figure3")),
    "table1_undamped": ("Poisson, fully connected, no damping", _levels(TABLE1, {}, "figure3_undamped")),
    "table1_conv": ("Poisson, convolutional (table 1, figure 4)", _levels(TABLE1_CONV, {}, "figure4")),
    "table2": ("Darcy, fully connected, no damping (table 2, figure 6)", _levels(TABLE2, {}, "figure6")),
    "table2_conv": ("Darcy, convolutional, no damping (table 2, figure 7)", _levels(TABLE2_CONV, {}, "figure7")),
    "table3": ("Darcy, fully connected, damped (table 3, figure 8)", _levels(TABLE3, TABLE3_AUX, "figure8")),
    "table3_conv": ("Darcy, convolutional, damped (table 3)", _levels(TABLE3_CONV, TABLE3_CONV_AUX, "figure8_conv")),
    "table4": ("Darcy, four levels: learning rates on the levels (table 4, figure 9)", _table4),
    "tuned": ("Poisson, fully connected, tuned learning rates", _tuned),
    "tuned_conv": ("Poisson, convolutional, tuned learning rates", _tuned),
    "tuned_darcy": ("Darcy, fully connected, tuned learning rates", _tuned),
    "scan": ("Poisson, fully connected: what the settings do, tuned learning rates", _tuned),
}
