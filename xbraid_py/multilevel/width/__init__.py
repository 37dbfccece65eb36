"""Networks of several widths: the full approximation scheme in width."""
