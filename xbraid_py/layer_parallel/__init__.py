"""Layer-parallel stacks of residual blocks as torch modules, and what a training loop around them needs."""

from xbraid_py.layer_parallel.accuracy import GradientControl, SolveRecord
from xbraid_py.layer_parallel.ends import broadcast_loss, check_replicas, clip_grad_norm_
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.stages import StageParallelResNet, parallel_stages

__all__ = [
    "GradientControl",
    "LayerParallel",
    "PipelineParallel",
    "SolveRecord",
    "StageParallelResNet",
    "broadcast_loss",
    "check_replicas",
    "clip_grad_norm_",
    "parallel_stages",
]
