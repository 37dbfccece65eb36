"""Tensors of any device as buffers for MPI: through pinned host memory, or as they are where MPI reads the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

# Numbers that numpy or MPI does not know travel as integers of the same size: only their bits matter.
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}

# What users tell their MPI about device memory: Cray's MPICH; MPICH; Open MPI 4.
_SETTINGS = ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "OMPI_MCA_opal_cuda_support")
_NO = ("0", "false", "no", "off")


def cuda_aware(query: Callable[[], bool], environ=os.environ) -> bool:
    """Whether MPI takes buffers on a CUDA device.

    `XBRAID_CUDA_AWARE=1` or `0` decides, where it is set. Otherwise MPI is asked, unless one of the variables
    by which users switch its support off does so: `MPICH_GPU_SUPPORT_ENABLED` (Cray's MPICH, where 1 also switches
    it on), `MPIR_CVAR_ENABLE_GPU` (MPICH), `OMPI_MCA_opal_cuda_support` (Open MPI 4).

    Parameters
    ----------
    query : callable
        What the MPI library says of itself.

    Raises
    ------
    ValueError
        If `XBRAID_CUDA_AWARE` is neither 0 nor 1.
    """
    ours = environ.get("XBRAID_CUDA_AWARE", "")
    if ours not in ("", "0", "1"):
        raise ValueError(f"XBRAID_CUDA_AWARE={ours} is neither 0 nor 1; use 0 to send through host memory")
    if ours:
        return ours == "1"
    if any(environ.get(name, "").lower() in _NO for name in _SETTINGS):
        return False
    return environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1" or query()


class Staging:
    """How a tensor becomes a buffer that MPI reads or writes.

    Pinned memory comes from torch's allocator of host memory, which keeps blocks for reuse, and holds a
    block back until the events of the asynchronous copies from it have passed: a buffer may be let go
    while its copy to the device is still under way.

    Parameters
    ----------
    direct : bool
        Whether MPI reads and writes the memory of CUDA devices itself.
    """

    def __init__(self, direct: bool = False):
        self.direct = direct

    def is_remote(self, tensor: torch.Tensor) -> bool:
        """Whether the processor cannot read the tensor's memory."""
        return not tensor.is_cpu

    def outgoing(self, tensor: torch.Tensor) -> Any:
        """A buffer with the values of `tensor`, complete; for tensors on the CPU their own memory if contiguous."""
        tensor = tensor.detach()
        if not self.is_remote(tensor):
            return _host_buffer(tensor.contiguous())
        if self.direct and tensor.is_cuda:
            return _DeviceBuffer(tensor.contiguous())
        # This copy waits for what the stream computes, and for itself.
        return _host_buffer(self._host(tensor).copy_(tensor))

    def incoming(self, out: torch.Tensor) -> tuple[Any, Callable[[], torch.Tensor]]:
        """A buffer to receive into, and a function for afterwards that fills `out` and returns it.

        On a device `out` is filled in the order of its current stream, without waiting.
        """
        target = out.detach()
        if self.is_remote(target) and not (self.direct and target.is_cuda):
            landing = self._host(target)
        elif target.is_contiguous():
            landing = target
        else:
            landing = torch.empty_like(target, memory_format=torch.contiguous_format)
        buffer = _DeviceBuffer(landing) if landing.is_cuda else _host_buffer(landing)

        def finish() -> torch.Tensor:
            if landing is not target:
                target.copy_(landing, non_blocking=True)
            return out

        return buffer, finish

    def _host(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _host_buffer(tensor: torch.Tensor):
    # As an array of numpy: what mpi4py does with a tensor itself takes several times as long.
    return _bits(tensor).numpy()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor


class _DeviceBuffer:
    """Memory of a CUDA device for MPI, all work on it done; it need not be torch's current device."""

    def __init__(self, tensor: torch.Tensor):
        torch.cuda.current_stream(tensor.device).synchronize()
        self.tensor = tensor  # keeps the memory alive as long as the message
        self.__cuda_array_interface__ = _bits(tensor).__cuda_array_interface__
