"""What an error says, for bodies on several ranks."""

from collections.abc import Callable


def refusal(kind: type[Exception], call: Callable, *args, **options) -> str | None:
    """The message of the error of a call, if there is one; over MPI an error that leaves a body ends the job."""
    try:
        call(*args, **options)
    except kind as error:
        return str(error)
    return None
