"""Pages that are kept beside what they are about, brought into the site, and their links led to the site's pages.

A link to a file of the checkout that is no page of the site becomes the file's name; a link to nothing is a warning,
and so ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.util import logging

DOCS = Path(__file__).resolve().parent.parent
PROJECT = DOCS.parent
RESULTS = PROJECT / "benchmarks" / "results"
# Where in the site a page goes that is kept elsewhere.
COPIES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "EXPERIMENTS.md": "project/experiments.md",
    "jobs/README.md": "howto/jobs.md",
    "docker/README.md": "start/containers.md",
}
# The numbers that the code has for the papers, and what readers know them by.
PAPERS = {
    "000": "Gaedke-Merzhäuser, Kopaničáková, Krause 2020",
    "001": "Cyr, Günther, Schroder 2019",
    "002": "Ponce, Li, Mao, Vassilevski 2022",
    "003": "Chang, Meng, Haber, Tung, Begert 2018",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^( *```.*?^ *```)", re.M | re.S)
logger = logging.getLogger(__name__)


def places() -> dict[Path, str]:
    """Where the pages of the checkout are in the site: the path of a page, relative to `docs`."""
    found = {PROJECT / source: page for source, page in COPIES.items()}
    for path in sorted(RESULTS.rglob("*.md")):
        name = path.relative_to(RESULTS)
        found[path] = f"benchmarks/{name.parent.name if name.name == 'README.md' else name.with_suffix('')}.md"
    return found


def named(text: str) -> str:
    """A text with the papers by their authors and years."""
    return re.sub(r"\b[Pp]aper (00[0-3])\b", lambda match: PAPERS[match[1]], text)


def led(text: str, source: Path, page: str, pages: dict[Path, str]) -> str:
    """The text of a page with its links as they are in the site, where it is the page of that name."""

    def link(match: re.Match) -> str:
        picture, said, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = Path(os.path.normpath(source.parent / path))
        here = (DOCS / page).parent
        if file in pages:
            return f"[{said}]({os.path.relpath(DOCS / pages[file], here)}{'#' + anchor if anchor else ''})"
        if file == PROJECT / "README.md":
            return f"[{said}]({os.path.relpath(DOCS / 'index.md', here)})"
        if file.is_relative_to(DOCS) and (file.suffix in (".md", ".rst") or picture):
            return f"{picture}[{said}]({os.path.relpath(file, here)}{'#' + anchor if anchor else ''})"
        if not file.exists():
            logger.warning("a link to %s, which is not there", target, location=page, type="pages")
        elif picture:
            return f"![{said}]({os.path.relpath(file, here)})"
        name = str(file.relative_to(PROJECT))
        return f"`{name}`" if said.strip("`") in (name, file.name) else f"{said} (`{name}`)"

    parts = _FENCE.split(text)  # what stands in a fence is no link
    return "".join(part if at % 2 else _LINK.sub(link, part) for at, part in enumerate(parts))


def write(page: str, text: str) -> None:
    """Write a page that is made while building, but not where it is there as it is: then it is not built again."""
    text = named(text)
    path = DOCS / page
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def copy(app, config) -> None:
    pages = places()
    for source, page in pages.items():
        write(page, led(source.read_text(encoding="utf-8"), source, page, pages))


def lead(app, docname, content) -> None:
    source = DOCS / f"{docname}.md"
    if source.exists():
        content[0] = led(content[0], source, f"{docname}.md", places())


def setup(app):
    app.connect("config-inited", copy)
    app.connect("source-read", lead)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
