"""Layer-parallel stacks of residual blocks as torch modules, and what a training loop around them needs."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
