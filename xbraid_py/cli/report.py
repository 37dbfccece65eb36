"""`xbraid-py report DIR...`: one HTML page with the pictures and tables of a run, or a comparison of several."""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from xbraid_py.cli.curves import MOST, draw, named, overview, quantities, refinements
from xbraid_py.cli.reader import LOG, Run, command_parser, printable, read_run
from xbraid_py.cli.status import Summary, duration, progress, shown, summarize
from xbraid_py.run.documents import open_regular, read_regular, tail
from xbraid_py.run.options import flat, text
from xbraid_py.run.record import MOST_READ, number, replacing, scalars

_ROWS = 40  # of the record in the page; the first and the last are among them
_LOG_BYTES, _LOG_LINES = 20_000, 60
_FIGURE_BYTES, _FIGURES = 5_000_000, 40  # of each, and how many of a run
# What is on a page: runs, curves in a picture, columns and lines of a table; and bytes of figures, of all runs.
_RUNS, _CURVES, _COLUMNS, _LINES, _PAGE_BYTES = 50, 20, 60, 400, 50_000_000
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def main(words: Sequence[str]) -> int:
    """Write the page, and say where it is."""
    usage = "DIR... [--out FILE.html]"
    parser = command_parser("report", usage, "One HTML page of a run, or a comparison of several.")
    parser.add_argument("DIR", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument(
        "--out", type=Path, help="The page; report.html in the folder of one run, comparison.html here for several."
    )
    options = parser.parse_args(words)
    folders = list({folder.resolve(): folder for folder in options.DIR}.values())
    if len(folders) > _RUNS:
        raise ValueError(f"DIR names {len(folders)} folders, more than a page compares; use at most {_RUNS}")
    runs = [read_run(folder, MOST_READ // len(folders)) for folder in folders]
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
    """The page as text, of one run, or of several to be compared."""
    labels = _labels(runs)
    names = quantities(runs)
    curves = [{"title": printable(named(name)), "content": draw(runs, labels, name)} for name in names[:MOST]]
    several, together = len(runs) > 1, overview(runs, labels)
    return render(
        title=f"Comparison of {len(runs)} runs" if several else f"Run {labels[0]}",
        runs=[_about(run, label, _PAGE_BYTES // len(runs), runs[0]) for run, label in zip(runs, labels, strict=True)],
        curves=curves,
        overview=[{"title": "training and validation", "content": together}] if together else [],
        left_out=[printable(named(name)) for name in names[MOST : MOST + _COLUMNS]],
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


def _about(run: Run, label: str, room: int, first: Run) -> dict[str, Any]:
    summary = summarize(run)
    figures, flaws = [], list(run.flaws)
    if len(run.figures) > _FIGURES:
        flaws.append(f"{len(run.figures) - _FIGURES} figures left out")
    for path in run.figures[:_FIGURES]:
        content = _bytes(path, room)
        room -= len(content)
        if content.startswith(_PNG) and content.endswith(_PNG_END):
            figures.append({"title": printable(path.stem), "content": content})
        else:
            flaws.append(f"figures/{printable(path.name)} is damaged, half-written or too large")
    step = max(1, -(-len(run.rows) // _ROWS))
    about = {name: run.about.get(name) for name in ("versions", "ranks", "host", "date", "driver")}
    return {
        "label": label,
        "state": summary.state,
        "update": progress(summary),
        "objective": shown(summary.objective),
        "accuracy": shown(summary.accuracy, percent=True),
        "seconds": shown(_seconds(run)),
        "speedup": _speedup(first, run),
        "sentence": sentence(run, label, summary),
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


def _seconds(run: Run) -> float | None:
    """Seconds of training, as the record has them last."""
    return next((found for row in reversed(run.rows) if (found := number(row.get("seconds"))) is not None), None)


def _speedup(first: Run, run: Run) -> str:
    ours, theirs = _seconds(run), _seconds(first)
    return f"{theirs / ours:.2f}" if ours and theirs else "-"


def sentence(run: Run, label: str, summary: Summary) -> str:
    """What was trained, how good it is, how long it took, by which plan, and what was saved."""
    driver, seconds = run.about.get("driver"), _seconds(run)
    what = f"{label} ({Path(driver).stem})" if isinstance(driver, str) and Path(driver).stem not in label else label
    good = [f"{shown(summary.accuracy, percent=True)} validation accuracy"] * (summary.accuracy is not None)
    good += [f"an objective of {shown(summary.objective)}"] * (summary.objective is not None)
    words = [f"{what} has come to {' and '.join(good)}" if good else f"{what} has not said yet how good it is"]
    words += [f"in {summary.update} updates"] * (summary.update is not None)
    words += [] if seconds is None else [f"and {_time(seconds)} of training"]
    words += [f"on {summary.ranks} rank{'s' * (summary.ranks != 1)}"] * (summary.ranks is not None)
    parts = [" ".join(words), *filter(None, [_plan(run.path / LOG), _saved(run)])]
    return printable("; ".join(parts)) + "."


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _plan(log: Path) -> str:
    """The plan that the log says first, and what it was predicted to gain."""
    try:
        with open_regular(log, follow=False) as stream:
            said = re.search(r"\bplan: (.+)", stream.read(_LOG_BYTES).decode(errors="replace"))
    except OSError:
        return ""
    return "plan: " + "; ".join(said[1].split("; ")[:2]).strip() if said else ""


def _saved(run: Run) -> str:
    """How much less work a run of growing depth was than as many updates of its deepest network."""
    if not (refined := refinements(run)):
        return ""
    start, layers = refined[-1]
    rows = [row for row in run.rows if row.get("run") == start.get("run")]
    pairs = [(number(row.get("update")), number(row.get("work"))) for row in rows]
    works = [(update, work) for update, work in pairs if update is not None and work is not None]
    deep = [pair for pair in works if pair[0] >= start["update"]]
    if len(deep) < 2 or deep[-1][0] <= deep[0][0] or deep[-1][0] <= works[0][0]:
        return ""
    (first, before), (last, total) = deep[0], deep[-1]
    all_deep = (total - before) / (last - first) * (last - works[0][0])
    if not 0 < total < all_deep:
        return ""
    return (
        f"it began with fewer layers, which took {shown(round(total, 1))} work units where as many updates of all "
        f"{layers:.0f} layers take {shown(round(all_deep, 1))}: {100 * (1 - total / all_deep):.0f} % saved"
    )


def _bytes(path: Path, room: int) -> bytes:
    try:
        return read_regular(path, min(room, _FIGURE_BYTES))
    except OSError:  # it may be removed at any time
        return b""


def _kilobytes(path: Path) -> str:
    try:
        return f"{path.stat().st_size / 1e3:.1f}"
    except OSError:
        return "-"


def _log(path: Path) -> str:
    try:
        lines = tail(path, _LOG_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(map(printable, lines[-_LOG_LINES:]))


def _options(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options by their full names, as they are written on a command line."""
    return [(printable(name), printable(text(value))) for name, value in islice(flat(values).items(), _LINES)]


def _row_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [scalars(row) | {"update": number(row.get("update"))} for row in rows]
    words = [name for name in ("kind", "run", "note") if any(row.get(name) for row in rows)]
    found = dict.fromkeys(name for each in values for name in each if name.rpartition(".")[2] != "update")
    names = ["update", *found][:_COLUMNS]
    lines = [
        [printable(row.get(word) or "") for word in words] + [shown(each.get(name)) for name in names]
        for row, each in zip(rows, values, strict=True)
    ]
    return {"titles": [*words, *(printable(named(name)) for name in names)], "rows": lines, "words": len(words)}


def _values(run: Run) -> dict[str, Any]:
    """First, last, smallest and largest value of every column."""
    rows = []
    pairs = [(column, name) for column, curves in run.columns.items() for name in curves if _tells(column)]
    for column, name in pairs[:_LINES]:
        points = run.columns[column][name]
        values = points.values()
        title = f"{name}: {named(column)}" if name and len(run.columns[column]) > 1 else named(column)
        ends = points[min(points)], points[max(points)]
        rows.append([printable(title), *map(shown, (*ends, min(values), max(values)))])
    titles = ["quantity", "first", "last", "smallest", "largest"]
    return {"titles": titles, "rows": rows, "left_out": len(pairs) - len(rows)}


def _final_values(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    """The last value of every column of every run, at its last update."""
    keys = dict.fromkeys(
        (column, name) for run in runs for column in run.columns if _tells(column) for name in run.columns[column]
    )
    several = len({name for _, name in keys}) > 1
    rows = []
    for column, name in islice(keys, _LINES):
        found = [run.columns.get(column, {}).get(name) for run in runs]
        title = f"{name}: {named(column)}" if name and several else named(column)
        rows.append([printable(title), *(shown(points[max(points)] if points else None) for points in found)])
    return {"titles": ["quantity", *labels], "rows": rows, "left_out": len(keys) - len(rows)}


def _tells(column: str) -> bool:
    """Whether a column is a quantity, and not the place of a part's row."""
    return column.rpartition(".")[2] != "update"


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Options with their values in all runs, and whether they differ; those that do come first."""
    options = [dict(_options(run.configuration)) for run in runs]
    names = dict.fromkeys(name for each in options for name in each)
    rows = [(name, [each.get(name, "-") for each in options]) for name in names]
    return sorted(((name, cells, len(set(cells)) > 1) for name, cells in rows), key=lambda row: not row[2])


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .note { color: #666; font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.differs td { background: #fff3cd; } td.differs { font-weight: 600; }
.state { padding: .1rem .5rem; border-radius: .6rem; background: #eee; white-space: nowrap; }
.finished, .running { background: #d4edda; } .failed { background: #f8d7da; }
.stale, .stopped { background: #fff3cd; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.whole .pictures { display: block; } .lead { font-size: 1.1rem; overflow-wrap: anywhere; }
figure { margin: 0; } img { max-width: 100%; height: auto; } figcaption { color: #666; font-size: .9rem; }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; font-size: .8rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
"""

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% macro table(titles, rows, words=1) -%}
<div class="wide"><table>
<thead><tr>{% for title in titles %}<th{% if loop.index > words %} class="number"{% endif %}>{{ title }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in rows -%}
<tr>{% for cell in row %}<td{% if loop.index > words %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
{%- endmacro %}
{% macro pictures(items) -%}
<div class="pictures">
{% for item in items -%}
<figure><img src="data:image/png;base64,{{ item.content | base64 }}" alt="{{ item.title }}">
<figcaption>{{ item.title }}</figcaption></figure>
{% endfor -%}
</div>
{%- endmacro %}
<h1>{{ title }}</h1>
{% for run in runs %}<p class="lead">{{ run.sentence }}</p>
{% endfor %}
{% set several = runs | length > 1 -%}
{% set titles = ["state", "update", "objective", "accuracy", "seconds"] + ["speedup"] * several
  + ["ranks", "host", "started", "says"] -%}
{% macro cell(run, title) -%}
{% if title == "state" %}<span class="state {{ run.state }}">{{ run.state }}</span>{% else %}{{ run[title] }}{% endif %}
{%- endmacro %}
<div class="wide"><table>
{% if runs | length == 1 -%}
<tbody>
{% for title in titles if runs[0][title] %}<tr><th>{{ title }}</th><td>{{ cell(runs[0], title) }}</td></tr>
{% endfor -%}
</tbody>
{%- else -%}
<thead><tr><th>run</th>{% for title in titles %}<th>
{%- if title == "speedup" %}speed-up over {{ runs[0].label }}{% else %}{{ title }}{% endif %}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for run in runs -%}
<tr><td>{{ run.label }}</td>{% for title in titles %}<td>{{ cell(run, title) }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody>
{%- endif %}
</table></div>
{% for run in runs if run.flaws -%}
<p class="note">{% if runs | length > 1 %}{{ run.label }}: {% endif %}{{ run.flaws | join("; ") }}.</p>
{% endfor %}
{% if runs | length == 1 and runs[0].figures %}<h2>Pictures of the run</h2>
{{ pictures(runs[0].figures) }}{% endif %}
{% if overview %}<h2>Training and validation</h2>
<div class="whole">{{ pictures(overview) }}</div>{% endif %}
<h2>Over the updates</h2>
{% if curves %}{{ pictures(curves) }}{% else %}<p>There is nothing to draw: no quantity with two different values
{%- if runs | length > 1 %} that all runs have{% endif %}.</p>{% endif %}
{% if left_out %}<p class="note">Not drawn: {{ left_out | join(", ") }}.</p>{% endif %}

<h2>{{ "Final values" if runs | length > 1 else "Values" }}</h2>
{% if values.rows %}{{ table(values.titles, values.rows) }}{% else %}<p>The record holds no values.</p>{% endif %}
{% if values.left_out %}<p class="note">{{ values.left_out }} more are left out.</p>{% endif %}

{% if differences is not none -%}
<h2>Configuration</h2>
{% if differences -%}
<div class="wide"><table>
<thead><tr><th>option</th>{% for run in runs %}<th>{{ run.label }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells, differ in differences -%}
<tr{% if differ %} class="differs"{% endif %}><td>{{ name }}</td>
{%- for cell in cells %}<td{% if differ %} class="differs"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
<p class="note">Options that differ come first and are marked.</p>
{% else %}<p>None of the runs says with which options it was started.</p>{% endif %}
{%- endif %}
{% for run in runs %}
<h2>{{ run.label if runs | length > 1 else "The run" }}</h2>
{% if runs | length > 1 and run.figures %}{{ pictures(run.figures) }}{% endif %}
{% if run.last_rows.rows -%}
<details><summary>Rows of the record{% if run.thinned %} ({{ run.thinned }}){% endif %}</summary>
{{ table(run.last_rows.titles, run.last_rows.rows, run.last_rows.words) }}</details>
{%- endif %}
{% if differences is none and run.options -%}
<details><summary>Configuration</summary>{{ table(["option", "value"], run.options, 2) }}</details>
{%- endif %}
{% if run.about %}<details><summary>Versions and host</summary>{{ table(["what", "value"], run.about, 2) }}</details>
{%- endif %}
{% if run.checkpoints -%}
<details><summary>Checkpoints</summary>{{ table(["file", "kB"], run.checkpoints) }}</details>
{%- endif %}
{% if run.log %}<details><summary>End of the log</summary><pre>{{ run.log }}</pre></details>{% endif %}
{% endfor %}
<p class="note">Written by xbraid-py report, {{ date }}.</p>
</body>
</html>
"""


def render(**content) -> str:
    """The page; what the names of `content` are is said by the template above. All text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    return environment.from_string(_TEMPLATE).render(style=_STYLE, **content)
