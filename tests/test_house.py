"""The rules of the house that a machine can check; as a script it prints what the house holds and what breaks a rule.

The list of rooms is the table of CONTRIBUTING.md, and stands nowhere else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
LINES = 500
FACES = ("xbraid_py/__init__.py", "xbraid_py/__main__.py", "xbraid_py/nn.py", "xbraid_py/testing.py")
# Where pictures may be imported at once: elsewhere matplotlib is loaded by the rank that draws, when it draws.
DRAWING = ("xbraid_py/recipes/pictures/", "xbraid_py/cli/", "drivers/studies/", "benchmarks/", "tests/")
PICTURES = ("matplotlib", "xbraid_py.recipes.pictures")
# What a room without messages may have of comm: integers, and a communicator that sends nothing.
SILENT = ("xbraid_py.comm.partition", "xbraid_py.comm.SerialCommunicator")
COMPILED = "xbraid_py.kernels._native"
LIBRARY, PROGRAMS, TESTS = (
    sorted(str(path.relative_to(PROJECT)) for folder in folders for path in (PROJECT / folder).rglob("*.py"))
    for folders in (["xbraid_py"], ["drivers", "benchmarks"], ["tests"])
)


@dataclass(frozen=True)
class Room:
    """A row of the table: the floor, and who sends messages: everybody (None) or some files."""

    floor: int
    sentence: str
    speakers: tuple[str, ...] | None


def rooms() -> dict[str, Room]:
    """The table of CONTRIBUTING.md, from the bottom to the top."""
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)/` \| (.+?) \| (all|none|`.+?`) \|$", (PROJECT / "CONTRIBUTING.md").read_text(), re.M
    )
    return {
        name: Room(int(floor), sentence, None if who == "all" else tuple(re.findall(r"`(.+?)`", who)))
        for floor, name, sentence, who in rows
    }


ROOMS = rooms()


def room_of(file: str) -> str:
    """The room of a file of the library or of the programs; "" for a face."""
    parts = file.split("/")
    return "" if file in FACES else parts[1] if parts[0] == "xbraid_py" else parts[0]


def imported(node: ast.AST, package: Sequence[str], inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Full names of all modules and names that a file imports, each with whether a function does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package[: len(package) - child.level + 1] if child.level else ()
            for alias in child.names:
                yield ".".join((*above, *filter(None, [child.module]), alias.name)), inside
        else:
            yield from imported(child, package, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def reached(tree: ast.AST, package: Sequence[str]) -> Iterator[str]:
    """Full names of the private names that are taken from imported modules of ours, as in `module._name`."""
    modules = {name.rpartition(".")[2]: name for name, _ in imported(tree, package) if file_of(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr.startswith("_") and not node.attr.endswith("__"):
                yield f"{modules[node.value.id]}.{node.attr}"


def file_of(name: str) -> str | None:
    """The file of ours that an imported name is in, or is."""
    parts = [] if name == COMPILED else name.split(".")
    for length in range(len(parts), 0, -1):
        for folder in ("", "drivers/", "benchmarks/"):
            path = folder + "/".join(parts[:length])
            for file in (f"{path}.py", f"{path}/__init__.py"):
                if (PROJECT / file).is_file():
                    return file
    return None


def offences(file: str, source: str) -> list[str]:
    """Imports of a file that break a rule, each with the rule."""
    room = room_of(file)
    tests = file.startswith("tests/")
    tree, package = ast.parse(source), file.split("/")[:-1]
    found = [f"{name}: a private name of another file" for name in reached(tree, package)]
    for name, inside in imported(tree, package):
        target = file_of(name)
        other = room_of(target) if target else ""
        if name.split(".")[0] == "mpi4py" and file != "xbraid_py/comm/mpi.py" and not tests:
            found.append(f"{name}: only xbraid_py/comm/mpi.py imports mpi4py")
        if not inside and name.startswith(PICTURES) and not file.startswith(DRAWING):
            found.append(f"{name}: pictures are imported where they are drawn, inside a function")
        if target is None:
            continue
        last = name.split(".")[-1]
        if last.startswith("_") and not last.endswith("__") and target != file:
            found.append(f"{name}: a private name of another file")
        if file in FACES or tests or not {room, other} <= {*ROOMS, ""}:  # what is in no room is found by its own test
            continue
        if target in FACES:
            if room not in ("drivers", "benchmarks"):
                found.append(f"{name}: the package's face is for its users, take the module that defines the name")
        elif other != room and target.count("/") == 1:
            found.append(f"{name}: programs are started, not imported")
        elif other != room and ROOMS[other].floor >= ROOMS[room].floor:
            found.append(f"{name}: {room} is on floor {ROOMS[room].floor}, {other} on floor {ROOMS[other].floor}")
        elif other == room and target.endswith("/__init__.py") and room != "drivers":
            found.append(f"{name}: inside a room names come from the module that defines them")
        speakers = ROOMS[room].speakers
        if other == "comm" and speakers is not None and file.split("/", 2)[-1] not in speakers:
            if not name.startswith(SILENT):
                found.append(f"{name}: this file of {room} sends no messages")
    return found


def graph(files: Sequence[str]) -> dict[str, set[str]]:
    """The files of ours that each of some files imports, inside functions too."""
    return {
        file: {target for name, _ in imported_by(file) if (target := file_of(name)) and target != file}
        for file in files
    }


def imported_by(file: str) -> Iterator[tuple[str, bool]]:
    return imported(ast.parse((PROJECT / file).read_text()), file.split("/")[:-1])


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which imports all others, itself or through others."""
    reached = {}
    for start in imports:
        seen: set[str] = set()
        ahead = [*imports[start]]
        while ahead:
            file = ahead.pop()
            if file not in seen:
                seen.add(file)
                ahead += imports.get(file, ())
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in imports if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def broken(files: Sequence[str]) -> list[str]:
    """All imports that break a rule."""
    return [f"{file}: {each}" for file in files for each in offences(file, (PROJECT / file).read_text())]


