"""Multi-level residual networks on images (paper 003)."""
