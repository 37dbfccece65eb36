"""Where a job computes: the option, and the device of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xbraid_py.run.run_options import free

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options of a job that can compute on GPUs.

    Parameters
    ----------
    device
        Where it runs; on several GPUs every rank takes its own.
    """

    device: Literal["cpu", "cuda"] = free("cpu")

    def __post_init__(self):
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be cpu or cuda; use cpu")

    def device_of(self, rank: int) -> torch.device:
        """That of a rank; `ValueError` if PyTorch finds none."""
        import torch

        if self.device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ValueError("device=cuda: PyTorch finds no such device here; use cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())