def long_files(files: Sequence[str]) -> list[str]:
    """Files that are more than one idea."""
    return [f"{file}: {lines} lines" for file in files if (lines := count_lines([file])) > LINES]


def nameless(files: Sequence[str]) -> list[str]:
    """Files that do not say what they are."""
    return [file for file in files if not ast.get_docstring(ast.parse((PROJECT / file).read_text()))]


def count_lines(files: Sequence[str]) -> int:
    """Lines of some files together."""
    return sum(len((PROJECT / file).read_text().splitlines()) for file in files)


def test_the_table_names_every_room_once():
    names = [room_of(file) for file in LIBRARY + PROGRAMS]
    assert {*names} - {""} == {*ROOMS}
    floors = [room.floor for room in ROOMS.values()]
    assert floors == sorted(floors) and {*floors} == {*range(1, max(floors) + 1)}


def test_speakers_exist():
    missing = [
        f"xbraid_py/{name}/{file}"
        for name, room in ROOMS.items()
        for file in room.speakers or ()
        if f"xbraid_py/{name}/{file}" not in LIBRARY
    ]
    assert missing == []


@pytest.mark.parametrize("files", [LIBRARY, PROGRAMS, TESTS], ids=["library", "programs", "tests"])
def test_imports_keep_the_rules(files):
    assert broken(files) == []


def test_no_file_imports_itself_through_others():
    assert circles(graph(LIBRARY + PROGRAMS)) == []


def test_files_are_chapters_not_books():
    assert long_files(LIBRARY + PROGRAMS + TESTS) == []


def test_files_say_what_they_are():
    assert nameless(LIBRARY + PROGRAMS + TESTS) == []


