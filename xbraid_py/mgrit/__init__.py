"""MGRIT with FAS: a multigrid solver for u_{n+1} = Phi(u_n) over all n at once, and what it asks of Phi.

For layers of networks: S. Günther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger, "Layer-Parallel Training of
Deep Residual Neural Networks", SIAM Journal on Mathematics of Data Science 2, 2020; E. C. Cyr, S. Günther, J. B.
Schroder, "Multilevel Initialization for Layer-Parallel Deep Neural Network Training", 2019 ("paper 001" in the code).
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names of the stub beside it
