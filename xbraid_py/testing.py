"""What tests of layer-parallel programs need: ranks that are threads, and a check of propagators."""

from xbraid_py.comm.threads import run_threads
from xbraid_py.layers.checking import check_propagator

__all__ = ["check_propagator", "run_threads"]
