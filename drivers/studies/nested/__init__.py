"""Nested iteration on peaks (paper 001)."""
