"""Messages between ranks: serial or MPI, tensors on any device; replicas and batches handed to all ranks.

`mpi.py` is the only file that imports mpi4py.
"""

from xbraid_py.comm.agreement import LaunchError, check_launcher, launcher_rank
from xbraid_py.comm.base import Communicator, SerialCommunicator
from xbraid_py.comm.mpi import MPICommunicator, as_communicator, world
from xbraid_py.comm.replicas import ProcessGrid, broadcast_batch

__all__ = [
    "Communicator",
    "LaunchError",
    "MPICommunicator",
    "ProcessGrid",
    "SerialCommunicator",
    "as_communicator",
    "broadcast_batch",
    "check_launcher",
    "launcher_rank",
    "world",
]
