"""Options of the jobs that come with the library: a help needs them, and nothing that takes long to load."""
