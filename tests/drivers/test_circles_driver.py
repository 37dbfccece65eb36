"""The circles driver from the outside: the record, the pictures, ranks, bad input; and the picture of cycles."""

import pytest
from processes import PROJECT, run_job

from xbraid_py.recipes.pictures.curves import over_cycles
from xbraid_py.run.record import read

DRIVER = PROJECT / "drivers" / "circles.py"


def rows_of(out) -> list[dict]:
    """The record without the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read(out / "metrics.jsonl")[1:]]


@pytest.mark.job
@pytest.mark.timeout(300)
def test_runs_to_the_goal_and_alike_on_two_ranks(tmp_path):
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        job = run_job([DRIVER, "--smoke", f"--out={out}"], ranks, timeout=140)
        assert job.returncode == 0, job.stderr
        found.append(rows_of(out))
        last = found[-1][-1]
        assert last["val_accuracy"] == 1.0 and last["reached"] and last["final"]
        assert last["work"] == last["counted_work"] == 5.0 * last["cycle"] and last["gradients"][0] == 2 * last["cycle"]
        assert f"validation accuracy 100.00 % after {last['cycle']} cycles, {last['work']:.1f} work units" in job.stdout
        assert (out / "figures" / "cycles.png").stat().st_size > 0 < (out / "figures" / "classes.png").stat().st_size
    for alone, both in zip(*found, strict=True):
        assert alone["objective"] == pytest.approx(both["objective"], rel=1e-9)
        assert alone["val_accuracy"] == both["val_accuracy"]


@pytest.mark.job
def test_bad_options_end_with_one_message(tmp_path):
    job = run_job([DRIVER, "--smoke", f"--out={tmp_path}", "--mgopt.schedule=[(1), x, {2}]"])
    assert job.returncode == 2 and "Traceback" not in job.stderr
    assert "entry 2, 'x', must be n, (n), m/n or, for the coarsest level, {n}" in job.stderr
    job = run_job([DRIVER, "--smoke", f"--out={tmp_path}", "--num_layers=60"])
    assert job.returncode == 2 and "num_layers=60 is not a multiple of 2^(levels - 1)=8; use 56 or 64" in job.stderr


def test_picture_of_cycles(tmp_path):
    rows = [
        {"cycle": k, "work": 5.0 * k, "seconds": 0.1 * k, "loss": 1 / (k + 1), "val_accuracy": 0.5} for k in range(4)
    ]
    for over in ("cycle", "work", "seconds"):
        over_cycles({"one": rows, "two": rows[:1]}, tmp_path / f"{over}.png", over)
        assert (tmp_path / f"{over}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="^over='update' must be one of cycle, work, seconds; use cycle$"):
        over_cycles({"one": rows}, tmp_path / "x.png", "update")
    with pytest.raises(ValueError, match="^runs holds no run"):
        over_cycles({}, tmp_path / "x.png")
