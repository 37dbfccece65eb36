"""The rules of the house that a machine can check: import direction, length of files, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "xbraid_py"

# From the bottom to the top. A room imports itself and the rows below its own.
LAYERS = (
    {"allocation", "errors", "grid"},
    {"comm"},
    {"threads"},
    {"kernels"},
    {"networks"},
    {"propagator", "spline_weights"},
    {"gru_steps", "module_steps"},
    {"mgrit"},
    {"spatial"},
    {"checking"},
    {"network"},
    {"regularization"},
    {"layer_parallel", "objective", "process_grid"},
    {"problem", "sequence_parallel"},
    {"optim"},
    {"multilevel"},
    {"data", "io", "planner", "report", "scores"},
    {"classification", "image_cases", "mgopt_cases", "minibatch", "pde_files", "study"},
    {"width_cases"},
    {"export"},
    {"cli"},
    {"__main__"},
    {"drivers", "benchmarks"},
)
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
# Tensors in, tensors out.
NO_COMM = {"grid", "kernels", "networks", "propagator", "gru_steps", "module_steps", "spatial"}

LIBRARY = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted(path for folder in ("drivers", "benchmarks") for path in (PROJECT / folder).rglob("*.py"))
SHORT = LIBRARY + sorted((PROJECT / "drivers").rglob("*.py"))


def room_of(path: Path) -> str:
    """First folder or file below the package; the folder itself for programs; "" for the package's own names."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    room = parts[1] if parts[0] == "xbraid_py" else parts[0]
    return "" if room == "__init__" else room


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Full names of all modules and names that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*above, *filter(None, [node.module]), alias.name)) for alias in node.names)


def offences(source: str, room: str, package: tuple[str, ...]) -> list[str]:
    """Imports of a file in `room` that break the rules, each with the rule it breaks."""
    found = []
    for name in imported(ast.parse(source), package):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "mpi4py" and room != "comm":
            found.append(f"{name}: only comm imports mpi4py")
        elif root in ("drivers", "benchmarks", "tests") and root != room:
            found.append(f"{name}: nothing imports programs or tests")
        elif root == "xbraid_py" and room and LAYER[room] < LAYER["drivers"]:
            if other != room and LAYER.get(other, len(LAYERS)) >= LAYER[room]:
                found.append(f"{name}: {room} imports only what is below it")
            if other == "comm" and room in NO_COMM:
                found.append(f"{name}: {room} knows nothing of messages")
    return found


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room == "" or room in LAYER, f"{room} is a new room: give it a row in LAYERS"
    assert not offences(path.read_text(), room, path.relative_to(PROJECT).parent.parts)


@pytest.mark.parametrize(
    ("source", "room", "broken"),
    [
        ("from xbraid_py.comm import world", "grid", 2),
        ("from xbraid_py.comm.partition import Partition", "comm", 0),
        ("import xbraid_py.comm.partition", "propagator", 0),
        ("from xbraid_py import grid", "propagator", 0),
        ("from xbraid_py import LayerGrid", "propagator", 1),
        ("from xbraid_py import LayerGrid", "drivers", 0),
        ("import xbraid_py", "mgrit", 1),
        ("from . import solver", "mgrit", 0),
        ("from ..optim import lbfgs", "mgrit", 1),
        ("from .. import comm", "networks", 1),
        ("def f():\n    from xbraid_py.optim.lbfgs import LBFGS", "objective", 1),
        ("from xbraid_py.problem.objective import Objective", "layer_parallel", 1),
        ("def f():\n    from mpi4py import MPI", "io", 1),
        ("import mpi4py.MPI", "drivers", 1),
        ("import mpi4py", "comm", 0),
        ("from drivers import peaks", "report", 1),
        ("import torch, numpy", "grid", 0),
    ],
)
def test_the_rules_bite(source, room, broken):
    assert len(offences(source, room, ("xbraid_py", room))) == broken


@pytest.mark.parametrize("path", SHORT, ids=lambda path: str(path.relative_to(PROJECT)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 300, f"{lines} lines; past 300 it is two files"


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "one sentence at the top says what the file is"


def test_one_file_imports_mpi4py():
    importers = [
        path
        for path in LIBRARY
        if any(name.split(".")[0] == "mpi4py" for name in imported(ast.parse(path.read_text()), ()))
    ]
    assert importers == [PACKAGE / "comm" / "mpi.py"]
