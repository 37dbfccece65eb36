"""The tables and figures of the four papers beside ours."""
