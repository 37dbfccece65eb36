"""Nested iteration on Indian Pines (paper 001)."""
