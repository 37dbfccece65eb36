"""
Reading and comparing runs
==========================

Every run leaves a folder. Two short runs of the peaks job are started here as from a terminal, looked at with
``xbraid-py``, and read with ten lines of Python.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import xbraid_py

# %%
# ``--smoke`` is a job of seconds; here with two optimizers. On more ranks it would be ``mpirun -n 4 python
# drivers/peaks.py``.

project = Path(xbraid_py.__file__).resolve().parents[1]
runs = Path(tempfile.mkdtemp())


def shell(*words):
    done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True, check=True)
    return done.stdout.replace(str(runs), "runs").replace(str(project), ".")


for method in ("lbfgs", "steepest"):
    shell("drivers/peaks.py", "--smoke", f"--optim.method={method}", f"--out={runs / method}")
print(shell("-m", "xbraid_py", "status", str(runs / "lbfgs"), str(runs / "steepest")))

# %%
# The folder of a run:

for path in sorted((runs / "lbfgs").rglob("*")):
    if path.is_file():
        print(path.relative_to(runs))

# %%
# ``metrics.jsonl`` has a header, and then an object for each update.

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for method in ("lbfgs", "steepest"):
    rows = [json.loads(line) for line in (runs / method / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "objective" in row and "update" in row]
    axes.plot([row["update"] for row in rows], [row["objective"] for row in rows], "o-", markersize=3, label=method)
axes.set(xlabel="update", ylabel="objective")
axes.legend()
print(sorted(rows[-1]))

# %%
# ``xbraid-py report`` makes a page of HTML, of one run or as a comparison; ``watch`` shows a run that is going on,
# ``resume`` goes on with one that was interrupted, and ``export`` makes a plain torch module of its newest good
# checkpoint:

print(shell("-m", "xbraid_py", "report", str(runs / "lbfgs"), str(runs / "steepest"), f"--out={runs / 'both.html'}"))
print(shell("-m", "xbraid_py", "export", str(runs / "lbfgs"), str(runs / "network.pt")))
