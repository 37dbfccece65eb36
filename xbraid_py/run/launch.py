"""How a driver starts and how it ends: options, ranks, set-up, run, one message for whatever goes wrong."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

from xbraid_py.comm import Communicator, guard, launcher_rank, leftovers, watchdog
from xbraid_py.comm.agreement import RunError, agree_on_all, launcher_size, same_data, same_installation
from xbraid_py.comm.ending import end_job, say, wait_for_rank_0
from xbraid_py.run import memory, signals
from xbraid_py.run.folder import last_words
from xbraid_py.run.options import OptionError, Presets, flat, parse, to_dict

T = TypeVar("T")

BAD_INPUT, RUN_FAILED, INTERRUPTED = 2, 1, 128 + signal.SIGINT

_TWICE = 0.2  # seconds within which two SIGTERM are one
_SOON, _LATE = 3.0, 20.0  # seconds within which ranks that end alike come to their end

_log = logging.getLogger(__name__)


def launch(
    options_class: type[T],
    setup: Callable[[T, Communicator], Callable[[], None]],
    argv: Sequence[str] | None = None,
    *,
    presets: Presets | None = None,
    prog: str | None = None,
    description: str = "",
) -> None:
    """Run a driver on the ranks of this job, each with one thread, and end the job whatever happens.

    `setup(options, comm)` validates everything, reads the files and returns the run, a function without
    arguments. It must send no message: it may fail on one rank alone, and only afterwards do the ranks agree
    whether to go on.

    Before the set-up the ranks compare their options, versions and code, after it the data that they say they hold
    (`comm.agreement.hold`). During the run a watchdog looks after them: where a rank waits for longer than the option
    `patience` says, if there is one of that name (300 seconds otherwise), it tells where all are.

    ==========================================  ==========================================  ======
    what happens                                what is printed                             status
    ==========================================  ==========================================  ======
    wrong option, launcher of another MPI       one message, rank 0                         2
    options, code or data that differ           what differs, rank 0                        2
    an exit on some ranks alone                 one message                                 2
    ValueError, TypeError, OSError in set-up    one message, rank 0                         2
    too little memory in set-up                 one message that names an option, rank 0    2
    `RunError`, raised by all ranks             one message, rank 0                         1
    any other exception, on any rank or thread  its traceback and its rank; ends all ranks  1
    a rank that is gone, or does not come       one line; where all are; ends all ranks     1
    SIGTERM, SIGUSR1 or SIGHUP, see below       where it goes on, rank 0                    75
    a second SIGTERM                            `terminated`, rank 0; ends all ranks        143
    Ctrl-C                                      `interrupted`, rank 0; ends all ranks       130
    reader of the output gone (`| head`)        nothing; ends all ranks                     1
    ==========================================  ==========================================  ======

    `SystemExit` passes through where all ranks raise it. Under `torchrun` each rank ends with such a status, and
    torchrun itself with 1, after a report of its own.

    SIGTERM, SIGUSR1 and SIGHUP (a closed terminal), to any rank or to all, are noted. During the set-up they end all
    ranks after it, before the run. During the run it is the run that asks for them after each update
    (`RunFolder.update`), writes a checkpoint and raises `Stopped` on all ranks. After its last update a run ends as if
    nothing had been sent. Before `launch` is called, while a program is still being loaded, they end the process as
    they end any other (143, 138 and 129). A second SIGTERM ends the job at once, at any time; two within a fifth of a
    second are one, which a launcher and a batch system have both passed on.

    Parameters
    ----------
    options_class : type
        Frozen dataclass of the driver's options, see `xbraid_py.run.options.parse`.
    setup : callable
        Set-up as above.
    argv : sequence of str, optional
        Words of the command line; those of this process by default.
    presets : mapping, optional
        Small jobs by name, other defaults of some options, as `{"smoke": {"num_layers": 32}}` makes `--smoke`.
    prog, description : str, optional
        Name and purpose of the driver for the help.

    Raises
    ------
    SystemExit
        With the status of the table for what fails in order, 0 after `--help`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is loaded from here on
    guard.leave_to_driver()
    job = _Job()
    job.watch()
    if job.rank > 0:
        warnings.simplefilter("ignore")
    options, run, problem, leaving = None, None, None, None
    try:
        options = parse(options_class, argv, presets=presets, prog=prog, description=description)
    except OptionError as error:
        problem = str(error)
        if not isinstance(error.__cause__, OSError):
            problem += f"\ntry {prog or os.path.basename(sys.argv[0])} --help"
    except SystemExit as exit:  # after --help
        leaving = exit
    if launcher_size() == 1:
        job.part(problem, leaving)
    # A help, or a wrong option, needs nothing of what takes long to load.
    import torch

    from xbraid_py.comm import world
    from xbraid_py.kernels import BACKEND
    from xbraid_py.run.progress import setup_logging

    torch.set_num_threads(1)
    # mpi4py warns of what LaunchError says.
    warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
    patience = getattr(options, "patience", watchdog.PATIENCE)
    leftovers.remove_dead()
    try:
        with job.limited(patience, "MPI has not begun: not all processes of this job have come"):
            comm = world()
    except (RuntimeError, ImportError) as error:
        # LaunchError, or mpi4py finds no MPI library.
        job.part(str(error), leaving)
        raise
    job.join(comm, patience)
    setup_logging(comm)
    job.agree(problem, leaving)
    leftovers.forget_own()
    try:
        same_installation(comm, kernels=BACKEND)
        agree_on_all(comm, {"program": prog or os.path.basename(sys.argv[0])} | flat(to_dict(options)), "options")
    except ValueError as error:
        job.fail(BAD_INPUT, str(error))
    try:
        run = memory.within(setup, options, comm)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        _log.debug("set-up failed", exc_info=True)
        problem = str(error) or type(error).__name__
    except SystemExit as exit:
        leaving = exit
    job.agree(problem, leaving)
    try:
        same_data(comm)
    except ValueError as error:
        job.fail(BAD_INPUT, str(error))
    try:
        if signals.stop_agreed(comm):
            raise signals.Stopped("stopped before the run has begun; start again")
        # What is here now stays: full collections would look through all of it, again and again, in the run.
        gc.collect()
        gc.freeze()
        assert run is not None
        try:
            run()
        finally:
            gc.unfreeze()
        # Here a lost reader is still met by the hook; at the exit of the interpreter it no longer is.
        sys.stdout.flush()
    except RunError as error:
        job.fail(RUN_FAILED, str(error))
    except signals.Stopped as stop:
        job.end(signals.STOPPED, str(stop))
    except SystemExit as exit:
        job.leave(_SOON, f"rank {job.rank} of {comm.size} has left the others by SystemExit({exit.code!r})")
        raise
    job.leave()


