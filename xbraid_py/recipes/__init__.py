"""The jobs that come with the library: their options, trainings and pictures."""
