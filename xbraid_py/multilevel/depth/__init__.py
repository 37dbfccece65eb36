"""Networks of several depths: nested iteration, adaptive depth, MG/OPT.

MG/OPT: L. Gaedke-Merzhäuser, A. Kopaničáková, R. Krause, "Multilevel Minimization for Deep Residual Networks", 2020
("paper 000" in the code). Nested iteration: E. C. Cyr, S. Günther, J. B. Schroder, "Multilevel Initialization for
Layer-Parallel Deep Neural Network Training", 2019 ("paper 001"). Adaptive depth is in neither.
"""
