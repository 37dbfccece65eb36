"""Optimizers that know an objective and nothing of how it is computed."""

from xbraid_py.optim.line_search import Armijo, FixedStep
from xbraid_py.optim.one_shot import OneShot, OneShotOptions, Update
from xbraid_py.optim.quasi_newton import QuasiNewton

__all__ = ["Armijo", "FixedStep", "OneShot", "OneShotOptions", "QuasiNewton", "Update"]
