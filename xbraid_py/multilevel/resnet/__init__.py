"""Multi-level residual networks: blocks doubled between cycles of a cosine learning rate.

B. Chang, L. Meng, E. Haber, F. Tung, D. Begert, "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018
("paper 003" in the code).
"""
