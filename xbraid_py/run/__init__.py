"""One engine for every run: its folder, record, checkpoints, signals, screen and options."""
