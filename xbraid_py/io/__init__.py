"""Files and the screen: checkpoints, the record of a run, and its display."""
