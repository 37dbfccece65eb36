"""Messages between ranks: serial, MPI or torch.distributed, tensors on any device; replicas and batches for all ranks.

`mpi.py` is the only file that imports mpi4py.
"""

from xbraid_py.comm.agreement import LaunchError, check_launcher, launcher_rank
from xbraid_py.comm.base import Communicator, SerialCommunicator
from xbraid_py.comm.kinds import as_communicator, world
from xbraid_py.comm.mpi import MPICommunicator
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
