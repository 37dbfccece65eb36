"""Lesions of trained residual networks (paper 003)."""