@pytest.mark.parametrize(
    ("source", "file", "rule"),
    [
        ("from xbraid_py.comm import world", "xbraid_py/mgrit/new.py", None),
        ("from xbraid_py.comm.partition import Partition", "xbraid_py/kernels/new.py", "floor"),
        ("from xbraid_py.comm import Communicator", "xbraid_py/layers/new.py", "messages"),
        ("from xbraid_py.comm import SerialCommunicator", "xbraid_py/layers/new.py", None),
        ("from xbraid_py.comm.partition import Partition", "xbraid_py/layers/new.py", None),
        ("import xbraid_py.optim.line_search", "xbraid_py/mgrit/new.py", "floor"),
        ("from ..optim import line_search", "xbraid_py/mgrit/new.py", "floor"),
        ("def f():\n    from xbraid_py.cli import main", "xbraid_py/mgrit/new.py", "floor"),
        ("class A:\n    def f(self):\n        from xbraid_py.cli import main", "xbraid_py/run/store/new.py", "floor"),
        ("from . import solver", "xbraid_py/mgrit/new.py", None),
        ("from xbraid_py.mgrit import MGRIT", "xbraid_py/mgrit/new.py", "inside a room"),
        ("from xbraid_py.mgrit import MGRIT", "xbraid_py/optim/new.py", "floor"),
        ("from xbraid_py.mgrit import MGRIT", "xbraid_py/problem/new.py", None),
        ("from xbraid_py.mgrit.norms import _new", "xbraid_py/problem/new.py", "private"),
        ("from xbraid_py.mgrit.norms import _new", "tests/mgrit/test_new.py", "private"),
        ("from xbraid_py.mgrit import norms\nnorms._new()", "xbraid_py/problem/new.py", "private"),
        ("from xbraid_py.mgrit import norms\nnorms.__name__", "xbraid_py/problem/new.py", None),
        ("import xbraid_py", "xbraid_py/mgrit/new.py", "face"),
        ("from xbraid_py import LayerGrid", "xbraid_py/mgrit/new.py", "face"),
        ("from xbraid_py import LayerGrid", "drivers/new.py", None),
        ("from studies.rows import Row", "drivers/new.py", None),
        ("from studies.rows import Row", "benchmarks/new.py", None),
        ("from studies.rows import Row", "xbraid_py/cli/new.py", "floor"),
        ("import peaks", "drivers/new.py", None),
        ("import peaks", "benchmarks/new.py", "started"),
        ("import common", "benchmarks/new.py", None),
        ("def f():\n    from mpi4py import MPI", "xbraid_py/comm/new.py", "mpi4py"),
        ("import mpi4py.MPI", "drivers/new.py", "mpi4py"),
        ("import mpi4py", "xbraid_py/comm/mpi.py", None),
        ("from matplotlib.figure import Figure", "xbraid_py/recipes/new.py", "pictures"),
        ("from xbraid_py.recipes.pictures import style", "drivers/new.py", "pictures"),
        ("def f():\n    from xbraid_py.recipes.pictures import style", "xbraid_py/recipes/new.py", None),
        ("import torch, numpy", "xbraid_py/comm/new.py", None),
    ],
)
def test_the_rules_bite(source, file, rule):
    found = offences(file, source)
    assert [rule in each for each in found] == ([] if rule is None else [True])


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c"]]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"e"}, "e": {"c"}}, [["a", "b"], ["c", "d", "e"]]),
    ],
)
def test_circles_are_found(imports, found):
    assert circles(imports) == found


def main() -> int:
    """Print the counts and what breaks a rule; the exit status is 1 if something does."""
    everything = LIBRARY + PROGRAMS + TESTS
    round_trips = [" <-> ".join(group) for group in circles(graph(LIBRARY + PROGRAMS))]
    inner = [room for room in ROOMS if (PROJECT / "xbraid_py" / room).is_dir()]
    print(f"rooms {len(inner)}  floors {max(room.floor for room in ROOMS.values())}  circles {len(round_trips)}")
    parts = {f"xbraid_py/{room}": f"xbraid_py/{room}/" for room in inner}
    parts |= {"xbraid_py": "xbraid_py/", "drivers": "drivers/", "of them studies": "drivers/studies/"}
    parts |= {"benchmarks": "benchmarks/", "tests": "tests/", "all": ""}
    for name, start in parts.items():
        files = [file for file in everything if file.startswith(start)]
        print(f"{name:<26}{len(files):>5} files{count_lines(files):>8,} lines")
    wrong = [*broken(everything), *round_trips, *long_files(everything), *nameless(everything)]
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
