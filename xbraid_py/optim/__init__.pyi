from .line_search import Armijo as Armijo, FixedStep as FixedStep
from .one_shot import OneShot as OneShot, OneShotOptions as OneShotOptions, Update as Update
from .quasi_newton import QuasiNewton as QuasiNewton
