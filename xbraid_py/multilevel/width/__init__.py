"""Networks of several widths: the full approximation scheme in width.

C. Ponce, R. Li, C. Mao, P. Vassilevski, "Multilevel-in-Layer Training for Deep Neural Network Regression", 2022
("paper 002" in the code). What is not as there: neurons are matched by rows of [W, b], not of W, unless `with_bias` is
off; tau is a mean over its minibatches, without the factor N/m of eq. 35; with `alpha_m` 0 no momentum is
sent down either.
"""
