"""What the command line draws: curves in a terminal, `watch`, and the page of `report`."""

import base64
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread
from processes import PROJECT, job_environment
from runs_on_disk import make_run, minibatch_rows, nested_rows, status

from xbraid_py.cli import curves, main
from xbraid_py.cli.reader import read_run
from xbraid_py.cli.report import page
from xbraid_py.cli.status import draw, uses_log

# ---- curves


def test_a_curve_goes_where_its_points_are():
    lines = draw([[(0, 0.0), (10, 10.0)]], width=14, height=6, ascii_only=True)
    assert lines == [
        "10          **",
        "          **  ",
        "       ***    ",
        "     **       ",
        " 0 **         ",
        "   0        10",
    ]


def test_braille_has_eight_dots_a_letter():
    lines = draw([[(x, float(x % 2)) for x in range(200)]], width=40, height=5)
    assert len(lines) == 5 and {len(line) for line in lines[:4]} == {40}
    assert "\u28ff" in lines[1], "a zigzag as fine as the dots fills the letters"
    flat = draw([[(0, 1.0), (1, 1.0)]], width=10, height=3)
    assert sum(ord(letter) > 0x2800 for line in flat for letter in line) == 8, "one row of letters"


def test_powers_of_ten_are_even_steps():
    assert uses_log([1.0, 100.0]) and uses_log([0.0, 1.0, 100.0])
    assert not uses_log([1.0, 2.0]) and not uses_log([-1.0, 100.0]) and not uses_log([0.0])
    lines = draw([[(n, 10.0**-n) for n in range(11)]], width=18, height=12, ascii_only=True)
    columns = [line.index("*", 6) for line in lines[:-1]]
    steps = {b - a for a, b in zip(columns, columns[1:], strict=False)}
    assert steps <= {0, 1, 2} and lines[0].startswith("    1 *")


@pytest.mark.parametrize("curve", [[(3, 2.0)], [(0, -1e308), (1, 1e308)], [(0, 5e-324), (1, 1e308)], [(1e308, 0.0)]])
def test_any_numbers_can_be_drawn(curve):
    lines = draw([curve], width=30, height=6)
    assert any(ord(letter) > 0x2800 for line in lines for letter in line)


# ---- watch


def test_watch_once_without_a_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "run", said=status(message="level 1 of 3"))
    assert main(["watch", "--once", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for part in ("running", "update 12 / 40", "objective 0.625", "accuracy 87.50 %", "1 min left", "level 1 of 3"):
        assert part in said
    assert "objective over updates: nested" in said and "grad norm (logarithmic) over updates" in said
    assert re.search(r"^ +12 +0\.15385 +- +0\.62$", said, re.M), "the last row, a dash for what it lacks"


def test_watch_shows_whatever_columns_there_are(tmp_path, capsys):
    folder = make_run(tmp_path / "run", minibatch_rows())
    (folder / "status.json").unlink()
    main(["watch", "--once", str(folder)])
    said = capsys.readouterr().out
    assert "loss over updates" in said and "val accuracy over updates" in said
    assert "stacks.0.gradient error over updates" in said and "no status.json" in said
    (folder / "metrics.jsonl").unlink()
    assert main(["watch", "--once", str(folder)]) == 3
    assert "no metrics.jsonl" in capsys.readouterr().out


def test_watch_ends_with_the_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run", said=status("failed", message="the loss is nan"))
    assert main(["watch", str(folder)]) == 1
    assert capsys.readouterr().out == "failed, update 12 / 40, objective 0.625, accuracy 87.50 %, the loss is nan\n"


def test_watch_on_a_terminal(tmp_path):
    folder = make_run(tmp_path / "run", nested_rows(3), said=status())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "xbraid_py", "watch", str(folder), "--every=0.2"]
    env = job_environment({"TERM": "xterm", "COLUMNS": "200", "LINES": "60", "PYTHONUTF8": "1"})
    job = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=PROJECT)
    os.close(theirs)
    try:
        said = _read_until(ours, b"running")
        temporary = folder / "new"
        temporary.write_text(json.dumps(status("finished", update=40)))
        temporary.replace(folder / "status.json")
        said += _read_until(ours, None)
        assert job.wait(timeout=20) == 0
    finally:
        job.kill()
        os.close(ours)
    assert b"update 12 / 40" in said and b"finished" in said and b"update 40 / 40" in said
    assert b"objective over updates" in said


