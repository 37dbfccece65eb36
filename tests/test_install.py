"""The package as it is installed: what is in it, with native kernels and without, and what stands in their way.

Built from a source distribution in temporary folders, with the tools of this environment and without the network. -O0
compiles in seconds and says as much about what goes into a wheel.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from processes import PROJECT

pytestmark = pytest.mark.job

SOURCES = ("xbraid_py", "drivers", "tests", "CMakeLists.txt", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")
# Runs one hook of the build backend of the project in the working directory, as pip does.
HOOK = """
import json, sys
from scikit_build_core.setuptools import build_meta
hook, folder, *settings = sys.argv[1:]
print(json.dumps(getattr(build_meta, hook)(folder, dict(pair.split(":") for pair in settings))))
"""
USE = "import xbraid_py.kernels as kernels; print(kernels.__file__); print(kernels.BACKEND)"


def environment(**changes: str) -> dict[str, str]:
    """The environment without what would choose kernels or compilers, and with one thread."""
    ours = ("XBRAID_", "SKBUILD_", "CMAKE_", "CXX", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def run(args, folder: Path, **changes: str) -> subprocess.CompletedProcess:
    """Run a command to its end, with both kinds of output in `stdout`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([*map(str, args)], cwd=folder, env=environment(**changes), timeout=100, **streams)


