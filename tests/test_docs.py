"""The documentation site: every public name is in it, with a valid docstring; what its pages quote is in the code."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
DOCS = PROJECT / "docs"
pytest.importorskip("numpydoc", reason="the extra docs is not installed")
sys.path.append(str(DOCS / "_ext"))

import site_reference as reference  # noqa: E402
from numpydoc.docscrape import get_doc_object  # noqa: E402
from numpydoc.validate import validate  # noqa: E402

PUBLIC = [f"{face}.{name}" for face, name in reference.public()]

# What numpydoc checks, and we keep: a docstring is there and has the form that the reference reads (GL, SS), its
# parameters are those of the signature, in their order (PR01 to PR03, PR05, PR06, PR10), and what comes back and is
# raised is said (RT, YD). Left out is what is a matter of style, or not ours: types of parameters that annotations give
# (PR04) and descriptions of those whose name and type say all (PR07, PR08, PR09), "See Also" and examples for every
# name (SA, EX), an extended summary (ES01), summaries that begin with an equation or a noun (SS02, SS05, SS06).
CHECKS = {
    *("GL02", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10"),
    *("SS01", "SS03", "SS04", "PR01", "PR02", "PR03", "PR05", "PR06", "PR10"),
    *("RT02", "RT04", "YD01"),
}
# Their arguments are those of torch's modules of the same names, and are described there.
AS_TORCH = {"MovingBatchNorm1d", "MovingBatchNorm2d", "MovingBatchNorm3d", "MultiheadAttention"}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_valid(name):
    face, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(face), last)
    errors = [(code, said) for code, said in validate(name)["errors"] if code in CHECKS]
    known = {"*args", "**kwargs"}  # what Python takes a protocol to be called with
    if inspect.isclass(found):  # the fields of a record are its attributes, and said so
        known |= {each for field in get_doc_object(found)["Attributes"] for each in field.name.split(", ")}
        known |= {"message"} if issubclass(found, Exception) else set()
    undescribed = last in AS_TORCH or "all arguments are those of" in inspect.getdoc(found)
    wrong = [
        (code, said)
        for code, said in errors
        if code != "PR01" or not (undescribed or set(re.findall(r"'([\w*]+)'", said)) <= known)
    ]
    assert not wrong


def test_a_broken_docstring_is_noticed(monkeypatch):
    monkeypatch.setattr(importlib.import_module("xbraid_py").world, "__doc__", "No full stop\n\nX\n")
    assert "SS03" in {code for code, _ in validate("xbraid_py.world")["errors"]} & CHECKS


def test_every_public_name_is_in_a_group_of_the_reference():
    grouped = [name for names in reference.GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(importlib.import_module("xbraid_py").__all__)
    page = reference.reference_index()
    assert all(f"(api/{name}.rst)" in page and f"\napi/{name}\n" in page for name in PUBLIC)


def test_every_option_has_its_row():
    page = reference.options_page()
    for _, name, _ in reference.OPTIONS:
        section = page.split(f"[`xbraid_py.{name}`]")[1].split("\n## ")[0]
        given = set(inspect.signature(getattr(importlib.import_module("xbraid_py"), name)).parameters)
        rows = {each.lstrip("*") for each in re.findall(r"^\| `([\w*]+)`[ <]", section, re.M)}
        assert rows >= given - {"args", "kwargs"}, (name, given - rows)
        assert not re.findall(r"^\| `[\w*]+`.* \|\s*\|$", section, re.M) or name in ("ParallelGRU",), name


def test_the_errors_that_the_page_quotes_are_the_code_s():
    """What stands as code in the first column is a piece of a message, in its words."""
    said = " ".join(sentence for _, _, sentence in reference.messages()).replace("{size_name}", "")
    said = " ".join(re.sub(r"\{[^}]*\}", "", said).split())
    page = (DOCS / "reference" / "errors.md").read_text()
    others = {
        "gradient_error",
        "nn.Dropout",
        "max_iter",
        "DataLoader worker (pid(s) ...) exited unexpectedly",
        "export",
    }
    rows = re.findall(r"^\| (.*?) \| .*? \| .*? \|$", page.split("## Starting")[1], re.M)
    quoted = {each for row in rows for each in re.findall(r"`([^`]+)`", row)} - others - {"solve"}
    assert len(quoted) > 12
    assert not [each for each in quoted if " ".join(each.split()) not in said]


def test_the_start_page_leads_to_what_a_stranger_looks_for():
    """One click: how to install, programs to copy, options, errors, names, and a tutorial for each method."""
    page = (DOCS / "index.md").read_text()
    found = set(re.findall(r"\]\(([\w/]+)\.(?:md|rst)\)", page))
    tutorials = {f"tutorials/{path.stem}" for path in (DOCS / "gallery").glob("*.py")}
    methods = {"t03_nested_iteration", "t07_mgopt", "t08_width", "t09_multi_level_resnets"}
    wanted = {f"tutorials/{each}" for each in methods}
    wanted |= {"start/install", "start/first_run", "reference/options", "reference/errors", "reference/index", "papers"}
    assert wanted <= found
    assert {each for each in found if each.startswith("tutorials/t")} <= tutorials


def test_every_command_and_variable_is_on_its_page():
    page = (DOCS / "reference" / "commands.md").read_text()
    assert not [
        name for name in importlib.import_module("xbraid_py.cli").COMMANDS if not re.search(rf"\b{name}\b", page)
    ]
    used = set()
    for path in (PROJECT / "xbraid_py").rglob("*.py"):
        used |= set(re.findall(r"\"(XBRAID_[A-Z0-9_]*[A-Z0-9])\"", path.read_text()))
    assert len(used) > 5 and not [name for name in used if f"`{name}`" not in page]


def test_the_code_of_the_readme_runs_and_trains(capsys):
    """Its blocks are one program; each of the four systems is in it, in about ten lines."""
    text = (PROJECT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names, said = {"__name__": "readme"}, []
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        said.append(
            [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if re.match(r"\d+\S* \d", line)]
        )
    assert len(blocks) == 5 and all(len(block.strip().splitlines()) <= 12 for block in blocks[1:])
    for system in ("NestedIteration", "DepthCycle", "WidthTraining", "refine"):
        assert any(f"xb.{system}(" in block for block in blocks[1:]), system
    nested, width = said[1], said[3]
    assert nested[-1] < 0.5 * nested[0] and width[-1] < width[0]
    assert [len(stage) for stage in names["resnet"].stages] == [8, 8, 8] and names["levels"].work > 0
