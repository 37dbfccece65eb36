"""MG/OPT in depth on circles, MNIST and peaks (paper 000)."""
