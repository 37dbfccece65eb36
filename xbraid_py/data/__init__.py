"""Data sets: points and features as a `Dataset`, images of digits and of things, texts, and samples of PDEs."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
