"""Residual networks for images, parallel over the blocks of each stage.

Shape letters: `B` images, `N` blocks of a stack.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, together
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.stack import LayerParallel, Recompute
from xbraid_py.layers.image_resnet import ImageResNet, ResidualBlock, check_images
from xbraid_py.mgrit import MGRIT


class StageParallelResNet(nn.Module):
    """An `ImageResNet` whose stages are `LayerParallel` stacks; made by `parallel_stages`.

    The first convolution, the transitions and the head are computed by every rank alike. In each stage the blocks that
    keep the shape form a stack; where the coarsening factor of the solver does not fit their number, those right
    behind the transition are computed by every rank too, as many as are left over.

    Attributes
    ----------
    stem, head : nn.Module
        As in the network.
    stages : nn.ModuleList of nn.ModuleList
        Of each stage the blocks that every rank computes, and behind them the stack, if there are blocks for one.
    stacks : list of LayerParallel
        Those of all stages, each with the `record` of its solves.
    """

    stages: Sequence[Sequence[nn.Module]]

    def __init__(self, network: ImageResNet, stages: list[list[nn.Module]], comm: Communicator):
        super().__init__()
        self.comm, self._options = comm, network.options()
        self.stem, self.head = copy.deepcopy(network.stem), copy.deepcopy(network.head)
        lists = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        self.stages = lists  # pyright: ignore[reportAttributeAccessIssue]  # a sequence of them
        # Of frozen statistics; stacks do not keep them. Those of moving ones are kept like weights.
        state = network.state_dict()
        self._counts = {name: state[name].clone() for name in state if name.endswith("num_batches_tracked")}

    @property
    def stacks(self) -> list[LayerParallel]:
        return [stage[-1] for stage in self.stages if isinstance(stage[-1], LayerParallel)]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W), the same on every rank, to logits (B, num_classes) on every rank.

        Collective. Raises `ValueError` if the images have another shape.
        """
        check_images(images, self._options["in_channels"])
        y = self.stem(images)
        for stage in self.stages:
            for part in stage:
                y = part(y)
        return self.head(y)

    def options(self) -> dict[str, Any]:
        """Those of the network."""
        return dict(self._options)

    def to_network(self) -> ImageResNet:
        """The plain network with the weights as they are now, on every rank; it shares nothing with this one.

        Collective.
        """
        with torch.device("meta"):
            network = ImageResNet(**self._options)
        found = {}
        stacked = {f"stages.{s}.{len(stage) - 1}.layers.": (s, len(stage) - 1) for s, stage in enumerate(self.stages)}
        for name, tensor in self.state_dict().items():
            prefix = next((prefix for prefix in stacked if name.startswith(prefix)), None)
            if prefix is None:
                found[name] = tensor.clone()
                continue
            s, first = stacked[prefix]
            for k, row in enumerate(tensor):
                found[f"stages.{s}.{first + k}.residual.{name.removeprefix(prefix)}"] = row.clone()
        for name, count in self._counts.items():
            found.setdefault(name, count.to(self.stem.weight.device, copy=True))
        network.load_state_dict(found, assign=True)
        return network.train(self.training)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of all weights by their names in the plain network, on every rank; copies.

        Collective. Weights without a gradient are left out.
        """
        found = {}
        inside = {id(p) for stack in self.stacks for p in stack.parameters()}
        for name, p in self.named_parameters():
            if id(p) not in inside and p.grad is not None:
                found[name] = p.grad.detach().clone()
        for s, stage in enumerate(self.stages):
            if isinstance(stage[-1], LayerParallel):
                stack, first = stage[-1], len(stage) - 1
                for key, p in stack.layers.named_parameters():
                    if p.grad is not None:
                        for k, row in enumerate(stack.layers.gathered(p.grad)):
                            found[f"stages.{s}.{first + k}.residual.{key}"] = row.clone()
        return found


def parallel_stages(
    network: ImageResNet,
    comm: Any = None,
    *,
    mgrit: MGRIT | None = None,
    adjoint: MGRIT | None = None,
    accuracy: GradientControl | None = None,
    vmap: bool | None = None,
    recompute: Recompute = False,
) -> StageParallelResNet:
    """The same network, the blocks of each stage shared among the ranks.

    Every rank makes it from the same network, calls it with the same batch, and calls `backward`; the training loop
    is that of a single process. Optimizers of torch update the weights of each block on the rank that owns it.

    Parameters
    ----------
    network : ImageResNet
        Its weights are copied. Normalization is "moving", "group", "frozen" or "none".
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        A serial run without.
    mgrit : MGRIT, optional
        Of the states, in all stages. `MGRIT(max_levels=1)` propagates exactly, rank after rank; so does a stage that is
        too short for a coarse level. `MGRIT(cycle="pipeline")` is exact too, in portions of the images; each stage
        waits for all portions of the one before, which `PipelineParallel` of all blocks does not. The default is that
        of `LayerParallel`.
    adjoint, accuracy, vmap, recompute
        As of `LayerParallel`.

    Returns
    -------
    StageParallelResNet
        In the mode of the network.

    Raises
    ------
    ValueError
        If the network has batch normalization with moving statistics, if residual modules were left out by
        `with_blocks`, or if the ranks do not pass the same network.
    """
    comm = as_communicator(comm)
    with together(comm):
        if network.norm == "batch":
            raise ValueError(
                "network.norm='batch': statistics of the batch would move with every sweep of the solver; use "
                "norm='moving', whose statistics move once per update, norm='group', or norm='frozen'; 'moving' and "
                "'frozen' load the state_dict() of a network with norm='batch'"
            )
        if {block.step_size for stage in network.stages for block in stage} != {
            network.step_size
        } or 0 in network.blocks:
            raise ValueError(
                "network lacks a transition, or a stage, which with_blocks has left out; use the one it was made from"
            )
    what = "network, by its options and a digest of its weights"
    agree(comm, (network.options(), _digest(network)), what, "stage_parallel()")
    options = mgrit or MGRIT()
    stages = []
    for blocks in network.stages:
        leading = _leading(blocks, options)
        stage = [copy.deepcopy(block) for block in blocks[:leading]]
        rest = blocks[leading:]
        if len(rest):
            coarsens = _coarsens(options, len(rest))
            stack = LayerParallel(
                _maker(rest[0]),
                len(rest),
                len(rest) * network.step_size,  # T: all steps of a network have the same h
                comm,
                mgrit=options if coarsens else replace(options, max_levels=1),
                adjoint=adjoint if coarsens else None,
                accuracy=accuracy,
                vmap=vmap,
                recompute=recompute,
            )
            stack.layers.load_state_dict(_rows(rest, stack))
            stage.append(stack)
        stages.append(stage)
    return StageParallelResNet(network, stages, comm).train(network.training)


def _maker(block: ResidualBlock):
    return lambda: copy.deepcopy(block.residual)


def _coarsens(options: MGRIT, count: int) -> bool:
    """Whether a stack of so many blocks has a coarse level."""
    factor = options.cfactor_of(0, count)
    return factor is not None and count % factor == 0 and count // factor >= options.min_coarse


def _leading(blocks: Sequence[ResidualBlock], options: MGRIT) -> int:
    """Blocks that every rank computes: the transition, and the fewest behind it that leave a stack with coarse levels.

    If none do, the stack gets all blocks behind the transition.
    """
    transitions = int(len(blocks) > 0 and blocks[0].is_transition)
    fitting = (first for first in range(transitions, len(blocks)) if _coarsens(options, len(blocks) - first))
    return next(fitting, transitions)


def _rows(blocks: Sequence[ResidualBlock], stack: LayerParallel) -> dict[str, Tensor]:
    """The state of a stack (N, *shape) from its blocks."""
    states = [block.residual.state_dict() for block in blocks]
    names = [column.name for column in stack.layers.block.columns]
    return {name: torch.stack([state[name] for state in states]) for name in names}


def _digest(network: ImageResNet) -> str:
    """The same for the same weights, in all processes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
