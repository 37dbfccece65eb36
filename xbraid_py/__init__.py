"""Layer-parallel training of deep residual networks.

The layers of a residual network are time steps; `Solver` propagates states and adjoints through all of them at once
by multigrid in time (`MGRIT`), over the ranks of a `Communicator`. `NestedIteration` trains networks of growing depth
with it. See README.md, and `drivers/peaks.py` for a complete program.
"""

import ctypes
import importlib
import os

__version__ = "0.2.0"

# The same bits from a matrix product wherever its operands lie in memory and however many go in one call: without it
# results depend on the partition of the layers. Costs nothing measurable; has to be set before MKL is first used.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 32 << 20  # bytes; glibc accepts no more for its mapping threshold


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MB for the next request.

    A solve frees and asks for the same states again and again. Handed back to the system in between, every one of
    their pages has to be cleared and mapped anew: as much work as a layer. Larger blocks still go back at once. Does
    nothing where the user has chosen by `MALLOC_...` variables, and on other C libraries.

    Returns
    -------
    bool
        Whether it was done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, 8 * _LARGE))


keep_freed_memory()

# The public names and their modules. A name is loaded when it is first asked for: what looks at a run from outside
# needs no torch.
_HOMES = {
    "comm": ("Communicator", "LaunchError", "as_communicator", "world"),
    "comm.agreement": ("RunError",),
    "comm.partition": ("Partition",),
    "comm.replicas": ("ProcessGrid", "broadcast_batch"),
    "layer_parallel": (
        *(
            "GradientControl",
            "LayerParallel",
            "PipelineParallel",
            "SolveRecord",
            "check_replicas",
            "clip_grad_norm_",
            "parallel_stages",
            "broadcast_loss",
        ),
    ),
    "layer_parallel.equation": ("Trajectory", "solve"),
    "layer_parallel.export": ("ResidualStep", "to_sequential"),
    "layer_parallel.minibatch.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "layer_parallel.parallelize": ("parallelize",),
    "layer_parallel.rates": ("GradScaler", "layer_lr", "layer_views", "param_groups"),
    "layer_parallel.refine": ("refine_depth",),
    "layer_parallel.replace": ("replace_modules",),
    "layer_parallel.sequence": ("ParallelGRU", "ParallelLSTM", "SequenceRecord"),
    "layers.checking": ("PropagatorReport", "check_propagator"),
    "layers.dense": ("DenseBlock", "DenseLayer", "ResidualSteps"),
    "layers.image_resnet": ("ImageResNet",),
    "layers.pixels": ("SpatialCoarsening",),
    "layers.steps": ("error_norms", "local_errors", "output_error"),
    "layers.splines": ("Splines",),
    "layers.time_steps": ("TimeStepper",),
    "mgrit": ("MGRIT", "Adjoint", "Forward", "Hierarchy", "LayerGrid", "Propagator", "Solution", "Solver"),
    "multilevel": (
        *("AdaptiveOptions", "MGOpt", "MGOptOptions", "NestedIteration", "NestedOptions", "ResNetTraining"),
        *("ResNetTrainingOptions", "VCycle", "WidthTraining", "WidthTrainingOptions", "prolong_depth"),
    ),
    "multilevel.depth.cycle": ("DepthCycle",),
    "multilevel.resnet.refinement": ("refine",),
    "optim": ("Armijo", "OneShot", "OneShotOptions", "QuasiNewton"),
    "optim.objective": ("Evaluation", "Objective"),
    "planner.stacks": ("Advice", "advise"),
    "problem.network": ("InitialScales", "DenseResNet"),
    "problem.objective": ("NetworkObjective",),
    "problem.problem": ("DenseResNetOptions", "Problem"),
    "problem.regularization": ("Regularization",),
    "run.signals": ("Stopped",),
    "run.store.read": ("CheckpointError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]  # it is in the stub


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'xbraid_py' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"xbraid_py.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
