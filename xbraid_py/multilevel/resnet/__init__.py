"""Multi-level residual networks: blocks doubled between cycles of a cosine learning rate."""