def _read_until(terminal: int, word: bytes | None) -> bytes:
    """What a terminal shows up to a word, or to its end."""
    said, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline and (word is None or word not in said):
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return said
    return said


# ---- report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page taken apart; raises if its tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.images, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "img":
            kind, _, content = attrs["src"].partition(",")
            assert kind == "data:image/png;base64" and attrs["alt"]
            self.images.append((attrs["alt"], base64.b64decode(content, validate=True)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data.strip())


def test_the_page_of_a_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'} (")
    text = (folder / "report.html").read_text()
    found = Page(text)
    own, together, *others = [name for name, _ in found.images]
    assert (own, together) == ("classes", "training and validation"), "its own pictures first"
    assert others == ["objective", "validation accuracy", "norm of the gradient"]
    for _, content in found.images:
        height, width, _ = imread(io.BytesIO(content)).shape
        assert min(height, width) >= 100
    assert {"running", "12 / 40", "0.625", "87.50 %", "mgrit.max_iter", "a line of the log"} <= set(found.texts)
    at = found.texts.index("norm of the gradient", found.texts.index("quantity"))
    values = [text for text in found.texts[at : at + 12] if text][:5]
    assert values == ["norm of the gradient", "1", f"{0.5**11:.5g}", f"{0.5**11:.5g}", "1"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert [each for each in folder.iterdir() if each.name.endswith(".tmp")] == []


def test_the_page_asks_nothing_of_the_network_and_obeys_no_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    rows = [row | {"note": evil, evil: row["update"]} for row in nested_rows()]
    folder = make_run(
        tmp_path / "<b>run", rows, status(message=evil, host_kind=evil), **{evil: evil, "url": "http://x"}
    )
    (folder / "log.txt").write_text(evil)
    text = page([read_run(folder)])
    found = Page(text)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "pre"),
        *("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "details", "summary"),
    }
    allowed = {"src", "alt", "class", "lang", "charset", "name", "content", "http-equiv"}
    assert {name for _, attributes in found.tags for name in attributes} <= allowed
    assert evil in found.texts and "Run <b>run" in found.texts
    assert "url(" not in text and "@import" not in text


def test_what_the_page_lacks_is_said(tmp_path):
    folder = make_run(tmp_path / "run", [])
    whole = (folder / "figures" / "classes.png").read_bytes()
    (folder / "figures" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "status.json").write_text("{")
    found = Page(page([read_run(folder)]))
    assert [name for name, _ in found.images] == ["classes"]
    said = "status.json is damaged or half-written; figures/half.png is damaged, half-written or too large."
    assert said in found.texts
    assert any(text.startswith("There is nothing to draw") for text in found.texts)


def test_a_long_record_is_thinned(tmp_path):
    folder = make_run(tmp_path / "run", nested_rows(1000))
    found = Page(page([read_run(folder)]))
    assert "Rows of the record (every 25th of 1000)" in found.texts
    assert sum(tag == "tr" for tag, _ in found.tags) < 80
    assert "999" in found.texts


def test_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slow = [row | {"objective": 2 * row["objective"]} for row in nested_rows()]
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", slow, seed=1)
    make_run(tmp_path / "three", [{"kind": "update", "update": 1, "loss": 0.5}], num_layers=16)
    assert main(["report", "one", "two", "./one", "--out=both.html"]) == 0
    assert capsys.readouterr().out.startswith("both.html (")
    found = Page((tmp_path / "both.html").read_text())
    assert "Comparison of 2 runs" in found.texts, "a folder that is given twice counts once"
    drawn = ["training and validation", "objective", "validation accuracy", "norm of the gradient"]
    assert [name for name, _ in found.images][:4] == drawn
    cells = [text for text in found.texts if text]
    at = cells.index("objective", cells.index("Final values"))
    assert cells[at : at + 3] == ["objective", f"{2 / 13:.5g}", f"{4 / 13:.5g}"]
    at = cells.index("Configuration")
    assert cells[at + 4 : at + 7] == ["seed", "0", "1"], "what differs comes first"
    assert sum(tag == "tr" and attrs.get("class") == "differs" for tag, attrs in found.tags) == 1
    assert main(["report", "one", "three"]) == 0
    found = Page((tmp_path / "comparison.html").read_text())
    assert "There is nothing to draw: no quantity with two different values that all runs have." in found.texts


def deepened(count=12, seconds=1.0, work=1.0):
    """Rows of a run that is refined in its middle; an update of the deep network takes twice the work."""
    rows, done = [], 0.0
    for n in range(count):
        done += work * (1 if n < count // 2 else 2)
        rows.append(nested_rows(count)[n] | {"num_layers": 8 if n < count // 2 else 16, "work": done, "loss": 1.0})
        rows[-1] |= {"seconds": seconds * (n + 1), "train_accuracy": 0.5 + n / 50}
    return rows


def test_a_page_begins_with_one_sentence(tmp_path):
    folder = make_run(tmp_path / "run", deepened(), status("finished", ranks=3))
    (folder / "log.txt").write_text(
        "2026 INFO x: plan: 3 ranks over the layers; predicted 2.1 times one rank; next: y\n"
    )
    found = Page(page([read_run(folder)]))
    said = next(text for text in found.texts if text.startswith("run has come to"))
    assert said == (
        "run has come to 87.50 % validation accuracy and an objective of 0.625 in 12 updates and 12.0 s of training on "
        "3 ranks; plan: 3 ranks over the layers; predicted 2.1 times one rank; it began with fewer layers, which took "
        "18 work units where as many updates of all 16 layers take 22: 18 % saved."
    )


def test_a_refinement_is_marked_and_depths_have_colors(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "_png", lambda figure: drawn.append(figure) or b"")
    run = read_run(make_run(tmp_path / "run", deepened()))
    curves.draw([run], ["run"], "objective")
    curves.overview([run], ["run"])
    one, several = drawn
    assert [text.get_text() for text in one.axes[0].texts] == ["16"]
    assert len(several.axes) == 6, "losses and accuracies over updates, work and seconds"
    losses = several.axes[0].lines
    marks = [each for each in losses if each.get_linestyle() == ":" and list(each.get_xdata()) == [6, 6]]
    assert len(marks) == 1
    assert len({str(each.get_color()) for each in losses if each not in marks}) == 2
    labels = [text.get_text() for text in several.legends[0].get_texts()]
    assert labels == ["8 layers", "16 layers", "objective", "training", "validation"]


def test_a_comparison_has_seconds_and_speed_up(tmp_path):
    runs = [read_run(make_run(tmp_path / name, deepened(seconds=s))) for name, s in (("slow", 3.0), ("fast", 1.0))]
    cells = [text for text in Page(page(runs)).texts if text]
    assert "speed-up over slow" in cells
    assert cells[cells.index("36") + 1] == "1.00" and cells[cells.index("12", cells.index("36")) + 1] == "3.00"


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("stacks.0.gradient_error", "gradient error of stack 1"),
        ("val_accuracy", "validation accuracy"),
        ("loss", "training loss"),
        ("optim.rates.3.largest", "largest of rate 4 of optim"),
        ("a.99999999999999999999.b", "b of 99999999999999999999 of a"),
        ("val_", "val "),
    ],
)
def test_quantities_have_names_in_words(column, words):
    assert curves.named(column) == words


def test_the_rows_of_parts_are_no_quantities(tmp_path):
    rows = [row | {"stacks": [{"update": row["update"], "residual": 0.1 * row["update"]}]} for row in nested_rows()]
    found = Page(page([read_run(make_run(tmp_path / "run", rows))]))
    assert "residual of stack 1" in found.texts
    assert not any("stacks." in text or "update of stack" in text for text in found.texts)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [read_run(make_run(tmp_path / name / "run")) for name in ("a", "b")]
    assert {"a/run", "b/run"} <= set(Page(page(runs)).texts)


def test_a_file_of_the_run_is_not_overwritten(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["report", str(folder), f"--out={folder / 'metrics.jsonl'}"]) == 2
    assert f"use --out={folder / 'metrics.html'}" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert main(["report", str(folder), f"--out={folder / 'none' / 'x.html'}"]) == 2
    assert "No such file" in capsys.readouterr().err
