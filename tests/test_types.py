"""What type checkers and a quick look see of the package: names, types, and how little is loaded for it."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest
from processes import PROJECT, job_environment

STUBS = sorted((PROJECT / "xbraid_py").rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_the_names_of_a_stub_are_there(stub):
    package = importlib.import_module(".".join(stub.parent.relative_to(PROJECT).parts))
    for name in package.__all__:
        assert getattr(package, name) is not None and name in dir(package), name
    assert not hasattr(package, "nothing")


@pytest.mark.parametrize("statement", ["import xbraid_py", "import xbraid_py, xbraid_py.cli; dir(xbraid_py)"])
def test_the_package_is_loaded_without_what_takes_long(statement):
    code = f"{statement}; import sys; print([m for m in ('torch', 'numpy', 'mpi4py', 'h5py') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=job_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_a_type_checker_says_to_a_user(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs pyright: pip install 'xbraid_py[lint]'")
    program = tmp_path / "program.py"
    program.write_text(
        "import xbraid_py\n"
        "reveal_type(xbraid_py.MGRIT().cfactor)\n"
        "xbraid_py.LayerParallel(4, 'many')\n"
        "class Mine:\n"
        "    pass\n"
        "steps: xbraid_py.Propagator = Mine()\n"
        "xbraid_py.nothing\n"
    )
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path), str(program)]
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{PROJECT}"]}}')
    said = subprocess.run(
        words, env=job_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=100
    ).stdout
    lines = {int(number): text for number, text in re.findall(r"program\.py:(\d+):\d+ - (.*)", said)}
    assert sorted(lines) == [2, 3, 6, 7], said
    assert '"int' in lines[2]
    assert '"nothing" is not a known attribute' in lines[7]
