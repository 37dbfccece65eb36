"""Layers cut in two where it is worth it."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["page", "runs"])
