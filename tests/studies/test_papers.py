"""The page of the four papers: it is what the committed rows make, leaves nothing out, and its colors follow a rule."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from kinds import draw_nothing
from processes import PROJECT
from studies.comparison import depth, resnet, width
from studies.comparison.line import Line, near
from studies.comparison.quoted import RESULTS, behind, kept, quoted
from studies.mgopt.parts import MGOptStudyOptions
from studies.nested.options import NestedStudyOptions
from studies.papers import DRAWINGS, LINES, PAGE, PAPERS
from studies.rows import WORK
from studies.study import PAGE as PAGE_OF_A_STUDY
from studies.study import key
from studies.width import page as width_page

# Tables and figures of each paper.
WHOLE = {"000": (2, 5), "001": (0, 5), "002": (4, 9), "003": (5, 11)}


@pytest.fixture(scope="module")
def lines():
    return {name: list(make()) for name, make in LINES.items()}


def test_the_page_is_what_the_command_makes(tmp_path):
    program = PROJECT / "drivers" / "studies" / "papers.py"
    subprocess.run([sys.executable, program, "--out", tmp_path / "papers.md"], check=True, cwd=tmp_path, timeout=300)
    assert (tmp_path / "papers.md").read_text() == PAGE.read_text()


@pytest.mark.parametrize("paper", WHOLE)
def test_every_table_and_figure_has_a_line(lines, paper):
    tables, figures = WHOLE[paper]
    items = ", ".join([line.item for line in lines[paper]] + list(DRAWINGS[paper]))
    for name, count in (("table", tables), ("figure", figures)):
        found = {int(number) for number in re.findall(rf"{name} (\d+)", items)}
        assert found == set(range(1, count + 1)), name


def test_what_was_run_says_how_and_on_which_rows(lines):
    for line in (line for each in lines.values() for line in each):
        assert (line.color == "not run") == (not line.ours), line.item
        if line.ours:
            assert line.size and line.source, line.item
            for name in re.findall(r"[a-z_0-9/]+\.(?:jsonl\.gz|png|md)\b", line.source):
                assert (RESULTS / name).is_file(), name


@pytest.mark.parametrize(
    ("holds", "full", "color"),
    [(True, True, "green"), (True, False, "yellow"), (False, True, "**red**"), (False, False, "**red**")],
)
def test_colors(holds, full, color):
    assert Line("table 1", "5", "5", "small", "3", "rows", holds, full).color == color
    assert Line("table 1", "5").color == "not run"
    assert near(5.5, 5) and not near(5.6, 5) and near(1, 5)


def test_nested_runs_that_fall_behind_are_seen():
    def row(run, curve):
        points = [[0, 16, unit, unit, unit, accuracy] for unit, accuracy in enumerate(curve)]
        return {"settings": {"run": run, "seed": 0}, "result": {"curve": points, "seconds": 1.0, "updates": 1}}

    ahead = [0.8] * 189
    dips = [0.8] * 30 + [0.4] * 5 + [0.8] * 154
    pair = [row("nested", dips), row("non-nested", [0.5] * 189)]
    most, units = behind(pair, WORK)
    assert (round(most, 6), units) == (10.0, 5)
    most, units = behind([row("nested", ahead), pair[1]], WORK)
    assert (round(most, 6), units) == (-30.0, 0)


def test_the_figures_that_pages_quote_are_in_them():
    """What the pages say is what is computed: a figure that changes has to be changed there too."""
    texts = {name: (RESULTS / name / "README.md").read_text() for name in ("nested", "multi_level", "width", "mgopt")}
    texts["README"] = (PROJECT / "README.md").read_text()
    said = {what: (page, found) for page, what, found in quoted()}
    assert {page for page, _ in said.values()} == texts.keys()
    wanted = {
        "by counted layer steps": ("4.2", "5.7", "0.7"),
        "by wall-clock time, the paper's unit": ("1.0 to 3.4",),
        "layer steps of a nested run": ("0.82 to 1.25",),
        "seconds of a nested run": ("1.02 to 1.45",),
        "training loss": ("0.82 to 1.30", "0.59 to 1.11"),
        "mean norm of F": ("32.2", "25.8", "20 %"),
        "on the fine network": ("12 of its 14",),
        "MNIST, one level": ("77.7 %", "85.4 %"),
        "momentum carried": ("1.10 (0.73 to 1.65)",),
        "coarsest network of circles": ("16 to 2048",),
        "fine sweeps a solve": ("1.17", "1.09"),
    }
    for what, figures in wanted.items():
        ((name, page, found),) = [(name, page, found) for name, (page, found) in said.items() if what in name]
        for figure in figures:
            assert figure in texts[page], (page, what, figure)
            for number in re.findall(r"[0-9]+(?:\.[0-9]+)?", figure):
                assert number in name + found, (what, found, figure)


def test_the_rows_of_darcy_make_their_page(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    width_page.write({"table3": kept("width/darcy.jsonl.gz")}, tmp_path)
    text = (RESULTS / "width" / "darcy.md").read_text()
    assert (tmp_path / PAGE_OF_A_STUDY).read_text() == text
    assert "Learned is the pressure" in text


@pytest.mark.parametrize("paper", PAPERS)
def test_papers_are_cited(paper):
    """By title, authors and year, in the README, on the page and where they are implemented."""
    authors, title, year = re.fullmatch(r"(.*?), \*(.*?)\*, (\d{4}).*", PAPERS[paper]).groups()
    rooms = {"000": "depth", "001": "depth", "002": "width", "003": "resnet"}
    for path in ("README.md", "docs/papers.md", f"xbraid_py/multilevel/{rooms[paper]}/__init__.py"):
        said = " ".join((PROJECT / path).read_text().split())
        assert authors in said and title in said and year in said[said.index(title) :][:200], path


def test_rows_of_long_runs_take_the_place_of_shorter_ones(monkeypatch):
    """Table 1 on MNIST: epochs of 60 cycles."""
    cases = MGOptStudyOptions(parts=("mnist_epochs",)).first_stage({})["mnist_epochs"]
    ends = {1: (60 * 460, 1.0), 8: (60 * 40, 5.1875)}  # cycles, and units of a cycle
    rows = []
    for case in (each for each in cases if each["mgopt"]["levels"] in ends and each["seed"] < 2):
        cycles, unit = ends[case["mgopt"]["levels"]]
        curve = [[k * cycles, k * unit * cycles, 0, 0, 0, 0, 0.93 * k] for k in (0, 1)]
        rows.append({"settings": case, "result": {"curve": curve}})
    monkeypatch.setattr(depth, "later", lambda name: tuple(rows))
    found = {line.item: line for line in depth.paper_000()}
    one, eight = (found[f"table 1, MNIST, L = {levels}"] for levels in (1, 8))
    assert (one.ours, one.seeds, one.color) == ("460.0 epochs, 460.0 units of as many", "2 of 2 arrive", "green")
    assert (eight.ours, eight.color) == ("40.0 epochs, 207.5 units of as many", "**red**")
    assert "minibatch" in found["table 1, MNIST, L = 2"].size and found["table 1, MNIST, L = 2"].ours.startswith("85")
    work = found["table 1, MNIST: work of L = 1 over L = 8"]
    assert work.ours == "2.22 (2.22 to 2.22)" and work.color == "**red**" and work.seeds == "2"


def lines_with(monkeypatch, module, make, **files):
    """The lines of a paper when long runs have left these rows."""
    monkeypatch.setattr(module, "later", lambda name: tuple(files.get(name.split("/")[1].split(".")[0], ())))
    return {line.item: line for line in make()}


def test_long_runs_of_paper_001(monkeypatch):
    study = NestedStudyOptions(parts=("tuned_alike",), seeds=2)
    trials = study.settings()
    made = [{"settings": each, "result": {"val_accuracy": 0.9 + (each["tikhonov"] == 1e-4) / 100}} for each in trials]
    gains = {"nested": 0.97, "non-nested": 0.95}
    for each in study.second_stage({key(row["settings"]): row for row in made}):
        made.append({"settings": each, "result": {"val_accuracy": gains[each["run"]] + each["seed"] / 1e5}})
    solve = {"states": [1.0, 1e-3, 1e-5, 1e-7], "adjoints": [1.0, 1e-2, 1e-5, 1e-7]}
    slow = {"states": [1.0, 1e-1, 1e-2, 1e-5], "adjoints": [1.0, 1e-2, 1e-5, 1e-7]}
    pair = [{"num_layers": 64, "interpolation": name, **each} for name, each in (("constant", solve), ("linear", slow))]
    settings = {"regime": "paper", "num_layers": 64, "change": "convergence", "seed": 0}
    solved = [{"settings": settings, "result": {"refinements": pair}}]
    found = lines_with(monkeypatch, depth, depth.paper_001, tuned_alike=made, convergence=solved)
    line = found["figure 3, width 5: nested less non-nested, each tuned"]
    assert (line.ours, line.seeds, line.color) == ("+2.00 (+2.00 to +2.00)", "2", "yellow")
    line = found["section 2.2: MGRIT's convergence by linear and by constant interpolation"]
    assert line.ours.startswith("2.50 and 2.00 V-cycles") and line.color == "**red**"


def test_long_runs_of_paper_003(monkeypatch):
    def run(model, seed, error, **changes):
        settings = {"model": model, "seed": seed, "eta_max": 0.5, "eta_min": 0.001, "reset": True}
        return {"settings": settings | changes, "result": {"val_error": error}}

    paper = [run("last", seed, 0.08) for seed in (0, 1)] + [run("multilevel", seed, 0.07) for seed in (0, 1)]
    more = [run("multilevel", seed, 0.9, **how) for seed in (0, 1) for how in ({"reset": False}, {"eta_max": 0.1})]
    more += [run("multilevel", seed, 0.1, noise=0.1) for seed in (0, 1)]

    def network(depth, h, size):
        norms = [[stage, block, 100.0, size] for stage in range(3) for block in range(depth)]
        return {"settings": {"blocks": [depth] * 3, "step_size": h}, "result": {"norms": norms}}

    norms = [network(2, 1.0, 36.0), network(18, 1.0, 4.0), network(18, 2 / 18, 4.0)]
    found = lines_with(monkeypatch, resnet, resnet.paper_003, paper=paper, more=more, lesion=norms)
    line = found["table 3, CIFAR-10: ResNet-50-i less ResNet-50, 32 x 32 pixels"]
    assert (line.ours, line.color) == ("-1.00 (-1.00 to -1.00)", "yellow")
    assert found["table 3, CIFAR-10, ResNet-50-i: test error, 32 x 32 pixels"].ours == "7.00 ± 0.00 %"
    assert found["figure 9: learning rates"].ours.count("eta_max=0.1 +5") == 1
    assert found["figure 10: learning rate begun anew"].color == "yellow"
    assert found["figure 3, longer, h = 1: norm of the residual modules"].ours == "0.11 of it"
    assert "0.040 in the mean" in found["figure 4: norms of input and output of ResNet-110"].ours
    assert found["figure 7, longer: F at several depths with h d the same"].ours == "mean norms 36.0, 36.0"


def test_convolutional_rows_say_their_size_and_what_the_paper_had():
    curve = [[1, 1000.0, 900.0, 1000.0, 5.0, 1e-3, 1e-3, 0.4, 6e-4, 0.3, None, None, None, None]]
    row = {
        "settings": {"problem": "darcy", "levels": 2, "num_train": 4000, "max_work": 1000.0, "validate_every": 100.0},
        "result": {"curve": curve},
    }
    theirs = {1: ("6.61e-4", "0.361"), 2: ("6.06e-4", "0.371")}
    without, reduced = width.convolutional("table", "table3_conv", theirs, [row])
    assert without.holds is None and not without.size
    assert reduced.ours == "6.00e-04, 0.300" and reduced.holds and not reduced.full
    assert reduced.size == "4,000 samples, 1,000 units (40,000 samples, units not said)"
