"""Pages made from the code: one for each public name, all options, all messages, all commands."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator

from numpydoc.docscrape import ClassDoc, FunctionDoc
from site_pages import PROJECT, named, write

FACES = ("xbraid_py", "xbraid_py.nn", "xbraid_py.testing")
# The public names by what they are for: the order of the page of the reference.
GROUPS = {
    "A torch module that is layer-parallel": (
        "LayerParallel PipelineParallel parallelize parallel_stages to_sequential ResidualStep GradientControl "
        "SolveRecord refine_depth replace_modules DenseBlock Splines SpatialCoarsening LayerGrid ImageResNet refine"
    ),
    "In a training loop": (
        "broadcast_batch broadcast_loss check_replicas clip_grad_norm_ param_groups layer_lr layer_views GradScaler "
        "save_checkpoint load_checkpoint ProcessGrid advise Advice"
    ),
    "Sequences": "ParallelGRU ParallelLSTM SequenceRecord",
    "Equations in time": "solve TimeStepper Trajectory check_propagator PropagatorReport",
    "The solver": "MGRIT Solver Solution Hierarchy Forward Adjoint Propagator Partition",
    "Dense networks as an optimization problem": (
        "Problem DenseResNetOptions DenseResNet DenseLayer ResidualSteps InitialScales Regularization NetworkObjective "
        "Objective Evaluation OneShot OneShotOptions QuasiNewton Armijo"
    ),
    "Several depths and widths": (
        "NestedIteration NestedOptions AdaptiveOptions MGOpt MGOptOptions DepthCycle VCycle WidthTraining "
        "WidthTrainingOptions ResNetTraining ResNetTrainingOptions prolong_depth local_errors output_error error_norms"
    ),
    "Ranks": "world as_communicator Communicator",
    "Errors": "LaunchError RunError CheckpointError Stopped",
}
# Options and their page: a heading, the class or function, and what stands before an option on the command line.
OPTIONS = (
    ("The solver", "MGRIT", "mgrit"),
    ("How exact gradients have to be", "GradientControl", "accuracy"),
    ("A stack of layers", "LayerParallel", None),
    ("A pipeline of unlike modules", "PipelineParallel", None),
    ("A sequence", "ParallelGRU", None),
    ("The one-shot optimizer", "OneShotOptions", "optim"),
    ("Its line search", "Armijo", "optim.line_search"),
    ("A dense network", "DenseResNetOptions", "network"),
    ("Its first weights", "InitialScales", "initial"),
    ("Its regularization", "Regularization", "regularization"),
    ("Splines in depth", "Splines", "network.splines"),
    ("Nested iteration", "NestedOptions", "nested"),
    ("Adaptive depth", "AdaptiveOptions", "nested.adaptive"),
    ("MG/OPT in depth", "MGOptOptions", "mgopt"),
    ("FAS in width", "WidthTrainingOptions", "training"),
    ("Multi-level ResNets", "ResNetTrainingOptions", None),
    ("Fewer pixels on coarse levels", "SpatialCoarsening", None),
)


def public() -> Iterator[tuple[str, str]]:
    """The public names, each with the face that has it."""
    for face in FACES:
        for name in importlib.import_module(face).__all__:
            yield face, name


def api_page(face: str, name: str) -> str:
    found = getattr(importlib.import_module(face), name)
    full = f"{face}.{name}"
    kind = "function" if not inspect.isclass(found) else "class"
    members = "   :members:\n   :show-inheritance:\n" if kind == "class" else ""
    page = f"{name}\n{'=' * len(name)}\n\n.. currentmodule:: {face}\n\n.. auto{kind}:: {full}\n{members}"
    if described(found) is not found:
        page += f"\n.. autoclass:: {described(found).__module__}.{described(found).__qualname__}\n   :members:\n"
        page += "   :no-index:\n"
    return page


def described(found):
    """The class whose docstring has the arguments: of a class that refers to its base, the base."""
    refers = inspect.isclass(found) and "all arguments are those of" in inspect.getdoc(found)
    return found.__bases__[0] if refers else found


def reference_index() -> str:
    """The page of all public names, in groups."""
    said = [
        "# Reference\n\nEvery public name, what it is for, and all it takes. Names not listed here may change without "
        "notice.\n\n* [Options](options.md): each option of the solver and of the methods, on one page.\n"
        "* [Errors](errors.md): what a message means, and the way out.\n"
        "* [Commands](commands.md): `xbraid-py` and its words, programs and variables of the environment.\n"
    ]
    for heading, face, names in [
        *((heading, "xbraid_py", names.split()) for heading, names in GROUPS.items()),
        ("xbraid_py.nn", "xbraid_py.nn", importlib.import_module("xbraid_py.nn").__all__),
        ("xbraid_py.testing", "xbraid_py.testing", importlib.import_module("xbraid_py.testing").__all__),
    ]:
        rows = []
        for name in names:
            summary = " ".join(inspect.getdoc(getattr(importlib.import_module(face), name)).split("\n\n")[0].split())
            rows.append(f"| [`{name}`](api/{face}.{name}.rst) | {_cell(summary)} |")
        said.append(f"## {heading}\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows) + "\n")
    entries = "\n".join(f"api/{face}.{name}" for face, name in public())
    said.append(f"```{{toctree}}\n:hidden:\n\noptions\nerrors\nmessages\ncommands\n{entries}\n```\n")
    return "\n".join(said)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split())).replace("<", "&lt;").replace("``", "`")


def options_page() -> str:
    """Each option of the solver and of the methods: name, type and default, meaning."""
    said = [
        "# Options\n\nMade from the docstrings. In Python an option is an argument of its class; on the command line "
        "of a program it has the prefix that stands under the heading, as in `--mgrit.cfactor 4`, and `--help` of the "
        "program lists those that it has. `--config FILE` reads them from YAML.\n"
    ]
    for heading, name, prefix in OPTIONS:
        found = described(getattr(importlib.import_module("xbraid_py"), name))
        doc = ClassDoc(found) if inspect.isclass(found) else FunctionDoc(found)
        given = inspect.signature(found).parameters
        fields = {each.name: each for each in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
        said.append(f"## {heading}\n\n[`xbraid_py.{name}`](api/xbraid_py.{name}.rst)")
        said.append(f"On the command line: `--{prefix}.OPTION`.\n" if prefix else "")
        rows = []
        for parameter in doc["Parameters"]:
            for each in parameter.name.split(", "):
                of = given.get(each.lstrip("*"))
                kind = parameter.type or (_words(str(fields[each].type)) if each in fields else "")
                default = _default(of)
                about = [f"`{each}`", f"{_code(default)} by default" if default and _code(default) else "", _code(kind)]
                rows.append(f"| {'<br>'.join(filter(None, about))} | {_cell(' '.join(parameter.desc))} |")
        said.append("| option | what it says |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n\n".join(said)


def _default(parameter: inspect.Parameter | None) -> str:
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return ""
    value = parameter.default
    return type(value).__name__ + "()" if dataclasses.is_dataclass(value) else repr(value)


def _words(annotation: str) -> str:
    """A type as docstrings have it: {"lagged", "V"} for what annotations call a Literal."""
    return re.sub(r"Literal\[(.*?)\]", lambda match: "{" + match[1].replace("'", '"') + "}", annotation)


def _code(text: str) -> str:
    text = text.replace("`", "").replace("|", "\\|")
    return f"`{text}`" if text and "<factory>" not in text else ""


def messages() -> Iterator[tuple[str, str, str]]:
    """All messages of errors and warnings in the package: room, kind, sentence with the names of what is filled in."""
    for path in sorted((PROJECT / "xbraid_py").rglob("*.py")):
        room = path.relative_to(PROJECT / "xbraid_py").parts[0]
        room = "xbraid_py" if room.endswith(".py") else room
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            kind = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if isinstance(node, ast.Raise) or kind == "warn":
                sentence = _sentence(call.args[0])
                if len(re.sub(r"\{[^}]*\}", "", sentence).split()) > 3:
                    yield room, "warning" if kind == "warn" else kind, sentence


def _sentence(node: ast.expr) -> str:
    """What a string of the code says, with the names of what is filled in between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_sentence, node.values))
    if isinstance(node, ast.FormattedValue):
        names = [
            n.attr if isinstance(n, ast.Attribute) else n.id
            for n in ast.walk(node.value)
            if isinstance(n, ast.Attribute | ast.Name)
        ]
        return "{" + (names[0] if names else "...") + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sentence(node.left) + _sentence(node.right)
    return "{...}"


