"""The V-cycle of minimization over levels, whatever these are."""