class _Job:
    """The ways in which this process, one rank of a job, ends the job."""

    def __init__(self):
        self.comm: Communicator | None = None
        self.rank = launcher_rank()
        self._ending = threading.Lock()
        self._watchdog: watchdog.Watchdog | None = None

    def join(self, comm: Communicator, patience: float) -> None:
        """From here on the other ranks can be reached, and are watched."""
        self.comm = comm
        self.rank = comm.rank
        line = comm.line()
        if line is not None:
            self._watchdog = watchdog.Watchdog(line, patience, self._give_up)

    @contextlib.contextmanager
    def limited(self, seconds: float, message: str) -> Iterator[None]:
        """End this process if what is done within takes longer."""
        timer = threading.Timer(seconds, lambda: self._end(RUN_FAILED, f"rank {self.rank}: {message}"))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def leave(self, seconds: float | None = None, alone: str = "") -> None:
        """Come together with the other ranks before the end; who is not met within some seconds is ended."""
        if self._watchdog is None:
            return
        if seconds is None:
            with self._watchdog.waiting():
                self._watchdog.line.meet(math.inf)
        elif not self._watchdog.line.meet(seconds):
            self._end(BAD_INPUT if alone else RUN_FAILED, alone)
        self._watchdog.stop()
        self._watchdog = None

    def part(self, problem: str | None, leaving: SystemExit | None) -> None:
        """End this process, whatever the others do, if it is leaving or has a problem."""
        if leaving is not None:
            raise leaving
        if problem is not None:
            self.fail(BAD_INPUT, problem)

    def watch(self) -> None:
        """Meet uncaught exceptions of all threads, and Ctrl-C even while MPI waits for a message."""
        sys.excepthook = self._uncaught
        threading.excepthook = lambda failed: self._uncaught(
            failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback
        )
        signal.signal(signal.SIGINT, _interrupt_once)
        signals.install()
        # Python runs its signal handlers between two instructions of the main thread, which may wait in
        # MPI for ever. The number of the signal is written to this socket at once.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._await_signal, args=(reader, writer), daemon=True).start()

    def fail(self, status: int, message: str) -> NoReturn:
        """End in order, all ranks together: rank 0 prints what was wrong."""
        self.end(status, f"error: {message}")

    def end(self, status: int, message: str) -> NoReturn:
        """End in order, all ranks together: rank 0 prints the message."""
        if self.rank == 0:
            say(message)
        # A rank that fails alone, against the rules, would wait for the others for ever.
        signal.alarm(int(_LATE) + 5)
        self.leave(_LATE)
        raise SystemExit(status)

    def agree(self, problem: str | None, leaving: SystemExit | None) -> None:
        """Go on if all ranks do; otherwise end all of them, with the problem of the lowest rank that has one."""
        assert self.comm is not None
        said = self.comm.bcast(self.comm.gather((problem, leaving is not None)))
        failed = [rank for rank, (text, _) in enumerate(said) if text is not None]
        gone = [rank for rank, (_, is_gone) in enumerate(said) if is_gone]
        if failed:
            alone = f"rank {failed[0]} of {self.comm.size}: " if len(failed) < self.comm.size else ""
            self.fail(BAD_INPUT, alone + said[failed[0]][0])
        if len(gone) == self.comm.size:
            self.leave(_LATE)
            assert leaving is not None
            raise leaving
        if gone:
            self.fail(
                BAD_INPUT,
                f"rank {gone[0]} of {self.comm.size} ends here, after --help or --print_config perhaps, and others do "
                f"not; start all ranks with the same words",
            )

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind is SystemExit:
            return
        if kind is KeyboardInterrupt:
            self._interrupted()
        if issubclass(kind, BrokenPipeError):
            self._end(RUN_FAILED, "")
        if self.comm and self.comm.misses_a_rank(error):
            _log.debug("a rank is gone", exc_info=(kind, error, trace))
            last_words("another rank is gone")
            # The launcher has it, and says who it was.
            time.sleep(1.0)
            self._end(RUN_FAILED, f"rank {self.rank} of {self.comm.size}: another rank is gone ({error})")
        text = "".join(traceback.format_exception(kind, error, trace))
        last_words(f"rank {self.rank}: {kind.__name__}: {error}")
        wait_for_rank_0(self.rank)
        self._end(RUN_FAILED, f"rank {self.rank} of {self.comm.size}:\n{text}" if self.comm else text)

    def _give_up(self, text: str) -> None:
        last_words(text.splitlines()[0])
        self._end(RUN_FAILED, f"error: {text}")

    def _interrupted(self) -> NoReturn:
        self._end_by_signal(INTERRUPTED, "interrupted", patience=2.0)

    def _end_by_signal(self, status: int, word: str, patience: float) -> NoReturn:
        last_words(word, state="stopped")
        # Rank 0 speaks for all: the others leave it the time to do so.
        time.sleep(0.0 if self.rank == 0 else patience)
        self._end(status, word if self.rank == 0 else "")

    def _await_signal(self, reader: socket.socket, writer: socket.socket) -> None:
        asked_at = None
        while True:
            number = reader.recv(1)[0]
            if number == signal.SIGINT:
                time.sleep(1.0)  # for the main thread to unwind, if it can
                self._interrupted()
            if number == signal.SIGTERM:
                now = time.monotonic()
                asked_at = now if asked_at is None else asked_at
                if now - asked_at > _TWICE:
                    self._end_by_signal(signals.TERMINATED, "terminated", patience=0.5)

    def _end(self, status: int, text: str) -> NoReturn:
        """End the whole job at once; the first thread to come here does it."""
        self._ending.acquire()
        end_job(self.comm, status, text)


def _interrupt_once(number, frame) -> NoReturn:
    # Launcher and terminal may both send it; one is enough.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
