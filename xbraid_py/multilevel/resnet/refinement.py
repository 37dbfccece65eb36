"""Multi-level training of residual networks (paper 003, section 4): the refinement in depth.

Blocks are doubled and the step size is halved: a block is inserted behind each block (figure 5). Within a stage blocks
of one shape are the rows that `prolong_rows` prolongs. A transition has weights of another shape, so nothing can be
copied from it: the block behind it takes those of the block after that (appendix B), and so do its statistics. The
first stage has no transition, and nothing special about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.multilevel.depth.transfer import prolong_rows

Interpolation = Literal["constant", "linear"]


def refine(network: ImageResNet, interpolation: Interpolation = "constant") -> ImageResNet:
    """The network on the refined time grid: twice the blocks in every stage, the step size halved.

    Weights and statistics of normalizations are interpolated. No random number is drawn.

    Parameters
    ----------
    network : ImageResNet
        It is left as it is, and shares nothing with the result.
    interpolation : {"constant", "linear"}
        An inserted block takes the weights of the block before it, as in the paper, or the mean of its neighbors; at
        the end of a stage those of the block before it, behind a transition those of the block after it.

    Returns
    -------
    ImageResNet
        Of the same type, on the same device, in the same mode. Memory formats are not kept: use
        `.to(memory_format=torch.channels_last)` again.

    Raises
    ------
    ValueError
        If the interpolation is neither, if a stage is a transition alone, or if residual modules were left out
        by `with_blocks`.
    """
    if {block.step_size for stage in network.stages for block in stage} != {network.step_size} or 0 in network.blocks:
        raise ValueError(
            "network lacks a transition, or a stage, which with_blocks has left out; use the one it was made from"
        )
    tensors = refined_tensors(network, network.state_dict(), interpolation)
    blocks = tuple(2 * count for count in network.blocks)
    with torch.device("meta"):  # no memory, no random numbers: all tensors are those prolonged
        fine = ImageResNet(**{**network.options(), "blocks": blocks, "step_size": network.step_size / 2})
    fine.load_state_dict(tensors, assign=True)
    return fine.train(network.training)


def refined_tensors(
    network: ImageResNet, tensors: Mapping[str, Tensor], interpolation: Interpolation = "constant"
) -> dict[str, Tensor]:
    """Tensors for the refined network from those for the network: weights, statistics, momentum of an optimizer;
    copies.

    Parameters
    ----------
    network : ImageResNet
        The coarse one.
    tensors : mapping of str to Tensor
        By names as in `network.state_dict()`, all of them or some; what there is for one block of a stage there is for
        all blocks like it. Integers (counts of batches) are not averaged, but copied.
    interpolation : {"constant", "linear"}
        As of `refine`.

    Raises
    ------
    ValueError
        If a name is unknown or missing, if the interpolation is neither, or if a stage is a transition alone.
    """
    for s, stage in enumerate(network.stages):
        if len(stage) == 1 and stage[0].is_transition:
            fits = tuple(max(2, count) for count in network.blocks)
            raise ValueError(
                f"blocks={network.blocks}: stage {s} is a transition alone, which has no block after it whose weights "
                f"the inserted one could take; use {fits}"
            )
    known = network.state_dict().keys()
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise ValueError(f"tensors holds {unknown[0]!r}, which the network does not; use names of its state_dict()")
    found, stages = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("stages."):
            _, s, j, key = name.split(".", 3)
            stages.setdefault((int(s), key), {})[int(j)] = tensor
        else:
            found[name] = tensor.clone()
    for (s, key), column in stages.items():
        prefix = f"stages.{s}."
        missing = [f"{prefix}{j}.{key}" for j in range(network.blocks[s]) if j not in column]
        if missing:
            raise ValueError(f"tensors lacks {missing[0]!r}, but holds the same of other blocks; give all or none")
        first = int(network.stages[s][0].is_transition)
        if first:
            # Appendix B: block 1' is block 1, and block 2' is copied from block 3', the old block 2.
            found[f"{prefix}0.{key}"], found[f"{prefix}1.{key}"] = column[0].clone(), column[1].clone()
        rows = torch.stack([column[j] for j in range(first, len(column))])
        kind = interpolation if rows.is_floating_point() else "constant"
        fine = prolong_rows(rows.reshape(len(rows), -1), kind)
        for k, row in enumerate(fine):
            found[f"{prefix}{2 * first + k}.{key}"] = row.reshape(rows.shape[1:]).clone()
    return found


def perturb(network: ImageResNet, noise: float, random: torch.Generator) -> None:
    """Add noise to the weights of the blocks that `refine` has inserted, so that they are not those of their neighbors.

    Parameters
    ----------
    network : ImageResNet
        As `refine` gave it; it is changed.
    noise : float
        Standard deviation, in units of that of the entries of each matrix or kernel; scales and biases stay.
    random : torch.Generator
        Of the CPU: the noise is the same on every device.
    """
    with torch.no_grad():
        for weight in (p for stage in network.stages for block in stage[1::2] for p in block.parameters()):
            if weight.dim() > 1:
                drawn = torch.randn(weight.shape, generator=random, dtype=torch.float64)
                weight += (noise * weight.std()) * drawn.to(weight)
