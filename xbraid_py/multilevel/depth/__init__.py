"""Networks of several depths: nested iteration, adaptive depth, MG/OPT."""
