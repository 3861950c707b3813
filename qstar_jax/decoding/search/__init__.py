"""Searches for the responses of highest score: beams, chunks, trees, and exact search."""
