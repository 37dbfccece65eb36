"""The faults of whole jobs: each case runs a driver until it is through, whatever is done to it meanwhile.

A case is a function of a `Bench` that counts what it does, and raises `Hang`, `Wrong` or `Lost`. After every fault the
next job goes on in the same folder by `--resume auto`, on another number of ranks, and the end has to be the
undisturbed run's, bit by bit.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from chain import Bench, Chain, check_accepted, check_stopped, send
from damage import flip, truncate
from disturbed import PROJECT, Job, Lost, Other, Wrong, check_finished, last_start, last_update, mpirun, newest, updates

from xbraid_py.run.store.read import CheckpointError, newest_good, numbered, verify

CLOCK, LIMIT = (Path(__file__).resolve().parent / name for name in ("clock.py", "limit.py"))
# Of mount and umount, on Linux.
_REMOUNT, _DETACH = 32, 2


def undisturbed(bench: Bench) -> None:
    """The run that all others have to equal, on two ranks."""
    with Job(bench.subject, bench.out("undisturbed"), 2, words=()) as job:
        job.await_training()
        began = time.monotonic()
        code = job.end(240.0)
        bench.seconds = time.monotonic() - began
    bench.expected = updates(job.out)
    bench.hits = None
    check_finished(job, code, bench.expected)
    check_accepted(job.out)
    last = bench.expected[-1]["update"]
    bench.say(f"{bench.subject.name}, undisturbed: {last} updates, {bench.seconds:.1f} s with pictures")


def kills(bench: Bench, count: int, name: str = "kills") -> None:
    """SIGKILL of each rank in turn, while it starts, writes a checkpoint, or at any time; or of the launcher."""
    done, chains = 0, 0
    while done < count:
        chain = Chain(bench, f"{name}_{chains}")
        chains += 1
        code = -1
        while done < count and code != 0:
            ranks, rank = bench.next_hit()
            when = bench.random.choices(("start", "writing", "any", "launcher"), (1, 3, 3, 1))[0]
            with chain.job(ranks) as job:
                hit = _strike(bench, job, rank, when)
                code = job.end()
            done += hit
            bench.counts["kills"] += hit
            before = chain.reached
            chain.check()
            if code == 0:
                # It was over before, or but for its last steps.
                check_finished(job, code, bench.expected)
            bench.say(
                f"{chain.out.name}: rank {rank} of {ranks}, {when}: status {code}, "
                f"update {before} to {last_update(job.out)}"
            )
        if code != 0:
            chain.finish(bench.next_hit()[0])


def _strike(bench: Bench, job: Job, rank: int, when: str) -> bool:
    """Kill a rank; False if the job was over before."""
    if when == "start":
        found = job.await_ranks()
        time.sleep(bench.random.uniform(0.0, 3.0))
    else:
        found = job.await_training()
        if found is None:
            return False
        bench.pause(0.2)
        if when == "writing":
            end = time.monotonic() + 1.0
            while time.monotonic() < end and not any((job.out / "checkpoints").glob("*.tmp*")):
                pass
    if when == "launcher":
        return send(job.process.pid, signal.SIGKILL)
    return send(found[rank], signal.SIGKILL)


def unlike(bench: Bench, count: int) -> None:
    """Ranks that are started otherwise than the first: the job says in what, and ends before it has done anything."""
    others = [
        Other(("--checkpoint_every=7",), said="options: checkpoint_every="),
        Other(("--resume=null",), said="options: resume="),
        Other(("--help",), said="ends here, after --help"),
        Other(("--print_config",), said="ends here, after --help"),
        Other(("--no_such_option=1",), said="unknown option --no_such_option"),
        Other(("--record_every=often",), said="--record_every=often is not an int"),
        Other(before=("env", "XBRAID_KERNELS=torch"), said="versions: kernels="),
        Other(before=("env", f"PYTHONPATH={_stale(bench.folder)}"), said="files of the program, by their digests: "),
    ]
    chain = Chain(bench, "unlike")
    for other in bench.random.sample(others, min(count, len(others))):
        ranks = bench.random.choice((2, 3, 5))
        with chain.job(ranks, other=other) as job:
            job.await_ranks()
            code = job.end(60.0)
        bench.counts["unlike"] += 1
        bench.say(f"unlike: {' '.join((*other.before, *other.words))} on {ranks - 1} of {ranks}: status {code}")
        if code != 2 or other.said not in job.stderr or job.stderr.count("error:") != 1 or last_update(chain.out):
            raise Wrong(f"{chain.out}: status {code} instead of 2 and {other.said!r}\n{job.stderr}")


def _stale(folder: Path) -> Path:
    """Where another version of the package is: with one line more in one file."""
    stale = folder / "stale"
    package = stale / "xbraid_py"
    if not package.exists():
        shutil.copytree(PROJECT / "xbraid_py", package, ignore=shutil.ignore_patterns("__pycache__"))
        with (package / "mgrit" / "grid.py").open("a") as file:
            file.write("# another version\n")
    return stale


def pauses(bench: Bench, count: int) -> None:
    """A rank stands still for a while, which changes nothing; then for longer than the others have patience."""
    chain = Chain(bench, "pauses")
    for _ in range(count):
        ranks, rank = bench.next_hit()
        if ranks == 1:
            continue
        with chain.job(ranks, words=("--resume=auto", "--patience=6")) as job:
            if (found := job.await_training()) is None:
                break
            bench.pause(0.1)
            send(found[rank], signal.SIGSTOP)
            time.sleep(2.0)
            send(found[rank], signal.SIGCONT)
            bench.pause(0.1)
            sent = send(found[rank], signal.SIGSTOP)
            code = job.end(40.0)
        chain.check()
        if code == 0:
            break
        bench.counts["pauses"] += sent
        bench.say(f"pauses: rank {rank} of {ranks}: status {code}: {job.stderr.strip().splitlines()[-1]}")
        if code != 1 or f"rank {rank}: does not answer" not in job.stderr:
            raise Wrong(f"{chain.out}: a rank that stands still, status {code} instead of 1\n{job.stderr}")
    chain.finish()


def signals(bench: Bench, count: int) -> None:
    """SIGTERM and SIGUSR1 to one rank, to all ranks or to the launcher, at random times; a few while it starts."""
    targets = ["rank", "all"]
    if "HYDRA" in subprocess.run([mpirun(), "--version"], text=True, capture_output=True).stdout:
        targets.append("launcher")  # that of Open MPI ends its job at a SIGTERM
    done, chains = 0, 0
    while done < count:
        chain = Chain(bench, f"signals_{chains}")
        chains += 1
        code = -1
        while done < count and code != 0:
            ranks, rank = bench.next_hit()
            what = bench.random.choice((signal.SIGTERM, signal.SIGUSR1))
            target = bench.random.choice(targets)
            starting = bench.random.random() < 0.15
            with chain.job(ranks) as job:
                found = job.await_ranks() if starting else job.await_training()
                if found:
                    time.sleep(bench.random.uniform(0.0, 3.0)) if starting else bench.pause(0.2)
                    hit = {"rank": [found[rank]], "all": found.values(), "launcher": [job.process.pid]}[target]
                    sent = sum(send(number, what) for number in hit) > 0
                    done += sent
                    bench.counts["signals"] += sent
                code = job.end()
            chain.check()
            bench.say(
                f"{chain.out.name}: {what.name} to {target} of {ranks}{' at the start' * starting}: status {code}"
            )
            if not starting:
                check_stopped(job, code, bench.expected)
            elif code == 0:
                check_finished(job, code, bench.expected)
        if code != 0:
            chain.finish(bench.next_hit()[0])


def second_sigterm(bench: Bench, count: int) -> None:
    """One rank stands still, so that no update ends; a second SIGTERM to another ends the job with status 143."""
    chain = Chain(bench, "second_sigterm")
    for _ in range(count):
        ranks = bench.random.choice((2, 3))
        still, asked = bench.random.sample(range(ranks), 2)
        with chain.job(ranks) as job:
            found = job.await_training()
            if found is None:
                break
            bench.pause(0.1)
            send(found[still], signal.SIGSTOP)
            time.sleep(0.3)  # a checkpoint that is being written may still be completed
            for _ in range(2):
                send(found[asked], signal.SIGTERM)
                time.sleep(0.5)
            code = job.end()
        chain.check()
        bench.counts["signals"] += 1
        bench.say(f"second_sigterm: rank {asked}, while rank {still} of {ranks} stands still: status {code}")
        # It is rank 0 that says so.
        if code != 143 or asked == 0 and "terminated" not in job.stderr:
            raise Wrong(f"{chain.out}: a second SIGTERM, status {code} instead of 143\n{job.stderr}")
    chain.finish()


def damaged(bench: Bench, count: int) -> None:
    """The newest checkpoint of a stopped run is cut, or a bit of its data flipped: the one before is taken, and said.

    The times of the files lie as well: by them the oldest is the newest.
    """
    chain = Chain(bench, "damaged", intervals=2)
    bad, good, kind = None, None, ""
    for number in range(2 * count + 1):
        goes_on = chain.stop(bench.next_hit()[0])
        if bad is not None:
            _check_taken(chain, bad, good)
            bench.counts[kind] += 1
        if number == 2 * count or not goes_on:
            break
        bad, kind = newest(chain.out), ("truncations", "bit_flips")[number % 2]
        (truncate if number % 2 == 0 else flip)(bad, bench.random)
        age = bench.random.uniform(-1e8, 1e8)
        for at, (_, other) in enumerate(numbered(bad.parent)):
            os.utime(other, (time.time() + age + 1e7 * at,) * 2)
        try:
            verify(bad)
        except CheckpointError as error:
            bench.say(f"damaged: {kind}: {error.reason[-100:]}")
        else:
            raise Wrong(f"{bad}: {kind} in its data are accepted")
        good = newest_good(bad.parent)
    chain.finish()


def _check_taken(chain: Chain, bad: Path, good: Path | None) -> None:
    """The last job has said that `bad` is damaged, and has gone on after `good`."""
    first = 0 if good is None else int(good.stem.partition("_")[2]) + 1
    if (found := last_start(chain.out)[1]) != first:
        raise Wrong(f"{chain.out}: goes on with update {found}, not {first}")
    said = "".join(chain.out.with_name(f"{chain.out.name}.{name}").read_text() for name in ("stdout", "stderr"))
    if "damaged, so the one before is taken" not in said or bad.name not in said:
        raise Wrong(f"{chain.out}: not a word of the damaged checkpoint\n{said}")


def clock_jumps(bench: Bench, count: int) -> None:
    """The time of day jumps in all ranks, forwards and backwards; a run is stopped, goes on, and finishes under it."""
    chain = Chain(bench, "clock_jumps")
    counter = bench.folder / "clock_jumps.count"
    counter.touch()
    wrapper = (CLOCK, bench.random.randrange(1000), counter)
    for _ in range(count - 1):
        chain.stop(bench.next_hit()[0], wrapper=wrapper)
    chain.finish(3, wrapper=wrapper)
    if (jumps := counter.stat().st_size) < 10:
        raise Wrong(f"only {jumps} jumps of the clock were seen")
    bench.counts["clock_jumps"] += jumps
    bench.say(f"clock_jumps: {jumps} jumps")


def disk_full(bench: Bench, count: int) -> None:
    """Files may not grow past a size, or, where this may be mounted, the disk is a small one."""
    for number in range(count):
        chain = Chain(bench, f"limit_{number}")
        _full(chain, "File too large", wrapper=(LIMIT, bench.random.randrange(300_000, 600_000)))
        chain.finish(3)
    for number in range(count):
        chain = Chain(bench, f"disk_{number}")
        chain.out.mkdir()
        if not mount(chain.out, bench.random.randrange(1200, 2400)):
            bench.say("SKIPPED: no tmpfs can be mounted here (that needs root), so no disk was really full")
            return
        try:
            _full(chain, "No space left on device")
            mount(chain.out, 65536, again=True)
            chain.finish(3)
        finally:
            unmount(chain.out)


def _full(chain: Chain, reason: str, **others) -> None:
    """A job ends by itself, and says why; what it has written before is there."""
    with chain.job(2, **others) as job:
        code = job.end(120.0)
    chain.bench.say(f"{chain.out.name}: status {code}: ...{job.stderr.strip()[-120:]}")
    if code != 1 or reason not in job.stderr or "make room" not in job.stderr or "Traceback" in job.stderr:
        raise Wrong(f"{chain.out}: a full disk, status {code} instead of 1\n{job.stderr}")
    chain.check()
    good = newest_good(chain.out / "checkpoints")
    if good is None or int(good.stem.partition("_")[2]) < chain.reached - chain.bench.subject.every:
        raise Lost(f"{chain.out}: the newest good checkpoint is {good}, update {chain.reached} was reached")
    if list((chain.out / "checkpoints").glob("*.tmp")):
        raise Wrong(f"{chain.out}: half a checkpoint is left on the full disk")
    chain.bench.counts["disk_full"] += 1


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mount(folder: Path, kilobytes: int, again: bool = False) -> bool:
    """Mount a file system in memory on a folder, or change the size of the one there; False if that is not allowed."""
    if not sys.platform.startswith("linux"):
        return False
    size, flags = f"size={kilobytes}k".encode(), _REMOUNT if again else 0
    return _libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, size) == 0


def unmount(folder: Path) -> None:
    """The opposite, whoever still uses it."""
    _libc().umount2(os.fsencode(folder), _DETACH)
