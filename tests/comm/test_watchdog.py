"""The watchdog of a wait, on lines that are queues: who gives up, what it says, and what is no wait."""

import queue
import threading
import time

import pytest

from xbraid_py.comm import watchdog
from xbraid_py.comm.watchdog import Watchdog


class Line:
    """What is sent to a rank is in a queue; `answer` says what the others reply to a question."""

    size = 3

    def __init__(self, rank=0, answer=lambda rank: None):
        self.rank, self.answer = rank, answer
        self.coming, self.sent = queue.SimpleQueue(), []

    def send(self, word, dest):
        self.sent.append((word, dest))
        reply = self.answer(dest) if word == "?" else None
        if reply is not None:
            self.coming.put((dest, reply))

    def poll(self):
        found = []
        while not self.coming.empty():
            found.append(self.coming.get())
        return found


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(watchdog, "_TICK", 0.1)
    made = []

    def watch(line, patience=0.3):
        said = queue.SimpleQueue()
        made.append(Watchdog(line, patience, said.put))
        return said

    yield watch
    watchdog.end()
    for each in made:
        each.stop()


def test_a_wait_that_is_too_long_is_given_up_with_the_states_of_all(watched):
    said = watched(Line(answer={1: "works, in train.py, line 3, step"}.get))
    watchdog.begin((1,))
    lines = said.get(timeout=10).splitlines()
    assert lines[0] == "no message for 0.3 seconds (--patience)"
    assert lines[1].startswith("rank 0: waits for rank 1, in ")
    assert lines[2:] == ["rank 1: works, in train.py, line 3, step", "rank 2: does not answer"]


def test_of_several_that_wait_the_lowest_gives_up(watched):
    line = Line(rank=2, answer=lambda rank: "?" if rank == 1 else None)  # rank 1 asks as well
    said = watched(line)
    watchdog.begin((0, 1, 2))
    with pytest.raises(queue.Empty):
        said.get(timeout=1.5)
    answers = [word for word, dest in line.sent if dest == 1 and word != "?"]
    assert answers and answers[0].startswith("waits for all others, in ")


def test_a_lower_one_that_has_asked_gives_up(watched):
    line = Line(rank=1, answer=lambda rank: "works, in train.py")
    said = watched(line, patience=2.0)
    watchdog.begin((2,))
    until = time.monotonic() + 5.0
    while time.monotonic() < until:  # rank 0 asks again and again, and waits as long as this one
        line.coming.put((0, "?"))
        time.sleep(0.5)
    assert said.empty() and ("?", 0) not in line.sent


def test_one_wait_after_the_other_is_no_long_wait(watched):
    said = watched(Line())
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        watchdog.begin((1,))
        time.sleep(0.02)
        watchdog.end()
    assert said.empty()


def test_a_question_is_answered_while_nothing_is_waited_for(watched):
    line = Line()
    watched(line, patience=60.0)
    line.coming.put((2, "?"))
    until = time.monotonic() + 10
    while not line.sent and time.monotonic() < until:
        time.sleep(0.02)
    (word, dest), *_ = line.sent
    assert dest == 2 and word.startswith("works, in ")


def test_time_in_which_the_whole_process_stood_still_does_not_count(watched, monkeypatch):
    now, lock = [0.0], threading.Lock()

    def monotonic():  # every look is a day after the one before
        with lock:
            now[0] += 86400.0
            return now[0]

    monkeypatch.setattr(watchdog.time, "monotonic", monotonic)
    said = watched(Line(), patience=100.0)
    watchdog.begin((1,))
    with pytest.raises(queue.Empty):
        said.get(timeout=1.0)
