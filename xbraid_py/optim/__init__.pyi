from .line_search import Armijo as Armijo, FixedStep as FixedStep
from .one_shot import OneShot as OneShot, Update as Update
from .options import OneShotOptions as OneShotOptions
from .quasi_newton import QuasiNewton as QuasiNewton
