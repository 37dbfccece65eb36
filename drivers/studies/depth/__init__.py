"""Training loops over depth on minibatches: the plain one, nested iteration (paper 001), MG/OPT (paper 000)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, ["page", "runs"])
