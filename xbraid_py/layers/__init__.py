"""Residual blocks F, and beside them the steps u + h F(u) that the solver takes: tensors in, tensors out."""
