"""Layer-parallel stacks of residual blocks as torch modules, and what a training loop around them needs."""

from xbraid_py.layer_parallel.accuracy import Accuracy, SolveRecord
from xbraid_py.layer_parallel.ends import clip_grad_norm_, share_loss
from xbraid_py.layer_parallel.stack import LayerParallel

__all__ = ["Accuracy", "LayerParallel", "SolveRecord", "clip_grad_norm_", "share_loss"]
