"""The language model you train on preferences, read as the Q-function that it secretly is."""

__version__ = "0.1.0"
