"""Multi-level residual networks on images (paper 003)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["outcome", "page", "runs"])
