"""The failure of a run that every rank sees."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is the same on every rank.

    NaN in the loss, an exhausted line search, a checkpoint that cannot be written. All ranks raise it
    together, so that `xbraid_py.run.launch` can end the job in order, with one message and exit status 1.
    """
