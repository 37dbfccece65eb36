"""The planner: measures a machine, simulates the critical path of an update, predicts and recommends."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