def build(hook: str, project: Path, folder: Path, *settings: str, **changes: str) -> tuple[Path, str]:
    """The archive that a hook of the build backend makes, and what it prints."""
    folder.mkdir(exist_ok=True)
    done = run([sys.executable, "-c", HOOK, hook, folder, *settings], project, **changes)
    assert done.returncode == 0, done.stdout
    return folder / json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def tools():
    """Leaves the tests out where the package cannot be built."""
    for name in ("scikit_build_core", "setuptools", "nanobind"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install 'xbraid_py[test]'")
    if cmake() is None:
        pytest.skip("needs cmake")


def cmake() -> str | None:
    """The cmake of this environment, or else of the machine."""
    beside = Path(sys.executable).parent / "cmake"
    return str(beside) if beside.exists() else shutil.which("cmake")


@pytest.fixture(scope="module")
def project(tools, tmp_path_factory):
    """The unpacked source distribution, made from a tree in which an editable install has left its extension module."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        path = PROJECT / name
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder / name)
    (folder / "xbraid_py/kernels/_native.any.so").touch()
    archive, _ = build("build_sdist", folder, folder / "dist")
    shutil.unpack_archive(archive, folder / "unpacked")
    return next((folder / "unpacked").iterdir())


def installed(wheel: Path, folder: Path) -> tuple[set[str], str]:
    """Names of all files of a wheel but the metadata, and the kernels that it runs on once it is unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    done = run([sys.executable, "-c", USE], folder)
    assert done.returncode == 0, done.stdout
    file, backend = done.stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(folder)
    return names, backend


def modules(project: Path) -> set[str]:
    """Python files of the package and of its programs, as a wheel names them, what says its types, and its page."""
    library = {path.relative_to(project).as_posix() for path in (project / "xbraid_py").rglob("*.py")}
    programs = {f"xbraid_py/{path.relative_to(project).as_posix()}" for path in (project / "drivers").rglob("*.py")}
    page = {path.relative_to(project).as_posix() for path in (project / "xbraid_py/cli/page").iterdir()}
    return library | programs | page | {"xbraid_py/py.typed", "xbraid_py/__init__.pyi"}


def test_source_distribution_is_complete(project):
    missing = {
        path.relative_to(PROJECT).as_posix()
        for folder in ("xbraid_py", "drivers")
        for path in (PROJECT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".cpp", ".hpp", ".typed", ".html", ".js", ".css")
        and not (project / path.relative_to(PROJECT)).exists()
    }
    assert not missing
    assert not list(project.rglob("*.so"))


def test_a_fresh_environment_needs_no_checkout(project, tmp_path):
    """The wheel in an environment of its own, in an empty folder: a program of the library trains on two ranks."""
    wheel, _ = build("build_wheel", project, tmp_path / "wheels", "cmake.define.XBRAID_NATIVE:OFF")
    python, here = tmp_path / "venv" / "bin" / "python", tmp_path / "here"
    here.mkdir()
    done = run([sys.executable, "-m", "venv", tmp_path / "venv"], here)
    assert done.returncode == 0, done.stdout
    done = run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], here)
    assert done.returncode == 0, done.stdout
    # What it depends on is that of this environment, which comes last.
    (folder,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (folder / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    # So is MPI, with its mpirun.
    mpi = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{sys.prefix}/lib{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    small = ["--num_layers=8", "--num_train=50", "--num_val=50", "--nested.updates=[2]", "--nested.refinements=0"]
    program = [python.with_name("xbraid-py"), "run", "peaks", "--ranks=2", "--smoke", *small]
    done = run(program, here, **mpi)
    assert done.returncode == 0, done.stdout
    header = json.loads((here / "runs" / "peaks" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["ranks"] == 2
    done = run([python, "-c", "import xbraid_py; print(xbraid_py.__version__, xbraid_py.__file__)"], here)
    version, file = done.stdout.split()
    assert version in wheel.name and Path(file).is_relative_to(tmp_path / "venv")
    # It is by its name that the run goes on.
    done = run([*program[:1], "resume", "runs/peaks", "--print"], here, **mpi)
    assert "nothing to continue" in done.stdout


def test_an_editable_install_runs_the_programs_of_its_checkout(project, tmp_path):
    build("build_editable", project, tmp_path / "wheels", "cmake.define.XBRAID_NATIVE:OFF")
    assert not (project / "xbraid_py" / "drivers").exists()


@pytest.mark.long
def test_with_and_without_native_kernels(project, tmp_path):
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    settings = ("cmake.define.XBRAID_NATIVE:REQUIRE", "cmake.define.CMAKE_CXX_FLAGS_RELEASE:-O0")
    wheel, said = build("build_wheel", project, tmp_path / "wheels", *settings)
    assert "native kernels are built" in said
    names, backend = installed(wheel, tmp_path / "native")
    (extension,) = names - modules(project)
    assert extension.startswith("xbraid_py/kernels/_native.")
    assert names >= modules(project)
    assert backend.startswith("native")

    # On a processor without AVX it has to run as well: the linker must have no reason to take a function that is
    # compiled here and elsewhere from here, and nothing may run when the library is loaded.
    libraries = list(project.glob("build/temp*/_skbuild/libdense_*.a"))
    assert len(libraries) == (2 if platform.machine() == "x86_64" else 0)
    for library in libraries if shutil.which("nm") and shutil.which("readelf") else ():
        symbols = [line.split()[-2:] for line in run(["nm", library], project).stdout.splitlines() if " " in line]
        assert len([name for kind, name in symbols if kind in "TD"]) >= 1
        assert [name for kind, name in symbols if kind in "WVu"] == []
        sections = run(["readelf", "-SW", library], project).stdout
        assert ".text" in sections and ".init_array" not in sections

    # The same tree once more: what is left of the first build, or of an editable install, must not get in.
    (project / extension).touch()
    wheel, said = build("build_wheel", project, tmp_path / "wheels", XBRAID_NATIVE="OFF")
    assert "left out, it runs on the torch fallback: XBRAID_NATIVE=OFF" in said
    names, backend = installed(wheel, tmp_path / "fallback")
    assert names == modules(project)
    assert backend.startswith("torch")


@pytest.mark.parametrize(
    ("choice", "changes", "status", "said"),
    [
        ("AUTO", {"CXX": "/nowhere/c++"}, 0, "torch fallback: no working C++ compiler was found"),
        ("REQUIRE", {"CXX": "/nowhere/c++"}, 1, "XBRAID_NATIVE=REQUIRE, but no working C++ compiler was found"),
        ("OFF", {}, 0, "torch fallback: XBRAID_NATIVE=OFF"),
        ("ON", {}, 1, "XBRAID_NATIVE=ON is none of AUTO, REQUIRE, OFF; use AUTO"),
    ],
)
def test_what_stands_in_the_way(tools, tmp_path, choice, changes, status, said):
    args = ["-S", PROJECT, "-B", tmp_path, "-D", "SKBUILD=2", "-D", "SKBUILD_SOABI=any"]
    done = run([cmake(), *args, "-D", f"XBRAID_NATIVE={choice}"], tmp_path, **changes)
    assert done.returncode == status, done.stdout
    assert said in " ".join(done.stdout.split())


def test_tests_are_registered(tools, tmp_path):
    done = run([cmake(), "-S", PROJECT, "-B", tmp_path, "-D", f"XBRAID_PYTHON={sys.executable}"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "kernels" not in done.stdout and "CXX" not in done.stdout
    ctest = Path(cmake()).with_name("ctest")
    listed = run([ctest, "--test-dir", tmp_path, "-N"], tmp_path).stdout
    assert all(name in listed for name in ("serial", "jobs", "mpi-2", "mpi-3", "mpi-5"))


def test_a_release_has_one_version():
    """It stands in the package; what cites it says the same, and the workflow compares the tag with it."""
    version = re.search(r'^__version__ = "(.*)"$', (PROJECT / "xbraid_py/__init__.py").read_text(), re.M)[1]
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == version
    assert "\nversion = attr: xbraid_py.__version__\n" in (PROJECT / "setup.cfg").read_text()
    text = (PROJECT / ".github" / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"} and not re.search(r"\w+://", text)
    jobs = workflow["jobs"]
    assert [name for name, job in jobs.items() if "permissions" in job] == ["draft"]
    assert all(0 < job["timeout-minutes"] <= 90 for job in jobs.values())
    ran = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    done = run(["sh", "-c", re.search(r"version=\$\(.*\)", ran)[0] + "; echo $version"], PROJECT)
    assert done.stdout.strip() == version
