"""Training loops over depth on minibatches: the plain one, nested iteration (paper 001), MG/OPT (paper 000)."""
