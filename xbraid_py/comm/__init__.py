"""Messages between ranks: serial, MPI or torch.distributed, tensors on any device; replicas and batches for all ranks.

`mpi.py` is the only file that imports mpi4py.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
