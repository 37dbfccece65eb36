"""Checkpoints as HDF5 files of global arrays."""
