"""The dense classifier as an objective of its weights."""
