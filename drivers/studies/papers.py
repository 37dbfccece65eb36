"""The tables and figures of the four papers beside ours: writes `docs/papers.md` from the rows that are kept.

python drivers/studies/papers.py [--out PAGE]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder hides a module of Python's library, and does not hold `studies`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from studies.comparison.depth import paper_000, paper_001
from studies.comparison.line import GREEN, NOT_RUN, RED, YELLOW
from studies.comparison.quoted import quoted
from studies.comparison.resnet import paper_003
from studies.comparison.width import paper_002
from studies.rows import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"
PAPERS = {
    "000": "L. Gaedke-Merzhäuser, A. Kopaničáková, R. Krause, *Multilevel Minimization for Deep Residual Networks*, "
    "2020 (ESAIM: Proceedings and Surveys 71, 2021), [arXiv:2004.06196](https://doi.org/10.48550/arXiv.2004.06196)",
    "001": "E. C. Cyr, S. Günther, J. B. Schroder, *Multilevel Initialization for Layer-Parallel Deep Neural Network "
    "Training*, 2019, [arXiv:1912.08974](https://doi.org/10.48550/arXiv.1912.08974)",
    "002": "C. Ponce, R. Li, C. Mao, P. Vassilevski, *Multilevel-in-Layer Training for Deep Neural Network Regression*"
    ", 2022, [arXiv:2211.06515](https://doi.org/10.48550/arXiv.2211.06515)",
    "003": "B. Chang, L. Meng, E. Haber, F. Tung, D. Begert, *Multi-level Residual Networks from Dynamical Systems "
    "View*, 2018 (ICLR), [arXiv:1710.10348](https://doi.org/10.48550/arXiv.1710.10348)",
}
# What readers know them by.
METHODS = {
    "000": "MG/OPT in depth",
    "001": "Nested iteration",
    "002": "FAS in width",
    "003": "Multi-level ResNets",
}
# What shows a scheme, a network or data, and so no result.
DRAWINGS = {
    "000": ("figure 1", "figure 2", "figure 3"),
    "001": ("figure 1", "figure 2"),
    "002": ("figure 1", "figure 2", "figure 5"),
    "003": ("figure 1", "figure 2", "figure 5", "table 1"),
}
_HEAD = (
    "of the paper",
    "paper",
    "ours",
    "size it was run at",
    "seeds",
    "command, and rows in `benchmarks/results`",
    "",
)
_WORDS = """\
# The tables and figures of the four papers, and ours

Made from the committed rows by `python drivers/studies/papers.py`; nothing here is written by hand.

The rule. A number *holds* if ours is worse by at most a tenth (counts, work, errors, ratios) or by at most one point
(accuracies). A comparison holds if ours has the same sign, and its 95 % interval leaves out that there is no
difference or, where the row has no interval, it is so on every seed and after every number of units that the row
names; "on par" holds unless ours is worse beyond the interval. **green**: it holds, and the run was of the paper's size
and by its method, as far as the paper states them. **yellow**: it holds in a run that was smaller, or other in
something, which the row says. **red**: it does not hold, at whatever size. **not run**: there are no committed rows. L2
is the mean square error, L∞ the largest error. ± is a standard deviation, in brackets is a 95 % interval or, of
speed-ups, the range.\
"""


LINES = {"000": paper_000, "001": paper_001, "002": paper_002, "003": paper_003}


def anchor(heading: str) -> str:
    """What a link to a heading ends in."""
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def text() -> str:
    """The page."""
    said, counts = [], []
    for name, paper in PAPERS.items():
        lines = list(LINES[name]())
        colors = [line.color for line in lines]
        counts.append(
            [
                f"[{METHODS[name]}](#{anchor(METHODS[name])})",
                *(f"{colors.count(each)}" for each in (GREEN, YELLOW, RED, NOT_RUN)),
            ]
        )
        drawn = ", ".join(DRAWINGS[name])
        shown = [[e.item, e.paper, e.ours, e.size, e.seeds, e.source, e.color] for e in lines]
        said += [
            f"## {METHODS[name]}",
            f"{paper}. Drawings, which have no row: {drawn}.",
            table(_HEAD, shown),
        ]
    heads = ["paper", "green", "yellow", "red", "not run"]
    figures_of = [[f"{page}", what, found] for page, what, found in quoted()]
    pages = (
        "Figures that sentences of the README and of the pages in `benchmarks/results` (named by their folder) stand "
        "on. Regimes of nested iteration: *paper* is the paper's, *ours* is ours with the paper's magnitudes, "
        "*defaults* are our defaults; behind them is the width."
    )
    tail = ["## Figures of the pages", pages, table(["page", "what", "figures"], figures_of)]
    return "\n\n".join([_WORDS, table(heads, counts), *said, *tail]) + "\n"


def main(path: Path) -> None:
    """Write the page."""
    path.write_text(text(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page is written (%(default)s)")
    main(parser.parse_args().out)
