"""Lesions of trained residual networks (paper 003)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, submod_attrs={"lesion": ["measure_all", "read_newest", "read_trained", "write_lesions"]}
)
