"""The page docs/when_it_pays.md: each figure is in the file that it names, and each row that it names exists."""

import re

import pytest
from processes import PROJECT

PAGE = (PROJECT / "docs" / "when_it_pays.md").read_text()
NAMES = ("ranks", "blocks", "minibatch", "planner")
RESULTS = {name: (PROJECT / "benchmarks" / "results" / f"{name}.md").read_text() for name in NAMES}
ROWS = ("replicas", "pipeline of 8", "lagged", "V")


def table() -> dict[str, list[float | None]]:
    """The speed-ups of the page, by the first column."""
    rows = [
        [each.strip() for each in line.split("|")[1:]] for line in PAGE.splitlines() if re.match(r"\| [\d,]+ ", line)
    ]
    return {row[0]: [float(each) if each else None for each in row[1:5]] for row in rows}


@pytest.mark.parametrize("layers", [64, 256, 1024])
def test_dense_layers_are_those_of_the_benchmark(layers):
    text = RESULTS["ranks"].partition(f"\n{layers} layers, 2 ranks")[2].partition(" layers, 2 ranks")[0]
    found = [float(re.search(rf"^  {row} .* speed-up +([\d.]+)", text, re.M).group(1)) for row in ROWS]
    assert table()[f"{layers:,} dense layers"] == found
    assert re.search(r"^  limit .* speed-up +([\d.]+)", text, re.M).group(1) in PAGE


@pytest.mark.parametrize(("name", "row"), [("32 convolutions", "conv"), ("32 transformer layers", "transformer")])
def test_blocks_are_those_of_the_benchmark(name, row):
    (line,) = [line for line in RESULTS["blocks"].splitlines() if line.startswith(f"| {row} | 2 |")]
    cells = [each.strip() for each in line.strip("|").split("|")]
    portions, lagged, replicas = map(float, (cells[4], cells[10], cells[11]))
    assert table()[name] == [replicas, portions, lagged, None] and cells[12] in PAGE


@pytest.mark.parametrize(("job", "sweeps"), [("conv", "2 + 1"), ("text", "3 + 2"), ("usual", "5 + 3")])
def test_sweeps_are_those_of_the_benchmark(job, sweeps):
    text = RESULTS["minibatch"].partition(f"\n{job}, ")[2]
    assert re.search(r"^cold +(\d \+ \d)", text, re.M).group(1) == sweeps and f"{sweeps} " in PAGE


def test_no_figure_comes_from_elsewhere():
    measured = " ".join(RESULTS.values())
    missing = [each for each in re.findall(r"\d+\.\d+|\d+(?= %)", PAGE) if each not in measured]
    assert missing == []


def test_every_file_that_is_named_exists():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links and all((PROJECT / "docs" / each).exists() for each in links)