def messages_page() -> str:
    """All messages, by the room of the code that says them."""
    found = defaultdict(set)
    for room, kind, sentence in messages():
        found[room].add((kind, " ".join(sentence.split())))
    said = [
        "# All messages\n\nMade from the code: what errors and warnings say, with the names of what is filled in "
        "between braces. A message names the option or file, its value, what is wrong, and behind the semicolon what "
        "works. Look for a piece of yours by the search of your browser; [Errors](errors.md) says more about those "
        "that people meet.\n"
    ]
    for room, rows in sorted(found.items()):
        said.append(f"## {room}\n\n| kind | message |\n|---|---|")
        said += [f"| {kind} | <code>{_html(sentence)}</code> |" for kind, sentence in sorted(rows)]
        said.append("")
    return "\n".join(said)


def _html(text: str) -> str:
    for mark, code in {
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "|": "&#124;",
        "`": "&#96;",
        "*": "&#42;",
        "_": "&#95;",
        "[": "&#91;",
        "]": "&#93;",
        "$": "&#36;",
        "\\": "&#92;",
        "~": "&#126;",
    }.items():
        text = text.replace(mark, code)
    return text


def make(app, config) -> None:
    for face, name in public():
        write(f"reference/api/{face}.{name}.rst", api_page(face, name))
    write("reference/index.md", reference_index())
    write("reference/options.md", options_page())
    write("reference/messages.md", messages_page())


def escape(app, what, name, found, options, lines) -> None:
    """Shapes as (B, *C) and norms as |s| are written plainly in docstrings, and are no markup."""
    markup = r"(?<![\\*])\*(?=[^\s*])(?!\w[\w ]*\*[\s.,;:]|\w[\w ]*\*$)|(?<!\\)\|(?=\S)"
    lines[:] = [re.sub(markup, r"\\\g<0>", named(line)) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=900)  # behind numpydoc
    app.connect("config-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
