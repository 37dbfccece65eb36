from .agreement import LaunchError as LaunchError, check_launcher as check_launcher, launcher_rank as launcher_rank
from .base import Communicator as Communicator, SerialCommunicator as SerialCommunicator
from .kinds import as_communicator as as_communicator, world as world
from .mpi import MPICommunicator as MPICommunicator
from .replicas import ProcessGrid as ProcessGrid, broadcast_batch as broadcast_batch
