"""The page of a report: one HTML file that asks nothing of the network, readable on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import jinja2
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xbraid_py.cli.reader import Points, Run
from xbraid_py.cli.status import printable
from xbraid_py.cli.watch import uses_log

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
{% set titles = ["state", "update", "objective", "accuracy", "ranks", "host", "started", "says"] -%}
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
<thead><tr><th>run</th>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr></thead>
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
<h2>Over the updates</h2>
{% if curves %}{{ pictures(curves) }}{% else %}<p>There is nothing to draw: no quantity with two different values
{%- if runs | length > 1 %} that all runs have{% endif %}.</p>{% endif %}
{% if left_out %}<p class="note">Not drawn: {{ left_out | join(", ") }}.</p>{% endif %}

<h2>{{ "Final values" if runs | length > 1 else "Values" }}</h2>
{% if values.rows %}{{ table(values.titles, values.rows) }}{% else %}<p>The record holds no values.</p>{% endif %}

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
{% if run.figures %}{{ pictures(run.figures) }}{% endif %}
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


# Colors that any kind of sight tells apart, and dashes, so that a curve on top of an equal one hides it not.
_COLORS = ("#0072b2", "#c1272d", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Quantities that say where in the run a row is, or that only grow.
_NOT_DRAWN = ("level", "num_layers", "seconds", "work", "evaluations")
_FIRST = ("objective", "loss", "val_accuracy", "val_loss", "train_accuracy", "grad_norm")
_DPI = 120
_LARGEST = 1e100  # of what can be drawn: the differences of larger numbers overflow
MOST = 16


def quantities(runs: Sequence[Run]) -> list[str]:
    """Columns worth a picture: common to all runs, with two points or more that are not all the same."""
    common = [name for name in runs[0].columns if all(name in run.columns for run in runs)]
    changing = [name for name in common if name not in _NOT_DRAWN and any(_changes(run, name) for run in runs)]
    return sorted(changing, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _changes(run: Run, name: str) -> bool:
    return any(len(set(values.values())) > 1 for values in run.columns[name].values())


def draw(runs: Sequence[Run], labels: Sequence[str], column: str) -> bytes:
    """The PNG of a column over the updates: a curve for each run, and for each run in its record."""
    several = len({name for run in runs for name in run.columns[column]}) > 1
    curves = [
        (" ".join(filter(None, (label if len(runs) > 1 else "", name if several else ""))), points)
        for run, label in zip(runs, labels, strict=True)
        for name, points in _drawable(run.curves(column))
    ]
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves):
        axes.plot(
            *zip(*points, strict=True),
            label=_literal(label),
            color=_COLORS[index % len(_COLORS)],
            linestyle=_DASHES[index % len(_DASHES)],
            linewidth=1.5,
            marker="o" if len(points) < 8 else None,
            markersize=4,
        )
    if uses_log([value for _, points in curves for _, value in points]):
        axes.set_yscale("log", nonpositive="mask")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="update", ylabel=_literal(column.replace("_", " ")))
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=_DPI, format="png")
    return stream.getvalue()


def _drawable(curves: dict[str, Points]) -> Iterator[tuple[str, Points]]:
    for name, points in curves.items():
        if kept := [point for point in points if max(map(abs, point)) < _LARGEST]:
            yield name, kept


def _literal(text: str) -> str:
    """Text in which matplotlib sees no formula; it leaves out labels that begin with an underscore."""
    return printable(text)[:60].replace("$", r"\$").lstrip("_") or " "
