"""Multilevel training in width on Poisson and Darcy (paper 002)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["page", "runs"])
