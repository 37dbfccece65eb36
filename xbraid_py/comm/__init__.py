"""Messages between ranks: serial or MPI, tensors on any device. `mpi.py` is the only file that imports mpi4py."""

from xbraid_py.comm.base import Communicator, SerialCommunicator
from xbraid_py.comm.launch import LaunchError, check_launcher, launcher_rank
from xbraid_py.comm.mpi import MPICommunicator, as_communicator, world

__all__ = [
    "Communicator",
    "LaunchError",
    "MPICommunicator",
    "SerialCommunicator",
    "check_launcher",
    "launcher_rank",
    "world",
    "as_communicator",
]
