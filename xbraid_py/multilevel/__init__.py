"""Networks of several depths or widths: transfers, nested iteration, multi-level ResNets, MG/OPT, FAS in width."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
