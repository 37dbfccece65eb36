"""Layers as functions of stacked weights: tensors in, tensors out, no messages."""
