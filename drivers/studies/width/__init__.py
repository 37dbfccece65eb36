"""Multilevel training in width on Poisson and Darcy (paper 002)."""
