"""Fault injection: jobs of all kinds are killed, stopped, their checkpoints damaged, disks filled, clocks set wrong.

    python tests/faults/run.py [--quick] [--seed 0] [--kills 30] [--signals 10] [--truncations 60] [--flips 300] ...

Every fault is followed by a job that goes on by `--resume auto`, and every run has to end as the undisturbed one does,
bit by bit. The last line is one JSON object: how many faults there were, and how often a job has hung, an end or an
accepted checkpoint was wrong, more work was lost than one checkpoint interval, or a reader met an input with another
error than the documented ones. The status is 0 if none of that ever happened.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cases
from chain import Bench
from disturbed import PATIENCE, PROJECT, Hang, Lost, Wrong, job_environment, newest
from subjects import subjects

FAULTS = (
    "kills",
    "signals",
    "pauses",
    "unlike",
    "truncations",
    "bit_flips",
    "lies",
    "disk_full",
    "clock_jumps",
    "fuzz_inputs",
)
FUZZ = ("fuzz", "fuzz_runs")
FAILURES = ("hangs", "wrong", "lost", "crashes")


def damage(bench: Bench, truncations: int, flips: int) -> None:
    """Damaged copies of a checkpoint, read in a process of their own: a bad file might crash or block HDF5."""
    script = Path(__file__).resolve().parent / "damage.py"
    words = [newest(bench.out("undisturbed")), bench.random.randrange(1000), truncations, flips]
    command = [sys.executable, script, *map(str, words)]
    verdicts: Counter = Counter()
    with subprocess.Popen(command, env=job_environment(), stdout=subprocess.PIPE, text=True) as process:
        lines = selectors.DefaultSelector()
        lines.register(process.stdout, selectors.EVENT_READ)
        try:
            # The first line comes once torch is loaded.
            while lines.select(PATIENCE if verdicts else 90.0):
                line = process.stdout.readline()
                if not line:
                    break
                verdicts[line.split()[0]] += 1
                bench.counts["truncations" if "cut" in line else "bit_flips"] += 1
                if line.startswith("wrong"):
                    bench.counts["wrong"] += 1
                    bench.say(f"WRONG: {line.strip()} is accepted")
            else:
                raise Hang("the loader has not come back from a damaged checkpoint")
        finally:
            process.kill()
    if sum(verdicts.values()) != truncations + flips:
        raise Wrong(f"the loader has crashed at a damaged checkpoint, after {sum(verdicts.values())}")
    bench.say(f"damaged copies: {dict(verdicts)}")


def lies(bench: Bench, files: int) -> None:
    """Checkpoints made to deceive, see `read_lies.py`, written and read on two cores."""
    command = [sys.executable, PROJECT / "tests" / "helpers" / "read_lies.py"]
    shares = [(bench.random.randrange(10**6), files // 2), (bench.random.randrange(10**6), files - files // 2)]
    words = {"stdout": subprocess.PIPE, "text": True, "env": job_environment()}
    jobs = [subprocess.Popen([*command, *map(str, share)], **words) for share in shares]
    said = [json.loads(line) for job in jobs for line in job.communicate()[0].splitlines()]
    for each in said:
        word = {"refused": "", "harmless": "", "hang": "hangs", "wrong": "wrong"}.get(each["verdict"], "crashes")
        if word:
            bench.counts[word] += 1
            bench.say(f"{word.upper()}: {each}")
    bench.counts["lies"] += len(said)
    if len(said) < files:
        raise Wrong(f"only {len(said)} of {files} files that lie were written and read")
    bench.say(f"files that lie: {dict(Counter(each['verdict'].split()[0] for each in said))}")


def fuzz(bench: Bench, inputs: int) -> None:
    """Random input to all readers, `tests/run/test_fuzz.py` and `test_fuzz_runs.py`, about so many in all."""
    count = bench.folder / "fuzz_inputs"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--timeout=600"]
    command += [
        f"--hypothesis-seed={bench.random.randrange(1000)}",
        "tests/run/test_fuzz.py",
        "tests/run/test_fuzz_runs.py",
    ]
    variables = {"XBRAID_FUZZ_INPUTS": str(inputs), "XBRAID_FUZZ_COUNT": str(count)}
    done = subprocess.run(command, env=job_environment(variables), cwd=PROJECT, text=True, capture_output=True)
    if count.exists():
        bench.counts["fuzz_inputs"] += sum(map(int, count.read_text().split()))
    bench.say(done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr)
    if done.returncode:
        bench.counts["crashes"] += 1
        bench.say(done.stdout[-5000:] + done.stderr[-2000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a few of each, in half a minute; numbers below are left out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--signals", type=int, default=6)
    parser.add_argument("--unlike", type=int, default=8, help="jobs with ranks that are started otherwise")
    parser.add_argument("--pauses", type=int, default=1, help="ranks that stand still")
    parser.add_argument("--second", type=int, default=1, help="second SIGTERMs")
    parser.add_argument("--damaged", type=int, default=1, help="truncations and bit flips each that a job meets")
    parser.add_argument("--truncations", type=int, default=60, help="those that the loader meets")
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--lies", type=int, default=5000, help="checkpoints made to deceive; 0 leaves them out")
    parser.add_argument("--full", type=int, default=1, help="full disks of each kind")
    parser.add_argument("--clock", type=int, default=2, help="jobs with a clock that jumps")
    parser.add_argument("--fuzz", type=int, default=4_000, help="random inputs; 0 leaves them out")
    parser.add_argument("--each", type=int, default=1, help="kills, signals and damaged checkpoints of each other kind")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    given = parser.parse_args()
    logging.getLogger("xbraid_py").setLevel(logging.ERROR)  # of damage that is looked at here
    plan = [
        ("unlike", lambda bench: cases.unlike(bench, given.unlike)),
        ("pauses", lambda bench: cases.pauses(bench, given.pauses)),
        ("kills", lambda bench: cases.kills(bench, given.kills)),
        ("signals", lambda bench: cases.signals(bench, given.signals)),
        ("second SIGTERM", lambda bench: cases.second_sigterm(bench, given.second)),
        ("damaged", lambda bench: cases.damaged(bench, given.damaged)),
        ("damaged copies", lambda bench: damage(bench, given.truncations, given.flips)),
        ("disk full", lambda bench: cases.disk_full(bench, given.full)),
        ("clock jumps", lambda bench: cases.clock_jumps(bench, given.clock)),
    ]
    if given.lies:
        plan.append(("lies", lambda bench: lies(bench, given.lies)))
    if given.fuzz:
        plan.append(("fuzzing", lambda bench: fuzz(bench, given.fuzz)))
    if given.quick:
        plan = [("kills", lambda bench: cases.kills(bench, 2)), ("damaged copies", lambda bench: damage(bench, 5, 10))]
    others = [
        ("unlike", lambda bench: cases.unlike(bench, given.each)),
        ("pauses", lambda bench: cases.pauses(bench, given.each)),
        ("kills", lambda bench: cases.kills(bench, given.each)),
        ("signals", lambda bench: cases.signals(bench, given.each)),
        ("damaged", lambda bench: cases.damaged(bench, (given.each + 1) // 2)),
    ]
    if given.quick or not given.each:
        others = []
    counts = Counter(dict.fromkeys((*FAULTS, *FAILURES), 0))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given.keep:
            given.keep.mkdir(parents=True)
        place, chance = (given.keep or Path(folder)).resolve(), random.Random(given.seed)
        for kind, subject in subjects(place / "data").items():
            bench = Bench(subject, place / kind, chance, counts)
            bench.folder.mkdir()
            cases_of_kind = plan if kind == "nested" else others
            for name, case in (
                [("undisturbed", lambda bench: cases.undisturbed(bench)), *cases_of_kind] if cases_of_kind else ()
            ):
                start = time.monotonic()
                try:
                    case(bench)
                except (Hang, Wrong, Lost) as failure:
                    word = {Hang: "hangs", Wrong: "wrong", Lost: "lost"}[type(failure)]
                    counts[word] += 1
                    bench.say(f"{word.upper()}: {failure}")
                    if name == "undisturbed":
                        break
                bench.say(f"-- {kind}, {name}: {time.monotonic() - start:.0f} s")
    bench.say(f"{time.monotonic() - began:.0f} s in all, load {os.getloadavg()[0]:.1f}, seed {given.seed}")
    print(json.dumps({name: counts[name] for name in (*FAULTS, *FAILURES)}), flush=True)
    return 1 if any(counts[name] for name in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
