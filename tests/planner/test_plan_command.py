"""`xbraid-py plan` from the outside, and a training job that asks for a plan."""

import json

import pytest
from processes import PROJECT, run_job

from xbraid_py.cli.plan import Options, setup
from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.record import read

PLAN, PEAKS = ["-m", "xbraid_py", "plan"], PROJECT / "drivers" / "peaks.py"
TINY = [
    *("--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3", "--nested.refinements=1"),
    *("--nested.updates=3,4", "--checkpoint_every=2", "--plan=measured"),
]


@pytest.mark.job
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("size", "cycles"), [(1, "lagged"), (2, "lagged,V")])
def test_a_plan_for_several_numbers_of_ranks(tmp_path, size, cycles):
    out = tmp_path / "deeper" / "plan.json"
    words = ["--num_layers=64", "--batch=200", "--ranks=1,2,256", f"--cycles={cycles}", f"--json={out}"]
    job = run_job([*PLAN, *words], size, timeout=100)
    assert (job.returncode, job.stderr) == (0, "")
    rows = [line.split() for line in job.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1", "2", "256")] == ["1", "2", "256"]
    assert job.stdout.count("messages between nodes") == 1
    assert "fastest" in job.stdout.lower() and "speedup" in job.stdout
    found = json.loads(out.read_text())
    predictions = found["predictions"]
    assert [each["num_ranks"] for each in predictions] == [1, 2, 256]
    assert all(each["seconds"] > 0 and each["speedup"] > 0 for each in predictions)
    assert predictions[0]["speedup"] > 0.999, "one portion, or several that are faster"
    assert found["machine"]["shared"]["source"] == "measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (0, 1)}, "ranks=0,1 must be at least 1, all of them; use 1,2,4"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"ranks_per_node": 0}, "ranks_per_node=0 must be at least 1; use 2"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
    ],
)
def test_bad_values_are_refused_before_anything_is_measured(options, message):
    with pytest.raises(ValueError) as caught:
        setup(Options(**options), SerialCommunicator())
    assert str(caught.value).startswith(message)


@pytest.mark.job
@pytest.mark.parametrize(("word", "message"), [("--cycles=W", "cycles"), ("--rank=3", "unknown option --rank")])
def test_bad_options_are_one_message(word, message):
    job = run_job([*PLAN, word], 2)
    assert job.returncode == 2 and job.stdout == ""
    assert job.stderr.startswith("error: ") and message in job.stderr and "Traceback" not in job.stderr
    assert "try xbraid-py plan --help" in job.stderr


@pytest.mark.job
@pytest.mark.timeout(200)
def test_a_planned_job_goes_on_as_it_was_planned(tmp_path):
    out = tmp_path / "run"
    first = run_job([PEAKS, *TINY, f"--out={out}"], 2, timeout=100)
    assert first.returncode == 0 and "plan for 2 ranks" in first.stderr, first.stderr
    rows = read(out / "metrics.jsonl")
    planned = rows[0]["configuration"]["mgrit"]
    for path in sorted((out / "checkpoints").glob("update_*.h5"))[1:]:
        path.unlink()
    (out / "checkpoints" / "best.h5").unlink()
    again = run_job([PEAKS, *TINY, "--resume=auto", f"--out={out}"], 1, timeout=100)
    assert (again.returncode, again.stderr) == (0, ""), "nothing is measured"
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    resumed = next(row for row in read(out / "metrics.jsonl") if row["kind"] == "resume")
    assert resumed["configuration"]["mgrit"] == planned
