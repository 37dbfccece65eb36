"""`xbraid-py report DIR...`: one HTML page with the pictures and tables of a run, or a comparison of several."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import LOG, Run, read_run
from xbraid_py.cli.status import printable, progress, shown, summarize
from xbraid_py.run.options import flat, text
from xbraid_py.run.record import number, scalars
from xbraid_py.run.store.files import replacing

_ROWS = 40  # of the record in the page; the first and the last are among them
_LOG_BYTES, _LOG_LINES = 20_000, 60
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def main(words: Sequence[str]) -> int:
    """Write the page, and say where it is."""
    usage = "DIR... [--out FILE.html]"
    parser = command_parser("report", usage, "One HTML page of a run, or a comparison of several.")
    parser.add_argument("DIR", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument(
        "--out", type=Path, help="The page; report.html in the folder of one run, comparison.html here for several."
    )
    options = parse(parser, words)
    folders = list({folder.resolve(): folder for folder in options.DIR}.values())
    runs = [read_run(folder) for folder in folders]
    out = options.out or (folders[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    if out.suffix not in (".html", ".htm"):
        # Whatever else it is, it may be a file of the run.
        raise ValueError(f"out={out} must be the name of a page; use --out={out.with_suffix('.html')}")
    content = page(runs)
    with replacing(out) as temporary:
        temporary.write_text(content, encoding="utf-8")
    print(f"{out} ({out.stat().st_size / 1e3:.0f} kB)")
    return 0


def page(runs: Sequence[Run]) -> str:
    """The page as text.

    Parameters
    ----------
    runs : sequence of Run
        One, or several to be compared.
    """
    # matplotlib and jinja2 take their time to load
    from xbraid_py.cli.page import MOST, draw, quantities, render

    labels = _labels(runs)
    names = quantities(runs)
    curves = [{"title": printable(name), "content": draw(runs, labels, name)} for name in names[:MOST]]
    several = len(runs) > 1
    return render(
        title=f"Comparison of {len(runs)} runs" if several else f"Run {labels[0]}",
        runs=[_about(run, label) for run, label in zip(runs, labels, strict=True)],
        curves=curves,
        left_out=[printable(name) for name in names[MOST:]],
        values=_final_values(runs, labels) if several else _values(runs[0]),
        differences=_differences(runs) if several else None,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [run.path.resolve().parts for run in runs]
    longest = max(map(len, parts))
    ends = ([printable("/".join(each[-length:])) for each in parts] for length in range(1, longest + 1))
    return next((names for names in ends if len(set(names)) == len(names)), [printable(run.path) for run in runs])


def _about(run: Run, label: str) -> dict[str, Any]:
    summary = summarize(run)
    figures, flaws = [], list(run.flaws)
    for path in run.figures:
        content = _bytes(path)
        if content.startswith(_PNG) and content.endswith(_PNG_END):
            figures.append({"title": printable(path.stem), "content": content})
        else:
            flaws.append(f"figures/{printable(path.name)} is damaged or half-written")
    step = max(1, -(-len(run.rows) // _ROWS))
    about = {name: run.about.get(name) for name in ("versions", "ranks", "host", "date", "driver")}
    return {
        "label": label,
        "state": summary.state,
        "update": progress(summary),
        "objective": shown(summary.objective),
        "accuracy": shown(summary.accuracy, percent=True),
        "ranks": shown(summary.ranks),
        "host": summary.host,
        "started": printable(run.status.get("started") or run.header.get("date") or ""),
        "says": summary.message,
        "flaws": flaws,
        "figures": figures,
        "last_rows": _row_table(
            [run.rows[index] for index in sorted({0, *range(len(run.rows) - 1, -1, -step)} if run.rows else ())]
        ),
        "thinned": f"every {step}th of {len(run.rows)}" if step > 1 else "",
        "options": _options(run.configuration),
        "about": [(name, value) for name, value in _options(about) if value != "null"],
        "checkpoints": [(printable(path.name), _kilobytes(path)) for path in run.checkpoints],
        "log": _log(run.path / LOG),
    }


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it may be removed at any time
        return b""


def _kilobytes(path: Path) -> str:
    try:
        return f"{path.stat().st_size / 1e3:.1f}"
    except OSError:
        return "-"


def _log(path: Path) -> str:
    lines = _bytes(path)[-_LOG_BYTES:].decode(errors="replace").splitlines()
    return "\n".join(map(printable, lines[-_LOG_LINES:]))


def _options(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options by their full names, as they are written on a command line."""
    return [(printable(name), printable(text(value))) for name, value in flat(values).items()]


def _row_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [scalars(row) | {"update": number(row.get("update"))} for row in rows]
    words = [name for name in ("kind", "run", "note") if any(row.get(name) for row in rows)]
    names = ["update", *dict.fromkeys(name for each in values for name in each if name != "update")]
    lines = [
        [printable(row.get(word) or "") for word in words] + [shown(each.get(name)) for name in names]
        for row, each in zip(rows, values, strict=True)
    ]
    return {"titles": [*words, *map(printable, names)], "rows": lines, "words": len(words)}


def _values(run: Run) -> dict[str, Any]:
    """First, last, smallest and largest value of every column."""
    rows = []
    for column in run.columns:
        for name, points in run.curves(column).items():
            values = [value for _, value in points]
            title = f"{name}: {column}" if name and len(run.columns[column]) > 1 else column
            rows.append([printable(title), *map(shown, (values[0], values[-1], min(values), max(values)))])
    return {"titles": ["quantity", "first", "last", "smallest", "largest"], "rows": rows}


def _final_values(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    """The last value of every column of every run, at its last update."""
    keys = dict.fromkeys((column, name) for run in runs for column in run.columns for name in run.columns[column])
    several = len({name for _, name in keys}) > 1
    rows = []
    for column, name in keys:
        points = [run.curves(column).get(name) for run in runs]
        title = f"{name}: {column}" if name and several else column
        rows.append([printable(title), *(shown(each[-1][1] if each else None) for each in points)])
    return {"titles": ["quantity", *labels], "rows": rows}


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Options with their values in all runs, and whether they differ; those that do come first."""
    options = [dict(_options(run.configuration)) for run in runs]
    names = dict.fromkeys(name for each in options for name in each)
    rows = [(name, [each.get(name, "-") for each in options]) for name in names]
    return sorted(((name, cells, len(set(cells)) > 1) for name, cells in rows), key=lambda row: not row[2])
