"""MG/OPT in depth on circles, MNIST and peaks (paper 000)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["page", "runs"])
