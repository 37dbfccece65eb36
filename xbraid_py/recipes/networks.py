"""Which recipe made a checkpoint, and the network that is in it."""

from __future__ import annotations

import importlib

from torch import nn

from xbraid_py.run.engine import state_of
from xbraid_py.run.store.read import Checkpoint

# By the names that checkpoints bear: each is a module beside this one with a function network(checkpoint).
RECIPES = {
    "peaks": "classification",
    "indian_pines": "classification",
    "circles": "mgopt",
    "mgopt_mnist": "mgopt",
    "poisson": "width",
    "darcy": "width",
    "images": "images",
    "mnist": "digits",
    "sequences": "sequences",
    "transformer": "text",
    "finetune": "finetune",
    "translate": "translate",
}


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module in evaluation mode, that knows nothing of ranks.

    Raises `CheckpointError` if it is no checkpoint of a run, or holds another network than it says, and `ValueError` if
    its recipe is none of those here.
    """
    name = state_of(checkpoint).get("recipe")
    if name not in RECIPES:
        raise ValueError(
            f"recipe={name!r} of {checkpoint.path} is none of {', '.join(RECIPES)}; use --driver=FILE with the program "
            f"that trained the network"
        )
    recipe = importlib.import_module(f"xbraid_py.recipes.{RECIPES[name]}")
    return recipe.network(checkpoint).eval()
