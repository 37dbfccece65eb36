from .accuracy import GradientControl as GradientControl, SolveRecord as SolveRecord
from .ends import broadcast_loss as broadcast_loss, check_replicas as check_replicas, clip_grad_norm_ as clip_grad_norm_
from .modules import PipelineParallel as PipelineParallel
from .stack import LayerParallel as LayerParallel
from .stages import StageParallelResNet as StageParallelResNet, parallel_stages as parallel_stages
