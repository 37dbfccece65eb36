"""Nested iteration on Indian Pines (paper 001)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["page", "runs"])
