"""The jobs that come with the library: their options, trainings and pictures, and which of them made a checkpoint."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
