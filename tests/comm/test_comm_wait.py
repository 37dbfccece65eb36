"""How ranks wait: asleep where they share cores, and for nobody where there is something else to do."""

import time

import pytest
import torch

from xbraid_py.comm import MPICommunicator
from xbraid_py.comm import mpi as communication
from xbraid_py.comm.partition import Partition


class _Request:
    """Done some time after it was made; counts the questions."""

    def __init__(self, seconds):
        self.until, self.tests, self.waited = time.perf_counter() + seconds, 0, False

    def Test(self):
        self.tests += 1
        return time.perf_counter() >= self.until

    def Wait(self):
        self.waited = True


def communicator(oversubscribed: bool) -> MPICommunicator:
    made = MPICommunicator.__new__(MPICommunicator)  # no MPI needed for how it waits
    made._ranks = (0, 1)
    made.oversubscribed = oversubscribed
    return made


def test_a_rank_that_shares_its_core_sleeps():
    request = _Request(0.2)
    communicator(True).wait(request)
    assert not request.waited and time.perf_counter() >= request.until
    # A nap lasts at least as long as it is asked for, so this bounds the questions whatever the machine does.
    assert request.tests <= communication.PATIENCE + 0.2 / communication.NAP + 1


def test_a_rank_with_a_core_of_its_own_leaves_it_to_mpi():
    request = _Request(0.0)
    communicator(False).wait(request)
    assert request.waited and request.tests == 0


def test_the_same_on_all_ranks_of_a_machine(spmd):
    flags = spmd(lambda comm: getattr(comm, "oversubscribed", None))
    assert len(set(flags)) == 1


@pytest.mark.ranks(2, 3, 5)
def test_messages_arrive_while_ranks_nap(spmd):
    """All kinds of messages, with naps forced on."""

    def body(comm):
        kept = getattr(comm, "oversubscribed", None)
        comm.oversubscribed = True
        try:
            comm.barrier()
            partition = Partition.balanced(comm.size, comm.size)
            row = torch.full((1, 3), float(comm.rank), dtype=torch.float64)
            edge = comm.shift(row, partition, +1)
            joined = comm.allgather(row, partition.counts)
            word = comm.bcast({"from": comm.rank} if comm.rank == 1 else None, 1)
            return None if edge is None else edge[0, 0].item(), joined[:, 0].tolist(), word, comm.gather(comm.rank)
        finally:
            comm.oversubscribed = kept

    parts = spmd(body)
    ranks = list(range(len(parts)))
    assert [part[0] for part in parts] == [None, *map(float, ranks[:-1])]
    assert all(part[1] == ranks and part[2] == {"from": 1} for part in parts)
    assert parts[0][3] == ranks


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("direction", [+1, -1])
def test_a_shift_is_begun_without_waiting(spmd, direction):
    """Two shifts in opposite directions are under way at once, and their ends are asked for in the other order."""

    def body(comm):
        partition = Partition.balanced(comm.size, comm.size)
        ours = torch.full((1, 2), float(comm.rank), dtype=torch.float64)
        ahead = comm.begin_shift(ours, partition, direction)
        back = comm.begin_shift(-ours, partition, -direction)
        found = back(), ahead()
        return [None if edge is None else edge[0, 0].item() for edge in found]

    parts = spmd(body)
    for rank, (back, ahead) in enumerate(parts):
        before, after = rank - direction, rank + direction
        assert ahead == (float(before) if 0 <= before < len(parts) else None)
        assert back == (-float(after) if 0 <= after < len(parts) else None)


def test_errors_that_say_that_a_rank_is_gone():
    MPI = pytest.importorskip("mpi4py.MPI")
    assert communication.is_of_lost_rank(MPI.Exception(MPI.ERR_OTHER))
    assert not communication.is_of_lost_rank(MPI.Exception(MPI.ERR_TRUNCATE))
    assert not communication.is_of_lost_rank(ValueError("no message"))
